# SPDX-License-Identifier: Apache-2.0
"""Tasks that a laptop can train on, by their data source."""

from verl.steer.tasks import arithmetic, countdown

TASKS = {task.DATA_SOURCE: task for task in (arithmetic, countdown)}
