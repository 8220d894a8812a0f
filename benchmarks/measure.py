# SPDX-License-Identifier: Apache-2.0
"""Wall time and peak memory of a piece of work, for the benchmarks beside this file; needs torch alone."""

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of `work`, on CUDA by the device's own clock."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_extra_bytes(work: Callable[[], None], device: str) -> int:
    """Peak of what `work` holds beyond what was allocated before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
