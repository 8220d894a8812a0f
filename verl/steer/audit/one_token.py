# SPDX-License-Identifier: Apache-2.0
"""The true effect of single tokens on the mean entropy: the same update with one token's loss weighted differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import PerToken
from verl.workers.utils.padding import response_to_nested

#: Weights of the one token; all others have 1.
WEIGHTS = (2.0, 0.0)


def one_token_effects(
    engine: Any, data: TensorDict, update: Callable[[TensorDict], Any], count: int, rank: int
) -> PerToken:
    """Derivative of the mean entropy after an update by the weight of one token's loss, token by token.

    The model, its optimizer and the engine's state are put back after each update, so that both updates begin alike.

    Args:
        engine: this fork's engine.
        data: this rank's part of a mini-batch.
        update: the engine's update of such data; its loss multiplies by `rollout_is_weights`.
        count: number of tokens of rank 0, spread evenly over those whose advantage is not 0; all of these if they are
            fewer.
        rank: data-parallel rank. Other ranks take part in the updates only.

    Returns:
        In nats per unit weight, (batch, response_length); NaN on tokens that are not measured.
    """
    batch = data.select("advantages", "response_mask", "rollout_is_weights", strict=False).cpu().to_padded_tensor()
    valid = batch["response_mask"].bool()
    candidates = torch.nonzero(valid & (batch["advantages"] != 0))
    effects = torch.full(valid.shape, math.nan)
    number = min(count, len(candidates))
    spread = torch.arange(number) * (len(candidates) - 1) // max(number - 1, 1)
    measured = candidates[spread].tolist() if rank == 0 else []
    for index in range(int(engine.sum_over_ranks(torch.tensor(len(measured))))):
        entropies = []
        for weight in WEIGHTS:
            weights = batch["rollout_is_weights"].clone() if "rollout_is_weights" in batch else torch.ones(valid.shape)
            if rank == 0:
                response, position = measured[index]
                weights[response, position] *= weight
            with engine.left_as_it_was(), _restored(engine.optimizer):
                copy = data.copy()
                copy["rollout_is_weights"] = response_to_nested(weights, data["response_mask"])
                update(copy)
                entropies.append(engine.mean_over_tokens(engine.token_statistics(data)["entropy"][valid].double()))
        if rank == 0:
            effects[response, position] = (entropies[0] - entropies[1]) / (WEIGHTS[0] - WEIGHTS[1])
    return effects


@contextmanager
def _restored(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put parameters and the optimizer's state back at the end."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    states: list[dict[str, Tensor]] = [
        {name: value.clone() for name, value in optimizer.state.get(parameter, {}).items()} for parameter in parameters
    ]
    yield
    with torch.no_grad():
        for parameter, value, state in zip(parameters, kept, states, strict=True):
            parameter.copy_(value)
            if not state:
                optimizer.state.pop(parameter, None)
            for name, moment in state.items():
                optimizer.state[parameter][name].copy_(moment)
