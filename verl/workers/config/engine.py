# SPDX-License-Identifier: Apache-2.0
"""verl's engine configurations, with this fork's option of the FSDP engine."""

from __future__ import annotations

from dataclasses import dataclass

from verl_steer import upstream

_upstream = upstream(globals())


@dataclass
class FSDPEngineConfig(_upstream.FSDPEngineConfig):
    """Upstream's fields and one more.

    Args:
        one_pass_reductions: log-prob and entropy from one reading of the logits (verl.steer.engine.vocab_reductions)
            in place of upstream's separate functions. `entropy_from_logits_with_chunking` and `entropy_checkpointing`
            have nothing left to do then.
    """

    one_pass_reductions: bool = False
