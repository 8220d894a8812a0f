# SPDX-License-Identifier: Apache-2.0
"""Real runs on the laptop task that are killed, that lose a process, or whose disk is full.

A run of `STEER_CAMPAIGN_KILLS` (20) kills and as many starts is held against one that was never killed:

    bash run/test.sh -m slow -k campaign -n 0 -s
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from verl.steer.report.run_metrics import read_run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KILLS = int(os.environ.get("STEER_CAMPAIGN_KILLS", 20))
PHASES = ("start", "generation", "update", "checkpoint", "validation")
#: Enough for a validation in every fifth start, two steps on, and for kills that come a step late.
STEPS = KILLS + 8
#: Seconds within which a run must end after a fault.
BOUND = 120

OVERRIDES = (
    "task=arithmetic",
    "hardware=cpu",
    "data.train_batch_size=4",
    "data.val_max_samples=16",
    # Without a seed each start validates on a sample of its own.
    "data.seed=42",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.full_determinism=true",
    "trainer.save_freq=1",
    "trainer.test_freq=2",
    "trainer.rollout_data_dir=${trainer.default_local_dir}/rollouts",
    "trainer.validation_data_dir=${trainer.default_local_dir}/validation",
)

#: Metrics that time or the machine's other work changes.
UNREPEATABLE = re.compile(r"timing|perf/|time|memory")


@dataclass
class LaptopRun:
    """The same command in the same folder, as often as it is started, and what can be seen of it from outside."""

    root: Path
    task: Path
    output: Path
    steps: int
    starts: int = 0
    process: subprocess.Popen | None = None
    workers: list[psutil.Process] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.output / "steer_exp"

    @property
    def log(self) -> Path:
        """What the present start prints; its standard error is in `.err`."""
        return self.output / f"start_{self.starts}.log"

    def start(self) -> None:
        self.starts += 1
        self.output.mkdir(parents=True, exist_ok=True)
        words = ("bash", self.root / "run/run_exp.sh", *OVERRIDES, f"trainer.total_training_steps={self.steps}")
        own = {"PYTHON": sys.executable, "OUTPUT_DIR": str(self.output), "TASK_DIR": str(self.task)}
        with self.log.open("w") as log, self.log.with_suffix(".err").open("w") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=log, stderr=errors,
            )  # fmt: skip
        self.started = time.time()
        self.workers = []

    def processes(self) -> list[psutil.Process]:
        """All that the present start has running, the launcher last."""
        launcher = psutil.Process(self.process.pid)
        return [*launcher.children(recursive=True), launcher]

    def finish(self) -> None:
        """Let the present start run to its end."""
        assert self.process.wait() == 0, self.tail()

    def tail(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in (self.log, self.log.with_suffix(".err")))

    def whole(self) -> int:
        """The last whole checkpoint by the ledger, 0 without one."""
        ledger = self.folder / "checkpoint_ledger.json"
        entries = json.loads(ledger.read_text()) if ledger.exists() else {}
        return max(entries.get("saved_steps", ()), default=0)

    def begun(self) -> int:
        """The last checkpoint that has a folder, whole or not."""
        return max(
            (int(path.name.removeprefix("global_step_")) for path in self.folder.glob("global_step_*")), default=0
        )

    def metrics_file(self) -> Path | None:
        """Where the present start logs, once it does."""
        files = [file for file in self.folder.glob("metrics*.jsonl") if file.stat().st_mtime >= self.started]
        return max(files, key=lambda file: file.stat().st_mtime, default=None)

    def logged(self) -> int | None:
        """The last step that the present start has logged."""
        file = self.metrics_file()
        lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if file else []
        return json.loads(lines[-1])["step"] if lines else None

    def resumed_from(self) -> int | None:
        """The checkpoint that the present start went on from, 0 for none; None before it has got that far."""
        file = self.metrics_file()
        found = re.search(r"_from_(\d+)", file.stem) if file else None
        return None if file is None else int(found[1]) if found else 0

    def phase(self) -> str:
        """What the run is about, by what is on disk and by the calls that Ray's workers name in their titles."""
        if self.metrics_file() is None:
            return "start"
        if self.begun() > self.whole():
            return "checkpoint"
        # None of the processes that are looked at starts later than the metrics file.
        self.workers = self.workers or self.processes()
        calls = " ".join(map(title_of, self.workers))
        if "update_actor" in calls or "compute_log_prob" in calls:
            return "update"
        logged = self.logged()
        if "generate_batch" in calls or "compute_score_batch" in calls:
            return "validation" if logged is None or logged < self.whole() else "generation"
        return "between"

    def kill_in(self, aim: str, length: float, chance: random.Random) -> str:
        """Start, and kill every process at a random moment of a phase; how a phase ends is seen while all stand still.

        Args:
            aim: the phase.
            length: seconds that it lasts, about.

        Returns:
            The phase that was hit.
        """
        self.start()
        # A phase that is over when the moment comes is waited for once more.
        for _ in range(3):
            if aim != "start":
                self.wait_for(aim)
            moment = time.time() + chance.uniform(0, length)
            # A start that is faster than the one that was timed ends at its metrics file.
            while time.time() < moment and not (aim == "start" and self.metrics_file()):
                time.sleep(0.002)
            processes = self.stop()
            hit = self.phase()
            if hit == aim or aim == "start":
                break
            send(signal.SIGCONT, processes)
        send(signal.SIGKILL, processes)
        self.process.wait()
        psutil.wait_procs(processes[:-1], timeout=30)
        return hit

    def wait_for(self, aim: str) -> None:
        """Until a phase begins; the validation that a resumed run begins with doesn't count."""
        while self.phase() != aim or aim == "validation" and self.logged() is None:
            assert self.process.poll() is None, f"the run ended before {aim}: {self.tail()}"
            time.sleep(0.002)

    def stop(self) -> list[psutil.Process]:
        """All processes, standing still."""
        stopped: dict[psutil.Process, None] = {}
        while new := [process for process in self.processes() if process not in stopped]:
            send(signal.SIGSTOP, new)
            stopped |= dict.fromkeys(new)
        launcher = psutil.Process(self.process.pid)
        return [*(process for process in stopped if process != launcher), launcher]


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    """A signal to those that are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def title_of(process: psutil.Process) -> str:
    """A process's command line, which Ray sets to the call that a worker is at."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def task(tmp_path_factory, command, root):
    """The laptop task with a model that has hardly been trained."""
    folder = tmp_path_factory.mktemp("task") / "laptop"
    program = root / "scripts/make_laptop_task.py"
    result = command(sys.executable, program, "--out", folder, "--quiet", "--steps", 20, "--train-size", 64)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def reference(root, task, tmp_path_factory):
    """A run that was never killed, and how many seconds each of its phases took."""
    run = LaptopRun(root, task, tmp_path_factory.mktemp("reference"), STEPS)
    run.start()
    while run.metrics_file() is None:
        assert run.process.poll() is None, run.tail()
        time.sleep(0.1)
    start = time.time() - run.started
    run.finish()
    names = dict(generation="gen", update="update_actor", checkpoint="save_checkpoint", validation="testing")
    timed = {phase: read_run(run.folder).series(f"timing_s/{name}").values() for phase, name in names.items()}
    return run, {"start": start} | {phase: sorted(seconds)[len(seconds) // 2] for phase, seconds in timed.items()}


def test_campaign_of_kills(reference, root, task, tmp_path):
    """Killed again and again, the run ends as if it had never been."""
    unharmed, lengths = reference
    run = LaptopRun(root, task, tmp_path, STEPS)
    chance = random.Random(13)
    aims = [phase for _ in range(-(-KILLS // len(PHASES))) for phase in chance.sample(PHASES, len(PHASES))]
    table = Table(title=f"{KILLS} kills")
    for heading in ("kill", "resumed from", "aimed at", "hit", "whole before", "whole after", "lost steps"):
        table.add_column(heading, justify="right")
    for number, aim in enumerate(aims[:KILLS], start=1):
        before = run.whole()
        hit = run.kill_in(aim, lengths[aim], chance)
        resumed, after = run.resumed_from(), run.whole()
        lost = max(run.begun(), run.logged() or 0) - after
        table.add_row(*map(str, (number, "-" if resumed is None else resumed, aim, hit, before, after, lost)))
        Console(width=120).print(table)
        # The mark of an unfinished checkpoint may go a moment before the ledger names it.
        assert resumed is None or before <= resumed <= before + 1
        assert after >= before and lost <= 1
    run.start()
    run.finish()
    assert_alike(run.folder, unharmed.folder)


def assert_alike(killed: Path, unharmed: Path) -> None:
    """Two runs' steps, metrics, rollouts, validations and checkpoints are the same."""
    ours, theirs = read_run(killed), read_run(unharmed)
    steps = set(range(1, STEPS + 1))
    assert set(theirs.series("training/global_step")) == set(ours.series("training/global_step")) == steps
    assert ours.accuracy.items() >= theirs.accuracy.items() and set(theirs.accuracy) == set(range(0, STEPS + 1, 2))
    for step, data in theirs.steps.items():
        wanted = {name: value for name, value in data.items() if not UNREPEATABLE.search(name)}
        assert {name: ours.steps[step].get(name) for name in wanted} == wanted, step
    for file in sorted(unharmed.glob("rollouts/*.jsonl")) + sorted(unharmed.glob("validation/*.jsonl")):
        assert rows_of(killed / file.relative_to(unharmed)) == rows_of(file), file
    assert {file.name for file in (killed / "rollouts").iterdir()} == {f"{step}.jsonl" for step in steps}
    for step in steps:
        saved, wanted = killed / f"global_step_{step}", unharmed / f"global_step_{step}"
        assert files_of(saved) == files_of(wanted)
        weights = load(saved)
        for name, weight in load(wanted).items():
            assert weights[name].equal(weight), (step, name)


def rows_of(file: Path) -> list[tuple[object, ...]]:
    """The rollouts of a dump, whose order follows random ids."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted((row["input"], row["output"], str(row["gts"]), row["score"], row["step"]) for row in rows)


def files_of(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights; every one of its files can be read."""
    for file in (*checkpoint.glob("actor/*.pt"), checkpoint / "data.pt"):
        torch.load(file, weights_only=False)
    return AutoModelForCausalLM.from_pretrained(checkpoint / "actor/huggingface").state_dict()


@pytest.fixture(scope="module")
def victim_run(root, task, tmp_path_factory):
    """A run that goes on from start to start."""
    return LaptopRun(root, task, tmp_path_factory.mktemp("victim"), steps=1000)


#: Kind of process -> how its title begins, and what the run's last line calls it.
VICTIMS = {
    "trainer": ("ray::SteerTaskRunner", "SteerTaskRunner"),
    "FSDP worker": ("ray::WorkerDict", "WorkerDict"),
    "vLLM server": ("ray::VLLMServerActor", "VLLMServerActor"),
    "vLLM engine": ("VLLM::EngineCore", "EngineCore"),
    "reward worker": ("ray::RewardLoopWorker", "RewardLoopWorker"),
    "storage unit": ("ray::SimpleStorageUnit", "SimpleStorageUnit"),
    "queue's controller": ("ray::TransferQueueController", "TransferQueueController"),
}


@pytest.mark.parametrize("kind", VICTIMS)
def test_campaign_of_dead_processes(kind, victim_run):
    """The run ends by itself and says which of its processes died."""
    title, name = VICTIMS[kind]
    victim_run.start()
    victim_run.wait_for("generation")
    processes = victim_run.processes()
    # Ray's worker is older than what it starts, which may bear its title for a moment.
    victim = min((p for p in processes if title_of(p).startswith(title)), key=psutil.Process.create_time)
    victim.send_signal(signal.SIGKILL)
    line = line_of_end(victim_run, processes)
    print(line)
    # The engine is a child of its server's, which says what it knows: no pid.
    assert name in line and (kind == "vLLM engine" or f"pid {victim.pid} " in line)


def line_of_end(run: LaptopRun, processes: list[psutil.Process]) -> str:
    """The last line of a run that ends in time, by itself and as a failure, and leaves no process behind."""
    assert run.process.wait(timeout=BOUND) != 0
    # A process that nobody has waited for yet is no longer one that runs.
    left = psutil.wait_procs([process for process in processes[:-1] if process.is_running()], timeout=10)[1]
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    lines = run.log.with_suffix(".err").read_text().splitlines()
    assert [line for line in lines if line.startswith("steer-verl: ")] == lines[-1:], run.tail()
    return lines[-1]


def test_campaign_of_a_full_disk(reference, small_disk, root, task):
    """There is room for two checkpoints and a half; with more, the same command goes on."""
    unharmed, _ = reference
    size = sum(path.stat().st_size for path in (unharmed.folder / "global_step_1").rglob("*") if path.is_file())
    run = LaptopRun(root, task, small_disk(5 * size // 2), steps=4)
    run.start()
    run.wait_for("checkpoint")
    line = line_of_end(run, run.processes())
    print(line)
    assert "No space left on device" in line and str(run.folder) in line
    assert run.whole() == 2
    load(run.folder / "global_step_2")
    small_disk(10 * size)
    run.start()
    run.finish()
    assert run.whole() == 4 and set(read_run(run.folder).series("training/global_step")) == {1, 2, 3, 4}
    weights = load(run.folder / "global_step_4")
    assert all(weights[name].equal(weight) for name, weight in load(unharmed.folder / "global_step_4").items())
