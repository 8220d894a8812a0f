# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector in processes that import a great deal."""

from __future__ import annotations

import gc


def freeze_gc_heap() -> None:
    """Have later collections pass over what there is now, which a process keeps to its end.

    A full collection looks at every object: the million that torch, transformers and vLLM leave behind take it a third
    of a second, and each step of a few hundred rollouts makes enough new ones to set it off.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(700)  # Python's own, which verl_steer_gc raises for the start
