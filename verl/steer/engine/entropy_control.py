# SPDX-License-Identifier: Apache-2.0
"""Token weights of a whole mini-batch, found before its update: `entropy_change_estimator=influence`, and the maps
`target` and `band`.

The weights go to the loss as the column `token_weights`. Each rank finds the multiplier or the range from the
contributions of all ranks, so the weights depend neither on micro-batches nor on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.steer.engine.head_influence import HeadInfluenceEngine
from verl.steer.engine.influence import Influence
from verl.steer.engine.normalizer import TokenWeightNormalizer, gather, write_state
from verl.trainer.ppo.core_algos import (
    CONTROL_MAPS,
    PerToken,
    clip_ratios,
    entropy_change_range,
    map_to_token_weights,
    signed_entropy_change,
    weighs_mini_batches,
    weighted_change,
)
from verl.trainer.ppo.entropy_influence import ProportionalIntegral, bounded_weights, solve_multiplier
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.padding import response_to_nested

#: File of the controller's state in an actor's checkpoint.
STATE_FILE = "entropy_control.json"


class EntropyControl(HeadInfluenceEngine, TokenWeightNormalizer):
    """verl's engine, which weights the tokens of mini-batches whose policy loss requests it."""

    integral_of_errors = 0.0
    #: Whether a mini-batch was controlled, in this run or before it resumed.
    controlled = False
    #: Of the last controlled mini-batch, with the estimator `influence`.
    measured: Influence | None = None

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        """The engine's update; a controlled one's metrics include `entropy_control/...`, in nats.

        Args:
            data: one mini-batch of nested tensors; the map `target` reads the non-tensor datum `target_entropy`.
            loss_function: verl's, with the actor's configuration bound to it.
        """
        config: Any = getattr(loss_function, "keywords", {}).get("config")
        if not hasattr(config, "policy_loss") or not weighs_mini_batches(config.policy_loss):
            return super().train_batch(data, loss_function)
        self.controlled, options = True, config.policy_loss
        data["token_weights"] = weights_of_one(data)
        if options.entropy_change_estimator == "influence":
            measure = self.measure_head_influence if options.influence_way == "head" else self.measure_influence
            measured = self.measured = measure(data, loss_function, options.influence_refresh)
        else:
            measured = self._local_estimates(data, config)
        gathered = gather(measured.contributions[measured.valid], self.get_data_parallel_group())
        metrics: dict[str, float] = {}
        if not len(gathered):
            weights = torch.ones_like(measured.contributions)
        elif options.token_weight_map in CONTROL_MAPS:
            target = None
            if options.token_weight_map == "target":
                target = float(tu.get_non_tensor_data(data, "target_entropy", options.target_entropy))
            weights, metrics = self._control(measured, gathered, target, options)
        else:
            weights = _map(measured, gathered, options)
        data["token_weights"] = response_to_nested(weights * measured.valid, data["response_mask"])
        output = super().train_batch(data, loss_function)
        if len(gathered):
            metrics["entropy"] = measured.entropy
        named: dict[str, Any] = {f"entropy_control/{name}": value for name, value in metrics.items()}
        output["metrics"] |= Metric.from_dict(named, AggregationType.MEAN)
        return output

    def _control(
        self, measured: Influence, gathered: Tensor, target: float | None, options: Any
    ) -> tuple[PerToken, dict[str, float]]:
        """Weights of the maps `target` and `band`, and the controller's metrics."""
        low, high = options.token_weight_min, options.token_weight_max
        if options.target_controller == "pi" and target is not None:
            controller = ProportionalIntegral(options.target_kp, options.target_ki, self.integral_of_errors)
            multiplier = controller.multiplier(gathered, target - measured.entropy)
            self.integral_of_errors = controller.total
            weights = bounded_weights(measured.contributions, float(multiplier), low, high)
            return weights, {"target": target, "multiplier": float(multiplier)}
        unweighted = measured.known + float(gathered.double().sum())
        if target is None:
            wanted = min(max(unweighted, -options.entropy_band), options.entropy_band)
        else:
            wanted = options.target_gain * (target - measured.entropy)
        multiplier = torch.zeros(())
        if wanted != unweighted:
            multiplier = solve_multiplier(gathered, wanted - measured.known, low, high)
        weights = bounded_weights(measured.contributions, float(multiplier), low, high)
        weighted = bounded_weights(gathered, multiplier, low, high).double() @ gathered.double()
        predicted = measured.known + float(weighted)
        metrics = {
            "predicted_change": predicted,
            "predicted_change_unweighted": unweighted,
            "known_change": measured.known,
            "wanted_change": wanted,
            "shortfall": abs(wanted - predicted),
        }
        return weights, metrics if target is None else metrics | {"target": target}

    def _local_estimates(self, data: TensorDict, config: Any) -> Influence:
        """STEER's signed estimates in place of contributions; they have no known scale."""
        estimator = config.policy_loss.entropy_change_estimator
        found = self.token_statistics(data, with_squares=estimator == "exact")
        inputs = self.estimate_inputs_of(data, found)
        valid = inputs.response_mask
        change = signed_entropy_change(inputs, estimator, clip_ratios(config)) * valid
        return Influence(change, 0.0, self.mean_over_tokens(found["entropy"][valid]), valid)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the engine's state and the controller's."""
        super().save_checkpoint(local_path, *args, **kwargs)
        state = {"integral_of_errors": self.integral_of_errors, "last_clip_factor": self.last_clip_factor}
        if self.controlled:
            write_state(Path(local_path, STATE_FILE), state)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Load the controller's state, if the checkpoint has one, and the engine's."""
        # The engine may delete files once it has read them.
        file = Path(local_path or "", STATE_FILE)
        if file.is_file():
            self.controlled, state = True, json.loads(file.read_text())
            self.integral_of_errors, self.last_clip_factor = state["integral_of_errors"], state["last_clip_factor"]
        super().load_checkpoint(local_path, *args, **kwargs)


def weights_of_one(data: TensorDict) -> Tensor:
    """A weight of 1 for each token of a mini-batch's responses, nested."""
    mask = data["response_mask"]
    ones = torch.ones_like(mask.values(), dtype=torch.float32)
    return torch.nested.nested_tensor_from_jagged(ones, mask.offsets())


def _map(measured: Influence, gathered: Tensor, options: Any) -> PerToken:
    """STEER's maps on the contributions, in units of their mean magnitude over the mini-batch."""
    unit, mode = gathered.abs().mean().clamp_min(torch.finfo(gathered.dtype).tiny), options.entropy_control_mode
    quantile = options.token_weight_quantile if options.token_weight_map == "threshold" else None
    change_range = entropy_change_range(weighted_change(gathered / unit, mode), torch.ones_like(gathered), quantile)
    return map_to_token_weights(
        weighted_change(measured.contributions / unit.cpu(), mode),
        measured.valid,
        options.token_weight_min,
        options.token_weight_max,
        token_weight_map=options.token_weight_map,
        change_range=change_range._replace(
            **{name: bound.cpu() for name, bound in change_range._asdict().items() if bound is not None}
        ),
    )
