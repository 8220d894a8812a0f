# SPDX-License-Identifier: Apache-2.0
"""The trainer's checkpoints by upstream's own saving and loading, with workers that only write files; also killed."""

import logging
import math
import os
import shutil
import sys
from collections import Counter
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from configurations import TARGET, resolved
from omegaconf import OmegaConf
from verl.steer import trainer as trainer_steer
from verl.steer import validation
from verl.steer.checkpoint_ledger import UNFINISHED, CheckpointLedger, step_of
from verl.steer.checkpoints import NoSteps
from verl.steer.methods.adaptive_entropy import AdaptiveEntropyCoefficient
from verl.steer.methods.entropic import EntroPICCoefficient
from verl.steer.methods.siren import EntropyAnchor
from verl.steer.methods.step_state import STATE_FILE
from verl.steer.requirements import unread
from verl.steer.step_record import STEP_RECORD, StepRecord
from verl.steer.trainer import SteerTrainer
from verl.steer.validation import metrics_of_files
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager, find_latest_ckpt_path

METRIC = "val-core/a/acc/mean@1"

#: Of `target_entropy`, by the step from which on each holds.
SCHEDULE = {1: 0.4, 3: 0.2}


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
    assert texts == {data} and (path / STATE_FILE).is_file() and not (path / UNFINISHED).exists(), path
    run, step = data.split()
    assert int(step) == step_of(path)
    return run, int(step)


def trainer_of(folder, run="new", values=(), steps=4, data=None, optim=None, **options):
    """A trainer whose validation at each step gives `values`, from step 1 on; the last again and again."""
    trainer = SteerTrainer.__new__(SteerTrainer)
    defaults = {
        "default_local_dir": str(folder), "default_hdfs_dir": None, "resume_mode": "auto", "resume_from_path": None,
        "del_local_ckpt_after_load": False, "max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None,
        "save_freq": 1, "test_freq": 1, "save_after": 0, "save_best_only": False, "best_metric_key": METRIC,
        "delete_old_best_checkpoint": False, "val_only": False, "total_epochs": 1,
    }  # fmt: skip
    trainer.config = OmegaConf.create(
        {"trainer": {**defaults, **options}, "actor_rollout_ref": {"actor": {"optim": optim}}, "data": data or {}}
    )
    trainer.folder, trainer.trainer_mode, trainer.use_critic = Path(folder), "sync", True
    trainer.parameter_sync_step = 2
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.actor_rollout_wg, trainer.critic_wg = Worker(run), Worker(run)
    trainer.step_state, trainer.last_entropy = AdaptiveEntropyCoefficient(1.0, 0.1, 1.0), None
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


def checked(folder, killed_at, earlier):
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
    inherited = earlier and killed_at in (None, 2)
    assert ledger.latest_step in ({killed_at, 4} if inherited else {killed_at})
    if earlier:
        assert 4 in found
    return ledger


@pytest.mark.parametrize("number, expected", [(1, {4}), (2, {3, 4})])
def test_the_best_checkpoints_count_among_those_to_keep(tmp_path, number, expected):
    keep = {"max_actor_ckpt_to_keep": number, "max_critic_ckpt_to_keep": number}
    train(trainer_of(tmp_path, values=[0.1, 0.2, 0.3, 0.4], save_best_only=True, **keep))
    assert set(saved(tmp_path)) == expected


@pytest.fixture
def memory():
    """A folder for thousands of small ones, in memory where the system has a place for that."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("emptied", [False, True], ids=["before", "emptied"])
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_every_change_of_the_file_system(memory, monkeypatch, name, emptied):
    """Killed once while it runs, and once more while the next start clears up; then it goes on to the end."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill, unlike a power cut, loses nothing written
    earlier, options = RUNS[name]
    start, folder, again = memory / "start", memory / "run", memory / "again"
    start.mkdir()
    if earlier:
        train(trainer_of(start, "old", OLD, steps=4))
    if name == "back to step 2":
        options = {**options, "resume_from_path": str(folder / "global_step_2")}

    def fresh(source, target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=shutil.copyfile)

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
        latest = getattr(trainer, "ledger", CheckpointLedger.open(start)).latest_step
        for more in count(1) if list(folder.glob(f"*/{UNFINISHED}")) or list(folder.glob(".*_global_step_*")) else ():
            fresh(folder, again)
            if not KILLER.after(more, again, lambda: CheckpointLedger.open(again), emptied, opening=True):
                break
            checked(again, latest, earlier)
        reopened = checked(folder, latest, earlier)
        other_run = earlier and saved(folder).get(reopened.latest_step) == "old" and reopened.latest_step == 4
        finished = train(new() if other_run else new(resume_mode="auto"))
        assert saved(folder).items() >= unharmed.items()
        assert finished.ledger.latest_step == ledger.latest_step
        assert (finished.ledger.best_step, finished.ledger.best_value) == (ledger.best_step, ledger.best_value)
    assert changes > 50


def test_upstreams_workers_delete_neither_the_best_actor_nor_its_critic(tmp_path):
    trainer = train(trainer_of(tmp_path, values=[0.9, 0.1, 0.1, 0.1], **RUNS["from scratch"][1]))
    assert saved(tmp_path) == {1: "new", 4: "new"} and trainer.ledger.best_step == 1
    options = trainer.config.trainer
    assert options.max_actor_ckpt_to_keep == options.max_critic_ckpt_to_keep == 1
    train(trainer_of(tmp_path / "all", values=NEW, max_actor_ckpt_to_keep=-1, max_critic_ckpt_to_keep=-1))
    assert set(saved(tmp_path / "all")) == {1, 2, 3, 4}  # upstream's meaning of a negative number


def test_the_users_callback_finds_a_whole_checkpoint(tmp_path):
    seen = []

    class Callback(CheckpointCallback):
        def on_save(self, trainer, global_step, checkpoint_dir, async_save=False, **_):
            seen.append((origin(Path(checkpoint_dir)), CheckpointLedger.open(tmp_path).latest_step, async_save))

    trainer = trainer_of(tmp_path, values=NEW, steps=2)
    trainer.checkpoint_callback = callback = Callback()
    train(trainer)
    assert seen == [(("new", step), step, False) for step in (1, 2)] and trainer.checkpoint_callback is callback


@pytest.mark.parametrize("options", [{"save_freq": 2}, {"save_best_only": True}, {"save_freq": -1}])
def test_the_last_step_is_saved_whatever_save_after_says(tmp_path, caplog, options):
    with caplog.at_level(logging.WARNING):
        train(trainer_of(tmp_path, values=NEW, save_after=80, **options))
    assert set(saved(tmp_path)) == {4}
    assert caplog.text.count("trainer.save_after=80: the run has 4 steps; its last may be saved") == 1


def test_save_after_is_silent_where_it_holds_or_nothing_is_saved(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(trainer_of(tmp_path / "holds", values=NEW, save_after=3))
        trainer_of(tmp_path / "nothing", save_after=80, save_freq=-1, best_metric_key=None)
        trainer_of(tmp_path / "evaluation", save_after=80, val_only=True)
    assert set(saved(tmp_path / "holds")) == {3, 4} and "save_after" not in caplog.text


def test_fewer_steps_than_asked_for_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, total_training_steps=4)
    assert "total_epochs" not in caplog.text
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, total_training_steps=5)
    assert "trainer.total_epochs=1: the run ends after 4 of trainer.total_training_steps=5" in caplog.text


def test_the_last_step_of_the_data_is_saved(tmp_path):
    """`total_training_steps` beyond what `total_epochs` give, where upstream saves at multiples of save_freq only."""
    train(trainer_of(tmp_path, values=NEW, save_freq=3, total_training_steps=100))
    assert set(saved(tmp_path)) >= {3, 4}
    train(trainer_of(tmp_path / "best", values=[math.nan] * 4, test_freq=3, save_freq=-1, total_training_steps=100))
    assert set(saved(tmp_path / "best")) == {4}


def test_a_run_whose_metric_is_never_a_number_saves_its_last_step(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = train(trainer_of(tmp_path, values=[math.nan] * 4, save_best_only=True))
    assert set(saved(tmp_path)) == {4} and trainer.ledger.best_step is None
    assert f"{METRIC}=nan: no checkpoint yet, so the last step 4 is saved" in caplog.text
    trainer = train(trainer_of(tmp_path / "one", values=[0.1, math.nan, 0.2, math.nan], save_best_only=True))
    assert set(saved(tmp_path / "one")) == {1, 3} and trainer.ledger.best_step == 3


def test_a_run_that_goes_on_from_another_folder_starts_an_empty_ledger(tmp_path, caplog):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    for one in (elsewhere, folder):
        train(trainer_of(one, "old", OLD))
    step = str(elsewhere / "global_step_2")
    trainer = trainer_of(folder, values=NEW, resume_mode="resume_path", resume_from_path=step, save_freq=-1, steps=3)
    with caplog.at_level(logging.WARNING):
        trainer._load_checkpoint()
    assert trainer.global_steps == 2 and trainer.ledger == CheckpointLedger(folder)
    assert (
        "left alone, not in this run's ledger: global_step_1, global_step_2, global_step_3, global_ste" in caplog.text
    )
    train(trainer)
    assert saved(folder) == {1: "old", 2: "new", 3: "old", 4: "old"}
    assert (trainer.ledger.saved_steps, trainer.ledger.best_step, trainer.ledger.best_value) == ([2], 2, 0.6)


def test_a_run_that_goes_back_and_is_killed_before_it_saves_has_lost_nothing(tmp_path):
    train(trainer_of(tmp_path, "old", OLD))
    before = CheckpointLedger.open(tmp_path)
    path = str(tmp_path / "global_step_2")
    trainer = trainer_of(tmp_path, values=NEW, resume_mode="resume_path", resume_from_path=path)
    trainer._load_checkpoint()
    assert trainer.ledger.saved_steps == [1, 2]
    assert CheckpointLedger.open(tmp_path) == before


def test_a_resumed_run_has_the_coefficient_of_its_checkpoint(tmp_path):
    run = trainer_of(tmp_path, values=NEW, steps=1)
    run.step_state.value = 0.7
    train(run)
    resumed = trainer_of(tmp_path, values=NEW)
    resumed._load_checkpoint()
    assert resumed.step_state.value == 0.7


def test_a_resumed_run_has_the_entropy_of_its_checkpoints_step(tmp_path):
    """On which the temperature of AEPO's next prompts depends."""
    train(trainer_of(tmp_path, values=NEW, steps=1))
    StepRecord(tmp_path / "global_step_1" / STEP_RECORD, {"actor/entropy": 0.3}).write()
    resumed = trainer_of(tmp_path, values=NEW)
    resumed._load_checkpoint()
    assert resumed.last_entropy == 0.3


@pytest.mark.parametrize(
    "options, target",
    [
        ({"loss_mode": "adaptive_entropy"}, SCHEDULE),
        ({"loss_mode": "entropic"}, SCHEDULE),
        (TARGET, SCHEDULE),
        ({"loss_mode": "siren"}, None),
        (TARGET | {"loss_mode": "vanilla"}, None),
        ({"loss_mode": "entropy_control"}, None),
    ],
    ids=str,
)
def test_the_targets_of_the_steps_go_to_those_that_read_them(tmp_path, monkeypatch, options, target):
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "__init__", lambda self, config: None)
    config = resolved("grpo", "hardware=cpu", f"trainer.default_local_dir={tmp_path}")
    config.actor_rollout_ref.actor.policy_loss.update(options, target_entropy=SCHEDULE)
    trainer = SteerTrainer(config)
    assert trainer.target_entropy == target
    states = {"adaptive_entropy": AdaptiveEntropyCoefficient, "entropic": EntroPICCoefficient, "siren": EntropyAnchor}
    assert type(trainer.step_state) is states.get(options.get("loss_mode"), type(None))


def test_an_evaluation_changes_nothing_in_the_folder_of_a_run(tmp_path):
    run = train(trainer_of(tmp_path, "old", OLD))
    run.ledger.begin(5)
    record = StepRecord(tmp_path / "global_step_4" / STEP_RECORD, {})
    record.write()
    evaluation = trainer_of(tmp_path, values=NEW, val_only=True)
    evaluation._load_checkpoint()
    evaluation._mark_logged()  # at the end of `fit`
    assert (tmp_path / "global_step_5" / UNFINISHED).exists()
    assert StepRecord.read(tmp_path / "global_step_4") == record


def test_an_epoch_without_a_whole_batch_is_refused(tmp_path):
    """The data set is without its prompts that are too long."""
    with patch.object(SteerTrainer, "train_dataset", [None] * 3, create=True):
        data = {"train_batch_size": 4, "max_prompt_length": 9}
        with pytest.raises(NoSteps, match="^data.train_batch_size=4: expected at most 3, the rows .* more than 9 tok"):
            trainer_of(tmp_path, steps=0, data=data)
    trainer_of(tmp_path, steps=0, val_only=True)


def test_a_validation_that_lost_samples_is_not_the_best(tmp_path, monkeypatch):
    """Step 2 lost 2 of 100 samples, step 3 one, and another data source half of its samples."""
    upstream = PPOTrainer._validate

    def validate(self):
        lost = {2: 2, 3: 1}.get(self.global_steps, 0)
        others = {"val-aux/b/num_lost": 50, "val-aux/b/num_samples": 50}
        return upstream(self) | others | {"val-aux/a/num_lost": lost, "val-aux/a/num_samples": 100 - lost}

    monkeypatch.setattr(PPOTrainer, "_validate", validate)
    trainer = train(trainer_of(tmp_path, values=[0.2, 0.9, 0.4, 0.3], save_best_only=True))
    assert trainer.ledger.best_value == 0.4 and set(saved(tmp_path)) == {1, 3}


def test_an_evaluation_of_an_own_data_set_is_verls(tmp_path):
    trainer = trainer_of(tmp_path, val_only=True)
    trainer.global_steps, trainer.val_dataset = 0, []
    assert trainer._validate() == {METRIC: 0.0}


def test_two_files_of_one_data_source_keep_both_results():
    first = {METRIC: 0.1, "val-core/b/acc/mean@1": 0.2, "val-aux/num_turns/mean": 2}
    assert metrics_of_files({"x": first}) == first
    assert metrics_of_files({"x": first, "y": {METRIC: 0.3, "val-aux/num_turns/mean": 4}}) == {
        "val-core/x/a/acc/mean@1": 0.1,
        "val-core/y/a/acc/mean@1": 0.3,
        "val-core/b/acc/mean@1": 0.2,
        "val-aux/x/num_turns/mean": 2,
        "val-aux/y/num_turns/mean": 4,
    }


def test_an_evaluation_takes_val_max_samples_of_each_file(tmp_path, monkeypatch):
    """Each file's results come to their folder at once, also where a killed evaluation left a half one."""
    asked, batches = [], []

    def dataset(files, data, tokenizer, processor, is_train, max_samples=-1):
        asked.append((files, max_samples))
        return list(range(max_samples))

    def validate(self):
        folder = Path(self.config.trainer.validation_data_dir)
        folder.mkdir(parents=True)
        (folder / "0.jsonl").write_text(str(len(self.val_dataloader.dataset)))
        batches.append(len(self.val_dataloader))
        assert not self.agent_loop_manager.submitted
        self.agent_loop_manager.submitted[True, 0] += 7
        return {METRIC: 0.5}

    monkeypatch.setattr(validation, "create_rl_dataset", dataset)
    monkeypatch.setattr(PPOTrainer, "_validate", validate)
    trainer = trainer_of(tmp_path, val_only=True, validation_data_dir=str(tmp_path))
    trainer.config.data = {"val_max_samples": 7}
    trainer.tokenizer = trainer.processor = None
    trainer.batched, trainer.agent_loop_manager = True, SimpleNamespace(submitted=Counter())
    trainer.val_dataset = SimpleNamespace(data_files=["/data/x.parquet", "/data/y.parquet"])
    trainer._init_dump_executor()
    (tmp_path / "y.part").mkdir()
    (tmp_path / "y.part" / "9.jsonl").write_text("half")
    assert trainer._validate() == {"val-core/x/a/acc/mean@1": 0.5, "val-core/y/a/acc/mean@1": 0.5}
    assert asked == [(["/data/x.parquet"], 7), (["/data/y.parquet"], 7)]
    assert [path.name for path in (tmp_path / "y").iterdir()] == ["0.jsonl"]
    assert (tmp_path / "x" / "0.jsonl").read_text() == (tmp_path / "y" / "0.jsonl").read_text() == "7"
    shutil.rmtree(tmp_path / "x")
    shutil.rmtree(tmp_path / "y")
    trainer.config.data.val_batch_size = 3
    trainer._validate()
    assert batches == [1, 1, 3, 3]


def test_steps_after_the_last_one_are_told_of_once_the_data_are_loaded(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(unread.logger, "warning", lambda text, *values: lines.append(text % values))
    trainer_of(tmp_path, steps=4, entropy_audit={"freq": 5})
    assert lines == ["trainer.entropy_audit.freq=5: the run has 4 steps"]


def test_the_learning_rates_schedule_ends_with_the_run(tmp_path):
    """Though more steps were asked for than the epochs have; in updates of weights, as verl counts."""
    optim = {"lr_scheduler_type": "cosine", "total_training_steps": 18}
    trainer = trainer_of(tmp_path, steps=4, optim=optim, total_training_steps=9)
    assert trainer.total_training_steps == 4
    assert trainer.config.actor_rollout_ref.actor.optim.total_training_steps == 8
