# SPDX-License-Identifier: Apache-2.0
"""verl's synchronous trainer; `trainer.v1.trainer_mode=steer` names the one that extends it."""

from verl_steer import upstream

_upstream = upstream(globals())

# Registers itself. Upstream imports this module wherever it looks a trainer up, and no other does.
from verl.steer import trainer as trainer_steer  # noqa: E402, F401
