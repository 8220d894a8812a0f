# SPDX-License-Identifier: Apache-2.0
"""Where a laptop run's time goes: the start, stage by stage, and a step, part by part, beside verl's own loop.

    python benchmarks/loop_profile.py --rollouts 128 512 --steps 5

Trains GRPO on the laptop task (made by `run/quickstart.sh` or `scripts/make_laptop_task.py`) without validation, once
for each way and number of rollouts a step, one run after the other. `verl` has upstream's trainer, replay buffer,
agent loops, storage units, reductions, padding, optimizer step, vLLM executor, garbage collection of the start and
waiting threads; `fork` has this fork's. Step times are medians without the first step, which compiles and warms up.
Ray's own timeline of the run divides a step into the calls of the processes; calls that overlap count once.
"""

from __future__ import annotations

import argparse
import bisect
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
ROLLOUT = "actor_rollout_ref.rollout"

WAYS = {
    "verl": [
        "trainer.v1.trainer_mode=sync",
        f"{ROLLOUT}.agent.agent_loop_manager_class=null",
        f"{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend=mp",
        "actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false",
        "actor_rollout_ref.actor.optim.override_optimizer_config=null",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=8",
        f"{ROLLOUT}.engine_kwargs.vllm.num_gpu_blocks_override=null",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "ray_kwargs.ray_init.runtime_env.env_vars.TORCHDYNAMO_DISABLE='0'",
        "~ray_kwargs.ray_init.runtime_env.worker_process_setup_hook",
    ],
    "fork": [],
}

#: libgomp's own number of looks before a waiting thread sleeps; the launchers' OMP_WAIT_POLICY makes it 0.
ENVIRONMENT = {"verl": {"GOMP_SPINCOUNT": "300000"}, "fork": {}}

#: What a run prints when a stage of its start is over.
STAGES = {
    "configuration, Ray": "Started a local Ray",
    "task runner": "'actor_rollout_ref'",
    "FSDP worker": "reward loop manager initialized",
    "vLLM server": "LLMServerManager:",
    "agent loop, first step": "step:1 ",
}

#: Parts of a step, by their metrics of verl's.
PARTS = ("gen", "old_log_prob", "adv", "update_actor", "update_weights", "step")


#: Calls of either way -> the work that they do; other calls are shown by their own names.
WORK = {
    "vLLMHttpServer.generate": "generation",
    "VLLMServerActor.generate_batch": "generation",
    "RewardLoopWorker.compute_score": "grading",
    "RewardLoopWorker.compute_score_batch": "grading",
    "WorkerDict.actor_rollout_compute_log_prob": "old log-probs",
    "WorkerDict.actor_rollout_update_actor": "updates",
    "WorkerDict.actor_rollout_update_weights": "weights to vLLM",
    "GlobalRequestLoadBalancer.acquire_server": "load balancer",
    "GlobalRequestLoadBalancer.release_server": "load balancer",
}

#: The work at whose end the trainer is done with a step's batch.
LAST_WORK = "updates"

#: Calls of fewer seconds a step are left out.
LEAST = 0.005


def train(way: str, rollouts: int, steps: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Run one training to its end; seconds from its start at which each stage was over.

    `folder` then has metrics.jsonl, timeline.json and log.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "bash",
        REPOSITORY / "run/run_grpo.sh",
        "task=arithmetic",
        "hardware=cpu",
        f"data.train_batch_size={rollouts // 8}",
        f"trainer.total_training_steps={steps}",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        f"ray_kwargs.timeline_json_file={folder.resolve() / 'timeline.json'}",
        *WAYS[way],
        *overrides,
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT_DIR": str(folder)}
    environment |= {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "VERL_LOGGING_LEVEL": "INFO"}
    environment |= ENVIRONMENT[way]
    start = time.monotonic()
    reached: dict[str, float] = {}
    with (
        open(folder / "log.txt", "w") as log,
        subprocess.Popen(
            [str(word) for word in words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:  # each line with its time, to look closer
            log.write(f"{time.monotonic() - start:7.2f} {line}")
            for stage, sign in STAGES.items():
                if stage not in reached and sign in line:
                    reached[stage] = time.monotonic() - start
    if process.returncode:
        sys.exit(f"loop_profile.py: {way} with {rollouts} rollouts failed: see {folder / 'log.txt'}")
    return reached


def step_parts(metrics: Path) -> dict[str, float]:
    """Median seconds of each part over the steps but the first."""
    rows = [json.loads(line)["data"] for line in metrics.read_text().splitlines()][1:]
    return {part: statistics.median(row[f"timing_s/{part}"] for row in rows) for part in PARTS}


def step_calls(timeline: Path) -> dict[str, float]:
    """Median seconds a step, over the steps but the first, during which calls for each kind of work run."""
    calls = []
    for event in json.loads(timeline.read_text()):
        if (category := event.get("cat", "")).startswith("task::"):
            name = category.removeprefix("task::")
            calls.append((event["ts"], event["ts"] + event["dur"], WORK.get(name, name)))
    ends = sorted(end for _, end, name in calls if name == LAST_WORK)
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(ends))
    busy_until: dict[str, float] = defaultdict(float)
    for start, end, name in sorted(calls):
        step = bisect.bisect_left(ends, start)
        if 0 < step < len(ends):
            seconds[name][step] += max(0.0, end - max(start, busy_until[name])) / 1e6
        busy_until[name] = max(busy_until[name], end)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {name: value for name, value in medians.items() if value >= LEAST}


def show(title: str, columns: dict[tuple[str, int], dict[str, float]], rows: list[str]) -> None:
    table = Table(title=title)
    table.add_column("")
    for way, rollouts in columns:
        table.add_column(f"{way} {rollouts}", justify="right")
    counts = list(dict.fromkeys(rollouts for _, rollouts in columns))
    pairs = [count for count in counts if all((way, count) in columns for way in WAYS)]
    for count in pairs:
        table.add_column(f"fork / verl {count}", justify="right")
    for row in rows:
        values = [f"{column[row]:.2f}" if row in column else "–" for column in columns.values()]
        ratios = [
            f"{columns['fork', count][row] / columns['verl', count][row]:.2f}"
            if row in columns["fork", count] and row in columns["verl", count]
            else "–"
            for count in pairs
        ]
        table.add_row(row, *values, *ratios)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[128, 512], help="a step, 8 to a prompt")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "loop_profile")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every run, after `--`")
    arguments = parser.parse_args()
    if importlib.util.find_spec("verl_steer") is None:
        sys.exit(f"loop_profile.py: {sys.executable} has no verl_steer: run it with the environment's own python")
    starts, parts, calls = {}, {}, {}
    for rollouts in arguments.rollouts:
        for way in arguments.ways:
            folder = arguments.out / f"{way}_{rollouts}"
            starts[way, rollouts] = train(way, rollouts, arguments.steps, folder, arguments.overrides)
            parts[way, rollouts] = step_parts(folder / "metrics.jsonl")
            calls[way, rollouts] = step_calls(folder / "timeline.json")
    show("seconds from the start to the end of each stage", starts, list(STAGES))
    show("seconds of a step's parts, medians", parts, list(PARTS))
    names = dict.fromkeys(name for column in calls.values() for name in column)
    show("seconds of a step in calls of the processes, medians", calls, list(names))


if __name__ == "__main__":
    main()
