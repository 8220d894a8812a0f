# SPDX-License-Identifier: Apache-2.0
"""The reward of a response from a reward model: a continuous score that no rule verifies.

verl calls `compute_score` as its custom reward function, `pkg://verl.steer.grading.learned`. A model runs in each of
verl's reward workers, on the CPU, so it should be small; for large ones verl has `reward.reward_model`.
"""

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from verl.steer.grading import score


@cache
def load(model_path: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model of a reward model.

    Args:
        model_path: a Hugging Face folder of a sequence classifier with one label, as `scripts/make_reward_model.py` or
            TRL's `RewardTrainer` saves it.

    Raises:
        ValueError: the classifier has several labels.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, dtype=torch.float32).eval()
    if model.config.num_labels != 1:
        raise ValueError(
            f"reward.custom_reward_function.reward_kwargs.model_path={model_path}: {model.config.num_labels} labels: "
            "expected a reward model with one"
        )
    return tokenizer, model


def dialogue_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Tokens of a question and its answer, both of one turn, in the model's chat template."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    model_path: str,
    **kwargs: Any,
) -> dict[str, Any]:
    """Grade one response by the reward model; the rule of its data source gives the rest.

    Args:
        data_source: the row's data source.
        solution_str: the response.
        ground_truth: the right answer, for the rule alone.
        extra_info: the row's; its `raw_problem` is the prompt that the reward model reads.
        model_path: see `load`.
        **kwargs: options of the rule.

    Returns:
        The grade of `verl.steer.grading.score`, with the reward model's logit as `score`. `acc` remains the rule's.
    """
    tokenizer, model = load(model_path)
    with torch.inference_mode():
        ids = torch.tensor([dialogue_ids(tokenizer, extra_info["raw_problem"], solution_str)])
        logit = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
    grade = score.compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    # verl's own graders return a number for some sources.
    return {**(grade if isinstance(grade, dict) else {"acc": grade}), "score": float(logit)}
