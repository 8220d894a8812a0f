# SPDX-License-Identifier: Apache-2.0
"""Weight synchronisation into vLLM's CPU build; named by `rollout.engine_kwargs.vllm.worker_extension_cls`."""

from __future__ import annotations

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """Loads received weights layer by layer.

    At start-up vLLM's CPU build packs linear weights for its matrix kernels and drops the originals, so a model's
    `load_weights` has no tensors to write to; `reload_weights` restores each layer, loads it and packs it again.
    """

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = True
    ) -> None:
        """Receive the trainer's weights and load them; see upstream's method of this name."""
        if peft_config and base_sync_done:
            # An adapter leaves the packed base weights alone.
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            return
        cpu = torch.device("cpu")
        weights: dict[str, torch.Tensor] = {}

        def keep(bucket: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            # The tensors are views of a shared buffer that the sender writes the next bucket to.
            weights.update((name, weight.clone()) for name, weight in bucket)

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=cpu, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=keep)
        self.model_runner.reload_weights(weights_iterator=iter(weights.items()))
        # An output layer tied to the embedding receives no weights of its own: pack it again from the new embedding.
        # No other layer: those have dropped their originals, which fails on a CPU with AMX.
        for model, _ in self._iter_all_models_with_config():
            for layer in model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)
