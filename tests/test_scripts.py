# SPDX-License-Identifier: Apache-2.0
"""The programs around a run: watching it, comparing runs, summing up an evaluation."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

RUN = """
import json, sys, time
print("Total training steps: 2")
with open(sys.argv[1] + "/metrics.jsonl", "w") as file:
    for step in range(3):
        data = {"actor/entropy": 1 / (step + 1), "critic/score/mean": -0.5, "val-core/x/acc/mean@4": 0.25}
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
"""


def write_run(folder, entropies, accuracies, weights=()):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, (entropy, accuracy) in enumerate(zip(entropies, accuracies, strict=True)):
            data = {"actor/entropy": entropy, "val-core/a/acc/mean@1": accuracy}
            if weights:
                data["actor/token_weights_mean"] = weights[step]
            file.write(json.dumps({"step": step, "data": data}) + "\n")


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
    assert lines[1] == "toy          step   1/2  reward -0.500  entropy 0.500  accuracy 0.250"
    assert "Total training steps" not in result.stdout and "Total training steps" in (tmp_path / "toy.log").read_text()


def test_watch_tells_why_a_run_failed(command, root, tmp_path):
    result = command(*watch(root, tmp_path, sys.executable, "-c", "raise ValueError('no such thing')"))
    assert result.returncode == 1 and "ValueError: no such thing" in result.stdout
    assert str(tmp_path / "toy.log") in result.stdout.replace("\n", "")


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


def test_comparison_takes_means_over_seeds(command, root, tmp_path):
    write_run(tmp_path / "0/grpo", [1.0, 0.5], [0.1, 0.3])
    write_run(tmp_path / "1/grpo", [1.0, 0.3], [0.1, 0.5])
    write_run(tmp_path / "0/steer", [1.0, 0.9], [0.2, 0.6], weights=[0.9, 0.8])
    runs = [tmp_path / run for run in ("0/grpo", "1/grpo", "0/steer")]
    result = command(
        sys.executable, root / "scripts/compare_runs.py", *runs, "--out", tmp_path / "p.png", COLUMNS="200"
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows == [
        ["grpo", "2", "0.100", "0.400", "1.000", "0.400", "-"],
        ["steer", "1", "0.200", "0.600", "1.000", "0.900", "0.850"],
    ]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_names_a_folder_without_metrics(command, root, tmp_path):
    result = command(sys.executable, root / "scripts/compare_runs.py", tmp_path, "--out", tmp_path / "p.png")
    assert result.returncode == 1 and f"{tmp_path}: no metrics*.jsonl" in result.stderr


def test_evaluation_by_hand(command, root, tmp_path):
    """Two problems, three samples each: right, right, wrong and wrong, wrong, right."""
    folder = tmp_path / "toy"
    folder.mkdir()
    answers = {"p": [("1", True), ("1", True), ("2", False)], "q": [("3", False), ("3", False), ("4", True)]}
    rows = [
        {"input": problem, "output": "", "gts": "1", "score": 1.0 if acc else -1.0, "acc": acc, "pred": pred}
        for problem, samples in answers.items()
        for pred, acc in samples
    ]
    pd.DataFrame(rows).to_json(folder / "0.jsonl", lines=True, orient="records")
    result = command(sys.executable, root / "scripts/summarize_eval.py", tmp_path, "--only", "toy", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    benchmark = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["toy"]
    assert (benchmark["n"], benchmark["k"], benchmark["complete"]) == (2, 3, True)
    assert benchmark["mean"]["value"] == 0.5 and benchmark["mean"]["interval"] == pytest.approx([1 / 3, 2 / 3])
    assert benchmark["maj"]["value"] == 0.5 and benchmark["pass"]["value"] == 1.0
    assert len(pd.read_parquet(tmp_path / "responses.parquet")) == 6
