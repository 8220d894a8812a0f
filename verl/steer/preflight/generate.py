# SPDX-License-Identifier: Apache-2.0
"""vLLM on one prompt, as a process: `python -m verl.steer.preflight.generate FOLDER`.

FOLDER holds the configuration; the tokens go there, for the comparison with FSDP. The engine has the run's options,
but it loads the model's weights, which a run sends it, and compiles nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from verl.steer.preflight.processes import TOKENS, write_row
from verl.steer.preflight.rows import run_check
from vllm import LLM, SamplingParams

PROMPT, LENGTH = [{"role": "user", "content": "1+2"}], 8


def generate(folder: Path, config: DictConfig) -> str:
    """Sample a few tokens and keep them with their log-probs."""
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    options = OmegaConf.to_container(rollout.engine_kwargs.get("vllm") or OmegaConf.create({}))
    llm = LLM(
        model=model.path,
        tokenizer=model.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        dtype=rollout.dtype,
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        max_model_len=rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        enforce_eager=True,
        seed=0,
        **{key: value for key, value in options.items() if value is not None},
    )
    tokenizer = llm.get_tokenizer()
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=True, return_dict=False)
    sampling = SamplingParams(temperature=1.0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
    response = list(output.token_ids)
    log_probs = [position[token].logprob for position, token in zip(output.logprobs, response, strict=True)]
    (folder / TOKENS).write_text(json.dumps({"prompt": prompt, "response": response, "log_probs": log_probs}))
    return f"{len(response)} tokens after a prompt of {len(prompt)}: {tokenizer.decode(response)!r}"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / TOKENS).unlink(missing_ok=True)
    write_row(place, "vllm", 0, run_check("vLLM", generate, place, OmegaConf.load(place / "config.yaml")))
