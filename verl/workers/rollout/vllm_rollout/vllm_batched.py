# SPDX-License-Identifier: Apache-2.0
"""A vLLM server that takes a batch of requests in one Ray call, and its client, for `agent_loop_batched`.

The server's process is started before it is known what it serves: it imports vLLM while the training workers import
what they need.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from verl.plugin.platform import get_platform
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind


class BatchedVLLMHttpServer(vLLMHttpServer):
    """Upstream's server, made in two steps, with one more method."""

    def __init__(self) -> None:
        """Nothing yet: by now the process has imported this module."""

    def construct(self, **arguments: Any) -> None:
        """What upstream's constructor does, with its arguments."""
        super().__init__(**arguments)
        if get_platform().device_name == "cpu":
            # Asked for by rollout.full_determinism; vLLM has it as Triton kernels, which a CPU hasn't.
            os.environ.pop("VLLM_BATCH_INVARIANT", None)

    async def generate_batch(self, requests: list[dict[str, Any]]) -> list[TokenOutput]:
        """Responses to `requests`, each the keyword arguments of `generate` but its id, in their order."""
        # Upstream would have vLLM build every response, its text too, anew at each token, and reads the last's tokens.
        for request in requests:
            request["sampling_params"] |= {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": False}
        return await asyncio.gather(*(self.generate(request_id=uuid4().hex, **request) for request in requests))


#: Servers that wait to be constructed, by their actors' names, in the process that launches them.
_started: dict[str, ray.actor.ActorHandle] = {}


def start_servers(replicas: int) -> None:
    """Start the processes of the first servers of this many replicas, and return at once."""
    platform = get_platform()
    environment = {**dict.fromkeys(platform.ray_noset_envvars(), "1"), **platform.rollout_env_vars()}
    for rank in range(replicas):
        name = f"vllm_server_{rank}_0"
        server_class = ray.remote(BatchedVLLMHttpServer)
        _started[name] = server_class.options(name=name, runtime_env={"env_vars": environment}).remote()


@dataclass
class ServerClass:
    """Stands for the server's actor class where upstream launches one: `cls.options(...).remote(...)`."""

    chosen: dict[str, Any]

    def options(self, **options: Any) -> ServerClass:
        return ServerClass(options)

    def remote(self, **arguments: Any) -> ray.actor.ActorHandle:
        server = _started.pop(self.chosen["name"], None)
        if server is None:
            server = ray.remote(BatchedVLLMHttpServer).options(**self.chosen).remote()
        ray.get(server.construct.remote(**arguments))
        return server


class BatchedVLLMReplica(vLLMReplica):
    """Upstream's replica of that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ServerClass({})


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
