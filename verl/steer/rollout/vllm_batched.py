# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that takes a batch of requests in one Ray call, and its client, for `agent_loop_batched`."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from uuid import uuid4

import ray
from verl.plugin.platform import get_platform
from verl.steer.rollout.server_actor import ServerClass
from verl.workers.rollout.llm_server import LLMServerClient, LLMServerManager
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError


class BatchedVLLMHttpServer(vLLMHttpServer):
    """Upstream's server with one more method."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if get_platform().device_name == "cpu":
            # Asked for by rollout.full_determinism; vLLM has it as Triton kernels, which a CPU hasn't.
            os.environ.pop("VLLM_BATCH_INVARIANT", None)

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput | str]:
        """Responses to `requests`, each the keyword arguments of `generate` but its id, in their order.

        In place of a response there may be the error of its request, as text: an exception might not reach the caller.

        Raises:
            EngineDeadError: if the engine is gone.
        """
        # Upstream would have vLLM build every response, its text too, anew at each token, and reads the last's tokens.
        for request in requests:
            request["sampling_params"] |= {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": False}
        responses = await asyncio.gather(
            *(self.generate(request_id=uuid4().hex, **request) for request in requests), return_exceptions=True
        )
        return [response_or_error(response) for response in responses]


def response_or_error(response: TokenOutput | BaseException) -> TokenOutput | str:
    """A response, or the text of its request's error; an error that is not the request's own is raised."""
    if not isinstance(response, BaseException):
        return response
    if isinstance(response, EngineDeadError) or not isinstance(response, Exception):
        raise response
    return f"{type(response).__name__}: {response}"


class BatchedVLLMReplica(vLLMReplica):
    """Upstream's replica of that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ServerClass({})


class BatchedLLMServerClient(LLMServerClient):
    """Upstream's client, which can also share a batch out among all servers without asking the load balancer.

    Args:
        servers: handles of `VLLMServerActor`.
    """

    def __init__(self, *args: Any, servers: list[ray.actor.ActorHandle], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.servers = servers

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput | str]:
        """One call to each server; neighbours stay together, so that the rollouts of a prompt share its prefix."""
        share = -(-len(requests) // len(self.servers))
        calls = [
            server.generate_batch.remote(requests[start : start + share])
            for server, start in zip(self.servers, range(0, len(requests), share), strict=False)
        ]
        return [output for outputs in await asyncio.gather(*calls) for output in outputs]


class BatchedLLMServerManager(LLMServerManager):
    """Upstream's manager without the load balancer, a process of its own, which that client has no use for."""

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None


def register() -> None:
    """Make `rollout.name=vllm` mean this replica in this process, the one that launches them."""
    RolloutReplicaRegistry.register("vllm", lambda: BatchedVLLMReplica)
