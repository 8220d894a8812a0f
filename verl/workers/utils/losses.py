# SPDX-License-Identifier: Apache-2.0
"""verl's losses of the training workers; a policy loss that takes `entropys` is given them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.padding import no_padding_2_padding

from verl_steer import upstream

_upstream = upstream(globals())

_entropys: ContextVar[torch.Tensor | None] = ContextVar("entropys")


def _policy_loss_fn(name: str) -> Callable[..., Any]:
    """The registered policy loss, with the entropies of the batch at hand bound to it if it takes them."""
    loss_fn = get_policy_loss_fn(name)
    return partial(loss_fn, entropys=_entropys.get()) if takes_entropys(loss_fn) else loss_fn


# `_upstream` is this overlay's own copy of the module: its ppo_loss looks the policy loss up by this name.
_upstream.get_policy_loss_fn = _policy_loss_fn


def takes_entropys(loss_fn: Callable[..., Any]) -> bool:
    """Whether a policy loss has the parameter `entropys`."""
    return "entropys" in inspect.signature(loss_fn).parameters


def ppo_loss(
    config: ActorConfig, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Upstream's `ppo_loss`, handing over the entropy of each response token to a policy loss that takes it.

    The entropies are the old policy's, computed together with the old log-probs (`data["entropy"]`). Where the batch
    has none, as in bypass mode, they are the current policy's, which `actor.calculate_entropy` makes the model output.

    Args:
        config: the actor's configuration.
        model_output: nested tensors of the forward pass: `log_probs` and, if asked for, `entropy`.
        data: one micro-batch of nested tensors.
        dp_group: the data-parallel process group.

    Returns:
        The loss, a scalar with gradient, and metrics. Metrics that end in `_min` and `_max` are reduced over
        micro-batches and ranks by minimum and maximum.
    """
    if not takes_entropys(get_policy_loss_fn(config.policy_loss.loss_mode)):
        return _upstream.ppo_loss(config, model_output, data, dp_group)
    token = _entropys.set(_response_entropys(model_output, data))
    try:
        loss, metrics = _upstream.ppo_loss(config, model_output, data, dp_group)
    finally:
        _entropys.reset(token)
    for name, metric in metrics.items():
        if isinstance(metric, Metric) and name.endswith(("_min", "_max")):
            metric.aggregation = AggregationType(name[-3:])
    return loss, metrics


def _response_entropys(model_output: dict[str, Any], data: TensorDict) -> torch.Tensor | None:
    """Entropies (batch, response_length) without gradient: the old policy's, else the current one's, else None."""
    if "entropy" in data:
        return data.select("entropy").to_padded_tensor()["entropy"]
    current = model_output.get("entropy")
    return None if current is None else no_padding_2_padding(current.detach(), data)
