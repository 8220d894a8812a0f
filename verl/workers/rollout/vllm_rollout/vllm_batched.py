# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that takes a batch of requests in one Ray call, for `agent_loop_batched`."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class BatchedVLLMHttpServer(vLLMHttpServer):
    """Upstream's server, with one more method."""

    async def generate_batch(self, request_ids: list[str], requests: list[dict[str, Any]]) -> list[TokenOutput]:
        """Responses to `requests`, each the keyword arguments of `generate` but its id, in their order."""
        return await asyncio.gather(
            *(self.generate(request_id=i, **request) for i, request in zip(request_ids, requests, strict=True))
        )


class BatchedVLLMReplica(vLLMReplica):
    """Upstream's replica of that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(BatchedVLLMHttpServer)


def register() -> None:
    """Make `rollout.name=vllm` mean this replica in this process, the one that launches them."""
    RolloutReplicaRegistry.register("vllm", lambda: BatchedVLLMReplica)
