# SPDX-License-Identifier: Apache-2.0
"""Two Ray nodes in network namespaces of this machine: `run/two_nodes.sh`, and what its runs leave."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from verl.steer.report.metrics_files import in_order

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Four prompts of eight rollouts a step, in two updates; micro-batches that divide one rank's share of either.
SMALL = (
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
)

#: The node that dies.
SECOND = "10.77.0.2"


@pytest.fixture(scope="module")
def out(tmp_path_factory, command, root):
    """The output folder of the script, which ended well: so it checked that the run failed without the second node."""
    words = "unshare --map-root-user --net --mount --pid --fork --mount-proc ip link add switch type bridge".split()
    try:
        probe = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if probe.returncode:
        pytest.skip(f"this machine makes no network namespaces: {probe.stderr.strip()}")
    folder = tmp_path_factory.mktemp("two_nodes")
    task = folder / "laptop"
    program = root / "scripts/make_laptop_task.py"
    made = command(sys.executable, program, "--out", task, "--quiet", "--steps", 20, "--train-size", 64)
    assert made.returncode == 0, made.stderr
    out = folder / "out"
    result = command("bash", root / "run/two_nodes.sh", *SMALL, cwd="/", OUTPUT_DIR=str(out), TASK_DIR=str(task))
    logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in sorted(out.glob("*.log")))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    print(result.stdout)
    return out


def steps_of(file: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics."""
    records = map(json.loads, file.read_text().splitlines())
    return {record["step"]: record["data"] for record in records}


def test_each_start_goes_on_after_the_last_checkpoint(out):
    run = out / "steer_exp"
    saved = json.loads((run / "checkpoint_ledger.json").read_text())["saved_steps"]
    *_, resumed_from, last = saved
    assert saved[:2] == [2, 4] and last == resumed_from + 2
    first, resumed, after = map(steps_of, in_order(run))
    assert list(first) == [1, 2] and min(resumed) == 3
    # A step that was saved but not logged when the node died is logged by the next start.
    assert resumed_from <= min(after) <= resumed_from + 1 and {*first, *resumed, *after} == set(range(1, last + 1))
    for data in (*first.values(), *resumed.values(), *after.values()):
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "critic/score/mean"):
            assert math.isfinite(data[name])
        assert 0.8 - 1e-6 <= data["actor/token_weights_min"] <= data["actor/token_weights_max"] <= 1
        # Each replica samples from the weights that the ranks of both nodes have trained.
        assert data["training/rollout_probs_diff_max"] < 1e-4


def test_a_checkpoint_has_both_ranks(out):
    for folder in (out / "steer_exp").glob("global_step_*"):
        for part in ("model", "optim", "extra_state"):
            for rank in (0, 1):
                assert (folder / f"actor/{part}_world_size_2_rank_{rank}.pt").stat().st_size > 0
        assert not (folder / ".unfinished").exists()


def test_the_lost_node_is_named(out):
    """One rank was on it, the other was not. If Ray had put the task runner there, its death alone may be reported."""
    lines = [line for line in (out / "lost_node.log").read_text().splitlines() if line.startswith("steer-verl:")]
    assert len(set(lines)) == 1
    dead = lines[0].removeprefix("steer-verl: ").split("; ")
    assert all(actor.endswith(f" on node {SECOND}) died with its node") for actor in dead)
    ranks = sum(actor.startswith("WorkerDict ") for actor in dead)
    assert ranks == 1 or ranks == 0 and any(actor.startswith("SteerTaskRunner ") for actor in dead)
