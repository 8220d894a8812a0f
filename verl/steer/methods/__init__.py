# SPDX-License-Identifier: Apache-2.0
"""Losses and advantage estimators of other papers, to compare STEER with; docs/interventions.md compares them.

Importing the package registers them all.
"""

from verl.steer.methods import (
    adaptive_entropy,
    archer,
    bapo,
    ce_gppo,
    clip_b_v,
    dynamic_clip,
    entropy_shaped_advantage,
    gtpo,
    high_entropy_tokens,
    quadrant,
    sample_reinforcement,
    unlikeliness,
)

__all__ = [
    "adaptive_entropy",
    "archer",
    "bapo",
    "ce_gppo",
    "clip_b_v",
    "dynamic_clip",
    "entropy_shaped_advantage",
    "gtpo",
    "high_entropy_tokens",
    "quadrant",
    "sample_reinforcement",
    "unlikeliness",
]
