# SPDX-License-Identifier: Apache-2.0
"""Measures each token's influence on the mean entropy in verl's FSDP2 engine (verl.trainer.ppo.entropy_influence)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.steer.engine.token_statistics import TokenStatistics, response_statistics
from verl.steer.loss import padded_responses
from verl.trainer.ppo.core_algos import LossInputs, PerToken, agg_loss, clip_ratios
from verl.trainer.ppo.entropy_influence import AdamStep, token_contributions, token_factors
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_

#: Change of the mean entropy, to first order, by the step from the parameters to either side, as a fraction of the mean
#: entropy. A larger one adds the third order, a smaller one the rounding of float32. The norm of u is no measure of the
#: step: parameters without any effect, such as the biases of attention's keys, can be by far the largest parts of u.
ENTROPY_STEP = 0.003

#: The same where the model computes in bfloat16, whose rounding is coarser.
BF16_ENTROPY_STEP = 0.02

#: Longest step, in units of the parameters' norm, where the entropy hardly depends on the parameters.
LONGEST_STEP = 1e-2

TINY = 1e-30

#: Columns that a policy loss reads, each (batch, response_length).
COLUMNS = ("old_log_probs", "advantages", "response_mask")


@dataclass
class Influence:
    """The first-order change of a mini-batch's mean entropy by the next update.

    Args:
        contributions: of this rank's tokens, (batch, response_length), float32, in nats at a weight of 1; 0 on tokens
            that are not valid.
        known: part of the change that no weight influences, in nats: Adam's momentum and weight decay.
        entropy: mean over the valid tokens of all ranks, before the update, in nats.
        valid: this rank's valid tokens.
    """

    contributions: PerToken
    known: float
    entropy: float
    valid: Tensor


@dataclass
class Direction:
    """The direction u of `entropy_influence`, of this rank's part of the parameters.

    Args:
        parts: u of each trained parameter, in the shape of this rank's part of it.
        distance: of a step along it, as `ENTROPY_STEP` and `LONGEST_STEP` define it.
        clip_factor: factor of gradient clipping, at most 1.
        decay_change: change of the mean entropy by weight decay, in nats.
        slope: derivative of the mean entropy along u, in nats; 0 where no token is valid, not finite where a gradient
            is not.
    """

    parts: list[Tensor]
    distance: float
    clip_factor: float
    decay_change: float
    slope: float


class InfluenceEngine(TokenStatistics):
    """verl's engine, which measures the influence of a mini-batch's tokens before their update."""

    direction: Direction | None = None
    mini_batches_since_scheduler_step = 0

    def lr_scheduler_step(self) -> float:
        """verl's, at the end of a training step; the next mini-batch gets a direction of its own."""
        self.mini_batches_since_scheduler_step = 0
        self.direction = None  # as large as the parameters: vLLM needs the memory
        return super().lr_scheduler_step()

    def measure_influence(self, data: TensorDict, loss_function: Callable, refresh: int = 1) -> Influence:
        """The influence of a mini-batch's tokens at the present parameters, which stay as they are.

        Args:
            data: this rank's part of the mini-batch, nested tensors with the columns that the loss reads.
            loss_function: verl's, with the actor's configuration bound to it. Its weights, if it has any, enter the
                preconditioner only.
            refresh: compute the direction anew at the first mini-batch of a training step and every so many after it.
                Where it is kept, the present log-probs and the entropy are means of those a step to either side.
        """
        direction, present = self.direction, None
        if direction is None or self.mini_batches_since_scheduler_step % refresh == 0:
            direction = self.direction = None  # before the gradients that make another one
            direction, present = self._find_direction(data, loss_function)
            # Rejected tokens alone, or an infinite loss, have no direction that would serve other mini-batches.
            if refresh > 1 and 0 < direction.slope < math.inf and direction.clip_factor > 0:
                self.direction = direction
        self.mini_batches_since_scheduler_step += 1
        config = loss_function.keywords["config"]  # type: ignore[attr-defined]
        step = self.adam_step()
        above, below = self._statistics_at(data, direction)
        if present is None:
            present = {name: (above[name] + below[name]) / 2 for name in above}
        inputs = self.loss_inputs_of(data, present["log_probs"])
        factors = token_factors(inputs, clip_ratios(config)) * self.loss_shares(data, config, inputs)
        contributions = token_contributions(
            above["log_probs"], below["log_probs"], 2 * direction.distance, factors,
            step.gradient_scale * direction.clip_factor,
        )  # fmt: skip
        momentum = self._sum(
            -step.momentum_scale * (moment * part).sum()
            for moment, part in zip(self._moments("exp_avg"), direction.parts, strict=True)
            if moment is not None
        )
        entropy = self.mean_over_tokens(present["entropy"][inputs.response_mask])
        return Influence(contributions, momentum + direction.decay_change, entropy, inputs.response_mask)

    def _find_direction(self, data: TensorDict, loss_function: Callable) -> tuple[Direction, dict[str, Tensor]]:
        """Two passes with gradient, of the mean entropy and of the loss; also the tokens' statistics."""
        limit = self.optimizer_config.clip_grad
        entropy_gradients, _, outputs = self._gradients(data, _mean_entropy)
        loss_gradients, norm, _ = self._gradients(data, loss_function, limit)
        step = self.adam_step()
        parts = [
            step.precondition(entropy, loss, second)
            for entropy, loss, second in zip(
                entropy_gradients, loss_gradients, self._moments("exp_avg_sq"), strict=True
            )
        ]
        decay_change = self._sum(
            -step.lr * step.decay * (gradient * _local(parameter)).sum()
            for gradient, parameter in zip(entropy_gradients, self.trained(), strict=True)
        )
        slope = self._sum((gradient * part).sum() for gradient, part in zip(entropy_gradients, parts, strict=True))
        longest = self._norm([_local(p) for p in self.trained()]) / max(self._norm(parts), TINY)
        present = response_statistics(outputs, data)
        mask = data["response_mask"].cpu().to_padded_tensor(0).bool()
        entropy = self.mean_over_tokens(present["entropy"][mask])
        fraction = ENTROPY_STEP if self._autocast_dtype == torch.float32 else BF16_ENTROPY_STEP
        distance = min(max(fraction * entropy, TINY) / max(slope, TINY), LONGEST_STEP * longest)
        return Direction(parts, distance, min(1.0, limit / (norm + 1e-6)), decay_change, slope), present

    def _gradients(
        self, data: TensorDict, loss_function: Callable, clip: float | None = None
    ) -> tuple[list[Tensor], float, dict[str, Tensor]]:
        """This rank's part of a loss's gradient by each trained parameter, its norm if it is clipped, model outputs."""
        copy, norm = data.copy(), 0.0
        valid_tokens = int(self.sum_over_ranks(data["response_mask"].values().sum()))
        of_entropy = clip is None
        calculate_entropy = of_entropy or tu.get_non_tensor_data(data, "calculate_entropy", False)
        flags = {"calculate_entropy": calculate_entropy, "return_model_output": of_entropy, "token_metrics": False}
        tu.assign_non_tensor(copy, **flags, valid_tokens=valid_tokens)
        self.optimizer_zero_grad()
        outputs: Any = self.forward_backward_batch(copy, loss_function)
        if clip is not None:
            norm = float(whole(fsdp2_clip_grad_norm_(self.trained(), clip)))
        gradients = [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in self.trained()]
        self.optimizer_zero_grad()
        return gradients, norm, outputs["model_output"]

    @torch.no_grad()
    def _statistics_at(self, data: TensorDict, direction: Direction) -> list[dict[str, Tensor]]:
        """The tokens' statistics with the parameters moved along the direction, forwards and backwards."""
        parameters = [_local(p) for p in self.trained()]
        kept = [p.clone() for p in parameters]
        in_bfloat16, seed, found = self._autocast_dtype == torch.bfloat16, 0, []
        if in_bfloat16:  # other random numbers for each update and rank, and none of the run's
            seed = self.updates() * torch.distributed.get_world_size() + torch.distributed.get_rank()
        for signed in (direction.distance, -direction.distance):
            generator = torch.Generator(parameters[0].device).manual_seed(seed)  # the same ones in both directions
            for parameter, start, part in zip(parameters, kept, direction.parts, strict=True):
                torch.add(start, part, alpha=signed, out=parameter)
                if in_bfloat16:
                    round_to_bfloat16(parameter, generator)
            found.append(self.token_statistics(data))
        for parameter, start in zip(parameters, kept, strict=True):
            parameter.copy_(start)
        return found

    def loss_inputs_of(self, data: TensorDict, log_prob: PerToken) -> LossInputs:
        """The loss's inputs of this rank's part of a mini-batch, each (batch, response_length), on the CPU."""
        batch = data.select(*COLUMNS, "rollout_is_weights", strict=False).cpu().to_padded_tensor()
        return LossInputs(
            batch["old_log_probs"], log_prob, batch["advantages"], batch["response_mask"].bool(),
            rollout_is_weights=batch.get("rollout_is_weights"),
        )  # fmt: skip

    def estimate_inputs_of(self, data: TensorDict, found: dict[str, Tensor]) -> LossInputs:
        """The inputs of STEER's estimates of this rank's part, each (batch, response_length), on the CPU.

        Args:
            data: the mini-batch.
            found: `token_statistics` of the policy being updated; `exact` needs those with squares.
        """
        # In bypass mode the batch has no entropies of the old policy.
        old = data.select("entropy").cpu().to_padded_tensor() if "entropy" in data else found
        return replace(
            self.loss_inputs_of(data, found["log_probs"]),
            entropys=old["entropy"],
            current_entropys=found["entropy"],
            sum_pi_squared=found.get("sum_pi_squared"),
            sum_pi_squared_log_pi=found.get("sum_pi_squared_log_pi"),
        )

    def loss_shares(self, data: TensorDict, config: Any, inputs: LossInputs) -> PerToken:
        """The share of each token's loss in the mean over all ranks, (batch, response_length)."""
        losses = torch.zeros_like(inputs.log_prob, dtype=torch.float32, requires_grad=True)
        with torch.enable_grad():
            mean = agg_loss(
                losses,
                inputs.response_mask,
                config.loss_agg_mode,
                # verl's count, in which rejected responses still are
                batch_num_tokens=int(self.sum_over_ranks(data["loss_mask"].values().sum())),
                global_batch_size=tu.get_non_tensor_data(data, "global_batch_size", None),
                loss_scale_factor=config.loss_scale_factor,
            )
        return torch.autograd.grad(mean, losses)[0]

    def trained(self) -> list[torch.nn.Parameter]:
        """The trained parameters, which are one group of the optimizer."""
        (group,) = self.optimizer.param_groups
        return [p for p in group["params"] if p.requires_grad]

    def updates(self) -> int:
        """The number of the optimizer's updates so far."""
        return int(max((float(state["step"]) for state in self.optimizer.state.values()), default=0.0))

    def adam_step(self) -> AdamStep:
        """The optimizer's next step."""
        (group,) = self.optimizer.param_groups
        return AdamStep.from_group(group, self.updates() + 1)

    def _moments(self, name: str) -> list[Tensor | None]:
        """This rank's part of a moment of each trained parameter; None before the first step."""
        states = (self.optimizer.state.get(parameter) for parameter in self.trained())
        return [_local(state[name]) if state else None for state in states]

    def _norm(self, parts: list[Tensor]) -> float:
        return self._sum(part.square().sum() for part in parts) ** 0.5

    def _sum(self, terms: Any) -> float:
        """Sum of scalars, each over this rank's part of a parameter, over all parts."""
        total = sum((term.double() for term in terms), torch.zeros((), dtype=torch.float64, device=get_device_id()))
        parameter = self.trained()[0]
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(total, group=parameter.device_mesh.get_group(dimension))
        return float(total)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks; in place if the values are on the engine's device."""
        values = values.to(get_device_id())
        torch.distributed.all_reduce(values, group=self.get_data_parallel_group())
        return values

    def mean_over_tokens(self, values: Tensor) -> float:
        """Mean of (tokens,) over the tokens of all data-parallel ranks."""
        values = values.double()
        sums = self.sum_over_ranks(torch.stack([values.sum(), values.new_tensor(len(values))]))
        return float(sums[0] / sums[1].clamp_min(1))


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> None:
    """Round in place to a neighbouring number of bfloat16, at random so that the mean stays (arXiv 1502.02551).

    The weights of a model saved in bfloat16 lie on its numbers, and a step along u is far shorter than the distance to
    the next one: rounding to the nearest number would undo it.

    Args:
        values: of any shape, float32.
        generator: on the device of the values.
    """
    bits = values.view(torch.int32)  # the upper half of a float32 is a bfloat16
    noise = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits.add_(noise).bitwise_and_(-(1 << 16))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, gradient or moment."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, gradient or moment of all ranks together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mean_entropy(model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict]:
    """A loss in verl's sense: the mean entropy of the valid tokens of a mini-batch on all ranks."""
    mask = data["response_mask"].to_padded_tensor(0)
    entropy = padded_responses({"entropy": model_output["entropy"]}, data, mask.shape[1])["entropy"]
    sizes = {"dp_size": data["dp_size"], "batch_num_tokens": data["valid_tokens"]}
    return agg_loss(entropy, mask, "token-mean", **sizes), {}
