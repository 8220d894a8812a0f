# SPDX-License-Identifier: Apache-2.0
"""The reward of STEER's runs, chosen by data source.

Reached through verl's own hook: `reward.custom_reward_function.path=pkg://verl.steer.grading.score`.
Data sources that aren't STEER's are graded by verl's `default_compute_score`.
"""

from typing import Any, Literal

from verl.steer.grading import boxed
from verl.utils.reward_score import default_compute_score

TRAINING_SOURCES = {"math_dapo"}
# Beginnings, since one benchmark has several names: aime_2024_dapo_boxed, minerva_math, omni and omni_math_test, …
BENCHMARKS = ("aime", "amc", "gsm8k", "math500", "minerva", "olympiad", "omni")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    *,
    rule: Literal["auto", "train", "eval"] = "auto",
    timeout: float = 2.0,
    **kwargs: Any,
) -> dict | float:
    """Grade one response, with the signature that verl's reward managers call.

    Args:
        data_source: the row's data source; it picks the grader.
        solution_str: the response.
        ground_truth: the row's `reward_model.ground_truth`.
        extra_info: the row's `extra_info`; for verl's own graders only.
        rule: `auto` grades benchmarks by the evaluation rule and training data by the training rule; `train` and `eval`
            apply one rule to every mathematical source. verl doesn't tell a reward function whether it validates.
        timeout: seconds of CPU time that a symbolic comparison may take.
        **kwargs: for verl's own graders, such as `sandbox_fusion_url`.

    Returns:
        `{"score": ±1.0, "acc": bool, "pred": str, "timed_out": bool}` for mathematical sources, arithmetic included;
        what their grader returns for others.

    Raises:
        ValueError: `rule` is none of the three.
        NotImplementedError: neither STEER nor verl has a grader for `data_source`.
    """
    if rule not in ("auto", "train", "eval"):
        raise ValueError(f"rule={rule!r}: expected 'auto', 'train' or 'eval'")
    is_benchmark = data_source.startswith(BENCHMARKS)
    if is_benchmark or data_source in TRAINING_SOURCES:
        if rule == "auto":
            rule = "eval" if is_benchmark else "train"
        return boxed.compute_score(solution_str, ground_truth, rule=rule, timeout=timeout)
    if data_source == "arithmetic":
        from verl.steer.tasks import arithmetic_score as arithmetic

        # verl takes a batch's keys from its first row, so all of STEER's sources have the same.
        return {**arithmetic.compute_score(solution_str, ground_truth), "timed_out": False}
    return default_compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
