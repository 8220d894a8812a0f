# SPDX-License-Identifier: Apache-2.0
"""verl's process groups, on a CPU too."""

from verl.utils.device import get_device_name

from verl_steer import upstream

_upstream = upstream(globals())


def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> None:
    """Initialise the process group of a Ray worker; see upstream's function of this name.

    Upstream names two devices, the CPU and the accelerator, each with its backend. torch refuses that where both are
    the CPU, so there the CPU is named once.
    """
    if backend is None and get_device_name() == "cpu":
        backend = "cpu:gloo"
    _upstream.initialize_global_process_group_ray(timeout_second=timeout_second, backend=backend)
