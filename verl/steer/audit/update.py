# SPDX-License-Identifier: Apache-2.0
"""The entropy audit of an optimiser update: the same tokens' entropies just before and just after it.

Both come from passes without gradient over the same micro-batches. The update's own forward and backward pass is left
alone: parameters, gradients and random numbers are those of a run without the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.steer.audit.one_token import one_token_effects
from verl.steer.audit.scores import (
    AuditRequest,
    covariance_estimate,
    sampled_lengths,
    score_estimates,
    signed_estimates,
    write_table,
    write_tokens,
)
from verl.steer.engine.entropy_control import EntropyControl, weights_of_one
from verl.steer.engine.influence import Influence
from verl.steer.engine.normalizer import gather
from verl.steer.methods.registry import clip_of
from verl.trainer.ppo.core_algos import ppo_clipped, weighs_mini_batches
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric

#: What the engine's passes and updates change in it beside parameters, gradients and the optimizer.
ENGINE_STATE = (
    "running_range", "last_clip_factor", "direction", "head_direction", "mini_batches_since_scheduler_step",
)  # fmt: skip


@dataclass
class Measurements:
    """What is measured of the update of a mini-batch; the tensors are (batch, response_length).

    Args:
        before: statistics before the update, by name.
        true_change: of the entropy, in nats.
        weights: of the loss, 0 on tokens that are not valid; None: 1 on valid ones.
        influence: of the tokens, by the name of the way.
        one_token: effects of single tokens, if they were measured.
    """

    before: dict[str, Tensor]
    true_change: Tensor
    weights: Tensor | None
    influence: dict[str, Influence]
    one_token: Tensor | None


class EntropyAudit(EntropyControl):
    """verl's engine, which audits the updates of mini-batches that request it."""

    #: Saved tokens of the current step, a frame for each mini-batch.
    audited_tokens: list[pd.DataFrame]
    audited_updates: list[dict[str, Any]]
    audited_step: int | None = None

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        """The engine's update; with an `AuditRequest` its metrics include `entropy_audit/...`.

        Args:
            data: one mini-batch of nested tensors; the non-tensor datum `entropy_audit` is an `AuditRequest` or absent.
            loss_function: verl's, with the actor's configuration bound to it.
        """
        request = tu.get_non_tensor_data(data, "entropy_audit", None)
        if request is None:
            return super().train_batch(data, loss_function)
        config = loss_function.keywords["config"]  # type: ignore[attr-defined]
        before = self.token_statistics(data, with_squares=True)
        if self.audited_step != request.step:
            self.audited_step, self.audited_tokens, self.audited_updates = request.step, [], []
        influence: dict[str, Influence] = {}
        effects = None
        options = config.policy_loss
        by_control = None
        if options.entropy_change_estimator == "influence":
            by_control = "influence_head" if options.influence_way == "head" else "influence"
        with self.left_as_it_was():
            if request.influence:
                influence = self._measure_influences(data, loss_function, by_control)
            if request.one_token and not self.audited_updates:
                update = partial(super().train_batch, loss_function=loss_function)
                effects = one_token_effects(self, data, update, request.one_token, self.get_data_parallel_rank())
        tu.assign_non_tensor(data, return_model_output=True)  # among the outputs are the loss's weights
        output = super().train_batch(data, loss_function)
        after = self.token_statistics(data)
        weights = output["model_output"].get("token_weights")
        if weights is not None:
            weights = weights.cpu().to_padded_tensor(0.0)
        if by_control and self.measured is not None:
            influence[by_control] = self.measured
        measured = Measurements(before, after["entropy"] - before["entropy"], weights, influence, effects)
        scores = self._audit(data, config, request, measured)
        named: dict[str, Any] = {f"entropy_audit/{name}": score for name, score in scores.items()}
        output["metrics"] |= Metric.from_dict(named, AggregationType.MEAN)
        return output

    def _measure_influences(
        self, data: TensorDict, loss_function: Callable, by_control: str | None
    ) -> dict[str, Influence]:
        """The tokens' influence by the name of the way: each that the model allows and no control will measure."""
        if weighs_mini_batches(loss_function.keywords["config"].policy_loss):  # type: ignore[attr-defined]
            data["token_weights"] = weights_of_one(data)  # else the loss has none yet
        found = {}
        if by_control != "influence":
            found["influence"] = self.measure_influence(data, loss_function)
        if by_control != "influence_head" and not self.obstacles_to_head_influence():
            found["influence_head"] = self.measure_head_influence(data, loss_function)
        return found

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """Put the engine's state and the random numbers back after measurements that run its passes."""
        kept = {name: getattr(self, name) for name in ENGINE_STATE}
        device = get_device_name()
        with torch.random.fork_rng([] if device == "cpu" else [get_device_id()], device_type=device):
            yield
        vars(self).update(kept)

    def _audit(self, data: TensorDict, config: Any, request: AuditRequest, measured: Measurements) -> dict[str, float]:
        """Score the estimates of a mini-batch over all ranks, and save the update and some of this rank's tokens."""
        inputs = self.estimate_inputs_of(data, measured.before)
        valid, group = inputs.response_mask, self.get_data_parallel_group()
        log_prob, advantages, clip = inputs.log_prob, inputs.advantages, clip_of(config)
        estimates = signed_estimates(inputs, clip)
        means = [self.mean_over_tokens(values[valid]) for values in (log_prob, advantages)]
        estimates["covariance"] = covariance_estimate(log_prob, advantages, *means)
        tokens = {
            "token_id": data["responses"].cpu().to_padded_tensor(0),
            "prob": log_prob.exp(),
            "entropy": measured.before["entropy"],
            "advantage": advantages,
            "ratio": (log_prob - inputs.old_log_prob).exp(),
            **({"clipped": torch.stack(ppo_clipped(inputs, clip)).any(0)} if clip else {}),
            **{f"omega_{name}": estimate for name, estimate in estimates.items()},
            "weight": valid.float() if measured.weights is None else measured.weights,
            "true_change": measured.true_change,
            **{name: influence.contributions for name, influence in measured.influence.items()},
            **({} if measured.one_token is None else {"one_token": measured.one_token}),
        }
        self._save_update(tokens, valid, estimates, measured.influence, request)
        self._save(tokens, valid, request)
        compared = torch.stack([measured.true_change[valid], *(estimate[valid] for estimate in estimates.values())], 1)
        compared = compared[compared.isfinite().all(1)]
        truth, *gathered = gather(compared.flatten(), group).cpu().view(-1, compared.shape[1]).unbind(1)
        return score_estimates(dict(zip(estimates, gathered, strict=True)), truth)

    def _save_update(
        self,
        tokens: dict[str, Tensor],
        valid: Tensor,
        estimates: dict[str, Tensor],
        influences: dict[str, Influence],
        request: AuditRequest,
    ) -> None:
        """Add a row for the update to those of the step, and write all of them: the mean entropy's true change, and
        what each estimator predicts, its tokens weighted as the loss weights them."""
        weights = tokens["weight"]
        row = {
            "step": request.step,
            "mini_batch": len(self.audited_updates),
            "entropy": self.mean_over_tokens(tokens["entropy"][valid]),
            "true_change": self.mean_over_tokens(tokens["true_change"][valid]),
            **{name: self.mean_over_tokens((weights * values)[valid]) for name, values in estimates.items()},
        }
        count = float(self.sum_over_ranks(valid.sum()))
        for name, influence in influences.items():
            tokens_part = count * self.mean_over_tokens((weights * influence.contributions)[valid])
            row |= {name: influence.known + tokens_part, f"{name}_without_momentum": tokens_part}
        self.audited_updates.append(row)
        if self.is_mp_src_rank_with_outputs() and self.get_data_parallel_rank() == 0:
            file = Path(request.folder, f"step_{request.step}_updates.parquet")
            write_table(pd.DataFrame(self.audited_updates), file)

    def _save(self, tokens: dict[str, Tensor], valid: Tensor, request: AuditRequest) -> None:
        """Add some responses' valid tokens to those of the step, and write all of them."""
        mini_batch, saved = len(self.audited_tokens), sum(map(len, self.audited_tokens))
        allowance = request.tokens * (mini_batch + 1) // request.mini_batches - saved
        kept = torch.tensor(sampled_lengths(valid.sum(1).tolist(), allowance, request.tokens))
        # The first so many valid tokens of a response.
        response, position = torch.nonzero(valid & (valid.cumsum(1) <= kept[:, None]), as_tuple=True)
        rank = self.get_data_parallel_rank()
        frame = pd.DataFrame(
            {
                "step": request.step,
                "mini_batch": mini_batch,
                "response": (mini_batch * self.get_data_parallel_size() + rank) * len(valid) + response.numpy(),
                "position": position.numpy(),
            }
            | {name: values[response, position].numpy() for name, values in tokens.items()}
        )
        tokens_alone = [[token] for token in frame["token_id"]]
        # Of no tokens `batch_decode` makes one empty text.
        frame.insert(2, "text", self.model_config.tokenizer.batch_decode(tokens_alone) if tokens_alone else [])
        self.audited_tokens.append(frame)
        if self.is_mp_src_rank_with_outputs():
            write_tokens(pd.concat(self.audited_tokens, ignore_index=True), request, rank)
