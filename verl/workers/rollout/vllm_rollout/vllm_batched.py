# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that takes a batch of requests in one Ray call, and its client, for `agent_loop_batched`."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import ray
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class BatchedVLLMHttpServer(vLLMHttpServer):
    """Upstream's server, with one more method."""

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput]:
        """Responses to `requests`, each the keyword arguments of `generate` but its id, in their order."""
        return await asyncio.gather(*(self.generate(request_id=uuid4().hex, **request) for request in requests))


class BatchedVLLMReplica(vLLMReplica):
    """Upstream's replica of that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(BatchedVLLMHttpServer)


class BatchedLLMServerClient(LLMServerClient):
    """Upstream's client, which can also share a batch out among all servers without asking the load balancer.

    Args:
        servers: actor handles of `BatchedVLLMHttpServer`.
    """

    def __init__(self, *args: Any, servers: list[ray.actor.ActorHandle], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.servers = servers

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput]:
        """One call to each server; neighbours stay together, so that the rollouts of a prompt share its prefix."""
        share = -(-len(requests) // len(self.servers))
        calls = [
            server.generate_batch.remote(requests[start : start + share])
            for server, start in zip(self.servers, range(0, len(requests), share), strict=False)
        ]
        return [output for outputs in await asyncio.gather(*calls) for output in outputs]


def register() -> None:
    """Make `rollout.name=vllm` mean this replica in this process, the one that launches them."""
    RolloutReplicaRegistry.register("vllm", lambda: BatchedVLLMReplica)
