# SPDX-License-Identifier: Apache-2.0
"""Fewer garbage collections while a process of a run imports; this module imports nothing that takes time.

Of the time in which a process imports torch, verl and vLLM, Python's collector takes a fifth: it traverses all objects
again whenever a quarter of them is new. `verl.steer.gc_heap.freeze_gc_heap` restores Python's own rule.
"""

import gc


def collect_seldom() -> None:
    """Collect once for 100,000 new objects in place of 700. Ray calls this in a worker's process before all else."""
    gc.set_threshold(100_000)


# In a process that `multiprocessing` spawns for the vLLM server's actor: see verl.steer.rollout.server_actor.
if __name__ == "__mp_main__":
    collect_seldom()
