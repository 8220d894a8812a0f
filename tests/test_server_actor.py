# SPDX-License-Identifier: Apache-2.0
"""The actor class forwards all methods of the server, and importing it does not load vLLM."""

import asyncio
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
from verl.steer.cpu.platform import PlatformCPU
from verl.steer.rollout.server_actor import METHODS, VLLMServerActor
from verl.steer.rollout.vllm_batched import BatchedLLMServerClient, BatchedVLLMHttpServer
from verl.workers.rollout.replica import TokenOutput
from vllm.v1.engine.exceptions import EngineDeadError


def test_every_public_method_of_the_server_is_passed_on():
    public = [name for name, _ in inspect.getmembers(BatchedVLLMHttpServer, inspect.isfunction) if name[0] != "_"]
    assert sorted(METHODS) == sorted(public)
    assert all(inspect.iscoroutinefunction(getattr(VLLMServerActor, name)) for name in METHODS)


def test_a_process_with_a_handle_loads_the_actor_without_vllm():
    code = """
import sys
import verl.steer.rollout.server_actor
loaded = [name for name in sys.modules if name.startswith(("vllm.entrypoints", "vllm.engine", "vllm.v1.engine"))]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_spawned_by_the_actor_collects_seldom():
    """As the process of vLLM's engine is: its first collection is not after 700 new objects."""
    code = """
import gc, multiprocessing, sys
from verl.steer.rollout.server_actor import VLLMServerActor
VLLMServerActor()
with multiprocessing.get_context("spawn").Pool(1) as pool:
    threshold, *_ = pool.apply(gc.get_threshold)
assert threshold == 100_000, threshold
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("threads", [None, "1"])
def test_vllm_may_have_fewer_threads_than_the_workers(monkeypatch, threads):
    monkeypatch.delenv("ROLLOUT_OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("ROLLOUT_OMP_NUM_THREADS", threads)
    assert PlatformCPU().rollout_env_vars() == ({"OMP_NUM_THREADS": threads} if threads else {})


def server(*answers):
    """A server that answers its requests so, and raises what is an exception."""
    built, left = object.__new__(BatchedVLLMHttpServer), list(answers)

    async def generate(request_id, prompt_ids, sampling_params):
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    built.generate = generate
    return built


def requests(count):
    return [{"prompt_ids": [1], "sampling_params": {}} for _ in range(count)]


def test_a_request_that_fails_leaves_the_others_their_responses():
    responses = [TokenOutput(token_ids=[token]) for token in (1, 2)]
    batch = server(responses[0], ValueError("the prompt is too long"), responses[1]).generate_batch(requests(3))
    assert asyncio.run(batch) == [responses[0], "ValueError: the prompt is too long", responses[1]]


def test_a_dead_engine_is_no_matter_of_a_request():
    with pytest.raises(EngineDeadError):
        asyncio.run(server(TokenOutput(token_ids=[1]), EngineDeadError()).generate_batch(requests(2)))


class Handle:
    """A Ray handle whose `generate_batch` returns the requests."""

    def __init__(self):
        self.calls, self.generate_batch = [], SimpleNamespace(remote=self._generate_batch)

    async def _generate_batch(self, requests):
        self.calls.append(requests)
        return requests


@pytest.mark.parametrize(("requests", "calls"), [(7, [[0, 1, 2], [3, 4, 5], [6]]), (2, [[0], [1]]), (0, [])])
def test_the_client_gives_each_server_neighbouring_requests(requests, calls):
    servers = [Handle() for _ in range(3)]
    client = BatchedLLMServerClient(config=None, servers=servers)
    assert asyncio.run(client.generate_batch(list(range(requests)))) == list(range(requests))
    assert [call for server in servers for call in server.calls] == calls
