# SPDX-License-Identifier: Apache-2.0
"""The light actor class stands for the whole of the server behind it, and nothing that others import loads vLLM."""

import inspect
import subprocess
import sys

from verl.workers.rollout.vllm_rollout.vllm_batched import BatchedVLLMHttpServer
from verl.workers.rollout.vllm_server_actor import METHODS, VLLMServerActor


def test_every_public_method_of_the_server_is_passed_on():
    public = [name for name, _ in inspect.getmembers(BatchedVLLMHttpServer, inspect.isfunction) if name[0] != "_"]
    assert sorted(METHODS) == sorted(public)
    assert all(inspect.iscoroutinefunction(getattr(VLLMServerActor, name)) for name in METHODS)


def test_a_worker_loads_the_rollout_and_the_actor_without_vllm():
    code = """
import sys
import verl.workers.engine_workers
import verl.workers.rollout.vllm_rollout.vllm_rollout
import verl.workers.rollout.vllm_server_actor
loaded = [name for name in sys.modules if name.startswith(("vllm.entrypoints", "vllm.engine", "vllm.v1.engine"))]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
