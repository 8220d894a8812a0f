# SPDX-License-Identifier: Apache-2.0
"""Losses and advantage estimators of other papers, to compare STEER with; docs/interventions.md compares them.

Importing the package registers them all.
"""

from verl.steer.methods import (  # noqa: F401 - registers the methods
    adaptive_entropy,
    aepo,
    archer,
    bapo,
    ce_gppo,
    clip_b_v,
    dynamic_clip,
    entrocraft,
    entropic,
    entropy_shaped_advantage,
    gtpo,
    high_entropy_tokens,
    opefo,
    positive_advantage,
    quadrant,
    sample_reinforcement,
    siren,
    unlikeliness,
)
