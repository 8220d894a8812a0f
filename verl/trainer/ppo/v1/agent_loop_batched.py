# SPDX-License-Identifier: Apache-2.0
"""Single-turn generation a batch at a time, named by `rollout.agent.agent_loop_manager_class`.

verl runs one agent loop for each rollout: a few Ray calls and one write to the TransferQueue apiece, which is what a
step of short responses spends its time on. Here a share of the rollouts, a hundred-odd, goes to each vLLM replica in
one call, is graded in one and written in one, while later shares are generated. Samples, fields and tags are those of
`verl.trainer.ppo.v1.agent_loop_tq`. Text-only prompts and the agent loop `single_turn_agent` are what it serves.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker, DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.protocol import DataProto
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, apply_greedy_sampling_params
from verl.utils.profiler import simple_timer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

logger = logging.getLogger(__name__)

Prompt = dict[str, Any]
#: A prompt and the number of the rollout within its group.
Rollout = tuple[Prompt, int]
Result = TypeVar("Result")

#: Rollouts that are generated, graded and stored together: few enough that a step has others to generate meanwhile.
ROLLOUTS_TOGETHER = 128


class BatchedAgentLoopWorker(AgentLoopWorker):
    """Generates, grades and stores a batch of single-turn prompts together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.distillation_enabled or self.rollout_config.agent.default_agent_loop != "single_turn_agent":
            raise ValueError(
                f"rollout.agent.default_agent_loop={self.rollout_config.agent.default_agent_loop}: the batched manager "
                "serves single_turn_agent without distillation; expected rollout.agent.agent_loop_manager_class=null"
            )
        self.background_tasks: set[asyncio.Task[None]] = set()
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
        """Start on a batch of prompts and return; what becomes of it goes to the TransferQueue."""
        validate = bool(batch["validate"]) if "validate" in batch else False
        columns = [(key, values) for key, values in batch.items() if key != "validate"]
        prompts = [{key: _item(values, i) for key, values in columns} for i in range(len(batch))]
        task = asyncio.create_task(self._run_prompts(prompts, validate))
        self.background_tasks.add(task)
        task.add_done_callback(self.background_tasks.discard)

    async def _run_prompts(self, prompts: list[Prompt], validate: bool) -> None:
        """Start all shares, and store each, in the batch's order, once it is graded."""
        partition_id = "val" if validate else "train"
        await _set_status(prompts, partition_id, "running")
        shares = list(self._shares(prompts, validate))
        generations = [asyncio.create_task(self._generate(share, validate)) for share in shares]
        for share, generation in zip(shares, generations, strict=True):
            status = "finished"
            try:
                await self._store(*await generation, partition_id)
            except Exception:
                # As upstream: the trainer learns of a failed group by its status, and the log says why.
                logger.exception("generation of %d prompts failed", len(share))
                status = "failure"
            await _set_status([prompt for _, prompt in share], partition_id, status)

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

    async def _generate(
        self, prompts: list[tuple[int, Prompt]], validate: bool
    ) -> tuple[list[Rollout], list[AgentLoopOutput]]:
        """Rollouts of a share and what became of each, graded."""
        rollouts: list[Rollout] = []
        requests: list[dict[str, Any]] = []
        for place, prompt in prompts:
            sessions = self._rollouts_of(prompt, validate)
            prompt.pop("__rollout_n__", None)
            sampling_params = self._sampling_params(validate, prompt.pop("__do_sample__", True))
            prompt_ids = await self.single_turn.ct_build_initial_tokens(list(prompt["raw_prompt"]))
            for session_id in range(sessions):
                rollouts.append((prompt, session_id))
                seed = self._request_seed(int(validate), prompt["global_steps"], place, session_id)
                requests.append({"prompt_ids": prompt_ids, "sampling_params": sampling_params | seed})
        timing: dict[str, float] = {}
        with simple_timer("generate_sequences", timing):
            tokens = await self.llm_client.generate_batch(requests)
        outputs = [
            self._agent_loop_output(request["prompt_ids"], token, timing)
            for request, token in zip(requests, tokens, strict=True)
        ]
        if self.reward_loop_worker_handles is not None:
            await self._grade(rollouts, outputs)
        return rollouts, outputs

    async def _store(self, rollouts: list[Rollout], outputs: list[AgentLoopOutput], partition_id: str) -> None:
        records = [_record(*rollout, output) for rollout, output in zip(rollouts, outputs, strict=True)]
        await tq.async_kv_batch_put(
            keys=[f"{prompt['uid']}_{session_id}_0" for prompt, session_id in rollouts],
            fields=list_of_dict_to_tensordict([field for field, _ in records]),
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

    async def _grade(self, rollouts: list[Rollout], outputs: list[AgentLoopOutput]) -> None:
        """Scores into `outputs`, by the reward workers, an equal share each."""
        batch = _reward_batch(rollouts, outputs)
        handles = self.reward_loop_worker_handles
        share = -(-len(outputs) // len(handles))
        timing: dict[str, float] = {}
        with simple_timer("compute_score", timing):
            calls = [
                handle.compute_score_batch.remote(batch[start : start + share])
                for handle, start in zip(handles, range(0, len(outputs), share), strict=False)
            ]
            results = [result for chunk in await asyncio.gather(*calls) for result in chunk]
        for output, result in zip(outputs, results, strict=True):
            output.reward_score = result["reward_score"]
            output.extra_fields["reward_extra_info"] = result["reward_extra_info"]
            output.metrics.compute_score = timing["compute_score"]


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

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Start on a batch of prompts and return; see `BatchedAgentLoopWorker.generate_sequences`."""
        self._on_event_loop(self.worker.generate_sequences(prompts))


async def _set_status(prompts: list[Prompt], partition_id: str, status: str) -> None:
    uids = [prompt["uid"] for prompt in prompts]
    await tq.async_kv_batch_put(keys=uids, partition_id=partition_id, tags=[{"status": status}] * len(uids))


def _item(value: Any, i: int) -> Any:
    """Row i of a TensorDict's column, whatever its kind."""
    if isinstance(value, NonTensorData) and not isinstance(value, NonTensorStack):
        return value.data
    row = value[i]
    return row.data if isinstance(row, NonTensorData) else row


def _reward_batch(rollouts: list[Rollout], outputs: list[AgentLoopOutput]) -> DataProto:
    """What a reward manager reads: padded tokens (batch, longest) and the columns of the prompts' rows."""

    def padded(rows: list[list[int]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)

    prompts, responses = padded([o.prompt_ids for o in outputs]), padded([o.response_ids for o in outputs])
    attention_mask = torch.cat(
        [padded([[1] * len(o.prompt_ids) for o in outputs]), padded([o.response_mask for o in outputs])], dim=1
    )
    columns: dict[str, list[Any]] = {key: [prompt[key] for prompt, _ in rollouts] for key in rollouts[0][0]}
    # A reward manager writes into extra_info, and the rollouts of a prompt share it.
    columns["extra_info"] = [dict(prompt.get("extra_info") or {}) for prompt, _ in rollouts]
    columns["session_id"] = [session_id for _, session_id in rollouts]
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


def _record(prompt: Prompt, session_id: int, output: AgentLoopOutput) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields and the tag of one rollout in the TransferQueue."""
    field = output.as_dict() | prompt | {"session_id": session_id}
    field.pop("multi_modal_data", None)
    prompt_len, response_len = len(output.prompt_ids), len(output.response_ids)
    field["loss_mask"] = field["response_mask"]
    field["input_ids"] = torch.cat([field["prompts"], field["responses"]])
    field["position_ids"] = torch.arange(prompt_len + response_len)
    field["multi_modal_inputs"] = {}
    tag = {
        "status": "success",
        "prompt_len": prompt_len,
        "response_len": response_len,
        "seq_len": prompt_len + response_len,
        "global_steps": prompt["global_steps"],
        "min_global_steps": output.extra_fields["min_global_steps"],
        "max_global_steps": output.extra_fields["max_global_steps"],
    }
    return field, tag
