# SPDX-License-Identifier: Apache-2.0
"""The trainer's checkpoints by upstream's own saving and loading, with workers that only write files; also killed."""

import logging
import math
import os
import shutil
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.requirements import UNFINISHED
from verl.trainer.ppo.v1 import trainer_steer
from verl.trainer.ppo.v1.adaptive_entropy import COEFFICIENT_FILE, AdaptiveEntropyCoefficient
from verl.trainer.ppo.v1.checkpoint_ledger import CheckpointLedger, step_of
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_steer import SteerTrainer, metrics_of_files
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager, find_latest_ckpt_path

METRIC = "val-core/a/acc/mean@1"


class Worker(BaseCheckpointManager):
    """Writes files that tell whose they are; which checkpoints go is upstream's to say."""

    def __init__(self, run):
        self.previous_saved_paths, self.run = [], run

    def save_checkpoint(self, path, remote, step, max_ckpt_to_keep):
        self.ensure_checkpoint_capacity(max_ckpt_to_keep)
        os.makedirs(path, exist_ok=True)
        Path(path, "model.pt").write_text(f"{self.run} {step}")
        self.register_checkpoint(path, max_ckpt_to_keep)

    def load_checkpoint(self, local_path, del_local_after_load):
        origin(Path(local_path).parent)


def origin(path):
    """The run and the step that wrote a checkpoint, which is whole and all of one save."""
    texts = {(path / role / "model.pt").read_text() for role in ("actor", "critic")}
    data = torch.load(path / "data.pt", weights_only=False)
    assert texts == {data} and (path / COEFFICIENT_FILE).is_file() and not (path / UNFINISHED).exists(), path
    run, step = data.split()
    assert int(step) == step_of(path)
    return run, int(step)


def trainer_of(folder, run="new", values=(), steps=4, **options):
    """A trainer whose validation at each step gives `values`, from step 1 on; the last again and again."""
    trainer = SteerTrainer.__new__(SteerTrainer)
    defaults = {
        "default_local_dir": str(folder), "default_hdfs_dir": None, "resume_mode": "auto", "resume_from_path": None,
        "del_local_ckpt_after_load": False, "max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None,
        "save_freq": 1, "test_freq": 1, "save_after": 0, "save_best_only": False, "best_metric_key": METRIC,
        "delete_old_best_checkpoint": False, "val_only": False, "total_epochs": 1,
    }  # fmt: skip
    trainer.config = OmegaConf.create({"trainer": {**defaults, **options}, "actor_rollout_ref": {"actor": {}}})
    trainer.folder, trainer.trainer_mode, trainer.use_critic = Path(folder), "sync", True
    trainer.actor_rollout_wg, trainer.critic_wg = Worker(run), Worker(run)
    trainer.entropy_coefficient = AdaptiveEntropyCoefficient(1.0, 0.1, 1.0)
    trainer.checkpoint_callback = CheckpointCallback()
    trainer.train_dataloader = SimpleNamespace(
        state_dict=lambda: f"{run} {trainer.global_steps}", load_state_dict=lambda state: None
    )
    trainer.values, trainer.total_steps_of_data = values, steps
    trainer._init_dataloader()
    return trainer


@pytest.fixture(autouse=True)
def upstream(monkeypatch):
    """What upstream does with data and models."""

    def init_dataloader(self):
        self.steps_per_epoch = self.total_steps_of_data
        self.total_training_steps = self.config.trainer.get("total_training_steps") or self.steps_per_epoch

    def validate(self):
        return {METRIC: self.values[self.global_steps - 1] if self.global_steps else 0.0}

    monkeypatch.setattr(PPOTrainer, "_init_dataloader", init_dataloader)
    monkeypatch.setattr(PPOTrainer, "_validate", validate)


def train(trainer):
    """Load, validate, then save and validate step by step, in the order of upstream's `fit`."""
    options = trainer.config.trainer
    trainer._load_checkpoint()
    trainer._validate()
    while trainer.global_steps < min(trainer.total_training_steps, trainer.steps_per_epoch):
        trainer.global_steps += 1
        last = trainer.global_steps >= trainer.total_training_steps
        if options.save_freq > 0 and (last or trainer.global_steps % options.save_freq == 0):
            trainer._save_checkpoint()
        if options.test_freq > 0 and (last or trainer.global_steps % options.test_freq == 0):
            trainer._validate()
    return trainer


def saved(folder):
    """Step -> the run that wrote it, for every folder; each must be whole."""
    return {origin(path)[1]: origin(path)[0] for path in folder.glob("global_step_*")}


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Raises `Killed` instead of the n-th change of the file system below a folder, whoever makes it."""

    def __init__(self):
        self.folder, self.left, self.emptied, self.opening = None, 0, False, False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.folder is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        # `shutil.rmtree` names what it removes relative to an open folder.
        if not path.startswith(self.folder) and os.path.isabs(path):
            return
        if event == "os.rename" and self.opening and step_of(Path(path)) is not None:
            assert Path(path, UNFINISHED).exists(), f"{path} goes though it isn't marked"
        self.left -= 1
        if self.left == 0:
            self.folder = None
            if event == "open" and self.emptied:
                Path(path).write_text("")
            raise Killed

    def after(self, changes, folder, call, emptied=False, opening=False):
        """Whether `call` was killed."""
        self.folder, self.left, self.emptied, self.opening = str(folder), changes, emptied, opening
        try:
            call()
        except Killed:
            return True
        finally:
            self.folder = None
        return False


KILLER = Killer()

OLD = [0.2, 0.6, 0.7, 0.9]
NEW = [0.1, 0.6, 0.5, 0.8]

#: Whether a run finds another's checkpoints, of steps 1 to 4; and how it is called.
RUNS = {
    "from scratch": (False, {"max_actor_ckpt_to_keep": 1, "max_critic_ckpt_to_keep": 1}),
    "best only": (False, {"save_best_only": True, "delete_old_best_checkpoint": True}),
    "back to step 2": (True, {"resume_mode": "resume_path", "max_actor_ckpt_to_keep": 1, "max_critic_ckpt_to_keep": 1}),
    "anew over another": (True, {"resume_mode": "disable", "steps": 2}),
}


def checked(folder, memory, earlier):
    """The ledger of a killed run that is called again, after a look at everything that must hold."""
    ledger = CheckpointLedger.open(folder)
    found = saved(folder)
    hidden = [path.name for path in folder.iterdir() if "_global_step_" in path.name]
    assert not hidden and set(ledger.saved_steps) <= set(found)
    latest = find_latest_ckpt_path(str(folder))
    assert latest == (str(folder / f"global_step_{ledger.latest_step}") if ledger.saved_steps else None)
    if ledger.best_step is not None:
        assert ledger.best_step in ledger.saved_steps
        values = {"old": OLD, "new": NEW}[found[ledger.best_step]]
        assert ledger.best_value == values[ledger.best_step - 1]
    # No step is lost that was whole; another run's last one counts until the first of this branch is begun.
    inherited = earlier and memory in (None, 2)
    assert ledger.latest_step in ({memory, 4} if inherited else {memory})
    if earlier:
        assert 4 in found
    return ledger


@pytest.mark.parametrize("emptied", [False, True], ids=["before", "emptied"])
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_every_change_of_the_file_system(tmp_path, monkeypatch, name, emptied):
    """Killed once while it runs, and once more while the next start clears up; then it goes on to the end."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill, unlike a power cut, loses nothing written
    earlier, options = RUNS[name]
    start, folder, again = tmp_path / "start", tmp_path / "run", tmp_path / "again"
    start.mkdir()
    if earlier:
        train(trainer_of(start, "old", OLD, steps=4))
    if name == "back to step 2":
        options = {**options, "resume_from_path": str(folder / "global_step_2")}

    def fresh(source, target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)

    def new(**other):
        return trainer_of(folder, values=NEW, **{**options, **other})

    fresh(start, folder)
    trainer = train(new())
    unharmed, ledger = saved(folder), trainer.ledger
    for changes in count(1):
        fresh(start, folder)
        trainer = new()
        if not KILLER.after(changes, folder, lambda trainer=trainer: train(trainer), emptied):
            break
        memory = getattr(trainer, "ledger", CheckpointLedger.open(start)).latest_step
        for more in count(1) if list(folder.glob(f"*/{UNFINISHED}")) or list(folder.glob(".*_global_step_*")) else ():
            fresh(folder, again)
            if not KILLER.after(more, again, lambda: CheckpointLedger.open(again), emptied, opening=True):
                break
            checked(again, memory, earlier)
        reopened = checked(folder, memory, earlier)
        other_run = earlier and saved(folder).get(reopened.latest_step) == "old" and reopened.latest_step == 4
        finished = train(new() if other_run else new(resume_mode="auto"))
        assert saved(folder).items() >= unharmed.items()
        assert finished.ledger.latest_step == ledger.latest_step
        assert (finished.ledger.best_step, finished.ledger.best_value) == (ledger.best_step, ledger.best_value)
    assert changes > 50
