# SPDX-License-Identifier: Apache-2.0
"""`policy_loss.loss_mode=siren`: an entropy regulariser of few actions and few tokens (SIREN, arXiv 2509.25133)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from verl.steer.methods.registry import policy_loss
from verl.steer.methods.response_quantile import above_response_quantile
from verl.steer.methods.step_state import StepState
from verl.steer.options import option
from verl.trainer.ppo.core_algos import LossInputs, LossOutputs, agg_loss, reweighted_policy_loss

#: Metrics from which the anchor is taken: the regularised entropy of a micro-batch, 0 if no response has such tokens,
#: and 1 if one has them.
PEAK_ENTROPY, PEAK_SHARE = "actor/peak_entropy", "actor/peak_share"


@dataclass
class SirenOptions:
    """Keys below `policy_loss`; the defaults are those of the authors' script.

    Args:
        siren_top_p: probability of the nucleus, the actions whose entropy counts.
        siren_quantile: only tokens above this quantile of their response's entropies count.
        siren_coeff: coefficient of the squared distance to the anchor.
    """

    siren_top_p: float = option(0.8, above=0.0, at_most=1.0)
    siren_quantile: float = option(0.8, at_least=0.0, below=1.0)  # none lies above the largest
    siren_coeff: float = option(0.005, at_least=0.0)


@policy_loss("siren", needs=("nucleus_entropys", "entropy_anchor"))
def compute_policy_loss_siren(inputs: LossInputs, config: Any) -> LossOutputs:
    """PPO's loss plus `siren_coeff` times (H - anchor)^2 of each micro-batch (arXiv 2509.25133).

    H is the mean over responses of the mean entropy of their tokens above the quantile, an entropy being that of the
    nucleus. The anchor is None in the first training step, which has PPO's loss.
    """
    options = config.policy_loss
    entropys = inputs.require("nucleus_entropys", "loss_mode=siren expects trainer.v1.trainer_mode=steer").float()
    outputs = reweighted_policy_loss("vanilla", None, inputs, config)
    peaks = above_response_quantile(entropys.detach(), inputs.response_mask, options.siren_quantile).float()
    counts = peaks.sum(-1)
    responses = (counts > 0).sum()
    entropy = ((entropys * peaks).sum(-1) / counts.clamp_min(1)).sum() / responses.clamp_min(1)
    outputs.metrics |= {PEAK_ENTROPY: entropy.detach(), PEAK_SHARE: (responses > 0).float()}
    if inputs.entropy_anchor is not None:
        distance = (entropy - inputs.entropy_anchor).square() * (responses > 0)
        # Each micro-batch counts by its share of the mini-batch's responses.
        mask = inputs.response_mask.float()
        mean = agg_loss(distance.expand_as(mask), mask, "seq-mean-token-mean", **config.global_batch_info)
        outputs.loss = outputs.loss + options.siren_coeff * mean
    return outputs


@dataclass
class EntropyAnchor(StepState):
    """The entropy that the regulariser holds: H in the updates of the first training step.

    Args:
        top_p: the engine's probability of the nucleus.
        value: the anchor in nats; None before the first step.
    """

    top_p: float
    value: float | None = None

    loss_mode = "siren"
    field = "entropy_anchor"
    reads_target = False

    @classmethod
    def from_options(cls, options: Any) -> EntropyAnchor:
        """From `actor.policy_loss` as a dataclass."""
        return cls(options.siren_top_p)

    @property
    def flags(self) -> dict[str, Any]:
        """The flag with which the engine computes the nucleus's entropies."""
        return {"nucleus_p": self.top_p}

    def step(self, entropy: float) -> float | None:
        """The anchor."""
        return self.value

    def observe(self, metrics: dict[str, Any]) -> None:
        """Set the anchor after the first step with a finite one: the mean over micro-batches with such a response."""
        if self.value is None and metrics[PEAK_SHARE] and math.isfinite(metrics[PEAK_ENTROPY]):
            self.value = float(metrics[PEAK_ENTROPY] / metrics[PEAK_SHARE])
