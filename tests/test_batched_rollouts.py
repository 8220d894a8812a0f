# SPDX-License-Identifier: Apache-2.0
"""Rollouts in shares: what is stored, in which order, what becomes of a share that fails; what a step does without."""

import asyncio
import gc
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from verl.trainer.ppo.v1 import agent_loop_batched, trainer_base
from verl.trainer.ppo.v1.agent_loop_batched import BatchedAgentLoopWorker
from verl.utils import seqlen_balancing
from verl.utils.gc_heap import freeze_gc_heap
from verl.workers.rollout.replica import TokenOutput

PROMPTS, ROLLOUTS = 6, 3


class Queue:
    """What reaches the TransferQueue."""

    def __init__(self):
        self.statuses, self.stored, self.fields = {}, [], {}

    async def async_kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        if fields is None:
            self.statuses |= {key: tag["status"] for key, tag in zip(keys, tags, strict=True)}
            return
        assert partition_id == "train" and all(tag["status"] == "success" for tag in tags)
        self.stored += keys
        for i, key in enumerate(keys):
            self.fields[key] = {name: fields[name][i] for name in ("responses", "rm_scores", "prompts")}


class Servers:
    """Answers a request by its seed and its prompt; earlier shares take longer, one may fail."""

    def __init__(self, failing_prompt=None):
        self.failing_prompt, self.calls, self.seeds = failing_prompt, [], []

    async def generate_batch(self, requests):
        self.calls.append(len(requests))
        await asyncio.sleep(0.05 / len(self.calls))
        if any(request["prompt_ids"][0] == self.failing_prompt for request in requests):
            raise RuntimeError("the server is gone")
        self.seeds += [(request["prompt_ids"][0], request["sampling_params"]["seed"]) for request in requests]
        return [
            TokenOutput(token_ids=[request["prompt_ids"][0], 7], log_probs=None, extra_fields={"global_steps": 4})
            for request in requests
        ]


class Grader:
    """A reward worker's handle: each response's first token is its score."""

    @property
    def compute_score_batch(self):
        async def remote(batch):
            return [
                {"reward_score": float(row[0]), "reward_extra_info": {"acc": float(row[0])}}
                for row in batch.batch["responses"]
            ]

        return SimpleNamespace(remote=remote)


def prompts():
    columns = {
        "raw_prompt": NonTensorStack(*(NonTensorData([{"role": "user", "content": str(i)}]) for i in range(PROMPTS))),
        "uid": NonTensorStack(*(f"uid{i}" for i in range(PROMPTS))),
        "global_steps": NonTensorStack(*([4] * PROMPTS)),
        "extra_info": NonTensorStack(*(NonTensorData({"index": i}) for i in range(PROMPTS))),
    }
    return TensorDict(columns, batch_size=PROMPTS)


@pytest.fixture
def run(monkeypatch):
    def run(together, **servers):
        queue = Queue()
        monkeypatch.setattr(agent_loop_batched.tq, "async_kv_batch_put", queue.async_kv_batch_put)
        monkeypatch.setattr(agent_loop_batched, "ROLLOUTS_TOGETHER", together)
        worker = object.__new__(BatchedAgentLoopWorker)
        worker.rollout_config = SimpleNamespace(
            n=ROLLOUTS, temperature=1.0, top_p=1.0, top_k=-1, calculate_log_probs=False, full_determinism=True, seed=3,
            response_length=5,
        )  # fmt: skip
        worker.background_tasks, worker.reward_loop_worker_handles = set(), [Grader(), Grader()]
        worker.llm_client = Servers(**servers)

        async def initial_tokens(messages):
            return [int(messages[0]["content"]), 9]

        worker.single_turn = SimpleNamespace(ct_build_initial_tokens=initial_tokens)

        async def to_the_end():
            await worker.generate_sequences(prompts())
            assert queue.stored == []
            await asyncio.gather(*worker.background_tasks)

        asyncio.run(to_the_end())
        return queue, worker.llm_client

    return run


KEYS = [f"uid{prompt}_{session}_0" for prompt in range(PROMPTS) for session in range(ROLLOUTS)]


@pytest.mark.parametrize(
    ("together", "calls"), [(100, [18]), (9, [9, 9]), (7, [9, 9]), (5, [6, 6, 6]), (1, [3] * 6), (12, [12, 6])]
)
def test_shares_keep_the_batchs_order(run, together, calls):
    queue, servers = run(together)
    assert servers.calls == calls
    assert queue.stored == KEYS
    assert queue.statuses == {f"uid{i}": "finished" for i in range(PROMPTS)}
    for key, fields in queue.fields.items():
        prompt = int(key[3])
        assert fields["responses"].tolist() == [prompt, 7] and fields["prompts"].tolist() == [prompt, 9]
        assert fields["rm_scores"].tolist() == [0, prompt]


def test_a_rollouts_seed_does_not_depend_on_its_share(run):
    one, many = (sorted(run(together)[1].seeds) for together in (100, 1))
    assert one == many and len({seed for _, seed in one}) == PROMPTS * ROLLOUTS


@pytest.mark.parametrize("failing", [0, 2, 5])
def test_a_share_that_fails_fails_alone(run, failing, caplog):
    queue, _ = run(ROLLOUTS, failing_prompt=failing)
    assert queue.stored == [key for key in KEYS if int(key[3]) != failing]
    assert queue.statuses == {f"uid{i}": "failure" if i == failing else "finished" for i in range(PROMPTS)}
    assert "the server is gone" in caplog.text


@given(st.lists(st.integers(1, 4000), min_size=4, max_size=12), st.sampled_from([1, 2, 4]))
def test_shares_of_a_batch_are_verls(lengths, ranks):
    lengths = lengths[: len(lengths) // ranks * ranks]
    expected = seqlen_balancing.get_seqlen_balanced_partitions(lengths, ranks, equal_size=True)
    assert trainer_base.get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True) == expected


def test_later_collections_pass_over_the_start():
    kept = [[i] for i in range(1000)]
    try:
        freeze_gc_heap()
        assert gc.get_freeze_count() > len(kept)
        young = [obj for generation in range(3) for obj in gc.get_objects(generation)]
        assert not any(obj is kept for obj in young)
    finally:
        gc.unfreeze()
