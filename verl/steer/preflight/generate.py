# SPDX-License-Identifier: Apache-2.0
"""vLLM on one prompt, as a process: `python -m verl.steer.preflight.generate FOLDER`, with the configuration there.

The engine has the run's options, but loads the model's weights, which a run sends it, and compiles nothing.
"""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from verl.steer.preflight.processes import TOKENS, write_row
from verl.steer.preflight.rows import run_check
from vllm import LLM, SamplingParams


def generate(folder: Path, config: DictConfig) -> str:
    """Sample two responses of a few tokens, and keep them with their log-probs."""
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    names = ("dtype", "gpu_memory_utilization", "logprobs_mode", "max_model_len", "max_num_seqs")
    options = {name: rollout[name] for name in names}
    options |= {name: model[name] for name in ("tokenizer_path", "trust_remote_code")}
    options |= rollout.engine_kwargs.get("vllm") or {}
    llm = LLM(
        model.path,
        tokenizer=options.pop("tokenizer_path"),
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        enforce_eager=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    sampling = SamplingParams(n=2, max_tokens=8, ignore_eos=True, logprobs=0, seed=0)
    chat, template = [{"role": "user", "content": "1+2"}], model.custom_chat_template
    (found,) = llm.chat(chat, sampling, use_tqdm=False, chat_template=template)
    responses = [list(output.token_ids) for output in found.outputs]
    log_probs = [[at[token].logprob for at, token in zip(o.logprobs, o.token_ids, strict=True)] for o in found.outputs]
    tokens = {"prompt": found.prompt_token_ids, "responses": responses, "log_probs": log_probs}
    (folder / TOKENS).write_text(json.dumps(tokens))
    return f"after '1+2': {', '.join(repr(output.text) for output in found.outputs)}"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_row(place, "vllm", 0, run_check("vLLM", generate, place, OmegaConf.load(place / "config.yaml")))
