# SPDX-License-Identifier: Apache-2.0
"""Single-turn generation in batches, the value of `rollout.agent.agent_loop_manager_class` on a CPU.

verl runs an agent loop for each rollout, with several Ray calls and a TransferQueue write, which takes most of the time
where responses are short. Here a chunk of about 128 rollouts takes one call to each vLLM server, one to each reward
worker and one write, while later chunks are generated. Samples, fields and tags are those of
`verl.trainer.ppo.v1.agent_loop_tq`. It serves text-only prompts of the agent loop `single_turn_agent`.

A rollout is lost alone if its prompt can't be tokenized, its request fails, its response is empty or its grading
raises: the log names the reason, and the other rollouts of the prompt are stored. Any other error, or the loss of all
rollouts of a batch, ends the run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transfer_queue as tq
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker, DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.protocol import DataProto
from verl.steer.rollout.checks import AGENT_LOOP, ONLY_SINGLE_TURN, TEMPERATURE
from verl.steer.rollout.wait import RolloutsFailed, error_text
from verl.trainer.ppo.v1.agent_loop_tq import apply_greedy_sampling_params
from verl.utils.profiler import simple_timer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

if TYPE_CHECKING:
    from verl.steer.rollout.vllm_batched import BatchedLLMServerClient

logger = logging.getLogger(__name__)

Prompt = dict[str, Any]

#: Rollouts that are generated, graded and stored together: few enough that a step has several chunks.
CHUNK_SIZE = 128


@dataclass
class Rollout:
    """One response to a prompt.

    Args:
        prompt: row of the batch.
        session_id: index within the prompt's group.
        sampling_params: of its request to vLLM.
        error: why the rollout is lost, or None.
        prompt_ids: the tokenized prompt.
        output: the response, with its score once it is graded.
    """

    prompt: Prompt
    session_id: int
    sampling_params: dict[str, Any]
    error: str | None = None
    prompt_ids: list[int] = field(default_factory=list)
    output: AgentLoopOutput = field(init=False)


class BatchedAgentLoopManager(AgentLoopWorker):
    """Generates, grades and stores batches of single-turn prompts, on an event loop in a thread of the trainer.

    Upstream's manager starts workers as actors, each of which would first import all that the trainer has imported;
    `rollout.agent.num_workers` has no effect here.

    Attributes:
        submitted: number of prompts by (whether they are of a validation, training step).
        failure: the error that ended the work on a batch, or None; the trainer reads it while it waits for rollouts.
    """

    llm_client: BatchedLLMServerClient

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.event_loop = asyncio.get_running_loop()
        self.batches: set[Future[None]] = set()
        self.submitted: Counter[tuple[bool, int]] = Counter()
        self.failure: BaseException | None = None
        self.batch_done = threading.Event()
        self.single_turn = SingleTurnAgentLoop(
            DictConfigWrap(self.config),
            self.llm_client,
            self.tokenizer,
            self.processor,
            self.dataset_cls,
            DictConfigWrap(self.config.data),
            hf_model_type=self.hf_model_type,
            tools=ToolListWrap(self.tools),
        )

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> BatchedAgentLoopManager:
        """Start the event loop and make the manager on it, with the arguments of `AgentLoopWorker`."""
        event_loop = asyncio.new_event_loop()
        threading.Thread(target=event_loop.run_forever, name="agent_loop", daemon=True).start()

        async def construct() -> BatchedAgentLoopManager:
            return cls(*args, **kwargs)

        return asyncio.run_coroutine_threadsafe(construct(), event_loop).result()

    def generate_sequences(self, prompts: TensorDict) -> None:  # type: ignore[override] # a manager's, as verl calls it
        """Start to generate for a batch of prompts and return; the rollouts go to the TransferQueue.

        Raises:
            RolloutsFailed: if a prompt is not a single turn of text.
        """
        validate = bool(prompts["validate"]) if "validate" in prompts else False
        rows = [row.to_dict() for row in prompts.exclude("validate")]
        for row in rows:
            check_single_turn_text(row)
        groups = [self._group(row, validate) for row in rows]
        batch = asyncio.run_coroutine_threadsafe(self._run_prompts(rows, groups, validate), self.event_loop)
        self.batches.add(batch)
        batch.add_done_callback(self._on_done)

    def _on_done(self, batch: Future[None]) -> None:
        self.batches.discard(batch)
        failure = batch.exception()
        if failure is not None:
            logger.error("generating for a batch of prompts failed", exc_info=failure)
            self.failure = self.failure or failure
        self.batch_done.set()

    def wait_for_batch(self) -> None:
        """Return once a batch has been stored or has failed since the last call, or after a second."""
        self.batch_done.wait(1.0)
        self.batch_done.clear()

    async def _run_prompts(self, prompts: list[Prompt], groups: list[list[Rollout]], validate: bool) -> None:
        """Generate all chunks of the prompts' rollouts at once; store each, in the batch's order, when it is graded.

        Raises:
            RolloutsFailed: if every rollout of the batch is lost.
        """
        partition_id = "val" if validate else "train"
        statuses = {
            prompt["uid"]: {"status": "running" if group else "finished"}
            for prompt, group in zip(prompts, groups, strict=True)
        }
        await _put(statuses, partition_id)
        expected, lost = sum(map(len, groups)), 0
        generations = [asyncio.create_task(self._generate(chunk)) for chunk in _chunks(groups)]
        try:
            for generation in generations:
                chunk = await generation
                failed = [rollout for rollout in chunk if rollout.error]
                for rollout in failed:
                    logger.error(
                        "rollout %d of prompt %s is lost: %s", rollout.session_id, rollout.prompt["uid"], rollout.error
                    )
                lost += len(failed)
                # With all lost, no single one is the cause; a training batch of one prompt may replace a failed prompt.
                if lost == expected and (validate or len(prompts) > 1):
                    raise RolloutsFailed(f"all {lost} rollouts failed, the last by {failed[-1].error}")
                if stored := _not_lost(chunk):
                    keys, tags, fields = zip(*map(_record, stored), strict=True)
                    await _put(dict(zip(keys, tags, strict=True)), partition_id, list_of_dict_to_tensordict(fields))
                # As upstream: a prompt that lacks a rollout has failed, and the trainer takes its other rollouts.
                statuses = {rollout.prompt["uid"]: {"status": "finished"} for rollout in chunk}
                statuses |= {rollout.prompt["uid"]: {"status": "failure"} for rollout in failed}
                await _put(statuses, partition_id)
        finally:
            for generation in generations:
                generation.cancel()

    def _group(self, prompt: Prompt, validate: bool) -> list[Rollout]:
        """The rollouts to generate for the next prompt of a training step or a validation.

        With `rollout.full_determinism` each has its own seed, so that a run repeats however vLLM batches the requests.
        Upstream's servers use one seed for all requests, with which all rollouts of a prompt are equal.
        """
        options = self.rollout_config
        n = int(prompt.pop("__rollout_n__", options.val_kwargs.n if validate else options.n))
        sampling_params = self._sampling_params(validate, prompt.pop("__do_sample__", True))
        if TEMPERATURE in prompt:
            sampling_params["temperature"] = float(prompt.pop(TEMPERATURE))
        group = [Rollout(prompt, session_id, dict(sampling_params)) for session_id in range(n)]
        if options.full_determinism:
            step = int(prompt["global_steps"])
            index = self.submitted[validate, step]  # a validation and a step may have several batches
            self.submitted[validate, step] += 1
            for rollout in group:
                entropy = [options.seed, int(validate), step, index, rollout.session_id]
                rollout.sampling_params["seed"] = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return group

    def _sampling_params(self, validate: bool, do_sample: bool) -> dict[str, Any]:
        source = self.rollout_config.val_kwargs if validate else self.rollout_config
        params = {
            "temperature": source.temperature,
            "top_p": source.top_p,
            "top_k": source.top_k,
            "repetition_penalty": 1.0,
            "logprobs": self.rollout_config.calculate_log_probs,
        }
        if not validate and not do_sample:
            apply_greedy_sampling_params(params)
        return params

    async def _generate(self, chunk: list[Rollout]) -> list[Rollout]:
        """Generate and grade: sets `output` or `error` of each rollout of a chunk, and returns the chunk."""
        for _, group in groupby(chunk, key=lambda rollout: rollout.prompt["uid"]):
            await self._tokenize(list(group))
        await self._respond(_not_lost(chunk))
        await self._grade(_not_lost(chunk))
        return chunk

    async def _tokenize(self, group: list[Rollout]) -> None:
        prompt_ids: list[int] = []
        error_of_all = None
        try:
            prompt_ids = await self.single_turn.ct_build_initial_tokens(list(group[0].prompt["raw_prompt"]))
        except Exception as error:  # a chat template can raise anything
            error_of_all = f"tokenizing: {error_text(error)}"
        for rollout in group:
            rollout.prompt_ids, rollout.error = prompt_ids, error_of_all

    async def _respond(self, rollouts: list[Rollout]) -> None:
        requests = [{"prompt_ids": one.prompt_ids, "sampling_params": one.sampling_params} for one in rollouts]
        timing: dict[str, float] = {}
        with simple_timer("generate_sequences", timing), _stage("generation"):
            responses = await self.llm_client.generate_batch(requests)
        for rollout, response in zip(rollouts, responses, strict=True):
            if isinstance(response, str):
                rollout.error = f"generation: {response}"
            elif not response.token_ids:
                # Upstream puts the reward on a response's last token. vLLM generates at least one unless it is stopped.
                rollout.error = f"generation: the response is empty, stop_reason={response.stop_reason}"
            else:
                rollout.output = self._output(rollout, response, timing)

    def _output(self, rollout: Rollout, response: TokenOutput, timing: dict[str, float]) -> AgentLoopOutput:
        """The result of `SingleTurnAgentLoop.run` for one rollout."""
        length = self.rollout_config.response_length
        response_ids = response.token_ids[:length]
        steps = response.extra_fields.get("global_steps")
        return AgentLoopOutput(
            prompt_ids=rollout.prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            response_logprobs=response.log_probs[:length] if response.log_probs else None,
            multi_modal_data={},
            num_turns=2,
            metrics=timing  # type: ignore[arg-type] # verl makes the object
            | {"num_preempted": -1 if response.num_preempted is None else response.num_preempted},
            extra_fields=response.extra_fields
            | {"min_global_steps": steps, "max_global_steps": steps, "turn_scores": [], "tool_rewards": []},
        )

    async def _grade(self, rollouts: list[Rollout]) -> None:
        """Have each reward worker grade an equal part of the rollouts."""
        workers = self.reward_loop_worker_handles
        if not rollouts or workers is None:
            return
        parts = _reward_batch(rollouts).split(math.ceil(len(rollouts) / len(workers)))
        timing: dict[str, float] = {}
        with simple_timer("compute_score", timing), _stage("grading"):
            grades = await asyncio.gather(*map(_grade_part, workers, parts))
        for rollout, grade in zip(rollouts, chain(*grades), strict=True):
            if isinstance(grade, BaseException):
                rollout.error = f"grading: {error_text(grade)}"
            elif not isinstance(grade["reward_score"], Real | torch.Tensor) or not math.isfinite(grade["reward_score"]):
                rollout.error = f"grading: reward_score={grade['reward_score']!r}: expected a finite number"
            else:
                rollout.output.reward_score = grade["reward_score"]  # type: ignore[assignment] # tensors too
                rollout.output.extra_fields["reward_extra_info"] = grade["reward_extra_info"]
                rollout.output.metrics.compute_score = timing["compute_score"]


def check_single_turn_text(prompt: Prompt) -> None:
    """Check that the batched manager serves a row of the data.

    Raises:
        RolloutsFailed: if the row names another agent loop, or holds images, videos or audio.
    """
    agent_name = prompt.get("agent_name", AGENT_LOOP)
    if agent_name != AGENT_LOOP:
        raise RolloutsFailed(f"agent_name={agent_name} in the data: {ONLY_SINGLE_TURN}")
    contents = [message["content"] for message in prompt["raw_prompt"]]
    kinds = {part["type"] for content in contents if isinstance(content, list) for part in content} - {"text"}
    if kinds:
        raise RolloutsFailed(f"a prompt with {', '.join(sorted(kinds))}: {ONLY_SINGLE_TURN}")


def _chunks(groups: Iterable[list[Rollout]]) -> Iterator[list[Rollout]]:
    """Join neighbouring groups to chunks of at least `CHUNK_SIZE` rollouts; the last chunk may have fewer."""
    chunk: list[Rollout] = []
    for group in groups:
        chunk += group
        if len(chunk) >= CHUNK_SIZE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _not_lost(rollouts: list[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if not rollout.error]


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Raise errors of a stage as `RolloutsFailed` with the stage's name."""
    try:
        yield
    except Exception as error:
        raise RolloutsFailed(f"{name}: {error_text(error)}") from error


async def _put(tags: dict[str, dict[str, Any]], partition_id: str, fields: TensorDict | None = None) -> None:
    """Write the tags, and the fields if given, of some keys to the TransferQueue."""
    with _stage("writing to the TransferQueue"):
        await tq.async_kv_batch_put(keys=list(tags), partition_id=partition_id, fields=fields, tags=list(tags.values()))


def _record(rollout: Rollout) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Key, tag and fields of a rollout in the TransferQueue."""
    output, prompt = rollout.output, rollout.prompt
    fields = output.as_dict() | prompt | {"session_id": rollout.session_id, "multi_modal_inputs": {}}
    fields.pop("multi_modal_data", None)
    prompt_len, response_len = len(output.prompt_ids), len(output.response_ids)
    fields["loss_mask"] = fields["response_mask"]
    fields["input_ids"] = torch.cat([fields["prompts"], fields["responses"]])
    fields["position_ids"] = torch.arange(prompt_len + response_len)
    tag = {
        "status": "success",
        "prompt_len": prompt_len,
        "response_len": response_len,
        "seq_len": prompt_len + response_len,
        "global_steps": prompt["global_steps"],
        "min_global_steps": output.extra_fields["min_global_steps"],
        "max_global_steps": output.extra_fields["max_global_steps"],
    }
    return f"{prompt['uid']}_{rollout.session_id}_0", tag, fields


def _reward_batch(rollouts: list[Rollout]) -> DataProto:
    """The input of a reward manager: tokens (batch, longest), padded on the right, and the columns of the prompts."""
    outputs = [rollout.output for rollout in rollouts]

    def padded(rows: Iterable[list[int]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)

    prompts = padded(output.prompt_ids for output in outputs)
    responses = padded(output.response_ids for output in outputs)
    prompt_mask = padded([1] * len(output.prompt_ids) for output in outputs)
    response_mask = padded(output.response_mask for output in outputs)
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": torch.cat([prompt_mask, response_mask], dim=1),
        "input_ids": torch.cat([prompts, responses], dim=1),
    }
    rows = [
        rollout.prompt
        | {
            # A copy for each rollout, because reward managers write into it.
            "extra_info": dict(rollout.prompt.get("extra_info") or {}),
            "session_id": rollout.session_id,
            "__num_turns__": rollout.output.num_turns,
            "tool_extra_fields": rollout.output.extra_fields,
        }
        for rollout in rollouts
    ]
    columns = {key: np.fromiter((row[key] for row in rows), dtype=object) for key in rows[0]}
    return DataProto.from_dict(tensors, columns)


async def _grade_part(worker: ActorHandle, batch: DataProto) -> list[dict[str, Any] | BaseException]:
    """Grades of a reward worker: in one call or, if grading raises, row by row, an error in place of the row's grade.

    After an error of one row all rows are graded again, while the first call may still be at work.

    Raises:
        RayError: if the cause is not the grading but the death of the reward worker or of an actor that it calls.
    """
    try:
        return await worker.compute_score_batch.remote(batch)
    except RayTaskError as error:
        if not _raised_by_grading(error):
            raise
    calls = [worker.compute_score.remote(row) for row in batch.split(1)]
    grades: list[dict[str, Any] | BaseException] = await asyncio.gather(*calls, return_exceptions=True)
    for grade in grades:
        if isinstance(grade, BaseException) and not _raised_by_grading(grade):
            raise grade
    return grades


def _raised_by_grading(error: BaseException) -> bool:
    """Whether a reward function raised an error itself, not Ray because of an actor's death."""
    if not isinstance(error, RayTaskError):
        return False
    return isinstance(error.cause, RayTaskError) or not isinstance(error.cause, RayError)
