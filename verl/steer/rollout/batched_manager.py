# SPDX-License-Identifier: Apache-2.0
"""Single-turn generation a batch at a time, named by `rollout.agent.agent_loop_manager_class`.

verl runs one agent loop for each rollout: a few Ray calls and one write to the TransferQueue apiece, which is what a
step of short responses spends its time on. Here a share of the rollouts, a hundred-odd, goes to each vLLM replica in
one call, is graded in one and written in one, while later shares are generated. Samples, fields and tags are those of
`verl.trainer.ppo.v1.agent_loop_tq`. Text-only prompts and the agent loop `single_turn_agent` are what it serves.

A rollout whose prompt can't be tokenized, whose request fails, whose response is empty or whose grading raises is lost
alone: the log says why, and the others of its prompt are stored. All other errors, and one that befalls every rollout
of a batch, end the run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
import transfer_queue as tq
from ray.exceptions import RayError, RayTaskError
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker, DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.protocol import DataProto
from verl.steer.rollout.checks import AGENT_LOOP, ONLY_SINGLE_TURN
from verl.steer.rollout.wait import RolloutsFailed, told
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, apply_greedy_sampling_params
from verl.utils.profiler import simple_timer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

logger = logging.getLogger(__name__)

Prompt = dict[str, Any]
Result = TypeVar("Result")

#: Rollouts that are generated, graded and stored together: few enough that a step has others to generate meanwhile.
ROLLOUTS_TOGETHER = 128


@dataclass
class Rollout:
    """One response to a prompt, on its way to the TransferQueue.

    Args:
        prompt: its row of the batch.
        session_id: its number within the prompt's group.
        request: what the vLLM server is asked for.
        lost: why it will not be stored, if so.
        output: the response; not there before it is generated, nor if that fails.
    """

    prompt: Prompt
    session_id: int
    request: dict[str, Any] = field(default_factory=dict)
    lost: str | None = None
    output: AgentLoopOutput = field(init=False)


class BatchedAgentLoopWorker(AgentLoopWorker):
    """Generates, grades and stores a batch of single-turn prompts together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.background_tasks: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None
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

    async def generate_sequences(self, batch: TensorDict) -> None:
        """Start on a batch of prompts and return; what becomes of it goes to the TransferQueue.

        What ends the work on a batch is kept in `failure`, for who waits for the TransferQueue.

        Raises:
            RolloutsFailed: if a prompt is not for a single turn of text.
        """
        validate = bool(batch["validate"]) if "validate" in batch else False
        columns = [(key, values) for key, values in batch.items() if key != "validate"]
        prompts = [{key: _item(values, i) for key, values in columns} for i in range(len(batch))]
        for prompt in prompts:
            check_single_turn_text(prompt)
        task = asyncio.create_task(self._run_prompts(prompts, validate))
        self.background_tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.background_tasks.discard(task)
        failure = task.exception()
        if failure is not None:
            logger.error("work on a batch of prompts ended", exc_info=failure)
            self.failure = self.failure or failure

    async def _run_prompts(self, prompts: list[Prompt], validate: bool) -> None:
        """Start all shares, and store each, in the batch's order, once it is graded.

        Raises:
            RolloutsFailed: if not one rollout of the batch can be stored.
        """
        partition_id = "val" if validate else "train"
        await _set_status({prompt["uid"]: "running" for prompt in prompts}, partition_id)
        asked, lost = sum(self._rollouts_of(prompt, validate) for prompt in prompts), 0
        shares = list(self._shares(prompts, validate))
        generations = [asyncio.create_task(self._generate(share, validate)) for share in shares]
        try:
            for generation in generations:
                rollouts = await generation
                failed = [rollout for rollout in rollouts if rollout.lost]
                for rollout in failed:
                    logger.error(
                        "rollout %d of prompt %s is lost: %s", rollout.session_id, rollout.prompt["uid"], rollout.lost
                    )
                lost += len(failed)
                # What befalls all is no matter of a rollout. A batch of one prompt may stand in for one that failed.
                if lost == asked and (validate or len(prompts) > 1):
                    raise RolloutsFailed(f"all {lost} rollouts failed, the last by {failed[-1].lost}")
                await self._store([rollout for rollout in rollouts if not rollout.lost], partition_id)
                # As upstream: a prompt that lacks a rollout has failed, and the trainer takes what it has.
                statuses = {rollout.prompt["uid"]: "finished" for rollout in rollouts}
                await _set_status(statuses | {rollout.prompt["uid"]: "failure" for rollout in failed}, partition_id)
        finally:
            for generation in generations:
                generation.cancel()

    def _shares(self, prompts: list[Prompt], validate: bool) -> Iterator[list[tuple[int, Prompt]]]:
        """Neighbouring prompts with their places in the batch, of about `ROLLOUTS_TOGETHER` rollouts."""
        share: list[tuple[int, Prompt]] = []
        rollouts = 0
        for place, prompt in enumerate(prompts):
            share.append((place, prompt))
            rollouts += self._rollouts_of(prompt, validate)
            if rollouts >= ROLLOUTS_TOGETHER:
                yield share
                share, rollouts = [], 0
        if share:
            yield share

    async def _generate(self, prompts: list[tuple[int, Prompt]], validate: bool) -> list[Rollout]:
        """Rollouts of a share, each with its graded response or why it is lost."""
        rollouts: list[Rollout] = []
        for place, prompt in prompts:
            rollouts += await self._requests(place, prompt, validate)
        await self._respond([rollout for rollout in rollouts if not rollout.lost])
        if self.reward_loop_worker_handles is not None:
            await self._grade([rollout for rollout in rollouts if not rollout.lost])
        return rollouts

    async def _requests(self, place: int, prompt: Prompt, validate: bool) -> list[Rollout]:
        """A prompt's rollouts with what the server is asked for; `place` is the prompt's in the batch."""
        sessions = self._rollouts_of(prompt, validate)
        prompt.pop("__rollout_n__", None)
        sampling_params = self._sampling_params(validate, prompt.pop("__do_sample__", True))
        try:
            prompt_ids = await self.single_turn.ct_build_initial_tokens(list(prompt["raw_prompt"]))
        except Exception as error:  # the chat template's
            return [Rollout(prompt, session_id, lost=f"tokenizing: {told(error)}") for session_id in range(sessions)]
        rollouts = []
        for session_id in range(sessions):
            seed = self._request_seed(int(validate), prompt["global_steps"], place, session_id)
            request = {"prompt_ids": prompt_ids, "sampling_params": sampling_params | seed}
            rollouts.append(Rollout(prompt, session_id, request))
        return rollouts

    async def _respond(self, rollouts: list[Rollout]) -> None:
        """Responses into `rollouts`."""
        if not rollouts:
            return
        timing: dict[str, float] = {}
        with simple_timer("generate_sequences", timing), _doing("generation"):
            tokens = await self.llm_client.generate_batch([rollout.request for rollout in rollouts])
        for rollout, token in zip(rollouts, tokens, strict=True):
            if isinstance(token, str):
                rollout.lost = f"generation: {token}"
            elif not token.token_ids:
                # Upstream puts the reward on a response's last token. vLLM gives at least one, unless it is stopped.
                rollout.lost = f"generation: the response is empty, stop_reason={token.stop_reason}"
            else:
                rollout.output = self._agent_loop_output(rollout.request["prompt_ids"], token, timing)

    async def _store(self, rollouts: list[Rollout], partition_id: str) -> None:
        if not rollouts:
            return
        records = [_record(rollout) for rollout in rollouts]
        with _doing("writing to the TransferQueue"):
            await tq.async_kv_batch_put(
                keys=[f"{rollout.prompt['uid']}_{rollout.session_id}_0" for rollout in rollouts],
                fields=list_of_dict_to_tensordict([fields for fields, _ in records]),
                tags=[tag for _, tag in records],
                partition_id=partition_id,
            )

    def _rollouts_of(self, prompt: Prompt, validate: bool) -> int:
        configured = self.rollout_config.val_kwargs.n if validate else self.rollout_config.n
        return int(prompt.get("__rollout_n__", configured))

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

    def _request_seed(self, *place: int) -> dict[str, int]:
        """A seed of its own for each rollout, so that a run repeats whatever vLLM batches together.

        Upstream's servers give all requests one seed, and with it all rollouts of a prompt the same response.
        """
        if not self.rollout_config.full_determinism:
            return {}
        return {"seed": int(np.random.SeedSequence([self.rollout_config.seed, *place]).generate_state(1)[0])}

    def _agent_loop_output(
        self, prompt_ids: list[int], token: TokenOutput, timing: dict[str, float]
    ) -> AgentLoopOutput:
        """What `SingleTurnAgentLoop.run` returns for one rollout."""
        length = self.rollout_config.response_length
        steps = token.extra_fields.get("global_steps")
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=token.token_ids[:length],
            response_mask=[1] * len(token.token_ids[:length]),
            response_logprobs=token.log_probs[:length] if token.log_probs else None,
            multi_modal_data={},
            num_turns=2,
            metrics={
                "generate_sequences": timing["generate_sequences"],
                "num_preempted": -1 if token.num_preempted is None else token.num_preempted,
            },
            extra_fields={
                **token.extra_fields,
                "min_global_steps": steps,
                "max_global_steps": steps,
                "turn_scores": [],
                "tool_rewards": [],
            },
        )

    async def _grade(self, rollouts: list[Rollout]) -> None:
        """Scores into `rollouts`, by the reward workers, an equal share each."""
        if not rollouts:
            return
        batch, handles = _reward_batch(rollouts), self.reward_loop_worker_handles
        share = -(-len(rollouts) // len(handles))
        timing: dict[str, float] = {}
        with simple_timer("compute_score", timing), _doing("grading"):
            calls = [
                _grade_rows(handle, batch[start : start + share])
                for handle, start in zip(handles, range(0, len(rollouts), share), strict=False)
            ]
            results = [result for chunk in await asyncio.gather(*calls) for result in chunk]
        for rollout, result in zip(rollouts, results, strict=True):
            if isinstance(result, BaseException):
                rollout.lost = f"grading: {told(result)}"
            elif not _is_score(result["reward_score"]):
                rollout.lost = f"grading: reward_score={result['reward_score']!r}: expected a finite number"
            else:
                rollout.output.reward_score = result["reward_score"]
                rollout.output.extra_fields["reward_extra_info"] = result["reward_extra_info"]
                rollout.output.metrics.compute_score = timing["compute_score"]


async def _grade_rows(handle: Any, batch: DataProto) -> list[dict[str, Any] | BaseException]:
    """Grades of a reward worker, row by row where they do not come together: those that raise tell their error.

    Raises:
        RayError: if it is not the grading itself that failed, but the reward worker or who it asks.
    """
    try:
        return await handle.compute_score_batch.remote(batch)
    except RayTaskError as error:
        if not _raised_by_grading(error):
            raise
    grades: list[dict[str, Any] | BaseException] = []
    calls = [handle.compute_score.remote(batch[row : row + 1]) for row in range(len(batch))]
    for grade in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(grade, BaseException) and not _raised_by_grading(grade):
            raise grade
        grades.append(grade)
    return grades


def _raised_by_grading(error: BaseException) -> bool:
    """Whether a reward function raised it; one that asks an actor which died is not to blame."""
    return isinstance(error, RayTaskError) and (
        not isinstance(error.cause, RayError) or isinstance(error.cause, RayTaskError)
    )


def _is_score(value: Any) -> bool:
    return isinstance(value, Real | torch.Tensor) and math.isfinite(value)


class BatchedAgentLoopManager(AgentLoopManagerTQ):
    """Upstream's manager with one worker, in the trainer's process, on an event loop of its own.

    The trainer waits while the worker works, and an actor would first import what this process has imported.
    `rollout.agent.num_workers` does not count here.
    """

    async def _init_agent_loop_workers(self) -> None:
        self.event_loop = asyncio.new_event_loop()
        threading.Thread(target=self.event_loop.run_forever, name="agent_loop", daemon=True).start()
        self.worker = self._on_event_loop(self._make_worker())

    async def _make_worker(self) -> BatchedAgentLoopWorker:
        # Agent loops keep the event loop that runs when they are made.
        return BatchedAgentLoopWorker(
            self.config, self.llm_client, self.teacher_client, self.reward_loop_worker_handles
        )

    def _on_event_loop(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self.event_loop).result()

    @property
    def failure(self) -> BaseException | None:
        """What ended the work on a batch, which will not be whole then."""
        return self.worker.failure

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Start on a batch of prompts and return; see `BatchedAgentLoopWorker.generate_sequences`."""
        self._on_event_loop(self.worker.generate_sequences(prompts))


def check_single_turn_text(prompt: Prompt) -> None:
    """That a row is one that the batched manager serves as upstream's would.

    Raises:
        RolloutsFailed: if it names another agent loop, or holds images, videos or audio.
    """
    agent_name = prompt.get("agent_name", AGENT_LOOP)
    if agent_name != AGENT_LOOP:
        raise RolloutsFailed(f"agent_name={agent_name} in the data: {ONLY_SINGLE_TURN}")
    for message in prompt["raw_prompt"]:
        kinds = {part["type"] for part in message["content"]} if isinstance(message["content"], list) else set()
        if kinds - {"text"}:
            raise RolloutsFailed(f"a prompt with {', '.join(sorted(kinds - {'text'}))}: {ONLY_SINGLE_TURN}")


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """Errors inside say what was being done."""
    try:
        yield
    except Exception as error:
        raise RolloutsFailed(f"{what}: {told(error)}") from error


async def _set_status(statuses: dict[str, str], partition_id: str) -> None:
    with _doing("writing to the TransferQueue"):
        await tq.async_kv_batch_put(
            keys=list(statuses), partition_id=partition_id, tags=[{"status": status} for status in statuses.values()]
        )


def _item(value: Any, i: int) -> Any:
    """Row i of a TensorDict's column, whatever its kind."""
    if isinstance(value, NonTensorData) and not isinstance(value, NonTensorStack):
        return value.data
    row = value[i]
    return row.data if isinstance(row, NonTensorData) else row


def _reward_batch(rollouts: list[Rollout]) -> DataProto:
    """What a reward manager reads: padded tokens (batch, longest) and the columns of the prompts' rows."""
    prompt_rows, outputs = [rollout.prompt for rollout in rollouts], [rollout.output for rollout in rollouts]

    def padded(rows: list[list[int]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)

    prompts, responses = padded([o.prompt_ids for o in outputs]), padded([o.response_ids for o in outputs])
    attention_mask = torch.cat(
        [padded([[1] * len(o.prompt_ids) for o in outputs]), padded([o.response_mask for o in outputs])], dim=1
    )
    columns: dict[str, list[Any]] = {key: [prompt[key] for prompt in prompt_rows] for key in prompt_rows[0]}
    # A reward manager writes into extra_info, and the rollouts of a prompt share it.
    columns["extra_info"] = [dict(prompt.get("extra_info") or {}) for prompt in prompt_rows]
    columns["session_id"] = [rollout.session_id for rollout in rollouts]
    columns["__num_turns__"] = [output.num_turns for output in outputs]
    columns["tool_extra_fields"] = [output.extra_fields for output in outputs]
    return DataProto(
        batch=TensorDict(
            {
                "prompts": prompts,
                "responses": responses,
                "attention_mask": attention_mask,
                "input_ids": torch.cat([prompts, responses], dim=1),
            },
            batch_size=len(outputs),
        ),
        non_tensor_batch={key: _object_array(values) for key, values in columns.items()},
    )


def _object_array(values: list[Any]) -> np.ndarray:
    """One-dimensional, even where the values are lists of one length."""
    array: np.ndarray = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _record(rollout: Rollout) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and the tag of one rollout in the TransferQueue."""
    output = rollout.output
    fields = output.as_dict() | rollout.prompt | {"session_id": rollout.session_id}
    fields.pop("multi_modal_data", None)
    prompt_len, response_len = len(output.prompt_ids), len(output.response_ids)
    fields["loss_mask"] = fields["response_mask"]
    fields["input_ids"] = torch.cat([fields["prompts"], fields["responses"]])
    fields["position_ids"] = torch.arange(prompt_len + response_len)
    fields["multi_modal_inputs"] = {}
    tag = {
        "status": "success",
        "prompt_len": prompt_len,
        "response_len": response_len,
        "seq_len": prompt_len + response_len,
        "global_steps": rollout.prompt["global_steps"],
        "min_global_steps": output.extra_fields["min_global_steps"],
        "max_global_steps": output.extra_fields["max_global_steps"],
    }
    return fields, tag
