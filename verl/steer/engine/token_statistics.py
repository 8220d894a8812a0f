# SPDX-License-Identifier: Apache-2.0
"""Passes without gradient over a mini-batch inside an update, for the entropy audit and the control of the entropy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

#: Flags of these passes that differ from the update's.
FLAGS = {"distillation_use_topk": False, "distillation_only": False, "nucleus_p": None}


class TokenStatistics(FSDPEngineWithLMHead):
    """verl's engine, which computes the current policy's statistics of a mini-batch's tokens."""

    #: Hidden states that the last layer got in the present pass, if they were requested.
    hidden: Tensor | None = None

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The engine's evaluation mode inside its training mode, which is restored afterwards."""
        mode, training = self.mode, self.module.training
        with self.eval_mode(disable_auto_offload=True):
            yield
        self.mode = mode
        self.module.train(training)
        # A forward pass leaves parameters gathered for a backward pass, which does not follow here: the root's, and
        # with `reshard_after_forward=false` those of all layers.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def _hidden_states(self) -> Iterator[None]:
        """Keep the last layer's input in `hidden`, which `prepare_model_outputs` adds to the outputs."""

        def keep(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.hidden = arguments[0]

        handle = self.module.get_output_embeddings().register_forward_pre_hook(keep)
        yield
        handle.remove()
        self.hidden = None

    def token_statistics(
        self, data: TensorDict, with_squares: bool = False, with_hidden: bool = False
    ) -> dict[str, Tensor]:
        """The current policy's statistics of the response tokens, each (batch, response_length).

        Args:
            data: a mini-batch of nested tensors.
            with_squares: whether to compute the sums over the vocabulary as well.
            with_hidden: whether to return the last layer's input as well.

        Returns:
            `log_probs` and `entropy` and, if requested, `sum_pi_squared` and `sum_pi_squared_log_pi`, and `hidden`,
            (batch, response_length, hidden size), on the CPU.
        """
        copy = data.copy()
        tu.assign_non_tensor(copy, **FLAGS, calculate_entropy=True, calculate_sum_pi_squared=with_squares)
        with self._inference(), self._hidden_states() if with_hidden else nullcontext():
            outputs = self.infer_batch(copy)["model_output"]
        return response_statistics(outputs, data)


def response_statistics(outputs: Mapping[str, Tensor], data: TensorDict) -> dict[str, Tensor]:
    """Outputs of a model for a mini-batch's tokens, nested, as padded ones of the responses, on the CPU."""
    responses = data.select("prompts", "responses").cpu()
    return {name: no_padding_2_padding(values.cpu(), responses) for name, values in outputs.items()}
