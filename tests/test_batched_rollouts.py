# SPDX-License-Identifier: Apache-2.0
"""Batched rollouts: what is stored and in which order, which rollouts are lost, which errors end a run; the trainer."""

import asyncio
import gc
import itertools
import os
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, RayTaskError
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from transfer_queue import KVBatchMeta
from verl.steer import trainer as trainer_steer
from verl.steer.audit.scores import AuditOptions
from verl.steer.gc_heap import freeze_gc_heap
from verl.steer.replacements import balanced_partitions
from verl.steer.rollout import batched_manager
from verl.steer.rollout.batched_manager import BatchedAgentLoopManager
from verl.steer.rollout.checks import BATCHED_MANAGER, check_rollouts
from verl.steer.rollout.lost_rollouts import LOST_IN_TRAINING, lost_rollouts
from verl.steer.rollout.wait import RolloutsFailed, RolloutWait
from verl.steer.trainer import SteerTrainer
from verl.trainer.ppo import padding_utils
from verl.trainer.ppo.v1 import replay_buffer, trainer_base
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import seqlen_balancing
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

import verl_steer_gc

PROMPTS, ROLLOUTS = 6, 3


class Queue:
    """A TransferQueue without Ray: rows and tags by key. A write whose tags have the status `refused` fails."""

    def __init__(self, refused=None):
        self.statuses, self.rows, self.tags, self.refused = {}, {}, {}, refused

    @property
    def stored(self):
        return list(self.rows)

    async def async_kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        if self.refused in [tag["status"] for tag in tags]:
            raise TimeoutError("no answer from the storage")
        if fields is None:
            self.statuses |= {key: tag["status"] for key, tag in zip(keys, tags, strict=True)}
            return
        assert partition_id == "train" and all(tag["status"] == "success" for tag in tags)
        self.kv_batch_put(keys, partition_id, fields, tags)

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None):
        if fields is None:  # the trainer's, of prompts that it submits
            return None
        for i, key in enumerate(keys):
            row = {name: fields[name][i] for name in fields.keys()}
            self.rows.setdefault(key, {}).update(
                {name: value.data if isinstance(value, NonTensorData) else value for name, value in row.items()}
            )
        if tags:
            self.tags |= dict(zip(keys, tags, strict=True))
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=[self.tags[key] for key in keys])

    def kv_batch_get(self, keys, partition_id, select_fields=None):
        if select_fields is None:
            return [self.rows[key] for key in keys]
        names = [name for name in select_fields if all(name in self.rows[key] for key in keys)]
        batch = list_of_dict_to_tensordict([{name: self.rows[key][name] for name in names} for key in keys])
        # The real queue's columns are jagged, whatever the rows' lengths.
        return TensorDict(
            {
                name: torch.nested.as_nested_tensor(list(column), layout=torch.jagged)
                if isinstance(column, torch.Tensor)
                else column
                for name, column in batch.items()
            },
            batch_size=len(keys),
        )


class Servers:
    """Answers a request by its prompt and its number within the prompt; earlier chunks take longer.

    Args:
        answers: (prompt, number) -> what is answered in place of a response.
        error: raised by every call with a request for prompt 0.
    """

    def __init__(self, answers=None, error=None):
        self.answers, self.error, self.calls, self.seeds, self.params = answers or {}, error, [], [], []

    async def generate_batch(self, requests):
        self.calls.append(len(requests))
        await asyncio.sleep(0.05 / len(self.calls))
        if self.error and any(request["prompt_ids"][0] == 0 for request in requests):
            raise self.error
        self.seeds += [(request["prompt_ids"][0], request["sampling_params"].get("seed")) for request in requests]
        self.params += [request["sampling_params"] for request in requests]
        place, responses = Counter(), []
        for request in requests:
            prompt = request["prompt_ids"][0]
            response = TokenOutput(token_ids=[prompt, 7], log_probs=[-0.5, -1.5], extra_fields={"global_steps": 4})
            responses.append(self.answers.get((prompt, place[prompt]), response))
            place[prompt] += 1
        return responses


EMPTY = TokenOutput(token_ids=[], stop_reason="aborted", extra_fields={"global_steps": 4})


class Grader:
    """A reward worker's handle, whose method is `remote` too: a response's first token is its score.

    Args:
        grades: (prompt, number of the rollout) -> a score in place of that, or an exception that the grading raises.
    """

    def __init__(self, grades=None):
        self.grades, self.calls = grades or {}, Counter()
        self.compute_score_batch = SimpleNamespace(remote=self._all)
        self.compute_score = SimpleNamespace(remote=self._one)

    def _grade(self, batch, i):
        prompt, session = int(batch.batch["responses"][i, 0]), int(batch.non_tensor_batch["session_id"][i])
        score = self.grades.get((prompt, session), float(prompt))
        if isinstance(score, ActorDiedError):
            raise score
        if isinstance(score, Exception):
            raise RayTaskError("compute_score", "a remote traceback", score).as_instanceof_cause()
        return {"reward_score": score, "reward_extra_info": {"acc": score}}

    async def _all(self, batch):
        self.calls["batch"] += 1
        return [self._grade(batch, i) for i in range(len(batch))]

    async def _one(self, batch):
        assert len(batch) == 1
        self.calls["one"] += 1
        return self._grade(batch, 0)


def prompts(**columns):
    columns = {
        "raw_prompt": NonTensorStack(*(NonTensorData([{"role": "user", "content": str(i)}]) for i in range(PROMPTS))),
        "uid": NonTensorStack(*(f"uid{i}" for i in range(PROMPTS))),
        "global_steps": NonTensorStack(*([4] * PROMPTS)),
        "extra_info": NonTensorStack(*(NonTensorData({"index": i}) for i in range(PROMPTS))),
    } | columns
    return TensorDict(columns, batch_size=PROMPTS)


async def to_the_end(manager, batch):
    """Generate for a batch and wait until it is done or has failed."""
    manager.event_loop = asyncio.get_running_loop()
    manager.generate_sequences(batch)
    assert not any(batch.done() for batch in manager.batches) and len(manager.batches) == 1
    await asyncio.gather(*map(asyncio.wrap_future, manager.batches), return_exceptions=True)
    assert not manager.batches


@pytest.fixture
def run(monkeypatch):
    """Generates for a batch to its end; returns the TransferQueue and the manager."""

    def run(chunk_size=100, batch=None, grades=None, refused=None, untokenizable=None, length=5, **servers):
        queue = Queue(refused)
        monkeypatch.setattr(batched_manager.tq, "async_kv_batch_put", queue.async_kv_batch_put)
        monkeypatch.setattr(batched_manager, "CHUNK_SIZE", chunk_size)
        manager = object.__new__(BatchedAgentLoopManager)
        manager.rollout_config = SimpleNamespace(
            n=ROLLOUTS, temperature=1.0, top_p=0.9, top_k=20, calculate_log_probs=True, full_determinism=True, seed=3,
            response_length=length, val_kwargs=SimpleNamespace(n=2, temperature=0.6, top_p=0.7, top_k=-1),
        )  # fmt: skip
        manager.batches, manager.failure, manager.batch_done = set(), None, threading.Event()
        manager.submitted = Counter()
        manager.reward_loop_worker_handles = [Grader(grades), Grader(grades)]
        manager.llm_client = Servers(**servers)

        async def initial_tokens(messages):
            if messages[0]["content"] == untokenizable:
                raise TypeError("the template wants a list")
            return [int(messages[0]["content"]), 9]

        manager.single_turn = SimpleNamespace(ct_build_initial_tokens=initial_tokens)
        asyncio.run(to_the_end(manager, prompts() if batch is None else batch))
        return queue, manager

    return run


KEYS = [f"uid{prompt}_{session}_0" for prompt in range(PROMPTS) for session in range(ROLLOUTS)]


@pytest.mark.parametrize(
    ("chunk_size", "calls"), [(100, [18]), (9, [9, 9]), (7, [9, 9]), (5, [6, 6, 6]), (1, [3] * 6), (12, [12, 6])]
)
def test_chunks_keep_the_batchs_order(run, chunk_size, calls):
    queue, manager = run(chunk_size)
    assert manager.llm_client.calls == calls
    assert queue.stored == KEYS and manager.failure is None
    assert queue.statuses == {f"uid{i}": "finished" for i in range(PROMPTS)}
    for key, fields in queue.rows.items():
        prompt = int(key[3])
        assert fields["responses"].tolist() == [prompt, 7] and fields["prompts"].tolist() == [prompt, 9]
        assert fields["rm_scores"].tolist() == [0, prompt]
    # As long as none raises, a reward worker is called once for a chunk.
    assert all(grader.calls == {"batch": len(calls)} for grader in manager.reward_loop_worker_handles)


def test_a_rollouts_seed_does_not_depend_on_its_chunk(run):
    one, many = (sorted(run(chunk_size)[1].llm_client.seeds) for chunk_size in (100, 1))
    assert one == many and len({seed for _, seed in one}) == PROMPTS * ROLLOUTS


def test_further_batches_of_a_step_have_seeds_of_their_own(run):
    """Batches of one validation, and of training where a step lacks prompts; another process repeats them."""
    _, manager = run()
    first = dict(manager.llm_client.seeds)
    manager.llm_client = Servers()
    asyncio.run(to_the_end(manager, prompts()))
    second, again = dict(manager.llm_client.seeds), dict(run()[1].llm_client.seeds)
    assert again == first and not set(first.values()) & set(second.values())


def test_the_manager_is_made_on_its_event_loop():
    class Manager(BatchedAgentLoopManager):
        def __init__(self, *arguments):
            self.arguments, self.event_loop = arguments, asyncio.get_running_loop()

    manager = Manager.create(1, 2)
    assert manager.arguments == (1, 2) and manager.event_loop.is_running()
    manager.event_loop.call_soon_threadsafe(manager.event_loop.stop)


# What is lost alone.

BAD = {
    "its grading raises": ({"grades": {(2, 1): ValueError("not a\nnumber")}}, "grading: ValueError: not a number"),
    "its score is not a number": ({"grades": {(2, 1): None}}, "grading: reward_score=None: expected a finite number"),
    "its score is not finite": ({"grades": {(2, 1): float("nan")}}, "grading: reward_score=nan: expected a finite"),
    "it is empty": ({"answers": {(2, 1): EMPTY}}, "generation: the response is empty, stop_reason=aborted"),
    "its request fails": ({"answers": {(2, 1): "ValueError: too long"}}, "generation: ValueError: too long"),
}


@pytest.mark.parametrize("chunk_size", [100, 9, 1])
@pytest.mark.parametrize("why", BAD)
def test_a_bad_rollout_costs_that_one_rollout(run, chunk_size, why, caplog):
    bad, told = BAD[why]
    queue, manager = run(chunk_size, **bad)
    assert queue.stored == [key for key in KEYS if key != "uid2_1_0"]
    assert queue.statuses == {f"uid{i}": "failure" if i == 2 else "finished" for i in range(PROMPTS)}
    assert {key: fields["rm_scores"].tolist() for key, fields in queue.rows.items()} == {
        key: [0, int(key[3])] for key in queue.stored
    }
    assert manager.failure is None
    assert [record.message for record in caplog.records if "rollout" in record.message][0].startswith(
        f"rollout 1 of prompt uid2 is lost: {told}"
    )


def test_several_bad_rollouts_of_all_kinds(run, caplog):
    grades = {(0, 0): KeyError("answer"), (5, 2): ZeroDivisionError(), (5, 1): float("inf")}
    queue, manager = run(9, grades=grades, answers={(1, 0): EMPTY, (5, 0): "EngineGenerateError: "})
    lost = {"uid0_0_0", "uid1_0_0", "uid5_0_0", "uid5_1_0", "uid5_2_0"}
    assert queue.stored == [key for key in KEYS if key not in lost] and manager.failure is None
    assert {uid for uid, status in queue.statuses.items() if status == "failure"} == {"uid0", "uid1", "uid5"}
    assert sum("is lost" in record.message for record in caplog.records) == len(lost)


def test_a_prompt_that_has_no_tokens_costs_its_own_rollouts(run, caplog):
    queue, manager = run(untokenizable="3")
    assert queue.stored == [key for key in KEYS if key[3] != "3"] and manager.failure is None
    assert "rollout 2 of prompt uid3 is lost: tokenizing: TypeError: the template wants a list" in caplog.text


# What ends a run.

FATAL = {
    "a server dies": ({"error": ActorDiedError()}, "generation: ActorDiedError: The actor died"),
    "a reward worker dies": ({"grades": {(2, 1): ActorDiedError()}}, "grading: ActorDiedError: The actor died"),
    "it dies once each is graded alone": (
        {"grades": {(2, 1): ValueError("not a number"), (2, 2): ActorDiedError()}},
        "grading: ActorDiedError: The actor died",
    ),
    "a status is not written": ({"refused": "finished"}, "TransferQueue: TimeoutError: no answer from the storage"),
    "nor that they run": ({"refused": "running"}, "TransferQueue: TimeoutError: no answer from the storage"),
    "rollouts are not written": ({"refused": "success"}, "TransferQueue: TimeoutError: no answer from the storage"),
    "every grading raises": (
        {"grades": {(i, j): ValueError("no such file") for i in range(PROMPTS) for j in range(ROLLOUTS)}},
        "all 18 rollouts failed, the last by grading: ValueError: no such file",
    ),
}


@pytest.mark.parametrize("chunk_size", [100, 9])
@pytest.mark.parametrize("why", FATAL)
def test_what_is_no_matter_of_a_rollout_is_kept_for_the_trainer(run, chunk_size, why):
    fatal, told = FATAL[why]
    queue, manager = run(chunk_size, **fatal)
    assert isinstance(manager.failure, RolloutsFailed) and told in str(manager.failure)
    assert "\n" not in str(manager.failure)
    # The trainer would take a batch of which every prompt is done.
    assert not queue.statuses or "running" in queue.statuses.values()


def test_a_reward_function_is_not_to_blame_for_an_actor_that_it_asks(run):
    class Died(Grader):
        async def _all(self, batch):
            raise RayTaskError("compute_score_batch", "a remote traceback", ActorDiedError()).as_instanceof_cause()

    manager = run(grades={})[1]
    manager.reward_loop_worker_handles = [Died()]

    asyncio.run(to_the_end(manager, prompts()))
    assert "grading: ActorDiedError" in str(manager.failure)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"agent_name": NonTensorStack(*["single_turn_agent"] * 5, "tool_agent")}, "agent_name=tool_agent in the data"),
        ({"agent_name": NonTensorData("tool_agent")}, "agent_name=tool_agent in the data"),
        (
            {
                "raw_prompt": NonTensorStack(
                    *[NonTensorData([{"role": "user", "content": "1"}])] * 5,
                    NonTensorData([{"role": "user", "content": [{"type": "text"}, {"type": "image"}]}]),
                )
            },
            "a prompt with image",
        ),
    ],
)
def test_what_the_batched_manager_does_not_serve_is_refused(run, columns, told):
    with pytest.raises(RolloutsFailed, match=f"{told}: the batched manager serves text-only prompts of single_turn"):
        run(batch=prompts(**columns))


def test_single_turn_rows_are_served(run):
    text = [NonTensorData([{"role": "user", "content": str(i)}]) for i in range(PROMPTS)]
    agent = NonTensorStack(*["single_turn_agent"] * PROMPTS)
    assert run(batch=prompts(raw_prompt=NonTensorStack(*text), agent_name=agent))[0].stored == KEYS


# What is asked for and what is stored.


def test_sampling_in_training_and_in_validation(run, monkeypatch):
    *_, manager = run()
    params = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.0, "logprobs": True}
    expected = params | {"temperature": 0.6, "top_p": 0.7, "top_k": -1}
    assert manager._sampling_params(False, True) == params and manager._sampling_params(True, True) == expected
    # Upstream: a prompt's own wish is heard in training only.
    assert manager._sampling_params(True, False) == expected
    assert manager._sampling_params(False, False) == params | {"temperature": 0, "top_p": 1.0, "top_k": -1}


def test_a_rows_own_number_of_rollouts_and_whether_they_are_sampled(run):
    numbers, sampled = NonTensorStack(1, 2, 3, 0, 5, 1), NonTensorStack(True, False, True, True, True, True)
    queue, manager = run(batch=prompts(__rollout_n__=numbers, __do_sample__=sampled))
    assert queue.statuses == {f"uid{i}": "finished" for i in range(PROMPTS)}
    assert Counter(int(key[3]) for key in queue.stored) == {0: 1, 1: 2, 2: 3, 4: 5, 5: 1}
    greedy = [params["temperature"] == 0 for params in manager.llm_client.params]
    assert greedy == [False] + [True] * 2 + [False] * 9
    assert not {"__rollout_n__", "__do_sample__"} & set(queue.rows["uid1_0_0"])


def test_validation_asks_for_its_own_number_by_its_own_options(run, monkeypatch):
    batch = prompts(validate=NonTensorData(True))
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "async_kv_batch_put", put_of("val"))
        queue, manager = run(batch=batch)
    assert Counter(key[:4] for key in queue.stored) == {f"uid{i}": 2 for i in range(PROMPTS)}
    assert {params["temperature"] for params in manager.llm_client.params} == {0.6}


def put_of(partition):
    async def put(self, keys, partition_id, fields=None, tags=None):
        assert partition_id == partition
        if fields is not None:
            self.kv_batch_put(keys, partition_id, fields, tags)

    return put


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_response_is_cut_with_its_log_probs_and_its_masks(run, length):
    queue, _ = run(length=length)
    kept = min(length, 2)
    for key, fields in queue.rows.items():
        prompt = int(key[3])
        assert fields["responses"].tolist() == [prompt, 7][:kept]
        assert fields["rollout_log_probs"].tolist() == [-0.5, -1.5][:kept]
        assert fields["response_mask"].tolist() == fields["loss_mask"].tolist() == [1] * kept
        assert fields["input_ids"].tolist() == [prompt, 9, *[prompt, 7][:kept]]
        assert fields["position_ids"].tolist() == list(range(2 + kept))
        assert fields["rm_scores"].tolist() == [0.0] * (kept - 1) + [prompt]
        tag = queue.tags[key]
        assert (tag["prompt_len"], tag["response_len"], tag["seq_len"]) == (2, kept, 2 + kept)


# The trainer's part.


def waiting_buffer(monkeypatch, partition, statuses):
    """Upstream's replay buffer over a TransferQueue of prompts with these statuses, by uid, at step 7."""
    tags = {uid: {"is_prompt": True, "global_steps": 7, "status": status} for uid, status in statuses.items()}
    monkeypatch.setattr(replay_buffer.tq, "kv_list", lambda: {partition: tags})
    return ReplayBuffer("sync", {}, None, "drop", {}, poll_interval=0), tags


@pytest.mark.parametrize("failure", [RolloutsFailed("generation: it died"), KeyError("generation: it died")])
@pytest.mark.parametrize("partition", ["train", "val"])
def test_a_failure_ends_the_wait(monkeypatch, partition, failure):
    buffer, _ = waiting_buffer(monkeypatch, partition, {"a": "finished", "b": "running", "c": "failure"})
    RolloutWait(buffer, None, failure=lambda: failure)
    kind = "" if isinstance(failure, RolloutsFailed) else "KeyError: '"
    told = f"^waiting for the rollouts of step 7, partition {partition}: 2 of 3 prompts done: {kind}generation: it died"
    with pytest.raises(RolloutsFailed, match=told):
        buffer.sample(global_steps=7, partition_id=partition, batch_size=3)


def test_a_wait_without_progress_ends(monkeypatch):
    buffer, tags = waiting_buffer(monkeypatch, "train", {"a": "finished", "b": "running", "c": "running"})
    polls = []

    def clock():
        """A second a poll; rollouts of `b` are done at the fourth and the ninth, and the prompt itself never."""
        polls.append(len(polls))
        if len(polls) in (4, 9):
            tags[f"b_{len(polls)}_0"] = {"status": "success"}
        return float(len(polls))

    RolloutWait(buffer, 6, clock=clock)
    with pytest.raises(
        RolloutsFailed,
        match="^trainer.rollout_timeout=6: waiting for the rollouts of step 7, partition train: 1 of 3 prompts done: "
        "no rollout was done for 6 s",
    ):
        buffer.sample(global_steps=7, partition_id="train", batch_size=3)
    assert 9 + 6 < len(polls) < 9 + 6 + 5


def test_rollouts_that_come_are_waited_for(monkeypatch):
    buffer, tags = waiting_buffer(monkeypatch, "train", {"a": "running", "b": "running"})
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda partition_id, keys: None)
    polls = []

    def clock():
        polls.append(len(polls))
        if len(polls) % 5 == 0:
            tags[f"a_{len(polls)}_0"] = {"status": "success"}
        if len(polls) == 50:
            tags["a"]["status"] = tags["b"]["status"] = "finished"
        return float(len(polls))

    RolloutWait(buffer, 7, clock=clock)
    batch, _ = buffer.sample(global_steps=7, partition_id="train", batch_size=2)
    assert len(batch.keys) == 10


def test_each_poll_follows_a_pause(monkeypatch):
    """The poll after a pause finds what was stored meanwhile."""
    buffer, tags = waiting_buffer(monkeypatch, "train", {"a": "running"})
    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda partition_id, keys: None)
    pauses = []

    def pause():
        pauses.append(len(pauses))
        if len(pauses) == 3:
            tags["a_0_0"], tags["a"]["status"] = {"status": "success"}, "finished"

    RolloutWait(buffer, 9, clock=itertools.count().__next__).pause = pause
    batch, _ = buffer.sample(global_steps=7, partition_id="train", batch_size=1)
    assert batch.keys == ["a_0_0"] and len(pauses) == 3


@pytest.mark.parametrize("servers", [{}, {"refused": "finished"}])
def test_the_end_of_a_batch_ends_one_pause(run, servers):
    _, manager = run(**servers)
    assert manager.batch_done.is_set() and (manager.failure is None) == (not servers)
    manager.wait_for_batch()
    assert not manager.batch_done.is_set()


def test_a_new_step_begins_a_new_wait(monkeypatch):
    buffer, tags = waiting_buffer(monkeypatch, "train", {"a": "running"})
    now = 0.0
    wait = RolloutWait(buffer, 10, clock=lambda: now)
    buffer._sync_metadata_from_transfer_queue()
    wait.wait_for_next_poll("train", 0.0)
    now, tags["a"]["global_steps"] = 1000.0, 8
    buffer._sync_metadata_from_transfer_queue()
    wait.wait_for_next_poll("train", 0.0)
    now = 1011.0
    with pytest.raises(RolloutsFailed, match="step 8"):
        wait.wait_for_next_poll("train", 0.0)


def test_a_further_batch_of_a_step_begins_a_new_wait(monkeypatch):
    """Those of a validation have one step and one partition."""
    buffer, tags = waiting_buffer(monkeypatch, "val", {"a": "running"})
    now = 0.0
    wait = RolloutWait(buffer, 10, clock=lambda: now)
    buffer._sync_metadata_from_transfer_queue()
    wait.wait_for_next_poll("val", 0.0)
    now, tags["b"] = 8.0, tags.pop("a")
    buffer.prompt_global_steps["val"].clear()
    buffer._sync_metadata_from_transfer_queue()
    wait.wait_for_next_poll("val", 0.0)
    now = 16.0
    wait.wait_for_next_poll("val", 0.0)
    now = 19.0
    with pytest.raises(RolloutsFailed, match="0 of 1 prompts done"):
        wait.wait_for_next_poll("val", 0.0)


@pytest.fixture
def trainer(monkeypatch):
    """The steer trainer without Ray: one rank, mini-batches of two prompts, GRPO."""
    built = SteerTrainer.__new__(SteerTrainer)
    built.batched, built.use_critic, built.global_steps, built.rollouts_asked = True, False, 7, {}
    built.ref_in_actor = False
    rollout = {"n": ROLLOUTS, "log_prob_micro_batch_size_per_gpu": 9, "log_prob_use_dynamic_bsz": False}
    built.config = OmegaConf.create(
        {
            "trainer": {
                "device": "cpu",
                "rollout_timeout": 12,
                "critic_warmup": 0,
                "log_val_generations": 0,
                "skip_old_log_prob": False,
                "val_only": False,
            },
            "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False, "gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 2}, "rollout": rollout, "ref": rollout},
        }
    )
    built.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0]})
    built.tokenizer, built.processor = SimpleNamespace(eos_token_id=1), None
    built.replay_buffer = SimpleNamespace(failure_keys={"train": set()})
    return built


def test_the_trainer_waits_by_its_key_and_learns_of_a_failure(run, trainer, monkeypatch, tmp_path):
    """From a status that can't be written to the error of the trainer's own wait."""
    buffer, _ = waiting_buffer(monkeypatch, "train", {f"uid{i}": "running" for i in range(PROMPTS)})
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_build_replay_buffer", lambda self: buffer)
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "fit", lambda self, manager: None)
    monkeypatch.setattr(trainer_steer, "freeze_gc_heap", lambda: None)
    for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    trainer.folder, trainer.replay_buffer = tmp_path, trainer._build_replay_buffer()
    assert trainer.rollout_wait.timeout == 12
    trainer.fit(run(refused="finished")[1])
    with pytest.raises(RolloutsFailed, match="0 of 6 prompts done: writing to the TransferQueue: TimeoutError"):
        trainer.replay_buffer.sample(global_steps=7, partition_id="train", batch_size=PROMPTS)


@pytest.mark.parametrize("val_only, name", [(False, "metrics_from_7_start_2"), (True, "evaluation_of_7_start_1")])
def test_an_evaluation_logs_to_a_file_beside_the_metrics(trainer, monkeypatch, tmp_path, val_only, name):
    """In the folder of a run, which may go on meanwhile."""
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "fit", lambda self, manager: None)
    monkeypatch.setattr(trainer_steer, "freeze_gc_heap", lambda: None)
    for variable in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    (tmp_path / "metrics.jsonl").touch()
    trainer.folder, trainer.batched, trainer.config.trainer.val_only = tmp_path, False, val_only
    trainer.fit(None)
    assert os.environ["VERL_FILE_LOGGER_PATH"] == str(tmp_path / f"{name}.jsonl")


#: Rollouts that are lost -> rows of the step: mini-batches of six.
LACKING = {((2, 1),): 18, ((2, 1), (2, 2), (4, 0)): 18, tuple((i, 0) for i in range(6)): 12, ((0, 0), (0, 1)): 18}


@pytest.mark.parametrize("lost", LACKING)
def test_a_step_goes_on_without_the_lost(run, trainer, monkeypatch, lost):
    """Upstream's own filling up and its GRPO, over what the batched manager has stored."""
    scores = {(i, j): float((7 * i + 3 * j) % 5) for i in range(PROMPTS) for j in range(ROLLOUTS)}
    queue, _ = run(9, grades=scores | dict.fromkeys(lost, ValueError()))
    for module in (padding_utils, trainer_base):
        monkeypatch.setattr(module, "tq", queue)
    trainer.agent_loop_manager = SimpleNamespace(generate_sequences=lambda batch: None)
    trainer.trainer_mode = "sync"
    trainer._submit_batch_to_rollout(prompts())
    trainer.replay_buffer.failure_keys["train"] = {f"uid{i}" for i, _ in lost}
    batch, metrics = KVBatchMeta(partition_id="train", keys=queue.stored, tags=[*queue.tags.values()]), {}

    batch = trainer._balance_batch(batch, metrics)
    assert metrics[LOST_IN_TRAINING] == len(lost)
    assert len(batch.keys) == LACKING[lost]
    asked_of_workers = []
    trainer.batched, trainer.entropy_audit, trainer.last_entropy = False, AuditOptions(), None
    for method in ("_compute_old_log_prob", "_compute_ref_log_prob"):
        monkeypatch.setattr(
            trainer_steer.PPOTrainerSync,
            method,
            lambda self, batch, metrics: asked_of_workers.append(dict(batch.extra_info)) or batch,
        )
        assert "micro_batch_size_per_gpu" not in getattr(trainer, method)(batch, metrics).extra_info
    # 9 divides 18 rows of a rank, and 3 is what it shares with 12.
    fitting = {} if len(batch.keys) == 18 else {"micro_batch_size_per_gpu": 3}
    assert asked_of_workers == [fitting] * 2
    # The reference of an adapter is the actor, in micro-batches of the rollout's size.
    trainer.ref_in_actor, trainer.config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu = True, 1
    trainer._compute_ref_log_prob(batch, metrics)
    assert asked_of_workers[2:] == [fitting]

    trainer._compute_advantage(batch, metrics)
    for key in batch.keys:
        advantages, tag = queue.rows[key]["advantages"], queue.tags[key]
        if tag.get("is_padding"):
            assert advantages.eq(0).all() and queue.rows[key]["response_mask"].eq(0).all()
            continue
        prompt, session = int(key[3]), int(key[5])
        group = [scores[prompt, j] for j in range(ROLLOUTS) if (prompt, j) not in lost]
        # Upstream's GRPO lets one that is alone have its score for an advantage.
        mean, std = (np.mean(group), np.std(group, ddof=1)) if len(group) > 1 else (0.0, 1.0)
        expected = (scores[prompt, session] - mean) / (std + 1e-6)
        torch.testing.assert_close(advantages, torch.full((2,), expected, dtype=torch.float32))


def test_a_whole_step_is_as_upstreams(run, trainer, monkeypatch):
    queue, _ = run()
    trainer.rollouts_asked = dict.fromkeys(queue.statuses, ROLLOUTS)
    batch, metrics = KVBatchMeta(partition_id="train", keys=queue.stored, tags=[*queue.tags.values()]), {}
    assert trainer._balance_batch(batch, metrics).keys == KEYS
    assert metrics[LOST_IN_TRAINING] == 0
    assert trainer.rollouts_asked == {}, "the next step would count this one's prompts as its own"


def test_prompts_that_failed_in_earlier_steps_are_not_counted():
    assert lost_rollouts({"a": 4}, ["a", "earlier"], ["a_0_0", "a_1_0", "a_1_1"]) == 2


def test_lost_are_those_of_the_number_that_a_prompt_has_asked_for(trainer, monkeypatch):
    """Of the first prompt one rollout, of the second two, and so on; the third and the fifth lack all."""
    upstream = trainer_steer.PPOTrainerSync
    monkeypatch.setattr(upstream, "_submit_batch_to_rollout", lambda self, batch: len(batch))
    monkeypatch.setattr(upstream, "_balance_batch", lambda self, batch, metrics: batch)
    trainer._submit_batch_to_rollout(prompts(__rollout_n__=torch.arange(1, PROMPTS + 1)))
    trainer.replay_buffer.failure_keys["train"] = {"uid2", "uid4"}
    metrics = {}
    trainer._balance_batch(KVBatchMeta(partition_id="train", keys=[], tags=[]), metrics)
    assert metrics[LOST_IN_TRAINING] == 3 + 5


# Validation.

ASKED = {("aime", "a"): 4, ("aime", "b"): 4, ("aime", "c"): 4, ("gsm", "d"): 2}
CORRECT = {"a": [1, 1, 0, 1], "b": [1, 0, 0, 0], "c": [0, 0, 1, 1], "d": [1, 0]}


def validated(trainer, lost=frozenset()):
    """The trainer's metrics of a validation without the samples `lost`, (prompt, number)."""
    samples = [
        (source, uid, value)
        for source, uid in ASKED
        for number, value in enumerate(CORRECT[uid])
        if (uid, number) not in lost
    ]
    sources, uids, values = map(list, zip(*samples, strict=True))
    infos = {
        "reward": [2.0 * value - 1 for value in values],
        "acc": list(map(float, values)),
        "pred": list(map(str, values)),
    }
    trainer._maybe_log_val_generations(inputs=["the same"] * len(uids), outputs=uids, scores=values)
    return trainer._val_metrics_update(sources, uids, infos, [2] * len(uids), expected_acc_counts=dict(ASKED)), (
        sources, uids, infos
    )  # fmt: skip


def test_a_whole_validation_has_upstreams_metrics_and_its_size(trainer):
    metrics, (sources, uids, infos) = validated(trainer)
    counts = {f"val-aux/{s}/{name}": n for s, size in (("aime", 12), ("gsm", 2)) for name, n in sizes(size, 0).items()}
    theirs = trainer_steer.PPOTrainerSync._val_metrics_update(trainer, sources, uids, infos, [2] * 14, dict(ASKED))
    sampled = {name for name in metrics if "/pass@" in name or "/distinct_" in name}
    assert sampled and {name: metrics[name] for name in metrics.keys() - sampled} == theirs | counts
    assert metrics["val-core/aime/acc/mean@4"] == 6 / 12


def of_two_prompts(trainer):
    """The metrics of eight rows: verl gives each row a uid of its own, and the prompts in the order of the uids."""
    uids = [str(number) for number in range(8)]
    trainer._maybe_log_val_generations(inputs=[*"abababab"], outputs=uids, scores=uids)
    infos = {"acc": [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]}
    asked = {("aime", uid): 1 for uid in uids}
    return trainer._val_metrics_update(["aime"] * 8, uids, infos, [2] * 8, expected_acc_counts=asked)


def test_a_problem_in_several_rows_has_pass_at_k(trainer):
    metrics = of_two_prompts(trainer)
    # A problem of which one of four samples is right, and one of which all are.
    shares = {k: metrics[f"val-aux/aime/acc/pass@{k}"] for k in (1, 2, 4)}
    assert shares == {1: 5 / 8, 2: 3 / 4, 4: 1.0} and metrics["val-core/aime/acc/mean@1"] == 5 / 8


def test_rows_that_may_have_images_are_not_taken_for_one_problem(trainer):
    trainer.processor = object()
    assert not [name for name in of_two_prompts(trainer) if "/pass@" in name]


def sizes(samples, lost):
    return {"num_samples": samples, "num_lost": lost}


@pytest.mark.parametrize(
    ("lost", "aime"),
    [
        ({("a", 2)}, (1 + 1 / 4 + 2 / 4) / 3),
        ({("b", 0), ("c", 1)}, (3 / 4 + 0 + 2 / 3) / 3),
        ({(uid, 3) for uid in "abc"}, (2 / 3 + 1 / 3 + 1 / 3) / 3),
        ({("b", number) for number in range(4)}, (3 / 4 + 2 / 4) / 2),
    ],
)
def test_lost_samples_are_not_counted_as_wrong(trainer, lost, aime):
    metrics, _ = validated(trainer, lost)
    assert metrics["val-core/aime/acc/mean@4"] == pytest.approx(aime)
    assert metrics["val-aux/aime/acc_success_only/mean@4"] == pytest.approx(aime)
    assert metrics["val-aux/aime/reward/mean@4"] == pytest.approx(2 * aime - 1)
    # Spread, best, worst and majority of four are those of the prompts that have four.
    whole = [np.std(CORRECT[uid]) for uid in "abc" if uid not in {of for of, _ in lost}]
    assert metrics.get("val-aux/aime/acc/std@4") == (pytest.approx(np.mean(whole)) if whole else None)
    assert metrics["val-core/gsm/acc/mean@2"] == 1 / 2
    numbers = {(name.split("/")[1], name.rpartition("@")[2]) for name in metrics if "/mean@" in name}
    assert numbers == {("aime", "4"), ("gsm", "2")}
    assert metrics["val-aux/aime/num_samples"] == 12 - len(lost) and metrics["val-aux/aime/num_lost"] == len(lost)
    assert metrics["val-aux/gsm/num_samples"] == 2 and metrics["val-aux/gsm/num_lost"] == 0


def test_a_data_source_without_a_sample_is_told(trainer):
    metrics, _ = validated(trainer, {("d", 0), ("d", 1)})
    assert metrics["val-aux/gsm/num_samples"] == 0 and metrics["val-aux/gsm/num_lost"] == 2
    assert "val-core/gsm/acc/mean@2" not in metrics and metrics["val-core/aime/acc/mean@4"] == 6 / 12


# Before Ray starts.


def checked(tmp_path, agent_names=None, rollout=None, **trainer):
    columns = {"prompt": [[{"role": "user", "content": "1"}]] * 3} | (
        {"agent_name": agent_names} if agent_names else {}
    )
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "test.parquet")
    pyarrow.parquet.write_table(pa.table({"prompt": ["1"]}), tmp_path / "train.parquet")
    agent = {"agent_loop_manager_class": BATCHED_MANAGER, "default_agent_loop": "single_turn_agent"}
    rollout = {"name": "vllm", "agent": agent, "enable_rollout_routing_replay": False, "full_determinism": False} | (
        rollout or {}
    )
    files = {
        "train_files": str(tmp_path / "train.parquet"),
        "val_files": [str(tmp_path / "test.parquet"), "no.parquet"],
    }
    check_rollouts(OmegaConf.create({"trainer": trainer, "actor_rollout_ref": {"rollout": rollout}, "data": files}))


def test_what_can_be_served_passes(tmp_path):
    checked(tmp_path)
    checked(tmp_path, ["single_turn_agent"] * 3, rollout_timeout=None)
    # Upstream's manager serves all.
    checked(tmp_path, ["tool_agent"] * 3, {"agent": {"agent_loop_manager_class": None}}, rollout_timeout=0.5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"agent_names": ["single_turn_agent", "tool_agent", None]},
            "data.val_files: .*test.parquet has rows with agent_name=tool",
        ),
        (
            {"rollout": {"enable_rollout_routing_replay": True}},
            "enable_rollout_routing_replay=True: the batched",
        ),
        (
            {"rollout": {"agent": {"agent_loop_manager_class": BATCHED_MANAGER, "default_agent_loop": "tool_agent"}}},
            "rollout.agent.default_agent_loop=tool_agent: the batched manager serves",
        ),
        ({"rollout": {"full_determinism": True, "seed": None}}, "rollout.seed=None: expected an integer of at least 0"),
        ({"rollout": {"full_determinism": True, "seed": -1}}, "rollout.seed=-1: expected an integer of at least 0"),
        ({"rollout_timeout": 0}, "trainer.rollout_timeout=0: expected seconds, more than 0, or null"),
        ({"rollout_timeout": -1.5}, "trainer.rollout_timeout=-1.5: expected"),
        ({"rollout_timeout": True}, "trainer.rollout_timeout=True: expected"),
        ({"rollout_timeout": "1h"}, "trainer.rollout_timeout=1h: expected"),
        ({"rollout_timeout": float("nan")}, "trainer.rollout_timeout=nan: expected"),
    ],
)
def test_what_can_not_be_served_is_refused_before_ray_starts(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        checked(tmp_path, **changes)


@given(st.lists(st.integers(1, 4000), min_size=4, max_size=12), st.sampled_from([1, 2, 4]))
def test_partitions_of_a_batch_are_verls(lengths, ranks):
    lengths = lengths[: len(lengths) // ranks * ranks]
    expected = seqlen_balancing.get_seqlen_balanced_partitions(lengths, ranks, equal_size=True)
    assert balanced_partitions(lengths, k_partitions=ranks, equal_size=True) == expected


def test_later_collections_pass_over_the_start():
    kept = [[i] for i in range(1000)]
    verl_steer_gc.collect_seldom()
    try:
        freeze_gc_heap()
        assert gc.get_freeze_count() > len(kept)
        assert gc.get_threshold()[0] == 700
        young = [obj for generation in range(3) for obj in gc.get_objects(generation)]
        assert not any(obj is kept for obj in young)
    finally:
        gc.unfreeze()
