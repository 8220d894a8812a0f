# SPDX-License-Identifier: Apache-2.0
"""Each token's influence on the mean entropy through the last layer alone, in closed form.

With hidden states h_t, logits z_t = W h_t / temperature and probabilities pi_t, the gradients by the last layer's
weight W are sums of outer products: of the mean entropy sum_t (dH_t / dz_t) h_t^T / N with dH / dz = -pi (ln pi + H),
and of ln pi_j (e_a - pi_j) h_j^T. With u as in `entropy_influence`, restricted to W, token j's derivative along u is
(e_a - pi_j)^T u h_j. No pass through the layers below is needed but the one that yields the hidden states; the part of
the influence that goes through these layers, usually the larger one, is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.steer.engine.influence import Influence, InfluenceEngine, whole
from verl.trainer.ppo.core_algos import clip_ratios
from verl.trainer.ppo.entropy_influence import token_factors
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

#: Keys of a model's configuration with which its logits are not the last layer's output alone.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")

#: Logits computed at a time on a CPU and on a GPU, so that memory grows with neither the vocabulary nor the mini-batch.
LOGITS_AT_A_TIME, GPU_LOGITS_AT_A_TIME = 2**24, 2**26


@dataclass
class HeadDirection:
    """u of the last layer, (vocabulary, hidden size), the same on all ranks.

    Args:
        values: u.
        decay_change: change of the mean entropy by weight decay of the last layer, in nats.
    """

    values: Tensor
    decay_change: float


class _Tokens(NamedTuple):
    """Valid tokens of this rank: hidden states (tokens, hidden size) and one value each of the others."""

    hidden: Tensor
    label: Tensor
    factor: Tensor
    temperature: Tensor

    def chunks(self, vocabulary: int) -> Iterator[_Tokens]:
        size = max(1, (LOGITS_AT_A_TIME if self.hidden.is_cpu else GPU_LOGITS_AT_A_TIME) // vocabulary)
        for parts in zip(*(values.split(size) for values in self), strict=True):
            yield _Tokens(*parts)


class HeadInfluenceEngine(InfluenceEngine):
    """verl's engine, which measures the influence through the last layer."""

    head_direction: HeadDirection | None = None
    #: Factor of gradient clipping in the last update; that of the next one is not known before its backward pass.
    last_clip_factor = 1.0

    def lr_scheduler_step(self) -> float:
        """As `InfluenceEngine`'s."""
        self.head_direction = None
        return super().lr_scheduler_step()

    def optimizer_step(self) -> float:
        """verl's; keeps the factor of gradient clipping."""
        norm = super().optimizer_step()
        if math.isfinite(norm):  # else verl leaves the update out
            self.last_clip_factor = min(1.0, self.optimizer_config.clip_grad / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def measure_head_influence(self, data: TensorDict, loss_function: Callable, refresh: int = 1) -> Influence:
        """As `measure_influence`, through the last layer alone."""
        config = loss_function.keywords["config"]  # type: ignore[attr-defined]
        found = self.token_statistics(data, with_hidden=True)
        inputs = self.loss_inputs_of(data, found["log_probs"])
        shares = self.loss_shares(data, config, inputs)
        valid, device = inputs.response_mask, get_device_id()
        factors = token_factors(inputs, clip_ratios(config)) * shares
        tokens = _Tokens(
            found["hidden"][valid].to(device).float(),
            data["responses"].cpu().to_padded_tensor(0)[valid].to(device),
            factors[valid].to(device),
            _temperatures(data, valid).to(device),
        )
        head = self._head_weight()
        weight, step, state = whole(head.detach()).float(), self.adam_step(), self.optimizer.state.get(head, {})
        direction = self.head_direction
        if direction is None or self.mini_batches_since_scheduler_step % refresh == 0:
            direction = self.head_direction = None
            count = int(self.sum_over_ranks(valid.sum()))
            entropy_gradient, loss_gradient = self._head_gradients(tokens, weight, count)
            second = whole(state["exp_avg_sq"]) if state else None
            u = step.precondition(entropy_gradient, loss_gradient * self.last_clip_factor, second)
            decay = -step.lr * step.decay * float((entropy_gradient * weight).sum())
            direction = HeadDirection(u, decay)
            if refresh > 1 and count and bool(u.isfinite().all()):  # one that serves other mini-batches
                self.head_direction = direction
        self.mini_batches_since_scheduler_step += 1
        u = direction.values
        slopes = torch.cat([_slopes(chunk, weight, u) for chunk in tokens.chunks(len(weight))])
        contributions = torch.zeros(valid.shape)
        contributions[valid] = (slopes * tokens.factor * step.gradient_scale * self.last_clip_factor).cpu()
        momentum = -step.momentum_scale * float((whole(state["exp_avg"]) * u).sum()) if state else 0.0
        entropy = self.mean_over_tokens(found["entropy"][valid])
        return Influence(contributions, momentum + direction.decay_change, entropy, valid)

    def obstacles_to_head_influence(self) -> list[str]:
        """What a model has whose logits are not W h with a trained weight W of the last layer on the device."""
        head, config = self.module.get_output_embeddings(), self.module.config
        found = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1.0)]
        found += ["a bias of the last layer"] if getattr(head, "bias", None) is not None else []
        found += [] if head.weight.requires_grad else ["a last layer that is not trained"]
        found += ["actor.fsdp_config.offload_policy=true"] if self.engine_config.offload_policy else []
        return found

    def _head_weight(self) -> torch.nn.Parameter:
        """The weight W of the last layer.

        Raises:
            ValueError: if the logits are not W h with a trained W.
        """
        if obstacles := self.obstacles_to_head_influence():
            raise ValueError(
                f"policy_loss.influence_way=head: expected parameters with {self.module.config.model_type}, which has "
                f"{', '.join(obstacles)}"
            )
        return self.module.get_output_embeddings().weight

    def _head_gradients(self, tokens: _Tokens, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Gradients of the mean entropy and of the loss by the last layer's weight, over all ranks."""
        entropy_gradient, loss_gradient = torch.zeros_like(weight), torch.zeros_like(weight)
        for chunk in tokens.chunks(len(weight)):
            log_prob = _log_probs(chunk, weight)
            prob = log_prob.exp()
            entropy = -(prob * log_prob).sum(-1, keepdim=True)
            hidden = chunk.hidden / chunk.temperature[:, None]
            by_logit = -prob * (log_prob + entropy) / count
            entropy_gradient.addmm_(by_logit.T, hidden)
            by_logit = prob * chunk.factor[:, None]
            by_logit[torch.arange(len(by_logit), device=by_logit.device), chunk.label] -= chunk.factor
            loss_gradient.addmm_(by_logit.T, hidden)
        return self.sum_over_ranks(entropy_gradient), self.sum_over_ranks(loss_gradient)


def _log_probs(tokens: _Tokens, weight: Tensor) -> Tensor:
    return (tokens.hidden @ weight.T / tokens.temperature[:, None]).log_softmax(-1)


def _slopes(tokens: _Tokens, weight: Tensor, u: Tensor) -> Tensor:
    """Derivative of each token's log-prob along u, (tokens,)."""
    along = tokens.hidden @ u.T / tokens.temperature[:, None]
    sampled = along.gather(-1, tokens.label[:, None]).squeeze(-1)
    return sampled - (_log_probs(tokens, weight).exp() * along).sum(-1)


def _temperatures(data: TensorDict, valid: Tensor) -> Tensor:
    """The sampling temperature of each valid token, (tokens,)."""
    temperature: Any = tu.get(data, "temperature")
    rows = torch.as_tensor(temperature, dtype=torch.float32).cpu().expand(len(valid))
    return rows[:, None].expand(valid.shape)[valid]
