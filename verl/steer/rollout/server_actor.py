# SPDX-License-Identifier: Apache-2.0
"""The actor around `vllm_batched`'s server, which only the actor's own process imports.

Ray imports an actor's class wherever a handle of it is made: in the trainer and in every FSDP worker, which without
this would load vLLM's server too. It also lets the process start before it is known what it serves: it imports vLLM
while the others import what they need.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray
from verl.plugin.platform import get_platform

#: The server's methods that may be called from elsewhere.
METHODS = (
    "abort_all_requests",
    "abort_request",
    "clear_kv_cache",
    "collective_rpc",
    "generate",
    "generate_batch",
    "get_master_address",
    "get_rollout_config",
    "get_server_address",
    "launch_server",
    "open_submission_gate",
    "release_kv_cache",
    "resume_engine_generation",
    "resume_generation",
    "resume_kv_cache",
    "run_headless",
    "run_server",
    "set_global_steps",
    "set_pd_peer",
    "sleep",
    "start_profile",
    "stop_profile",
    "wait_for_requests_to_drain",
    "wake_up",
)


class VLLMServerActor:
    """Passes `METHODS` on to a `BatchedVLLMHttpServer`."""

    def __init__(self) -> None:
        from verl.steer.rollout.vllm_batched import BatchedVLLMHttpServer

        self.server_class = BatchedVLLMHttpServer

    async def construct(self, **arguments: Any) -> None:
        """Make the server, by its constructor's arguments."""
        self.server = self.server_class(**arguments)


def _passed_on(name: str) -> Callable[..., Awaitable[Any]]:
    async def method(self: VLLMServerActor, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.server, name)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return method


for _name in METHODS:
    setattr(VLLMServerActor, _name, _passed_on(_name))


def start_servers(replicas: int) -> list[ray.actor.ActorHandle]:
    """Start the processes of the first servers of this many replicas, and return at once.

    Returns:
        Their handles: a process ends when nobody holds its handle.
    """
    platform = get_platform()
    environment = {**dict.fromkeys(platform.ray_noset_envvars(), "1"), **platform.rollout_env_vars()}
    actor_class = ray.remote(VLLMServerActor)
    return [
        actor_class.options(name=f"vllm_server_{rank}_0", runtime_env={"env_vars": environment}).remote()
        for rank in range(replicas)
    ]


@dataclass
class ServerClass:
    """Stands for the server's actor class where upstream launches one: `cls.options(...).remote(...)`."""

    chosen: dict[str, Any]

    def options(self, **options: Any) -> ServerClass:
        return ServerClass(options)

    def remote(self, **arguments: Any) -> ray.actor.ActorHandle:
        server = ray.remote(VLLMServerActor).options(**self.chosen, get_if_exists=True).remote()
        ray.get(server.construct.remote(**arguments))
        return server
