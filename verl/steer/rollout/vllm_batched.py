# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that takes a batch of requests in one Ray call, and its client, for `batched_manager`."""

from __future__ import annotations

import asyncio
import math
import os
from typing import Any
from uuid import uuid4

from ray.actor import ActorHandle
from verl.plugin.platform import get_platform
from verl.steer.rollout.server_actor import ServerClass
from verl.workers.rollout.llm_server import LLMServerClient, LLMServerManager
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError


class BatchedVLLMHttpServer(vLLMHttpServer):
    """Upstream's server with `generate_batch`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if get_platform().device_name == "cpu":
            # Upstream sets it for rollout.full_determinism; vLLM implements it in Triton only, which needs a GPU.
            os.environ.pop("VLLM_BATCH_INVARIANT", None)

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput | str]:
        """Generate a response to each request.

        Args:
            requests: keyword arguments of `generate` except `request_id`.

        Returns:
            Of each request, in order, the response or the text of its error: an exception might not be serializable.

        Raises:
            EngineDeadError: if the engine died.
        """
        # By default vLLM builds each response and its text anew at every token, of which upstream reads the last.
        for request in requests:
            request["sampling_params"] |= {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": False}
        calls = [self.generate(request_id=uuid4().hex, **request) for request in requests]
        responses = await asyncio.gather(*calls, return_exceptions=True)
        results: list[TokenOutput | str] = []
        for response in responses:
            if isinstance(response, EngineDeadError | asyncio.CancelledError):
                raise response
            error = f"{type(response).__name__}: {response}"
            results.append(error if isinstance(response, BaseException) else response)
        return results


class BatchedVLLMReplica(vLLMReplica):
    """Upstream's replica of that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ServerClass(BatchedVLLMHttpServer)


class BatchedLLMServerClient(LLMServerClient):
    """Upstream's client, which can also divide a batch among all servers without the load balancer.

    Args:
        servers: handles of `BatchedVLLMHttpServer`.
    """

    def __init__(self, *args: Any, servers: list[ActorHandle], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.servers = servers

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput | str]:
        """One call to each server; neighbours stay together, so that the rollouts of a prompt share its prefix."""
        size = math.ceil(len(requests) / len(self.servers)) or 1
        parts = [requests[start : start + size] for start in range(0, len(requests), size)]
        calls = [server.generate_batch.remote(part) for server, part in zip(self.servers, parts, strict=False)]
        return [response for responses in await asyncio.gather(*calls) for response in responses]


class BatchedLLMServerManager(LLMServerManager):
    """Upstream's manager with that client. It starts no process for a load balancer."""

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None

    def get_client(
        self, client_cls: type[LLMServerClient] | None = BatchedLLMServerClient, **kwargs: Any
    ) -> LLMServerClient:
        """The client of all servers."""
        return super().get_client(client_cls, servers=self.server_handles, **kwargs)


def register() -> None:
    """Register `BatchedVLLMReplica` as `rollout.name=vllm` in this process, which launches the servers."""
    RolloutReplicaRegistry.register("vllm", lambda: BatchedVLLMReplica)
