# SPDX-License-Identifier: Apache-2.0
"""Rule that grades solutions of the arithmetic problems of ``verl.steer.tasks.arithmetic``."""

from verl.steer.tasks.arithmetic import ANSWER_MARKER

# An answer has a handful of characters: text before the last ones can't hold the final marker.
_TAIL_CHARACTERS = 64


def compute_score(solution_str: str, ground_truth: str) -> dict[str, float | bool | str]:
    """Grade the text after the last answer marker, compared as text with the ground truth.

    Only the last 64 characters are read, and nothing in them is evaluated or parsed as a number.

    Returns:
        ``score`` +1.0 or -1.0, ``acc`` whether the answer is right, and ``pred``, the answer found
        (the empty string without a marker).
    """
    _, marker, answer = solution_str[-_TAIL_CHARACTERS:].rpartition(ANSWER_MARKER)
    pred = answer.strip() if marker else ""
    acc = pred == ground_truth
    return {"score": 1.0 if acc else -1.0, "acc": acc, "pred": pred}
