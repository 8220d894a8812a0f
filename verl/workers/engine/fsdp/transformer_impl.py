# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine, registered for the CPU too."""

from verl.workers.engine.base import EngineRegistry

from verl_steer import upstream

_upstream = upstream(globals())

# FSDP2 shards on the CPU over gloo; FSDP1 wants an accelerator, and verl says so when it is asked for.
EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(_upstream.FSDPEngineWithLMHead)
