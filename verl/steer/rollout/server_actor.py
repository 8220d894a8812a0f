# SPDX-License-Identifier: Apache-2.0
"""A Ray actor in front of a vLLM server, whose class can be imported without vLLM.

Ray imports an actor's class in every process that gets a handle of the actor, here in each FSDP worker. Besides, this
actor can start before the server's arguments are known, and imports vLLM while the other processes start. Without it,
`BatchedVLLMReplica.server_class` would be `ray.remote(BatchedVLLMHttpServer)`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import ray
from ray.actor import ActorHandle
from verl.plugin.platform import get_platform

#: The server's public methods: Ray needs their names when the actor's class is defined.
METHODS = """
    abort_all_requests abort_request clear_kv_cache collective_rpc generate generate_batch get_master_address
    get_rollout_config get_server_address launch_server open_submission_gate release_kv_cache
    resume_engine_generation resume_generation resume_kv_cache run_headless run_server set_global_steps set_pd_peer
    sleep start_profile stop_profile wait_for_requests_to_drain wake_up
""".split()


class VLLMServerActor:
    """Forwards `METHODS` to the server that `construct` makes."""

    def __init__(self) -> None:
        # Processes that are spawned from here execute this module first, in place of Ray's, which takes longer.
        sys.modules["__main__"].__spec__ = find_spec("verl_steer_gc")
        import verl.workers.rollout.vllm_rollout.vllm_async_server  # noqa: F401

    async def construct(self, server_class: type, arguments: dict[str, Any]) -> None:
        """Make the server."""
        self.server = server_class(**arguments)


def _forward(name: str) -> Callable[..., Awaitable[Any]]:
    async def method(self: VLLMServerActor, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.server, name)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    return method


for _name in METHODS:
    setattr(VLLMServerActor, _name, _forward(_name))


@dataclass
class ServerClass:
    """Stands in for the actor class in `vLLMReplica.launch_servers`, which calls `options(...).remote(...)`."""

    server_class: type
    actor_options: dict[str, Any] = field(default_factory=dict)

    def options(self, **options: Any) -> ServerClass:
        return ServerClass(self.server_class, options)

    def remote(self, **arguments: Any) -> ActorHandle:
        """Start the actor, unless `start_servers` has, and make its server."""
        actor = ray.remote(VLLMServerActor).options(**self.actor_options, get_if_exists=True).remote()
        ray.get(actor.construct.remote(self.server_class, arguments))
        return actor


def start_servers(replicas: int) -> list[ActorHandle]:
    """Start the actor of each replica's first server, by the name that `launch_servers` uses, without waiting for it.

    Returns:
        Their handles: Ray ends an actor to which no handle exists.
    """
    platform = get_platform()
    environment = {**dict.fromkeys(platform.ray_noset_envvars(), "1"), **platform.rollout_env_vars()}
    actor_class = ray.remote(VLLMServerActor)
    return [
        actor_class.options(name=f"vllm_server_{rank}_0", runtime_env={"env_vars": environment}).remote()
        for rank in range(replicas)
    ]
