# SPDX-License-Identifier: Apache-2.0
"""The programs around a run: watching it, comparing runs, summing up an evaluation."""

import hashlib
import importlib.metadata
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import venv

import httpx
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from configurations import validated
from huggingface_hub import errors
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy.stats import binom, norm
from tabular_audit import tabular_audit
from test_report import updates, write_metrics
from verl.steer.report.run_metrics import read_run, run_figures
from verl.steer.run_lock import lock_folder

RUN = """
import json, sys, time
print("Total training steps: 2")
with open(sys.argv[1] + "/metrics.jsonl", "w") as file:
    for step in range(3):
        data = {"actor/entropy": 1 / (step + 1), "critic/score/mean": -0.5, "val-core/x/acc/mean@4": 0.25}
        if step == 0:
            data["actor/entropy"] = None
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
"""


def write_run(folder, entropies, accuracies, weights=(), **more):
    """A run that logs at each step these and `more` metrics."""
    records = []
    for step, (entropy, accuracy) in enumerate(zip(entropies, accuracies, strict=True)):
        data = {"actor/entropy": entropy, "val-core/a/acc/mean@1": accuracy} | more
        data |= {"perf/total_num_tokens": 100 * (step + 1), "perf/time_per_step": 2.0}
        if weights:
            data["actor/token_weights_mean"] = weights[step]
        records.append((step, data))
    write_metrics(folder, records)


def printed_rows(result):
    """The cells of the tables that a program printed."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]


def watch(root, tmp_path, *words):
    program = root / "scripts/watch.py"
    return (
        sys.executable,
        program,
        "--title",
        "toy",
        "--log",
        tmp_path / "toy.log",
        "--metrics",
        tmp_path,
        "--",
        *words,
    )


def test_watch_shows_a_line_a_step_and_keeps_the_rest_in_the_log(command, root, tmp_path):
    result = command(*watch(root, tmp_path, sys.executable, "-c", RUN, tmp_path))
    assert result.returncode == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("toy ")]
    assert lines[0] == "toy          step   0/2  reward -0.500  entropy nan  accuracy 0.250"
    assert lines[1] == "toy          step   1/2  reward -0.500  entropy 0.500  accuracy 0.250"
    assert "Total training steps" not in result.stdout and "Total training steps" in (tmp_path / "toy.log").read_text()


def test_watch_of_a_resumed_run_shows_its_new_steps_only(command, root, tmp_path):
    """Whatever the times: the first start's file is older than this one's, but says that it is of tomorrow."""
    for name in ("metrics.jsonl", "metrics_from_1_start_2.jsonl"):
        (tmp_path / name).write_text('{"step": 1, "data": {"actor/entropy": 9.0}}\n')
        os.utime(tmp_path / name, (time.time() + 86_400,) * 2)
    resumed = RUN.replace("/metrics.jsonl", "/metrics_from_1_start_3.jsonl").replace("range(3)", "range(2, 3)")
    result = command(*watch(root, tmp_path, sys.executable, "-c", resumed, tmp_path))
    lines = [line for line in result.stdout.splitlines() if line.startswith("toy ")]
    assert lines == ["toy          step   2/2  reward -0.500  entropy 0.333  accuracy 0.250"]


def test_watch_keeps_the_log_of_an_earlier_start(command, root, tmp_path):
    """And tells why this start failed, not that one."""
    for reason in ("first", "second", "third"):
        result = command(*watch(root, tmp_path, "bash", "-c", f"echo 'ValueError: {reason}'; exit 1"))
        assert result.stdout.endswith(f"ValueError: {reason}\n")
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    reasons = {"toy_1.log": "first", "toy_2.log": "second", "toy.log": "third"}
    assert logs == {name: f"ValueError: {reason}\n" for name, reason in reasons.items()}


def test_watch_passes_over_a_line_that_is_no_record(command, root, tmp_path):
    script = f'printf \'{{"step\n{{"step": 1, "data": {{"actor/entropy": 0.5}}}}\n\' >{tmp_path}/metrics.jsonl'
    result = command(*watch(root, tmp_path, "bash", "-c", script))
    assert result.returncode == 0 and "step   1/?  entropy 0.500" in result.stdout, result.stdout + result.stderr


def test_watch_passes_over_a_file_that_vanishes(command, root, tmp_path):
    result = command(*watch(root, tmp_path, "bash", "-c", f"ln -s nowhere {tmp_path}/metrics.jsonl; sleep 1; exit 7"))
    assert result.returncode == 7, result.stdout + result.stderr


def test_watch_names_a_command_that_is_missing(command, root, tmp_path):
    (tmp_path / "toy.log").write_text("of an earlier start")
    result = command(*watch(root, tmp_path, "no-such-command"))
    assert result.returncode == 2 and result.stderr.endswith("error: no-such-command: no such command\n")
    assert (tmp_path / "toy.log").read_text() == "of an earlier start"


def test_watch_tells_why_a_run_failed(command, root, tmp_path):
    result = command(*watch(root, tmp_path, sys.executable, "-c", "raise ValueError('no such thing')"))
    assert result.returncode == 1 and "ValueError: no such thing" in result.stdout
    assert str(tmp_path / "toy.log") in result.stdout.replace("\n", "")


@pytest.mark.parametrize("reason", ["steer-verl: no such key", "launch.sh: no such folder"])
def test_watch_ends_with_the_reason_that_a_launcher_gave(command, root, tmp_path, reason):
    """Not with the many lines of other processes after it."""
    result = command(*watch(root, tmp_path, "bash", "-c", f"echo '{reason}'; yes goodbye | head -20; exit 1"))
    assert result.returncode == 1 and result.stdout.endswith(f"\n{reason}\n"), result.stdout


def test_watch_that_fails_ends_what_it_started(command, root, tmp_path):
    script = (
        "import os, pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / 'pid').write_text(str(os.getpid()))\n"
        "(folder / 'metrics.jsonl').write_text('{}\\n')\n"
        "time.sleep(600)\n"
    )
    result = command(*watch(root, tmp_path, sys.executable, "-c", script))
    assert result.returncode == 1 and "KeyError" in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_interrupt_ends_everything_that_was_started(root, tmp_path):
    """The command's own child too, although it ignores the interrupt."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    script = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    words = [str(word) for word in watch(root, tmp_path, sys.executable, "-c", script)]
    watching = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(60) == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_watch_prints_its_title_as_it_is(command, root, tmp_path):
    title = "out[/grpo]:bug:"
    result = command(*(title if word == "toy" else word for word in watch(root, tmp_path, "false")))
    assert result.returncode == 1 and f"{title} failed with exit code 1" in result.stdout, result.stderr


def test_watch_started_by_nohup_survives_the_terminal(command, root, tmp_path):
    """The command sends the signal of a closed terminal itself, and goes on."""
    result = command("nohup", *watch(root, tmp_path, "bash", "-c", "kill -HUP $PPID; sleep 0.5; exit 3"))
    assert result.returncode == 3, result.stdout + result.stderr


def test_comparison_takes_means_and_intervals_over_seeds(program, tmp_path):
    """Of two values a and b the half width is 12.706 |a - b| / 2: 1.271 for a difference of 0.2, 0.635 for 0.1.

    300 tokens in 4 seconds, and 600 in 6, are 75 and 100 a second.
    """
    write_run(tmp_path / "0/grpo", [1.0, 0.5], [0.1, 0.3])
    write_run(tmp_path / "1/grpo", [1.0, 0.3], [0.1, 0.5])
    write_run(tmp_path / "0/steer", [1.0, 0.8, 0.9], [0.2, 0.7, 0.6], weights=[0.9, 0.8, 0.7])
    runs = [tmp_path / run for run in ("0/grpo", "1/grpo", "0/steer")]
    result = program("compare_runs.py", *runs, "--out", tmp_path / "p.png")
    rows = printed_rows(result)
    assert rows == [
        [
            "grpo", "2", "0.100 ± 0.000", "0.400 ± 1.271", "0.400 ± 1.271", "1.000 ± 0.000",
            "0.700 ± 0.635", "0.400 ± 1.271", "-", "75 ± 0",
        ],
        ["steer", "1", "0.200", "0.600", "0.700", "1.000", "0.900", "0.800", "0.800", "100"],
    ]  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_says_of_how_many_seeds_a_figure_is_and_that_data_differ(program, tmp_path):
    write_run(tmp_path / "seed1/grpo", [1.0, 0.5], [0.1, 0.3])
    write_run(tmp_path / "seed2/grpo", [1.0, math.nan], [0.1, 0.5])
    write_run(tmp_path / "seed1/steer", [1.0, 0.5], [0.1, 0.3], **{"val-core/b/acc/mean@1": 0.5})
    result = program("compare_runs.py", *sorted(tmp_path.glob("*/*")), "--out", tmp_path / "p.png")
    assert printed_rows(result)[0][6] == "0.750 (1 of 2)", result.stdout
    assert "the entropy is no number at the end of grpo (seed 2)\n" in result.stdout
    different = "different data, so they cannot be compared: a: grpo (seed 1), grpo (seed 2); a and b: steer (seed 1)\n"
    assert different in result.stdout


def test_comparison_names_shorter_runs_and_methods_that_it_does_not_compare(program, tmp_path):
    """A run that ended before its first validation has no figures of the end. The file has the titles too."""
    for name, steps in (("seed1/grpo", 3), ("seed2/grpo", 3), ("seed2/two", 3), ("seed3/two", 2), ("seed1/one", 3)):
        write_run(tmp_path / name, [0.5] * steps, [0.1] * steps)
    out = ("--out", tmp_path / "p.png", "--markdown", tmp_path / "t.md", "--baseline", "grpo")
    result = program("compare_runs.py", *sorted(tmp_path.glob("*/*")), *out)
    notes = [
        "the longest run has 2 steps; two (seed 3) ends at step 1",
        "two is not compared with grpo: expected at least 2 seeds in common, found 1",
    ]
    assert [line for line in result.stdout.splitlines() if "│" not in line][-3:-1] == notes
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0] == "means over seeds ± 95 % interval" and all(note in lines for note in notes)
    assert "single runs; * is outside of the 95 % interval of a further run of grpo" in lines
    alone = program("compare_runs.py", tmp_path / "seed1/grpo", tmp_path / "seed1/one", *out)
    assert "one is not compared with grpo: expected at least 2 seeds in common, found 1" in alone.stdout


def test_comparison_prints_names_as_they_are(program, tmp_path):
    """Brackets and colons are no markup."""
    names = ["grpo[lr=1e-5]", "grpo[lr=1e-6]", "a[b]:bug:"]
    for name in names:
        write_run(tmp_path / name, [0.5], [0.1])
    words = ("--out", tmp_path / "p.png", "--markdown", tmp_path / "table.md")
    result = program("compare_runs.py", *(tmp_path / name for name in names), *words)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout and name in (tmp_path / "table.md").read_text() for name in names)


def test_comparison_and_report_name_what_they_cannot_write(program, tmp_path):
    write_run(tmp_path / "grpo", [0.5], [0.1])
    (tmp_path / "file").write_text("x")
    for words in (
        ["compare_runs.py", "--out", tmp_path / "file/p.png"],
        ["compare_runs.py", "--out", tmp_path / "p.png", "--markdown", tmp_path],
        ["report.py", "--out", tmp_path / "file"],
    ):
        result = program(words[0], tmp_path / "grpo", *words[1:])
        assert result.returncode == 1 and result.stderr.startswith(f"{words[0].removesuffix('.py')}: [Errno ")


def test_comparison_prints_its_tables_where_no_picture_can_be_drawn(program, tmp_path):
    """Seeds whose steps differ have no common curve."""
    for seed, step in ((1, 1), (2, 5)):
        line = {"step": step, "data": {"actor/entropy": 0.4, "val-core/x/acc/mean@1": 0.25}}
        folder = tmp_path / f"seed{seed}/grpo"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    result = program("compare_runs.py", *sorted(tmp_path.glob("*/grpo")), "--out", tmp_path / "p.png")
    assert result.returncode == 1 and "no entropy and no accuracy at a step that all seeds of a method" in result.stderr
    assert "0.250 ± 0.000" in result.stdout


def test_comparison_has_a_dash_for_what_a_run_did_not_log(program, tmp_path):
    for name in ("1/grpo", "2/grpo", "1/none"):
        write_run(tmp_path / name, [0.5, 0.4], [0.1, 0.2 if name == "1/grpo" else 0.3])
    lines = [json.loads(line) for line in (tmp_path / "1/none/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["data"] |= {"actor/target_entropy": 0.2, "actor/entropy": None}
    (tmp_path / "1/none/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = program(
        "compare_runs.py", *sorted(tmp_path.glob("*/*")), "--baseline", "grpo", "--out", tmp_path / "p.png"
    )
    assert result.returncode == 0, result.stderr
    rows = printed_rows(result)
    assert ["none", "0.2", "-", "-", "-"] in rows and ["none", "0.300", "-"] in rows


def test_comparison_has_a_dash_for_what_has_no_variance_or_no_baseline(program, tmp_path):
    """Differences of 0.25 in both seeds tell nothing of their variance, and a baseline without entropies nothing."""
    for name, entropy, accuracy in (("grpo", None, 0.25), ("other", 0.5, 0.5)):
        for seed in (1, 2):
            write_run(tmp_path / f"{seed}/{name}", [entropy], [accuracy])
    write_run(tmp_path / "1/one", [0.5], [0.25])
    rows = printed_rows(
        program("compare_runs.py", *sorted(tmp_path.glob("*/*")), "--baseline", "grpo", "--out", tmp_path / "p.png")
    )
    assert ["other", "final", "2", "0.250 ± 0.000", "-", "-", "-"] in rows
    assert rows[-2:] == [["interval", "0.250 to 0.250", "-"], ["one", "0.250", "0.500"]]


def test_pass_at_k_is_compared_at_the_least_and_the_greatest_k_of_all_runs(program, tmp_path):
    """Though the first method has no k between them; the other usual figures are compared too."""
    for name, ks in (("few", (8, 64)), ("many", (8, 16, 32, 64))):
        more = {f"val-aux/a/acc/pass@{k}": 0.5 for k in ks} | {"val-aux/a/distinct_right": 1.5}
        for seed in (1, 2):
            write_run(tmp_path / f"{seed}/{name}", [0.5], [0.25], **more)
    result = program("compare_runs.py", *sorted(tmp_path.glob("*/*")), "--baseline", "few", "--out", tmp_path / "p.png")
    compared = [row[1] for row in printed_rows(result) if len(row) == 7]
    assert compared == ["final", "pass@8", "pass@64", "distinct right", "last ten"]


def test_comparison_marks_single_runs_outside_of_the_baselines_interval(program, tmp_path):
    """Accuracies of 0.1 and 0.3 have the variance 0.02, and a further one lies within 12.706 √(0.02 * 1.5) of 0.2."""
    for name, accuracy in (("0/grpo", 0.1), ("1/grpo", 0.3), ("0/far", 2.5), ("0/low", -2.1), ("0/near", 2.3)):
        write_run(tmp_path / name, [0.5, 0.4], [0.0, accuracy])
    runs = sorted(tmp_path.glob("*/*"))
    compare = ("compare_runs.py", "--out", tmp_path / "p.png")
    result = program(*compare, "--baseline", "grpo", *runs)
    rows = printed_rows(result)
    assert rows[-4:] == [
        ["interval", "-2.001 to 2.401", "0.450 to 0.450"],
        ["far", "2.500 *", "0.450"], ["low", "-2.100 *", "0.450"], ["near", "2.300", "0.450"],
    ]  # fmt: skip
    result = program(*compare, "--baseline", "far", tmp_path / "0/far", tmp_path / "0/near")
    assert result.returncode == 0 and "interval of a further" not in result.stdout, result.stdout + result.stderr


def make_audit(run):
    """The folder of a run's audits, of which the first step has one."""
    (run / "audit").mkdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    next(record for record in records if record["step"] == 1)["data"]["entropy_audit/tokens"] = 6
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_comparison_scores_predictions_single_tokens_and_held_targets(program, tmp_path):
    write_run(tmp_path / "grpo", [0.4] * 30, [0.1] * 30)
    write_run(tmp_path / "held", [0.4] * 10 + [0.32] * 20, [0.1] * 30, weights=[0.9] * 30)
    lines = [json.loads(line) for line in (tmp_path / "held/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["data"]["actor/target_entropy"] = 0.3
    (tmp_path / "held/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_audit(tmp_path / "grpo")
    change = pd.Series([1.0, -2.0, 3.0])
    updates = pd.DataFrame({"step": 1, "mini_batch": range(3), "entropy": 0.4, "true_change": change})
    updates.assign(influence=2 * change, exact=[1.0, 1.0, 1.0]).to_parquet(
        tmp_path / "grpo/audit/step_1_updates.parquet"
    )
    tokens = tabular_audit(steps=(1,), mini_batches=1, responses=1, length=6)
    tokens["one_token"] = [1.0, -2.0, 3.0, 0.5, 0.0, float("nan")]
    tokens["influence"] = [2.0, -4.0, 5.0, -1.0, 0.5, 8.0]
    tokens.to_parquet(tmp_path / "grpo/audit/step_1_rank_0.parquet")
    result = program("compare_runs.py", tmp_path / "grpo", tmp_path / "held", "--out", tmp_path / "p.png")
    assert result.returncode == 0, result.stderr
    rows = printed_rows(result)
    assert ["grpo", "influence", "3", "1.000", "0.500"] in rows
    # Ranks 4, 1, 5, 2, 3 against 4, 1, 5, 3, 2; of five tokens one has the wrong sign and one no effect.
    assert ["grpo", "influence", "5", "0.900", "0.961", "75"] in rows
    assert ["grpo", "0.3, not its own", "0.1000", "33.3", "-"] in rows
    assert ["held", "0.3", "0.0200", "6.7", "0.900"] in rows


def test_comparison_shows_the_mean_scores_of_audits(program, tmp_path):
    """Of two audited updates, and of one whole step; factors are in the headings."""
    update = {"entropy_audit/tokens": 40, "entropy_audit/exact/mse": 1e-4, "entropy_audit/exact/pearson": 0.5}
    second = {"entropy_audit/tokens": 60, "entropy_audit/exact/mse": 3e-4, "entropy_audit/exact/pearson": 0.7}
    step = {"entropy_audit/step/exact/mse": 7e-4, "entropy_audit/step/exact/spearman": 0.25}
    write_metrics(tmp_path / "steer", [(1, {"actor/entropy": 0.5} | update), (2, second | step)])
    rows = printed_rows(program("compare_runs.py", tmp_path / "steer", "--out", tmp_path / "p.png"))
    assert rows[-2:] == [
        ["steer", "update", "exact", "50", "2.000", "0.60", "-", "-", "-"],
        ["steer", "step", "exact", "-", "7.000", "-", "0.25", "-", "-"],
    ]


def test_a_score_is_reached_by_a_mean_that_equals_it(program, tmp_path):
    """Scores of 1/4 to 20/4, whose first mean of ten is 5.5/4."""
    records = [(step, {"actor/entropy": 0.5, "critic/score/mean": step / 4}) for step in range(1, 21)]
    write_metrics(tmp_path / "grpo", records)
    result = program("compare_runs.py", tmp_path / "grpo", "--reach", "1.375", "--out", tmp_path / "p.png")
    assert ["grpo", "1", "1", "10"] in printed_rows(result)


def test_predictions_are_compared_where_all_seeds_have_them(program, tmp_path):
    """The first seed's audit has an estimator more than the second's."""
    for seed, audited in ((1, updates(1)), (2, updates(1).drop(columns="released"))):
        write_run(tmp_path / f"{seed}/steer", [0.5, 0.5], [0.1, 0.1])
        make_audit(tmp_path / f"{seed}/steer")
        audited.to_parquet(tmp_path / f"{seed}/steer/audit/step_1_updates.parquet")
    result = program("compare_runs.py", *sorted(tmp_path.glob("*/*")), "--out", tmp_path / "p.png")
    assert result.returncode == 0, result.stderr
    assert [row[1:3] for row in printed_rows(result)[1:]] == [["influence", "8"]]


def test_runs_without_a_target_are_compared_with_each_constant_one(program, tmp_path):
    """From the greatest on; of several methods without a target only the baseline, if there is one."""
    targets = {"changing": [0.9, 0.5], "high": [0.8, 0.8], "low": [0.2, 0.2], "grpo": [None] * 2, "plain": [None] * 2}
    for name, values in targets.items():
        records = [(s, {"actor/entropy": 0.5, "actor/target_entropy": value}) for s, value in enumerate(values)]
        write_metrics(tmp_path / name, records)
    compare = ("compare_runs.py", *(tmp_path / name for name in targets), "--out", tmp_path / "p.png")
    own = [["changing", "0.9, then 0.5"], ["high", "0.8"], ["low", "0.2"]]
    grpo, plain = ([[name, f"{target}, not its own"] for target in (0.8, 0.2)] for name in ("grpo", "plain"))
    for words, expected in (((), own + grpo + plain), (("--baseline", "grpo"), own + grpo)):
        rows = printed_rows(program(*compare, *words))[len(targets) :]  # those before are the means
        assert [row[:2] for row in rows] == expected


#: Stands for the interpreter in launchers: says that verl_steer is there, starts a watched command without watching it,
#: and only writes down the calls of programs whose output the launcher itself does not read.
SHELL = """#!/bin/sh
case "$1 $2" in
  "-c import fcntl"*) exec "$REAL" -S "$@" ;;
  "-c "* | "-m verl_steer") exit 0 ;;
  */watch.py*) while [ "$1" != -- ]; do shift; done; shift; exec "$@" ;;
  */compare_runs.py* | */report.py* | */summarize_eval.py*) printf '%s\\t' "$@" >>"$LATER"; echo >>"$LATER"; exit ;;
  */scripts/*) exec "$REAL" "$@" ;;
esac
exec "$REAL" -S "$PROGRAM" "$@"
"""


@pytest.fixture
def launch(command, program, tmp_path):
    """Runs a command with that interpreter and a program for training; then the calls written down, in this process."""

    def run(training, *words, **more):
        python, training_program, later = (tmp_path / name for name in ("python", "training.py", "later"))
        python.write_text(SHELL)
        python.chmod(0o755)
        training_program.write_text(training)
        later.write_text("")
        places = {"PYTHON": python, "REAL": sys.executable, "PROGRAM": training_program, "LATER": later}
        result = command(*words, **{name: str(place) for name, place in places.items()}, **more)
        for line in later.read_text().splitlines():
            script, *arguments = line.rstrip("\t").split("\t")
            called = program(os.path.basename(script), *arguments)
            result.returncode = result.returncode or called.returncode
            result.stdout, result.stderr = result.stdout + called.stdout, result.stderr + called.stderr
        return result

    return run


#: Prints configurations, and for a training run writes its metrics, or fails once.
INTERPRETER = """
import json, os, pathlib, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "verl.steer.main"]:
    options = {key: value.strip("'") for key, value in (word.split("=", 1) for word in arguments if "=" in word)}
    folder = pathlib.Path(options["trainer.default_local_dir"])
    if "+FAIL" in options:
        sys.exit("no such key: FAIL")
    if "--cfg" in arguments:
        print("experiment:", options["trainer.experiment_name"])
        sys.exit()
    if "+QUIET" in options:
        sys.exit()
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{options['method']} {options['+seed']} {options['task']} {options['hardware']}\\n")
    resumed = (folder / "latest_checkpointed_iteration.txt").exists()
    steps, file = ([2], "metrics_from_1_start_2.jsonl") if resumed else ([0, 1, 2], "metrics.jsonl")
    if os.environ.get("STOP") == options["method"] and not resumed:
        steps = [0, 1]
    with open(folder / file, "w") as out:
        for step in steps:
            data = {"actor/entropy": 1.0 - step / 4, "val-core/a/acc/mean@1": step / 4}
            out.write(json.dumps({"step": step, "data": data}) + "\\n")
    if len(steps) == 2:
        (folder / "latest_checkpointed_iteration.txt").write_text("1")
        sys.exit(3)
else:
    sys.exit(f"unexpected: {arguments}")
"""


@pytest.fixture
def launched(launch, root, tmp_path):
    """A launcher of several runs with an interpreter that trains nothing; and what it was asked to train."""
    environment = {"CALLS": str(tmp_path / "calls"), "OUTPUT_DIR": str(tmp_path / "out"), "TASK_DIR": str(tmp_path)}

    def run(launcher, *overrides, **more):
        (tmp_path / "calls").write_text("")
        result = launch(INTERPRETER, "bash", root / "run" / launcher, *overrides, cwd="/", **(environment | more))
        return result, (tmp_path / "calls").read_text().splitlines()

    return run


def test_comparison_with_a_baseline_and_steps_to_a_score(program, tmp_path):
    """Two seeds of each method; the mean score of ten steps reaches 0 after step 15 or never."""
    for method, gain in (("grpo", 0.0), ("other", 0.1)):
        for seed in (1, 2):
            records = [
                {"step": step, "data": {"actor/entropy": 0.5, "critic/score/mean": (step - 10.5) * gain}}
                for step in range(1, 21)
            ]
            accuracy = "val-core/countdown/acc/mean@8"
            records[-1]["data"] |= {accuracy: 0.1 * seed + gain * seed}
            records.insert(0, {"step": 0, "data": {accuracy: gain}})
            folder = tmp_path / f"seed{seed}" / method
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = sorted(tmp_path.glob("seed*/*"))
    compare = ("compare_runs.py", *runs, "--out", tmp_path / "p.png")
    result = program(*compare, "--baseline", "grpo", "--reach", "0.05")
    assert result.returncode == 0, result.stderr
    rows = printed_rows(result)
    # Differences of 0.1 and 0.2: mean 0.15, deviation 0.0707; t = 3 with one degree of freedom.
    assert ["other", "final", "2", "0.150 ± 0.635", "+2.1", "0.205", "0.205"] in rows
    # The mean of steps 6 to 15 is 0, of 7 to 16 0.1.
    assert ["other", "2", "2", "16 ± 0"] in rows and ["grpo", "2", "0", "-"] in rows
    result = program(*compare, "--baseline", "grpo", "--compare", "gain")
    rows = printed_rows(result)
    # Accuracies before of 0 and 0.1: 0 and 0.1 are left, t = 1.
    assert [row for row in rows if len(row) == 7] == [["other", "gain", "2", "0.050 ± 0.635", "+0.7", "0.500", "0.500"]]
    refused = program(*compare, "--baseline", "grpo", "--compare", "again")
    assert refused.returncode == 1 and "--compare again: expected some of accuracy before, final, " in refused.stderr
    refused = program(*compare, "--compare", "gain")
    assert refused.returncode == 2 and "--compare gain: expected a --baseline to compare with" in refused.stderr
    refused = program(*compare, "--baseline", "gone")
    assert refused.returncode == 1 and "--baseline gone: expected one of grpo, other" in refused.stderr
    refused = program(*compare[:-1], tmp_path / "p.txt")
    assert refused.returncode == 2 and "p.txt: expected a file whose name ends with .png or .svg" in refused.stderr


def test_comparison_of_runs_with_other_figures_and_of_one_named_twice(program, tmp_path):
    """The first has an accuracy only, the second pass@16 and pass@8 too, which the table has in the order of k."""
    samples = {"val-aux/a/acc/pass@16": 0.75, "val-aux/a/acc/pass@8": 0.5, "val-aux/a/distinct_right": 1.5}
    for name, data in (("few", {}), ("many", samples)):
        (tmp_path / name).mkdir()
        record = {"step": 1, "data": {"val-core/a/acc/mean@1": 0.25, "actor/entropy": 0.5} | data}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    runs = [tmp_path / name for name in ("few", "many", "few")]
    again = ("--baseline", "few", "--compare", "final", "--compare", "final", "--markdown", tmp_path / "new/t.md")
    result = program("compare_runs.py", *runs, *again, "--out", tmp_path / "p.png")
    assert result.returncode == 0, result.stderr
    assert printed_rows(result)[:2] == [
        ["few", "1", "0.250", "0.250", "-", "-", "-", "0.500", "0.500", "0.500"],
        ["many", "1", "0.250", "0.250", "0.500", "0.750", "1.500", "0.500", "0.500", "0.500"],
    ]
    assert "| many" in (tmp_path / "new/t.md").read_text()


def test_compare_trains_the_methods_over_the_seeds_once(launched, tmp_path):
    result, trained = launched("compare.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    methods = ["grpo_symmetric", "clip_higher", "clip_cov", "kl_cov", "steer_exp", "steer_linear"]
    assert trained == [f"{method} {seed} arithmetic cpu" for seed in (42, 43, 44) for method in methods]
    assert (tmp_path / "out/seed43/kl_cov/config.yaml").read_text() == "experiment: kl_cov\n"
    assert "clip_cov" in result.stdout and "0.500 ± 0.000" in result.stdout
    assert (tmp_path / "out/comparison.png").exists()
    result, trained = launched("compare.sh")
    assert result.returncode == 0 and trained == [] and "seed44/steer_exp: trained already" in result.stdout


def test_compare_goes_on_after_a_stop_and_refuses_other_settings(launched, tmp_path):
    choice = {"METHODS": "clip_cov steer_exact", "SEEDS": "1", "TASK": "dapo_math", "HARDWARE": "gpu1"}
    result, trained = launched("compare.sh", "data.max_response_length=9", STOP="steer_exact", **choice)
    assert result.returncode != 0 and trained == ["clip_cov 1 dapo_math gpu1", "steer_exact 1 dapo_math gpu1"]
    result, trained = launched("compare.sh", "data.max_response_length=9", STOP="steer_exact", **choice)
    assert result.returncode == 0 and trained == ["steer_exact 1 dapo_math gpu1"]
    # Entropy 1, 0.75, 0.5 and accuracy 0, 0.25, 0.5: the first steps' metrics are still there.
    cells = [line.split("│") for line in result.stdout.splitlines() if "steer_exact" in line and "│" in line][0]
    assert [cell.strip() for cell in cells[3:9]] == ["0.000", "0.500", "0.500", "1.000", "0.750", "0.500"]
    result, trained = launched("compare.sh", "data.max_response_length=8", **choice)
    assert result.returncode == 1 and trained == []
    assert "train_once.sh: " in result.stderr and "was trained with other settings" in result.stderr
    other = choice | {"TASK_DIR": str(tmp_path / "other")}
    result, trained = launched("compare.sh", "data.max_response_length=9", **other)
    assert result.returncode == 1 and trained == [] and "was trained with other settings" in result.stderr


def test_a_run_that_failed_without_a_checkpoint_starts_again_with_other_settings(launched, tmp_path):
    choice = {"METHODS": "grpo", "SEEDS": "1"}
    result, trained = launched("compare.sh", "+FAIL=1", **choice)
    assert result.returncode != 0 and trained == []
    assert not (tmp_path / "out/seed1/grpo/finished").exists()
    result, trained = launched("compare.sh", "+QUIET=1", **choice)
    assert result.returncode == 1 and "seed1/grpo: no metrics*.jsonl; expected a run with `file`" in result.stderr
    result, trained = launched("compare.sh", **choice)
    assert result.returncode == 0 and trained == ["grpo 1 arithmetic cpu"]


def test_the_folder_of_a_run_may_have_characters_of_hydras_grammar(command, root, tmp_path):
    python, folder = tmp_path / "python", tmp_path / "it's a=b {c}" / "x=1, y"
    python.write_text('#!/bin/sh\n[ "$2" != verl.steer.main ] || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    result = command("bash", root / "run/train_once.sh", folder, "grpo", PYTHON=str(python))
    assert result.returncode == 1 and "no metrics*.jsonl" in result.stderr
    words = [word for word in (folder / "config.yaml").read_text().splitlines() if word.startswith("trainer.")]
    options = {option.get_key_element(): option.value() for option in OverridesParser.create().parse_overrides(words)}
    assert options["trainer.default_local_dir"] == str(folder) and options["trainer.experiment_name"] == folder.name


def test_a_second_start_leaves_the_metrics_of_a_run_alone(launched, tmp_path):
    run = tmp_path / "out/seed1/grpo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    with lock_folder(run):
        result, trained = launched("compare.sh", METHODS="grpo", SEEDS="1")
        assert result.returncode == 1 and not trained and (run / "metrics.jsonl").exists()
        assert f"train_once.sh: {run}: a training runs in it; wait for its end or" in result.stderr
    result, trained = launched("compare.sh", METHODS="grpo", SEEDS="1")
    assert result.returncode == 0 and len(trained) == 1, result.stderr


def test_a_run_is_finished_where_its_folder_has_brackets(launched, tmp_path):
    choice = {"METHODS": "grpo", "SEEDS": "1", "OUTPUT_DIR": str(tmp_path / "out[lr=1]")}
    result, trained = launched("compare.sh", **choice)
    assert result.returncode == 0 and len(trained) == 1, result.stderr
    assert (tmp_path / "out[lr=1]/seed1/grpo/finished").exists()


def test_quickstart_marks_no_run_without_metrics_as_trained(command, root, tmp_path):
    """As with `--cfg job`; the environment is up to date by its stamp, and its interpreter does nothing."""
    venv, run = tmp_path / "venv", tmp_path / "out/grpo"
    run.mkdir(parents=True)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to("/bin/true")
    files = (root / name for name in ("pyproject.toml", "run/constraints.txt", "run/setup.sh"))
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    (venv / "steer-stamp").write_text(f"cpu {stamp}  -\n")
    environment = {"STEER_VENV": str(venv), "OUTPUT_DIR": str(tmp_path / "out"), "TASK_DIR": str(tmp_path)}
    result = command("bash", root / "run/quickstart.sh", "--cfg", "job", METHODS="grpo", **environment)
    assert result.returncode == 1 and not (run / "finished-with").exists()
    assert f"quickstart.sh: {run}: no metrics*.jsonl; expected a run with `file`" in result.stderr


def test_an_environment_is_not_made_over_one_of_another_kind(command, root, tmp_path):
    """It would mix builds of torch and vLLM for GPUs and for CPUs."""
    (tmp_path / "steer-stamp").write_text("gpu 0123  -\n")
    result = command("bash", root / "run/setup.sh", STEER_VENV=str(tmp_path))
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"setup.sh: {tmp_path} is an environment of the kind gpu: set STEER_VENV to ")
    assert [file.name for file in tmp_path.iterdir()] == ["steer-stamp"]


def test_a_folder_that_cannot_be_made_is_named(command, root, tmp_path):
    (tmp_path / "file").touch()
    folder = f"{tmp_path}/file/outputs"
    for words in (("launch.sh", "grpo"), ("eval.sh", "--only", "aime24"), ("preflight.sh",)):
        found = command("bash", root / "run" / words[0], *words[1:], OUTPUT_DIR=folder, MODEL_PATH="m")
        assert found.returncode == 1
        assert found.stderr == f"{words[0]}: OUTPUT_DIR={folder}: expected a folder to write to\n"


@pytest.mark.parametrize("words", [("launch.sh", "grpo"), ("eval.sh",), ("preflight.sh",), ("two_nodes.sh",)])
def test_an_interpreter_without_this_package_is_named(command, root, tmp_path, words):
    found = command("bash", root / "run" / words[0], *words[1:], OUTPUT_DIR=tmp_path, PYTHON="false", MODEL_PATH="m")
    assert found.returncode == 1
    assert found.stderr == f"{words[0]}: false has no verl_steer: run `bash run/setup.sh` or set PYTHON\n"


def test_an_interpreter_finds_no_package_in_the_repository_that_it_does_not_have(command, root, tmp_path):
    """The repository's root, where `verl_steer.py` lies, is on the path of `python -c`."""
    venv.create(tmp_path / "none")
    python = tmp_path / "none/bin/python"
    found = command("bash", root / "run/launch.sh", "grpo", cwd=root, OUTPUT_DIR=tmp_path, PYTHON=str(python))
    assert found.returncode == 1
    assert found.stderr == f"launch.sh: {python} has no verl_steer: run `bash run/setup.sh` or set PYTHON\n"


def test_the_pins_stay_where_new_ones_cannot_be_found(command, root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    found = command("bash", tmp_path / "run/lock.sh", STEER_VENV=tmp_path / "none")
    assert found.returncode != 0
    assert (tmp_path / "run/constraints.txt").read_bytes() == (root / "run/constraints.txt").read_bytes()


@pytest.mark.parametrize(
    "launcher",
    ["compare.sh", "eval.sh", "launch.sh", "lock.sh", "preflight.sh", "quickstart.sh", "run_asymmetric.sh",
     "run_exp.sh", "run_exp_extreme.sh", "run_grpo.sh", "run_linear.sh", "run_linear_extreme.sh", "setup.sh",
     "study.sh", "test.sh", "train_once.sh", "two_nodes.sh"],
)  # fmt: skip
def test_launchers_explain_themselves(command, root, launcher):
    result = command("bash", root / "run" / launcher, "--help", cwd="/", PYTHON="false")
    assert result.returncode == 0 and f"bash run/{launcher}" in result.stdout
    assert result.stdout.splitlines()[0][-1] != "#" and "set -euo" not in result.stdout


@pytest.mark.parametrize(
    "launcher, word, told",
    [
        (
            "compare.sh",
            "",
            "compare.sh: METHODS names clip_higer: expected names of files in verl/trainer/config/method",
        ),
        ("quickstart.sh", "", "quickstart.sh: METHODS names clip_higer: expected names of files in verl/trainer/con"),
        ("study.sh", "--lst", "study.sh: --lst: expected --list, or Hydra overrides without flags"),
        ("launch.sh", "", "launch.sh: expected the name of a method or configuration, such as steer_exp"),
        (
            "launch.sh",
            "steer_expp",
            "launch.sh: steer_expp: expected the name of a method or configuration, one of adap",
        ),
        ("train_once.sh", "", "train_once.sh: expected a folder for the run and the name of a configuration, such as"),
        ("eval.sh", "--only", "eval.sh: --only: expected names such as aime24,math500"),
        ("eval.sh", "", "eval.sh: MODEL_PATH: expected a Hugging Face folder, a hub id or a checkpoint"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(command, root, launcher, word, told):
    result = command("bash", root / "run" / launcher, *word.split(), METHODS="grpo clip_higer", PYTHON="false")
    assert result.returncode == 1 and result.stderr.startswith(told) and not result.stdout


def test_an_evaluation_of_a_runs_folder_names_its_checkpoints(command, root, tmp_path):
    (tmp_path / "global_step_80").mkdir()
    result = command("bash", root / "run/eval.sh", MODEL_PATH=str(tmp_path), PYTHON="false")
    told = f"a run's folder; expected one of its checkpoints: {tmp_path}/global_step_80"
    assert result.returncode == 1 and result.stderr == f"eval.sh: MODEL_PATH={tmp_path}: {told}\n"


def test_a_benchmark_that_nobody_makes_is_named(command, root, tmp_path):
    environment = {"MODEL_PATH": "a/b", "DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path)}
    result = command("bash", root / "run/eval.sh", "--only", "mytest", **environment)
    told = f"eval.sh: {tmp_path}/mytest.parquet: expected this file, or the name of a benchmark that datasets/make_data"
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(told)
    assert not list(tmp_path.iterdir())


def test_a_run_without_anything_to_keep_is_named(program, tmp_path):
    write_metrics(tmp_path / "run", [(1, {"a": 1})])
    result = program("keep_metrics.py", tmp_path / "run", "--out", tmp_path / "kept")
    assert result.returncode == 1 and "run.jsonl: nothing to keep; expected a run with the metrics" in result.stderr
    assert not (tmp_path / "kept").exists()


def test_study_shares_runs_and_ends_with_a_table_a_picture_and_a_page_for_each_part(launched, tmp_path):
    choice = {"PARTS": "extreme", "SEEDS": "7"}
    result, trained = launched("study.sh", **choice)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["clip_higher", "steer_exp", "grpo", "steer_exp_extreme", "steer_linear_extreme"]
    assert trained == [f"{name} 7 arithmetic cpu" for name in names]
    out = tmp_path / "out"
    assert "grpo_extreme" in (out / "extreme.md").read_text() and (out / "extreme.png").exists()
    assert "grpo_extreme" in (out / "extreme/report.html").read_text()
    result, trained = launched("study.sh", **choice)
    assert result.returncode == 0 and trained == []


def test_study_goes_on_from_the_models_of_other_runs_and_compares_what_became_of_them(launched, tmp_path):
    result, trained = launched("study.sh", PARTS="stable", SEEDS="7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert trained == [f"{method} 7 countdown cpu" for method in ("grpo", "grpo", "steer_exp")]
    names = re.findall(r"^\| (\w+_\w+) ", (tmp_path / "out/stable.md").read_text(), re.MULTILINE)
    assert names == ["stable_grpo", "stable_steer_exp"]


def test_the_study_of_lora_compares_with_and_without_adapters(launched, tmp_path):
    result, trained = launched("study.sh", PARTS="countdown_lora", SEEDS="7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert trained == [f"{method} 7 countdown cpu" for method in ("grpo", "grpo", "steer_exp", "steer_exp")]
    assert (tmp_path / "out/seed7/countdown_grpo_lora").exists()
    assert (tmp_path / "out/countdown_lora/report.html").exists()


def test_the_study_stops_where_a_task_cannot_be_made(launched, tmp_path):
    (tmp_path / "out/countdown").mkdir(parents=True)
    (tmp_path / "out/countdown/mine").touch()
    result, trained = launched("study.sh", PARTS="collapse", SEEDS="7", TASK_DIR="")
    assert result.returncode != 0 and trained == []


def test_every_run_of_the_study_passes_the_checks(command, root, tmp_path, monkeypatch):
    """Of all parts that `members` tells apart."""
    cases = (root / "run/study.sh").read_text().partition("members() {")[2].partition("esac")[0]
    parts = [part for names in re.findall(r"^    ([\w |\\\n]+)\)", cases, re.M) for part in re.findall(r"\w+", names)]
    assert len(parts) == len(set(parts)) == 28 and {"sweep", "countdown_lora", "control_others"} < set(parts)
    (tmp_path / "chosen.txt").write_text("countdown_grpo\n")
    listed = command("bash", root / "run/study.sh", "--list", PARTS=" ".join(parts), OUTPUT_DIR=tmp_path)
    assert listed.returncode == 0 and listed.stderr == ""
    runs = dict(line.split(": ") for line in listed.stdout.splitlines())
    assert len(runs) == len(listed.stdout.splitlines()) == 267
    (tmp_path / "reward_model").mkdir()
    (tmp_path / "reward_model/config.json").touch()
    monkeypatch.setenv("TASK_DIR", str(tmp_path))
    lr = "actor_rollout_ref.actor.optim.lr"
    rates = {name: name.rpartition("_lr") for name in runs if "_lr" in name}
    assert all(runs.pop(name) == f"{runs[base]} {lr}={rate}" for name, (base, _, rate) in rates.items())
    configs = {}
    for name, words in runs.items():
        task = "countdown" if re.match("countdown_|second_|continued_|stable_", name) else "arithmetic"
        task = "countdown_learned" if name.startswith("learned_") else task
        config, *overrides = words.split()
        configs[name] = validated(config, f"task={task}", "hardware=cpu", *overrides)
    coefficients = [name for name in configs if "_coefficient" in name]
    assert len(rates) == 2 * 37 and len(coefficients) == 2 * 32
    assert all(configs[name] != configs[name.partition("_coefficient")[0]] for name in coefficients)
    assert configs["countdown_pi_exact_coefficient0.15"][1].target_entropy == 0.15
    assert configs["countdown_gtpo_together"][0].algorithm.entropy_reward_by_class is False
    clips = [configs[name][0].actor_rollout_ref.actor.clip_ratio_high for name in ("clip_cov", "countdown_clip_cov")]
    assert clips == [0.28, 1.0]
    assert configs["countdown_bonus_0.03"][0].actor_rollout_ref.actor.entropy_coeff == 0.03
    assert configs["steer_exp_0.6"][1].token_weight_min == 0.6
    quadrant = configs["negative_likely_1.5"][1]
    assert (quadrant.quadrant, quadrant.quadrant_weight) == ("negative_likely", 1.5)
    assert configs["grpo_extreme"][0].actor_rollout_ref.actor.clip_ratio_high == 5.0
    assert configs["steer_exp_lora"][0].actor_rollout_ref.model.lora_rank == 8
    assert configs["influence_steps"][1].target_entropy == {1: 0.35, 21: 0.2, 41: 0.3}
    assert configs["learned_bonus_0.01"][0].actor_rollout_ref.actor.entropy_coeff == 0.01


def test_study_trains_the_settings_that_a_sweep_has_chosen(launched, tmp_path):
    """GRPO's settings that were chosen are the baseline."""
    chosen = ["countdown_grpo_s", "countdown_grpo_lr5e-5", "countdown_clip_b_coefficient1.25"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/chosen.txt").write_text("\n".join(chosen) + "\n")
    result, trained = launched("study.sh", PARTS="chosen", SEEDS="7 8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert trained == [f"{method} {seed} countdown cpu" for seed in (7, 8) for method in ("grpo_s", "grpo", "clip_b")]
    written = (tmp_path / "out/chosen.md").read_text()
    assert "differences from countdown_grpo_lr5e-5" in written
    settings = (tmp_path / f"out/seed8/{chosen[2]}/settings").read_text().splitlines()
    assert "algorithm.clip_b_mu=1.25" in settings


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"PARTS": "chosen"}, "PARTS=chosen: no {out}/chosen.txt; expected that PARTS=sweep has ended"),
     ({"PARTS": "sweep"}, "PARTS=sweep: expected sweep alone, and SEEDS with a seed that no other part uses"),
     ({"PARTS": "sweep field", "SEEDS": "7"}, "PARTS=sweep field: expected sweep alone, and SEEDS")],
)  # fmt: skip
def test_a_sweep_and_what_it_chooses_have_seeds_of_their_own(launched, tmp_path, choice, message):
    result, trained = launched("study.sh", **choice)
    assert result.returncode == 1 and trained == []
    assert result.stderr.startswith("study.sh: " + message.format(out=tmp_path / "out"))
    assert result.stderr.count("\n") == 1


def test_the_settings_of_a_sweep_that_are_chosen(program, tmp_path):
    """The greatest pass@8 of each method; of equal ones its own, which the run without a suffix has."""
    shares = {"grpo_lr2e-4": 0.5, "grpo": 0.5, "grpo_lr5e-5": 0.25, "a_b": 0.25, "a_b_coefficient0.5": 0.75, "x_lr1": 1}
    runs = [tmp_path / "seed1" / name for name in shares]
    for run in runs:
        write_run(run, [0.5, 0.5], [0.1, 0.1], **{"val-aux/a/acc/pass@8": shares[run.name]})
    result = program("choose_settings.py", *runs, "--out", tmp_path / "new/chosen.txt")
    assert result.returncode == 0, result.stderr
    assert printed_rows(result) == [
        ["grpo", "3", "0.500", "its own", "0.500"],
        ["a_b", "2", "0.250", "coefficient0.5", "0.750"],
        ["x", "1", "-", "lr1", "1.000"],
    ]
    assert (tmp_path / "new/chosen.txt").read_text().split() == ["grpo", "a_b_coefficient0.5", "x_lr1"]
    write_run(tmp_path / "seed2/grpo", [0.5, 0.5], [0.1, 0.1], **{"val-aux/a/acc/pass@8": 0.5})
    write_run(tmp_path / "short", [0.5] * 3, [0.1] * 3, **{"val-aux/a/acc/pass@8": 0.5})
    for more, message in (
        ((tmp_path / "seed2/grpo",), "grpo: seeds 1 and 1 2; expected the same of each setting"),
        ((tmp_path / "short",), "steps of the runs: x_lr1 1, short 2; expected whole runs, of the same length"),
        (("--figure", "pass@9"), "grpo_lr2e-4: no pass@9 at the end; expected whole runs, and a heading of compare_ru"),
    ):
        result = program("choose_settings.py", *runs, *more, "--out", tmp_path / "other")
        assert result.returncode == 1 and not (tmp_path / "other").exists()
        assert result.stderr.startswith(f"choose_settings: {message}")


def test_study_names_its_parts(command, root):
    refused = command("bash", root / "run/study.sh", PARTS="sizes maps")
    assert refused.returncode == 1 and "PARTS names sizes; expected collapse, " in refused.stderr


def test_comparison_names_a_folder_without_metrics(program, tmp_path):
    result = program("compare_runs.py", tmp_path, "--out", tmp_path / "p.png")
    assert result.returncode == 1 and f"{tmp_path}: no metrics*.jsonl" in result.stderr


def write_responses(folder, name, responses, rows=None, n=1, most=-1):
    """An evaluation's responses, as (input, acc, pred), to a benchmark of so many rows, by default as many."""
    lines = [
        {"input": problem, "output": "", "gts": "1", "score": 1.0 if acc else -1.0, "acc": acc, "pred": pred}
        for problem, acc, pred in responses
    ]
    (folder / name).mkdir()
    (folder / name / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pd.DataFrame({"prompt": [""] * (rows or len(lines))}).to_parquet(folder / f"{name}.parquet")
    config = {"data": {"val_max_samples": most}, "actor_rollout_ref": {"rollout": {"val_kwargs": {"n": n}}}}
    (folder / "settings.json").write_text(json.dumps({"config": config}))


def summarized(program, folder, *names):
    """The summary of these benchmarks, and what was printed."""
    result = program("summarize_eval.py", folder, "--only", *names, COLUMNS="200")
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "results.json").read_text()), result


def test_evaluation_by_hand(program, tmp_path):
    """Two problems, three samples each: right, right, wrong and wrong, wrong, right."""
    responses = [("p", True, "1"), ("p", True, "1"), ("p", False, "2"), ("q", False, "3"), ("q", False, "3")]
    write_responses(tmp_path, "toy", [*responses, ("q", True, "4")], rows=5, n=3, most=2)
    results, printed = summarized(program, tmp_path, "toy")
    benchmark = results["benchmarks"]["toy"]
    assert [benchmark[name] for name in ("n", "k", "complete", "lost")] == [2, 3, True, 0]
    assert benchmark["mean"]["value"] == 0.5 and benchmark["mean"]["interval"] == pytest.approx([1 / 3, 2 / 3])
    assert benchmark["maj"]["value"] == 0.5 and benchmark["pass"]["value"] == 1.0
    assert printed_rows(printed)[0][:4] == ["toy", "2", "3", "0"]
    assert len(pd.read_parquet(tmp_path / "responses.parquet")) == 6


@pytest.mark.parametrize("rows, n, most, lost", [(3, 1, -1, 1), (2, 3, -1, 4), (9, 1, 2, 0), (1, 1, -1, 0)])
def test_lost_responses_are_told(program, tmp_path, rows, n, most, lost):
    """Two responses, each to another problem."""
    write_responses(tmp_path, "toy", [("p", True, "1"), ("q", False, "2")], rows, n, most)
    results, printed = summarized(program, tmp_path, "toy")
    assert [results["benchmarks"]["toy"][name] for name in ("complete", "lost")] == [lost == 0, lost]
    assert printed_rows(printed)[0][:4] == ["toy", "2", "1", str(lost)]


def test_intervals_of_shares_are_those_of_the_binomial_distribution(root):
    """Resampled, k of 20 problems with half of the samples right are binomial, with a share of k / 20.

    The share of 10,000 resamples below a value that q of all are below has a standard error of √(q (1 - q) / 10,000);
    the ends may be those of quantiles that are four of these away.
    """
    interval = runpy.run_path(str(root / "scripts/summarize_eval.py"))["interval"]
    for right in range(1, 20):
        ends = interval(np.repeat([0.5, 0.0], [right, 20 - right]))
        for end, q in zip((2 * end for end in ends), (0.025, 0.975), strict=True):
            error = 4 * math.sqrt(q * (1 - q) / 10_000)
            least, greatest = binom.ppf([q - error, q + error], 20, right / 20) / 20
            assert least - 1e-9 < end < greatest + 1e-9, (right, q)


def test_intervals_of_problems_that_are_right_or_wrong_are_wilsons(root):
    """(p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n), which has a width at 0 and 1 too."""
    interval = runpy.run_path(str(root / "scripts/summarize_eval.py"))["interval"]
    z, n = norm.ppf(0.975), 30
    for right in (0, 1, 15, 30):
        p = right / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        expected = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert interval(np.repeat([1.0, 0.0], [right, n - right])) == pytest.approx(expected, abs=1e-12)


def test_a_prompt_that_is_there_twice_does_not_change_k(program, tmp_path):
    """With another ground truth it is another problem; with the same one it has twice as many samples."""
    write_responses(tmp_path, "toy", [("p", True, "1"), ("p", False, "1"), ("q", True, "1"), ("r", True, "1")])
    lines = tmp_path / "toy/0.jsonl"
    results, _ = summarized(program, tmp_path, "toy")
    assert (results["benchmarks"]["toy"]["n"], results["benchmarks"]["toy"]["k"]) == (3, 1)
    lines.write_text(lines.read_text().replace('"gts": "1"', '"gts": "2"', 1))
    results, _ = summarized(program, tmp_path, "toy")
    assert (results["benchmarks"]["toy"]["n"], results["benchmarks"]["toy"]["k"]) == (4, 1)


def test_earlier_benchmarks_of_a_model_stay_among_its_results(program, tmp_path):
    for name, right in (("one", True), ("two", False)):
        write_responses(tmp_path, name, [("p", right, "1"), ("q", right, "")])
    summarized(program, tmp_path, "one", "two")
    before = pd.read_parquet(tmp_path / "responses.parquet")
    results, printed = summarized(program, tmp_path, "two")
    assert list(results["benchmarks"]) == ["one", "two"] and results["average"]["mean"] == 0.5
    after = pd.read_parquet(tmp_path / "responses.parquet")
    assert after.equals(before) and [row[0] for row in printed_rows(printed)] == ["two", "average"]


def test_an_average_over_some_of_the_benchmarks_says_so(program, tmp_path):
    for name, pred in (("answers", "1"), ("programs", "")):
        write_responses(tmp_path, name, [("p", True, pred), ("q", True, pred)])
    _, printed = summarized(program, tmp_path, "answers", "programs")
    assert printed_rows(printed)[-1][4:] == ["100.0%", "100.0% (of 1)", "100.0%"]


def test_responses_without_a_grade_are_named(program, tmp_path):
    write_responses(tmp_path, "toy", [("p", True, "1")])
    lines = tmp_path / "toy/0.jsonl"
    for text, missing in ((lines.read_text().replace('"acc"', '"other"'), "acc"), ("", "input, gts, acc")):
        lines.write_text(text)
        result = program("summarize_eval.py", tmp_path, "--only", "toy")
        assert result.returncode == 1 and f"summarize_eval: {lines}: no {missing}; expected a grade" in result.stderr


def test_responses_that_cannot_be_read_are_named(program, tmp_path):
    write_responses(tmp_path, "toy", [("p", True, "1"), ("q", False, "\u2028")])
    lines, settings = tmp_path / "toy/0.jsonl", tmp_path / "settings.json"
    whole = lines.read_text()
    one, two = whole.splitlines(keepends=True)
    for text, message in (
        (one + two[:20] + "\n", ":2: expected a response as JSON: "),
        (one + two.replace("false", '"yes"'), ":2: acc=yes: expected a number of 0 to 1"),
        (one + two.replace("false", "-1.0"), ":2: acc=-1.0: expected a number of 0 to 1"),
        (one + two.replace('"acc": false, ', ""), ":2: acc=nan: expected a number of 0 to 1"),
    ):
        lines.write_text(text)
        result = program("summarize_eval.py", tmp_path, "--only", "toy")
        assert result.returncode == 1 and result.stderr.startswith(f"summarize_eval: {lines}{message}"), result.stderr
    lines.write_text(whole)
    settings.rename(tmp_path / "other.json")
    result = program("summarize_eval.py", tmp_path, "--only", "toy")
    assert result.returncode == 1 and result.stderr.startswith("summarize_eval: ") and str(settings) in result.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        ([("", False), (None, False), (None, False), ("1", True)], 1),  # one answer
        ([("", False), ("", False), (None, True)], 0),  # none
        ([("", False), ("1", True), ("2", False)], 1),  # a tie, of which the first counts
        ([("5", False), ("1/2", True), ("0.5", True)], 1),  # one right answer, written in two ways
    ],
)
def test_a_response_without_an_answer_has_no_vote(program, tmp_path, answers, share):
    """Beside a problem with a wrong answer."""
    write_responses(tmp_path, "toy", [*(("p", acc, pred) for pred, acc in answers), ("q", False, "3")])
    results, _ = summarized(program, tmp_path, "toy")
    assert results["benchmarks"]["toy"]["maj"]["value"] == share / 2


def test_rewards_that_are_no_grades(program, tmp_path):
    """A reward function without answers, whose `acc` is a number: 1 is right, 0 and a part are not."""
    write_responses(tmp_path, "toy", [("a", 0.0, None), ("a", 1.0, None), ("b", 0.5, None)])
    write_responses(tmp_path, "grades", [("a", True, "1")])
    lines = tmp_path / "toy/0.jsonl"
    lines.write_text(lines.read_text().replace(', "pred": null', "").replace('"gts": "1"', '"gts": 1'))
    results, _ = summarized(program, tmp_path, "toy", "grades")
    assert results["benchmarks"]["toy"]["pass"]["value"] == 0.5 and "maj" not in results["benchmarks"]["toy"]
    together = pd.read_parquet(tmp_path / "responses.parquet")
    assert together["acc"].tolist() == [0.0, 1.0, 0.5, 1.0] and together["gts"].tolist() == ["1"] * 4


def test_reward_functions_may_differ_in_what_they_return_beside_the_grade(program, tmp_path):
    """Another call reads the first one's lists as arrays."""
    for name, feedback in (("words", "well done"), ("numbers", 0.5)):
        write_responses(tmp_path, name, [("p", True, "1")])
        lines = tmp_path / name / "0.jsonl"
        lines.write_text(json.dumps(json.loads(lines.read_text()) | {"feedback": feedback, "tests": [1, 2]}) + "\n")
        summarized(program, tmp_path, name)
    found = pd.read_parquet(tmp_path / "responses.parquet")
    assert found["feedback"].tolist() == ["well done", "0.5"] and [list(one) for one in found["tests"]] == [[1, 2]] * 2


def test_programs_have_no_majority(program, tmp_path):
    for name, pred in (("programs", ""), ("answers", "1")):
        write_responses(tmp_path, name, [("p", True, pred), ("p", False, pred)])
    results, _ = summarized(program, tmp_path, "programs", "answers")
    assert results["benchmarks"]["programs"].keys() == {"n", "k", "complete", "lost", "mean", "pass"}
    assert results["average"] == {"mean": 0.5, "maj": 1.0, "pass": 1.0}
    summarized(program, tmp_path, "programs")


#: Answers each benchmark with the model's weights and the benchmark's text, and merges shards by copying one.
EVALUATOR = """
import ast, json, os, pathlib, re, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "verl.steer.main"]:
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    (weights,) = pathlib.Path(os.environ["MODEL_PATH"]).glob("*.safetensors")
    for file in map(pathlib.Path, ast.literal_eval(options["data.val_files"])):
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(file.stem.split("-")[0] + "\\n")
        text = re.search(b"<(.*?)>", file.read_bytes())[1].decode()
        row = {"input": "1 + 1", "output": weights.read_text() + " " + text, "gts": "2", "acc": False}
        folder = pathlib.Path(ast.literal_eval(options["trainer.validation_data_dir"]), file.stem)
        folder.mkdir(parents=True)
        (folder / "0.jsonl").write_text(json.dumps(row | {"pred": "", "score": -1.0}) + "\\n")
elif arguments[:2] == ["-m", "verl.model_merger"]:
    source, target = (pathlib.Path(arguments[arguments.index(word) + 1]) for word in ("--local_dir", "--target_dir"))
    target.mkdir(parents=True, exist_ok=True)
    (shard,) = source.glob("model_world_size_*.pt")
    (target / "model.safetensors").write_text(shard.read_text())
    sys.exit("STOP" in os.environ)
else:
    sys.exit(f"unexpected: {arguments}")
"""


DATA, OUT = "it's à=b {c}", "(1, 2) [3]"


def write_benchmark(file, text):
    """A benchmark of one row whose text the evaluator finds without a reader of parquet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"prompt": [f"<{text}>"]}).to_parquet(file, compression=None)


@pytest.fixture
def evaluated(launch, root, tmp_path):
    """run/eval.sh with that interpreter: the folder of results, the responses by benchmark, and what was generated.

    Data and results lie in folders whose names have characters of Hydra's grammar.
    """
    calls, data, out = tmp_path / "calls", tmp_path / DATA, tmp_path / OUT
    for name in ("first", "second"):
        write_benchmark(data / f"{name}.parquet", name)
    environment = {"CALLS": str(calls), "DATA_DIR": str(data), "OUTPUT_DIR": str(out)}

    def run(model, *overrides, only="first", fails=False, **more):
        calls.write_text("")
        words = ("bash", root / "run/eval.sh", "--only", only, "hardware=cpu", *overrides)
        result = launch(EVALUATOR, *words, **{**environment, "MODEL_PATH": str(model), **more})
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        if fails:
            return result.stderr
        folder = re.findall(r"^results: (.*)/results.json", result.stdout, re.MULTILINE)[0]
        responses = pd.read_parquet(folder + "/responses.parquet")
        return folder, dict(zip(responses["benchmark"], responses["output"], strict=True)), calls.read_text().split()

    return run


def write_weights(folder, text, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_checkpoints_of_the_same_name_share_no_responses(evaluated, tmp_path):
    for seed in ("seed1", "seed2"):
        checkpoint = tmp_path / seed / "steer_exp/global_step_9"
        write_weights(checkpoint / "actor/huggingface", seed)
        folder, responses, _ = evaluated(checkpoint)
        assert responses == {"first": f"{seed} first"} and "/eval/steer_exp-global_step_9-" in folder


def test_models_that_would_be_evaluated_wrongly_are_refused(evaluated, tmp_path):
    """Cut off while they were saved, or with LoRA: merged without its adapters, or exported beside them."""
    unfinished = tmp_path / "run/global_step_9"
    write_weights(unfinished / "actor/huggingface", "weights")
    (unfinished / ".unfinished").touch()
    exported = tmp_path / "exported/global_step_9"
    write_weights(exported / "actor/huggingface", '{"base_model.model.q_proj.base_layer.weight": {}}')
    merged = write_weights(tmp_path / "merged", "weights")
    (merged / "lora_adapter").mkdir()
    empty = tmp_path / "empty/global_step_9"
    (empty / "actor").mkdir(parents=True)
    for model, message in (
        (unfinished, f"eval.sh: MODEL_PATH={unfinished}: expected a whole checkpoint; this one was cut off"),
        (empty, f"eval.sh: MODEL_PATH={empty}: expected model_world_size_*.pt or an export in its actor"),
        (exported, f"eval.sh: {exported}/actor/huggingface: expected a model without LoRA adapters"),
        (merged, f"eval.sh: {merged}: expected a model without LoRA adapters"),
    ):
        assert evaluated(model, fails=True).startswith(message)


def test_only_stands_before_the_overrides(evaluated, tmp_path):
    model = write_weights(tmp_path / "model", "weights")
    for words in (("--only", "second"), ("--only=second",)):
        assert evaluated(model, *words, fails=True).startswith(f"eval.sh: {words[0]}: expected --only NAMES before")
    assert evaluated(model, "--cfg", "job", fails=True).startswith("eval.sh: --cfg: expected Hydra overrides, without")


def test_an_evaluation_is_done_once_under_each_set_of_options(evaluated, tmp_path):
    model = write_weights(tmp_path / "model", "weights")
    sampling = "actor_rollout_ref.rollout.val_kwargs"
    folder, _, generated = evaluated(model, f"{sampling}.n=1", f"{sampling}.top_k=5")
    assert generated == ["first"]
    again, _, generated = evaluated(
        model, f"{sampling}.top_k=5", only="first,second", OUTPUT_DIR=f"{tmp_path}/./{OUT}/"
    )
    assert again == folder and generated == ["second"]
    again, responses, generated = evaluated(model, f"{sampling}.top_k=5", only="second,first")
    assert again == folder and generated == [] and set(responses) == {"first", "second"}
    others = (f"{sampling}.temperature=0.5", f"{sampling}.top_k=6", "data.max_response_length=9")
    folders = {evaluated(model, other)[::2] == (folder, []) for other in others}
    assert folders == {False} and len(list((tmp_path / OUT / "eval").iterdir())) == 1 + len(others)


def test_settings_tell_what_a_folder_of_results_is_of(evaluated, tmp_path):
    model = write_weights(tmp_path / "model", "weights")
    (tmp_path / "link").symlink_to(model)
    (model / ".lock").touch()  # hidden, so no part of the model
    overrides = ("actor_rollout_ref.rollout.val_kwargs.temperature=0.5", f"global_profiler.save_path={tmp_path}")
    folder, *_ = evaluated("link/../model", *overrides, cwd=tmp_path)
    with open(folder + "/settings.json") as file:
        settings = json.load(file)
    assert settings["grading"] != hashlib.sha256(b"").hexdigest()[:10]  # the graders' files were found
    assert settings["versions"]["transformers"] == importlib.metadata.version("transformers")
    assert settings["versions"].keys() == {"math_verify", "sympy", "transformers", "vllm"}
    config = settings["config"]
    assert config["actor_rollout_ref"]["rollout"]["val_kwargs"]["temperature"] == 0.5
    written = model / "model.safetensors"
    path = {"path": str(model), "files": {written.name: [7, written.stat().st_mtime_ns]}}
    assert config["actor_rollout_ref"]["model"]["path"] == path
    assert config["global_profiler"]["save_path"] == str(tmp_path)  # what is written there decides nothing


def test_replaced_files_are_noticed(evaluated, tmp_path):
    """Weights of the same size at the same path, and a benchmark of the same name."""
    model = write_weights(tmp_path / "model", "old")
    folder, *_ = evaluated(model)
    write_weights(model, "new")
    other, responses, _ = evaluated(model)
    assert other != folder and responses == {"first": "new first"}
    write_benchmark(tmp_path / DATA / "first.parquet", "other rows")
    assert evaluated(model) == (other, {"first": "new other rows"}, ["first"])


def test_a_checkpoint_is_merged_once_and_again_where_its_shards_change(evaluated, tmp_path):
    actor = tmp_path / "steer_exp/global_step_9/actor"
    shard = "model_world_size_1_rank_0.pt"
    write_weights(actor, "old", shard)
    write_weights(actor / "huggingface", "{}", "config.json")
    evaluated(actor.parent, fails=True, STOP="in the merge")
    folder, responses, generated = evaluated(actor.parent)
    assert responses == {"first": "old first"} and generated == ["first"]
    assert evaluated(actor.parent) == (folder, responses, [])
    write_weights(actor, "new", shard)
    other, responses, _ = evaluated(actor.parent)
    assert other != folder and responses == {"first": "new first"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("no.such.key=1", "eval.sh: Could not override 'no.such.key'"),
        ("data.val_files=[a]", "eval.sh: data.val_files=[a]: data.val_files can't be set here; expected --only"),
    ],
)
def test_an_evaluation_refuses_an_option_before_ray_starts(evaluated, tmp_path, override, message):
    assert message in evaluated(write_weights(tmp_path / "model", ""), override, fails=True)
    assert (tmp_path / "calls").read_text() == ""


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    "files, error, words",
    [
        (["model.safetensors", "config.json"], None, "o/n is in {out}: MODEL_PATH={out}"),
        (["config.json"], None, "download_model: o/n: no *.safetensors on the hub; expected weights in that"),
        ([], errors.GatedRepoError("", response=RESPONSE), "download_model: o/n: access must be granted"),
        ([], errors.HFValidationError(), "download_model: o/n: no hub id; expected OWNER/NAME"),
        ([], errors.RepositoryNotFoundError("", response=RESPONSE), "download_model: o/n: no such model"),
        (
            [],
            errors.RevisionNotFoundError("", response=RESPONSE),
            "--revision v1: expected a branch, tag or commit",
        ),
        ([], OSError("timed out"), "download_model: o/n: the hub did not answer (timed out); call again"),
    ],
)
def test_a_download_tells_what_it_did_or_lacks(program, tmp_path, monkeypatch, files, error, words):
    def snapshot_download(model, revision, local_dir, allow_patterns):
        assert (model, revision) == ("o/n", "v1") and "*.safetensors" in allow_patterns
        if error:
            raise error
        local_dir.mkdir()
        for name in files:
            (local_dir / name).touch()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    result = program("download_model.py", "o/n", "--revision", "v1", "--out", tmp_path / "out")
    assert words.format(out=tmp_path / "out") in result.stdout + result.stderr
    assert result.returncode == (0 if "model.safetensors" in files else 1)


def test_a_download_of_a_part_of_the_weights_is_no_download(program, tmp_path, monkeypatch):
    """Where the hub does not answer, `snapshot_download` returns what is there."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "1.safetensors").touch()
    names = {"embedding": "1.safetensors", "norm": "1.safetensors", "head": "2.safetensors"}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    result = program("download_model.py", "o/n", "--out", out)
    assert result.returncode == 1 and f"o/n: 2.safetensors missing in {out}; call again to go on" in result.stderr


def test_kept_metrics_of_a_resumed_run_give_the_same_table(program, tmp_path):
    """Of speed nothing is kept, and of an entropy of 1/3 five digits, of an accuracy all; start 2 repeats step 2."""
    data = {"actor/entropy": 1 / 3, "actor/grad_norm": 1.0, "critic/score/mean": -0.5, "actor/token_weights_mean": 0.9}
    data |= {"perf/total_num_tokens": 100, "perf/time_per_step": 2.0, "actor/token_weights_std": None}
    validation = {"val-core/a/acc/mean@8": 1 / 3, "val-aux/a/acc/pass@8": 0.5, "val-aux/a/distinct_right": 1.25}
    validation["val-aux/a/distinct_share"] = 0.125
    starts = {"metrics": [(0, validation), (1, data), (2, {"actor/entropy": 9.0})]}
    starts["metrics_from_1_start_2"] = [(2, data | validation)]
    run = tmp_path / "seed7/grpo"
    run.mkdir(parents=True)
    for name, records in starts.items():
        lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in records]
        (run / f"{name}.jsonl").write_text("".join(lines))
    result = program("keep_metrics.py", run, "--out", tmp_path / "kept")
    kept = tmp_path / "kept/seed7/grpo.jsonl"
    assert result.returncode == 0 and result.stdout == f"{kept}\n", result.stdout + result.stderr
    second = {"actor/entropy": 0.33333, "actor/token_weights_mean": 0.9, "critic/score/mean": -0.5}
    second["actor/token_weights_std"] = None
    expected = [{"step": 0, "data": validation}, {"step": 1, "data": second}, {"step": 2, "data": second | validation}]
    assert [json.loads(line) for line in kept.read_text().splitlines()] == expected
    compare = ("compare_runs.py", "--out", tmp_path / "p.png")
    (whole,), (small,) = (printed_rows(program(*compare, path)) for path in (run, kept))
    assert whole == [*small, "50"]


@pytest.mark.parametrize("name", ["keep_metrics.py", "compare_runs.py"])
def test_two_runs_of_one_method_and_seed_are_refused(program, tmp_path, name):
    """Of different experiments; they are neither seeds of one method nor the same run."""
    for folder in ("a/seed1/grpo", "b/seed1/grpo", "a/plain", "b/plain"):
        write_run(tmp_path / folder, [0.5], [0.1])
    out = tmp_path / ("out.png" if name == "compare_runs.py" else "out")
    for run, kind in (("seed1/grpo", "grpo, seed 1"), ("plain", "plain, seed none")):
        runs = [tmp_path / "a" / run, tmp_path / "b" / run]
        result = program(name, *runs, "--out", out)
        assert result.returncode == 1 and not out.exists()
        assert f"{runs[0]} and {runs[1]}: both are {kind}; expected names that differ by" in result.stderr


def test_kept_metrics_of_a_run_without_a_seed_are_in_no_folder_of_one(program, tmp_path):
    write_run(tmp_path / "grpo", [0.5], [0.1])
    result = program("keep_metrics.py", tmp_path / "grpo", "--out", tmp_path / "kept")
    assert result.stdout == f"{tmp_path / 'kept/grpo.jsonl'}\n", result.stderr


def test_kept_metrics_of_a_run_that_diverged_say_so(program, tmp_path):
    """Its last ten steps have no entropy, and its end no accuracy."""
    write_run(tmp_path / "grpo", [1.0, 0.5, math.nan], [0.1, 0.3, math.nan])
    result = program("keep_metrics.py", tmp_path / "grpo", "--out", tmp_path / "kept")
    assert result.returncode == 0, result.stderr
    found = [run_figures(read_run(path)) for path in (tmp_path / "grpo", tmp_path / "kept/grpo.jsonl")]
    for figures in found:
        assert math.isnan(figures["last ten"]) and math.isnan(figures["final"]) and figures["best"] == 0.3
    compared = program("compare_runs.py", tmp_path / "kept/grpo.jsonl", "--out", tmp_path / "p.png")
    assert "the entropy is no number at the end of grpo\n" in compared.stdout


def test_a_kept_run_is_replaced_only_if_told_to(program, tmp_path):
    """Runs of two folders may have one name; the same run again changes nothing."""
    for place, entropy in (("a", 0.5), ("b", 0.4)):
        write_run(tmp_path / place / "grpo", [entropy], [0.1])
    keep, kept = ("keep_metrics.py", "--out", tmp_path / "kept"), tmp_path / "kept/grpo.jsonl"
    assert program(*keep, tmp_path / "a/grpo").returncode == program(*keep, tmp_path / "a/grpo").returncode == 0
    text = kept.read_text()
    result = program(*keep, tmp_path / "b/grpo")
    assert result.returncode == 1 and kept.read_text() == text
    assert f"keep_metrics: {kept}: keeps another run; expected another --out, or --force" in result.stderr
    assert program(*keep, "--force", tmp_path / "b/grpo").returncode == 0 and kept.read_text() != text
    result = program("keep_metrics.py", "--out", kept, tmp_path / "a/grpo")
    assert result.returncode == 1 and result.stderr.startswith("keep_metrics: [Errno ")


def test_kept_metrics_need_a_run(program, tmp_path):
    result = program("keep_metrics.py", tmp_path, "--out", tmp_path / "kept")
    assert result.returncode == 1 and f"keep_metrics: {tmp_path}: no metrics*.jsonl" in result.stderr
