# SPDX-License-Identifier: Apache-2.0
"""verl's losses of the training workers; a policy loss is given the statistics that it takes, such as `entropys`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from verl.steer.token_metrics import token_metrics
from verl.trainer.ppo.core_algos import clipped_by_loss, estimate_entropy_change, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.padding import no_padding_2_padding

from verl_steer import upstream

_upstream = upstream(globals())

Statistic = Callable[[dict[str, Any], TensorDict], Any]


def _old_entropys(model_output: dict[str, Any], data: TensorDict) -> torch.Tensor | None:
    """The old policy's, computed with the old log-probs; without those, as in bypass mode, the current policy's."""
    if "entropy" in data:
        return data.select("entropy").to_padded_tensor()["entropy"]
    current = _of_the_model("entropy")(model_output, data)
    return None if current is None else current.detach()


def _of_the_model(name: str) -> Statistic:
    """An output of the update's forward pass, cut to the response, or None where the model was not asked for it."""

    def read(model_output: dict[str, Any], data: TensorDict) -> torch.Tensor | None:
        values = model_output.get(name)
        return None if values is None else no_padding_2_padding(values, data)

    return read


def _of_the_mini_batch(name: str) -> Statistic:
    """What the trainer or the engine sent along with the mini-batch, or None."""
    return lambda model_output, data: tu.get_non_tensor_data(data, name, None)


#: What a policy loss may ask for beside upstream's arguments: name of its parameter -> where that comes from.
#: Tensors are (batch, response_length); those of the model are of the policy being updated, with gradient.
STATISTICS: dict[str, Statistic] = {
    "entropys": _old_entropys,
    "current_entropys": _of_the_model("entropy"),
    "sum_pi_squared": _of_the_model("sum_pi_squared"),
    "sum_pi_squared_log_pi": _of_the_model("sum_pi_squared_log_pi"),
    "change_range": _of_the_mini_batch("entropy_change_range"),
    "entropy_coeff": _of_the_mini_batch("entropy_coeff"),
}

_statistics: ContextVar[dict[str, Any]] = ContextVar("statistics")


def _policy_loss_fn(name: str) -> Callable[..., Any]:
    """The registered policy loss, with the statistics of the batch at hand bound to it that it takes."""
    loss_fn = get_policy_loss_fn(name)
    return partial(loss_fn, **_statistics.get()) if statistics_taken(loss_fn) else loss_fn


# `_upstream` is this overlay's own copy of the module: its ppo_loss looks the policy loss up by this name.
_upstream.get_policy_loss_fn = _policy_loss_fn


def statistics_taken(loss_fn: Callable[..., Any]) -> set[str]:
    """Names of the `STATISTICS` that a policy loss has among its parameters."""
    return STATISTICS.keys() & inspect.signature(loss_fn).parameters.keys()


def ppo_loss(
    config: ActorConfig, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Upstream's `ppo_loss`, handing a policy loss the `STATISTICS` that it has among its parameters.

    Args:
        config: the actor's configuration.
        model_output: nested tensors of the forward pass: `log_probs` and, if asked for, `entropy`, `sum_pi_squared`
            and `sum_pi_squared_log_pi`.
        data: one micro-batch of nested tensors; its flag `token_metrics` asks for those of `verl.steer.token_metrics`,
            which STEER's loss has anyway.
        dp_group: the data-parallel process group.

    Returns:
        The loss, a scalar with gradient, and metrics. Metrics that end in `_min` and `_max` are reduced over
        micro-batches and ranks by minimum and maximum.
    """
    taken = statistics_taken(get_policy_loss_fn(config.policy_loss.loss_mode))
    token = _statistics.set({name: STATISTICS[name](model_output, data) for name in taken})
    try:
        loss, metrics = _upstream.ppo_loss(config, model_output, data, dp_group)
    finally:
        _statistics.reset(token)
    if taken:
        for name, metric in metrics.items():
            if isinstance(metric, Metric) and name.endswith(("_min", "_max")):
                metric.aggregation = AggregationType(name[-3:])
    if tu.get_non_tensor_data(data, "token_metrics", False):
        metrics |= Metric.from_dict(_token_metrics(config, model_output, data), AggregationType.MEAN)
    return loss, metrics


@torch.no_grad()
def _token_metrics(config: ActorConfig, model_output: dict[str, Any], data: TensorDict) -> dict[str, torch.Tensor]:
    """Those of a loss other than STEER's: no weights, and the change as the `released` estimator has it."""
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    batch = data.select("advantages", "old_log_probs", "response_mask").to_padded_tensor()
    advantages, old_log_prob = batch["advantages"], batch["old_log_probs"]
    entropys, change = _old_entropys(model_output, data), None
    if entropys is not None:
        change = estimate_entropy_change(advantages, entropys, old_log_prob, log_prob, "released")
    clipped = clipped_by_loss(config, advantages, old_log_prob, log_prob)
    return token_metrics(advantages, old_log_prob, *clipped, batch["response_mask"], change)
