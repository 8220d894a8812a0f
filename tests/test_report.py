# SPDX-License-Identifier: Apache-2.0
"""The report of runs: what it reads, what its figures plot, and that its page is safe, whole and the same each time."""

import html
import json
import math
import os
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from itertools import permutations

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from tabular_audit import tabular_audit
from verl.steer.report import figures
from verl.steer.report.metrics_files import accuracy_metrics, in_order, next_evaluation_file, next_file
from verl.steer.report.page import (
    ReportOptions,
    coloured_responses,
    figure_text,
    inline,
    score_rows,
    visible,
    write_report,
)
from verl.steer.report.run_metrics import Run, group_seeds, method_of, over_seeds, read_run, run_figures, summary

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</p></section></style><img src=x onerror=document.title='owned'>",
    '" onmouseover="document.title=1" x="',
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "\u202eright to left\u202c",
    "\x00\x1b[31m",
    "http://example.org/",
    " $\\frac{",
)


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context({**figures.STYLE, "svg.hashsalt": "test"}):
        yield


def write_metrics(folder, records, name="metrics.jsonl", when=0, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in records]
    (folder / name).write_text("".join(lines) + tail)
    os.utime(folder / name, (when, when))
    return folder


def steer_metrics(steps=6, shift=0.0):
    """Metrics of a run with STEER, entropies falling in a line."""
    return [
        (
            step,
            {
                "actor/entropy": 1.0 - 0.1 * step + shift,
                "actor/target_entropy": 0.5,
                "val-core/a/acc/mean@1": 0.1 * step,
                "actor/token_weights_mean": 0.9 + 0.01 * step,
                "actor/token_weights_min": 0.8,
                "actor/token_weights_max": 1.0,
                "actor/entropy_change_mean": 0.1,
                "actor/entropy_change_max": 2.0 + step,
            },
        )
        for step in range(1, steps + 1)
    ]


#: A metric of a step that was audited.
AUDITED = {"entropy_audit/tokens": 40}


@pytest.fixture(scope="module")
def audited_run(tmp_path_factory):
    """A run with metrics and an audit in two files, the later steps' first by name."""
    records = [(step, data | {"val-aux/a/acc/pass@16": 0.6}) for step, data in steer_metrics()]
    for _, data in records[:3]:
        data |= AUDITED
    folder = write_metrics(tmp_path_factory.mktemp("runs") / "steer_exp", records)
    (folder / "audit").mkdir()
    audit = tabular_audit(steps=(1, 2, 3))
    audit[audit["step"] > 1].to_parquet(folder / "audit/a.parquet")
    audit[audit["step"] == 1].to_parquet(folder / "audit/b.parquet")
    for step in (1, 2, 3):
        updates(step).to_parquet(folder / f"audit/step_{step}_updates.parquet")
    return read_run(folder)


def updates(step):
    """Four audited updates, which `influence` predicts to a hundredth and `released` by their sign only."""
    change = 1e-3 * np.array([-3.0, 1.0, -2.0, 4.0]) / step
    columns = {"true_change": change, "released": np.sign(change), "influence": 1.01 * change}
    return pd.DataFrame({"step": step, "mini_batch": range(4), "entropy": 0.3} | columns)


def test_predictions_of_updates_are_scored(audited_run):
    assert audited_run.updates["step"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    scores = figures.prediction_scores(audited_run.updates)
    assert scores.index.tolist() == ["released", "influence"]
    assert scores.loc["influence"].tolist() == pytest.approx([1, 1 / 1.01])
    assert 0.5 < scores.loc["released", "pearson"] < 0.95
    drawing = figures.predicted_updates({"steer": [audited_run]})
    assert "steer, influence: Pearson correlation 1.000, slope 0.99" in drawing.description


def test_the_entropy_is_drawn_beside_its_target():
    steps = range(1, 31)
    run = Run("held", None, {s: {"actor/entropy": 0.3 + 0.01 * (s > 10), "actor/target_entropy": 0.3} for s in steps})
    plain = Run("grpo", None, {step: {"actor/entropy": 0.4 / step} for step in steps})
    drawing = figures.held_entropy({"grpo": [plain], "held": [run]})
    assert drawing.descriptions == ["held: 0.01 nats from the target over the last 20 steps"]
    assert len(drawing.figure.axes[0].lines) == 3
    many = figures.held_entropy({str(number): [plain] for number in range(6)} | {"held": [run]})
    assert [line.get_linestyle() == ":" for line in many.figure.axes[0].lines] == [False] * 7 + [True]
    assert figures.held_entropy({"grpo": [plain]}) is None


def test_the_distance_from_the_target_is_that_of_each_seed():
    """Seeds on either side of the target are not on it, and a run without entropies has no distance."""
    runs = [
        Run("held", seed, {s: {"actor/entropy": entropy, "actor/target_entropy": 0.2} for s in range(1, 31)})
        for seed, entropy in ((1, 0.1), (2, 0.3), (3, None))
    ]
    drawing = figures.held_entropy({"held": runs[:2], "none": runs[2:]})
    assert drawing.descriptions == ["held: 0.1 nats from the target over the last 20 steps"]


@pytest.fixture(scope="module")
def report(audited_run, tmp_path_factory):
    """The report of that run: its page."""
    return write_report([audited_run], tmp_path_factory.mktemp("report"), ReportOptions())


def test_the_page_of_a_run_whose_estimates_were_constant_has_no_correlations(tmp_path):
    """As where no token of an audited step has an advantage."""
    constant = {"entropy_audit/released/mse": 0.25, "entropy_audit/tokens": 5.0}
    runs = [Run("run", tmp_path, {step: data | constant for step, data in steer_metrics()})]
    page = write_report(runs, tmp_path / "report", ReportOptions()).read_text()
    assert re.search(r"released.*?<td>0\.250</td>\s*<td>–</td>\s*<td>–</td>", page, re.S)


def test_the_page_says_which_runs_end_before_others(tmp_path):
    runs = [Run(name, tmp_path, dict(steer_metrics(steps))) for name, steps in (("long", 6), ("short", 4))]
    page = write_report(runs, tmp_path / "report", ReportOptions()).read_text()
    longest, least = (runs[index].last_step for index in (0, 1))
    assert f"<p>the longest run has {longest} steps; short ends at step {least}</p>" in page


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A run whose name and whose responses would break a page that did not escape them."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>$^{ --><b>$"
    write_metrics(folder, [(step, data | AUDITED) for step, data in steer_metrics()])
    (folder / "audit").mkdir()
    tabular_audit(steps=(1,), mini_batches=1, words=HOSTILE).to_parquet(folder / "audit/a.parquet")
    return read_run(folder)


@pytest.fixture(scope="module")
def hostile_report(hostile_run, tmp_path_factory):
    return write_report([hostile_run], tmp_path_factory.mktemp("report"), ReportOptions())


def audit_of(**columns):
    """An audit of a few tokens by hand."""
    count = len(next(iter(columns.values())))
    default = {"step": 1, "mini_batch": 0, "token_id": 0, "text": "x", "response": 0, "position": range(count)}
    default |= {"prob": 0.5, "entropy": 1.0, "advantage": 1.0, "ratio": 1.0, "clipped": False, "weight": 1.0}
    return pd.DataFrame({**default, "true_change": 0.0, "omega_released": 0.0, **columns}, index=range(count))


def run_with(audit, name="run"):
    run = Run(name, None, {1: {}})
    run.audit = audit
    return run


# Reading


def test_a_resumed_run_goes_on_where_its_last_file_starts(tmp_path):
    """The last by number; null, as verl writes NaN, is no value; a torn last line is passed over."""
    write_metrics(tmp_path, [(step, {"a": step}) for step in range(10)])
    write_metrics(tmp_path, [(step, {"a": 10 + step}) for step in (5, 6, 7)], next_file(tmp_path, 5).name)
    torn = '{"step":4,"data":{"a":99'
    write_metrics(tmp_path, [(3, {"b": 1}), (4, {"a": None, "b": 2})], next_file(tmp_path, 3).name, tail=torn)
    run = read_run(tmp_path)
    assert run.series("a") == {0: 0, 1: 1, 2: 2, 3: 3}
    assert run.series("b") == {3: 1, 4: 2}


def test_only_finite_numbers_are_values():
    values = [1, None, float("nan"), float("inf"), "text", [1.0], 0.5]
    assert Run("a", None, {step: {"a": value} for step, value in enumerate(values)}).series("a") == {0: 1, 6: 0.5}


#: Names of a run's files by the steps that its starts went on from, as they are and as they were.
COUNTED = {0: "metrics.jsonl", 40: "metrics_from_40_start_2.jsonl", 80: "metrics_from_80_start_3.jsonl"}
UNCOUNTED = {0: "metrics.jsonl", 40: "metrics_from_40.jsonl", 80: "metrics_from_80.jsonl"}


@pytest.mark.parametrize("names", [COUNTED, UNCOUNTED])
@pytest.mark.parametrize("order", list(permutations((0, 40, 80))))
def test_a_copy_of_a_run_that_was_resumed_twice_is_whole_whatever_its_times(tmp_path, names, order):
    """A copy gives the files times in the order that it reads the folder; steps to 50, 41 to 105 and 81 to 120."""
    for when, start in enumerate(order):
        steps = range(start + 1, {0: 50, 40: 105, 80: 120}[start] + 1)
        write_metrics(tmp_path, [(step, {"a": 1000 * start + step}) for step in steps], names[start], when=when)
    expected = {step: 1000 * (0 if step <= 40 else 40 if step <= 80 else 80) + step for step in range(1, 121)}
    assert read_run(tmp_path).series("a") == expected


def test_each_start_of_a_run_has_a_metrics_file_of_its_own(tmp_path):
    """From none, from 40 twice, from 80, from 40 again; then all over, from none. Nine starts don't go before ten."""
    (tmp_path / "metrics_of_another.jsonl").touch()
    for start in (0, 40, 40, 80, 40, 0, *[5] * 5):
        file = next_file(tmp_path, start)
        assert not file.exists()
        records = [(step, {f"from {start}": step}) for step in (start, start + 1)]
        write_metrics(tmp_path, records, file.name)
    assert in_order(tmp_path)[-1].name == "metrics_from_5_start_12.jsonl"
    assert read_run(tmp_path).steps == {0: {"from 0": 0}, 1: {"from 0": 1}, 5: {"from 5": 5}, 6: {"from 5": 6}}


def test_the_first_metrics_file_is_called_as_ever(tmp_path):
    assert next_file(tmp_path, 0).name == "metrics.jsonl"
    write_metrics(tmp_path, [(1, {})], "metrics_from_40.jsonl")
    assert next_file(tmp_path, 40).name == "metrics_from_40_start_2.jsonl"


def test_a_start_that_logged_nothing_takes_nothing_away(tmp_path):
    write_metrics(tmp_path, [(1, {"a": 1}), (2, {"a": 2})])
    write_metrics(tmp_path, [], next_file(tmp_path, 1).name)
    assert read_run(tmp_path).series("a") == {1: 1, 2: 2}


def test_a_run_may_be_one_file_of_verls_logger(tmp_path):
    write_metrics(tmp_path / "project", [(1, {"actor/entropy": 0.5})], "qwen_seed3.jsonl")
    run = read_run(tmp_path / "project/qwen_seed3.jsonl")
    assert run.name == "qwen" and run.series("actor/entropy") == {1: 0.5}


@pytest.mark.parametrize("line", ["torn", "[]", '{"data": {}}', '{"step": null, "data": {}}', '{"step": 1, "data": 3}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    write_metrics(tmp_path, [(1, {"a": 1})], tail=line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected .*step"):
        read_run(tmp_path)


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match="no metrics"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such file or folder; expected a run"):
        read_run(tmp_path / "nowhere")


def test_what_a_folder_holds_in_place_of_metrics_is_named(tmp_path):
    def told():
        with pytest.raises(ValueError) as error:
            read_run(tmp_path)
        return str(error.value).removeprefix(f"{tmp_path}: ")

    (tmp_path / "evaluation_of_80_start_1.jsonl").write_text("{}")
    assert told() == "no metrics*.jsonl; expected a run with `file` among trainer.logger"
    (tmp_path / "grpo.jsonl").write_text("")
    assert told().endswith(f"expected a run's folder, or a file by its name, such as {tmp_path}/grpo.jsonl")
    write_metrics(tmp_path / "b", [(1, {"a": 1})])
    assert told() == f"a folder of runs; expected one of them, such as {tmp_path}/b"
    (tmp_path / "metrics.jsonl").write_text("")
    assert told() == "no step in metrics.jsonl yet; expected a run that has ended one"


@pytest.mark.parametrize(
    "folder, name",
    [
        *((path, "grpo") for path in ("grpo", "grpo_seed1", "grpo-SEED-2", "seed=3.grpo", "7/grpo", "grpo/7")),
        ("grpo/seed1", "grpo"),
        ("seeds/42/steer_exp", "steer_exp"),
        ("qwen2.5-7b", "qwen2.5-7b"),
        ("steer_0.7", "steer_0.7"),
        ("seeded_run", "seeded_run"),
    ],
)
def test_names_without_their_seed(tmp_path, folder, name):
    assert method_of(tmp_path / folder) == name


def test_seeds_of_one_method_are_one_group_with_a_band(tmp_path):
    runs = [
        read_run(write_metrics(tmp_path / folder, [(1, {"a": values[0]}), (2, {"a": values[1]})]))
        for folder, values in {"grpo_seed1": (1, 2), "steer": (5, 5), "grpo_seed2": (3, 6)}.items()
    ]
    groups = group_seeds(runs)
    assert {name: len(members) for name, members in groups.items()} == {"grpo": 2, "steer": 1}
    band = over_seeds([run.series("a") for run in groups["grpo"]])
    assert band.to_dict("list") == {"mean": [2, 4], "least": [1, 2], "greatest": [3, 6]}


def test_a_band_ends_with_its_shortest_seed():
    assert list(over_seeds([{1: 1, 2: 2, 3: 3}, {2: 4, 1: 1}, {}]).index) == [1, 2]
    assert over_seeds([{}]).empty and over_seeds([]).empty


def test_summary_by_hand():
    validation = {"val-core/x/acc/mean@1": 0.2, "val-core/y/acc/mean@1": 0.4}
    validation |= {"val-aux/x/distinct_right": 1.0, "val-aux/y/distinct_right": 2.0}
    first = Run("a", None, {0: validation, 1: validation | {"actor/entropy": 1.0}})
    second = Run("a", None, {1: {"actor/entropy": 0.6, "actor/token_weights_mean": 0.9}, 2: {"actor/entropy": 0.2}})
    second.steps[1]["actor/token_weights_std"], second.steps[2]["actor/token_weights_std"] = 0.1, 0.3
    found = summary({"a": [first, second]}).loc["a"]
    weights = [found[heading] for heading in ("mean token weight", "weight std")]
    assert (found["accuracy before"], weights) == ("0.300 (1 of 2)", ["0.900 (1 of 2)", "0.200 (1 of 2)"])
    assert found["distinct right"] == "1.500 (1 of 2)"  # a mean over the data sources, as the accuracy
    assert "tokens/s" not in found
    # two values 0.4 apart: Student's t with one degree of freedom, 12.706, times 0.2
    assert found["entropy first"] == "0.800 ± 2.541"
    assert summary({"a": [Run("a", None, {1: {}})]}).empty


def test_a_run_without_a_validation_at_its_start_has_no_accuracy_before():
    started = Run("b", None, {0: {"val-core/x/acc/mean@1": 0.1}})
    found = summary({"a": [Run("a", None, {5: {"val-core/x/acc/mean@1": 0.7}})], "b": [started]}).loc["a"]
    assert (found["accuracy before"], found["final"]) == ("-", "0.700")


def test_a_run_that_was_not_validated_after_its_start_has_no_figures_of_its_end():
    """Whereas an evaluation, which is step 0 alone, has; and an entropy that ended as NaN is no last one."""
    validation = {"val-core/x/acc/mean@8": 0.2, "val-aux/x/acc/pass@8": 0.4, "val-aux/x/distinct_right": 1.5}
    steps = {step: {"actor/entropy": 1.0 / step} for step in range(1, 9)}
    stopped = run_figures(Run("a", None, {0: validation} | steps))
    assert math.isnan(stopped["final"]) and math.isnan(stopped["distinct right"]) and "pass@8" not in stopped
    assert (stopped["accuracy before"], stopped["best"]) == (0.2, 0.2) and stopped["least"] == 1 / 8
    assert run_figures(Run("a", None, {0: validation}))["final"] == 0.2
    ended = run_figures(Run("a", None, {0: validation} | steps | {9: validation | {"actor/entropy": None}}))
    assert ended["pass@8"] == 0.4 and ended["distinct right"] == 1.5 and math.isnan(ended["last ten"])
    lost = run_figures(Run("a", None, {0: validation} | steps | {5: validation, 9: dict.fromkeys(validation)}))
    assert "pass@8" not in lost and math.isnan(lost["distinct right"]) and math.isnan(lost["final"])


def test_an_evaluation_is_no_part_of_a_runs_metrics(tmp_path):
    write_metrics(tmp_path, [(step, {"a": step}) for step in range(1, 100)])
    for number in (1, 2):
        file = next_evaluation_file(tmp_path, 80)
        assert file.name == f"evaluation_of_80_start_{number}.jsonl"
        write_metrics(tmp_path, [(80, {"a": -1})], file.name)
    assert read_run(tmp_path).series("a") == {step: step for step in range(1, 100)}


def test_audits_of_steps_that_a_resumed_run_has_not_reached_again_are_left_out(audited_run, tmp_path):
    shutil.copytree(audited_run.folder / "audit", tmp_path / "audit")
    write_metrics(tmp_path, [(step, {"a": step} | AUDITED) for step in range(1, 7)])
    write_metrics(tmp_path, [(2, {"a": 2} | AUDITED)], next_file(tmp_path, 1).name)
    run = read_run(tmp_path)
    assert set(run.audit["step"]) == set(run.updates["step"]) == {1, 2} != set(audited_run.audit["step"])
    write_metrics(tmp_path, [(1, {"a": 2} | AUDITED)], next_file(tmp_path, 0).name)
    for file in (tmp_path / "audit").glob("*1*"):
        file.unlink()
    (tmp_path / "audit/b.parquet").unlink()
    run = read_run(tmp_path)
    assert run.audit is None and run.updates is None


def test_audits_of_an_earlier_start_are_left_out(audited_run, tmp_path):
    """The first start audited each step, a second one from the beginning the second step alone."""
    shutil.copytree(audited_run.folder / "audit", tmp_path / "audit")
    write_metrics(tmp_path, [(step, {"a": step} | AUDITED) for step in range(1, 4)])
    write_metrics(tmp_path, [(1, {"a": 1}), (2, {"a": 2} | AUDITED), (3, {"a": 3})], next_file(tmp_path, 0).name)
    run = read_run(tmp_path)
    assert set(run.audit["step"]) == set(run.updates["step"]) == {2}


def test_pass_at_k_is_of_the_k_that_all_sources_have():
    """A source with fewer samples, of easier problems: pass@16 would be below pass@8."""
    last = {"val-aux/x/acc/pass@8": 0.2, "val-aux/x/acc/pass@16": 0.3, "val-aux/y/acc/pass@8": 1.0}
    assert Run("a", None, {1: last}).pass_at_k == {8: pytest.approx(0.6)}


def test_accuracies_among_metrics():
    accuracy = ["val-core/x/acc/mean@4", "val-core/file/a/b/acc/mean@32"]
    others = ["val-core/x/acc/best@4/mean", "val-core/x/reward/mean@4", "val-aux/x/acc/mean@4", "acc/mean@4"]
    assert accuracy_metrics([*others, *accuracy]) == accuracy


def test_the_audit_is_read_in_order(audited_run):
    order = audited_run.audit[["step", "mini_batch", "response", "position"]]
    assert len(order) == 3 * 2 * 6 * 30 and order.equals(order.sort_values(list(order), ignore_index=True))


def test_a_missing_column_of_the_audit_is_named(tmp_path):
    folder = write_metrics(tmp_path, [(1, {"a": 1})])
    assert read_run(folder).audit is None
    (folder / "audit").mkdir()
    audit_of(prob=[0.5]).drop(columns=["ratio", "omega_released"]).to_parquet(folder / "audit/x.parquet")
    with pytest.raises(ValueError, match="x.parquet: no column ratio, omega_…"):
        read_run(folder).audit  # noqa: B018


# Figures


def test_training_plots_means_and_bands(tmp_path):
    runs = [Run("grpo", None, dict(steer_metrics(shift=shift))) for shift in (0.0, 0.2)]
    drawing = figures.training({"grpo": runs, "steer": [Run("steer", None, dict(steer_metrics(3)))]})
    entropy, accuracy = drawing.figure.axes
    steps = np.arange(1, 7)
    assert np.allclose(entropy.lines[0].get_xydata(), np.c_[steps, 1.1 - 0.1 * steps])
    assert np.allclose(accuracy.lines[1].get_xydata(), np.c_[steps[:3], 0.1 * steps[:3]])
    (band,) = entropy.collections
    edges = {tuple(point) for point in band.get_paths()[0].vertices.round(6)}
    assert edges >= {(step, round(1.0 - 0.1 * step + shift, 6)) for step in range(1, 7) for shift in (0.0, 0.2)}
    assert "grpo: policy entropy (nats) 1 at step 1, 0.5 at 6" in drawing.description


@pytest.mark.parametrize("validations", [1, 2, 3])
def test_pass_at_k_is_drawn_over_k_and_replaces_an_accuracy_without_a_curve(validations):
    last = {"val-core/x/acc/mean@64": 0.2, "val-aux/x/acc/pass@16": 0.6, "val-aux/x/acc/pass@1": 0.2}
    last |= {"val-aux/y/acc/pass@1": 0.4, "val-aux/y/acc/pass@16": 0.8, "val-aux/x/acc/best@16/mean": 0.1}
    earlier = {step: {name: 0.01 for name in last} for step in range(validations - 1)}
    run = Run("grpo", None, earlier | {3: {"actor/entropy": 1.0}, 5: {"actor/entropy": 0.5, **last}})
    assert run.pass_at_k == {1: pytest.approx(0.3), 16: pytest.approx(0.7)}
    drawing = figures.training({"grpo": [run]})
    panels = {axis.get_ylabel(): axis for axis in drawing.figure.axes}
    assert list(panels)[0] == "policy entropy (nats)" and ("validation accuracy" in panels) == (validations == 3)
    panel = panels["pass@k at the end"]
    assert panel.get_xscale() == "log" and np.allclose(panel.lines[0].get_xydata(), [(1, 0.3), (16, 0.7)])
    assert "grpo: pass@k at the end 0.3 at k 1, 0.7 at 16" in drawing.description


def test_a_long_legend_leaves_the_panels_their_height(recwarn):
    def panel_height(count):
        runs = {f"a_method_with_a_long_name_{i}": [Run("a", None, dict(steer_metrics()))] for i in range(count)}
        figure = figures.training(runs).figure
        figure.draw_without_rendering()
        return figure.get_figheight() * figure.axes[0].get_position().height

    assert panel_height(40) > 0.95 * panel_height(4)
    assert not recwarn.list


def sampled(name, accuracy, share, entropy):
    data = {"val-core/x/acc/mean@16": accuracy, "val-aux/x/acc/pass@8": 0.5, "val-aux/x/acc/pass@16": share}
    return Run(name, None, {5: {"actor/entropy": entropy, **data}})


def test_tradeoff_names_the_first_method_and_those_that_no_other_equals_or_surpasses_in_both():
    drawing = figures.tradeoff(
        {
            "grpo": [sampled("grpo", 0.2, 0.3, 0.1), sampled("grpo", 0.4, 0.5, 0.3)],  # surpassed by `both`
            "exploits": [sampled("exploits", 0.8, 0.45, 0.05)],
            "explores": [sampled("explores", 0.1, 0.9, 0.4)],
            "lost": [sampled("lost", 0.1, 0.1, 0.8)],
            "both": [sampled("both", 0.5, 0.6, 0.2)],
            "low": [sampled("low", 0.5, 0.59, 0.2)],
        }
    )
    accuracy, entropy = drawing.figure.axes
    names = ["grpo", "exploits", "explores", "both", "others"]
    assert [line.get_label() for line in accuracy.lines] == names == [line.get_label() for line in entropy.lines]
    assert np.allclose(accuracy.lines[0].get_xydata(), [(0.3, 0.4)])
    assert np.allclose(entropy.lines[0].get_xydata(), [(0.2, 0.4)])
    assert np.allclose(accuracy.lines[-1].get_xydata(), [(0.1, 0.1), (0.5, 0.59)])
    assert accuracy.get_ylabel() == "pass@16 at the end" and entropy.get_xscale() == "log"
    assert "both: accuracy 0.5, pass@16 0.6, entropy 0.2" in drawing.description


def test_tradeoff_is_by_the_greatest_k_of_any_run():
    few = Run("few", None, {5: {"actor/entropy": 0.1, "val-core/x/acc/mean@8": 0.9, "val-aux/x/acc/pass@8": 0.9}})
    runs = {"a": [sampled("a", 0.5, 0.6, 0.2)], "few": [few]}
    del runs["a"][0].steps[5]["val-aux/x/acc/pass@8"]
    for groups in (runs, dict(reversed(runs.items()))):
        axis, _ = figures.tradeoff(groups).figure.axes
        assert axis.get_ylabel() == "pass@16 at the end" and [line.get_label() for line in axis.lines] == ["a"]


def test_tradeoff_of_equals_and_of_runs_without_pass_at_k():
    runs = {name: [sampled(name, 0.5, 0.6, 0.2)] for name in ("a", "b")}
    axis, _ = figures.tradeoff(runs).figure.axes
    assert [line.get_label() for line in axis.lines] == ["a", "others"]
    axis, _ = figures.tradeoff({"a": runs["a"]}).figure.axes
    assert [line.get_label() for line in axis.lines] == ["a"]
    assert figures.tradeoff({"grpo": [Run("grpo", None, dict(steer_metrics()))]}) is None


def test_a_panel_without_data_is_left_out():
    run = Run("grpo", None, {1: {"actor/entropy": 1.0}, 2: {"actor/entropy": 0.9}})
    assert [axis.get_ylabel() for axis in figures.training({"grpo": [run]}).figure.axes] == ["policy entropy (nats)"]
    assert figures.training({"grpo": [Run("grpo", None, {1: {}})]}) is None


def test_methods_differ_without_colour():
    styles = [figures.method_style(index) for index in range(12)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 12


def test_weight_maps_are_core_algos_over_the_logged_range(audited_run):
    drawing = figures.weight_maps({"steer": [audited_run]}, "released")
    exponential, linear, mean, tokens = drawing.figure.axes[0].lines
    largest = 2 + np.mean(range(1, 7))
    for line in (exponential, linear):
        assert line.get_xdata()[-1] == pytest.approx(largest) and line.get_ydata()[-1] == pytest.approx(0.8)
        assert line.get_ydata()[0] == pytest.approx(1.0)
    assert exponential.get_ydata() == pytest.approx(np.exp(np.log(0.8) / largest * exponential.get_xdata()), abs=1e-6)
    assert linear.get_ydata() == pytest.approx(1 - 0.2 * linear.get_xdata() / largest, abs=1e-6)
    assert list(mean.get_xdata()) == pytest.approx([0.1, 0.1])
    audit = audited_run.audit
    plotted = set(map(tuple, tokens.get_xydata()))
    assert len(plotted) == figures.SHOWN
    assert plotted <= set(zip(audit["omega_released"].astype(float), audit["weight"].astype(float), strict=True))


@pytest.mark.parametrize(
    "least, starts", [(0.8, {"a: exponential map": 1.0, "a: linear map": 1.2}), (0.0, {"a: linear map": 1.2})]
)
def test_an_exponential_map_starts_at_one_and_has_no_weight_of_zero(least, starts):
    run, weights = run_with(None, "a"), {"actor/token_weights_min": least, "actor/token_weights_max": 1.2}
    run.steps = {step: data | weights for step, data in steer_metrics()}
    *maps, _ = figures.weight_maps({"a": [run]}, "released").figure.axes[0].lines
    assert {line.get_label(): line.get_ydata()[0] for line in maps} == pytest.approx(starts)


def test_weight_against_entropy_pairs_a_step_with_the_change_after_it():
    steps = {1: (1.0, 0.9), 2: (0.8, 0.95), 3: (0.9, 1.0), 5: (0.5, 0.7)}
    data = {step: {"actor/entropy": h, "actor/token_weights_mean": w} for step, (h, w) in steps.items()}
    drawing = figures.weight_against_entropy({"steer": [Run("steer", None, data)]})
    assert np.allclose(drawing.figure.axes[0].lines[0].get_xydata(), [(0.9, -0.2), (0.95, 0.1)])
    assert figures.weight_against_entropy({"grpo": [Run("grpo", None, {1: {"actor/entropy": 1.0}})]}) is None


def test_scores_of_perfect_and_of_opposite_estimates():
    truth = np.array([-1.0, 2.0, 3.0, -4.0])
    audit = audit_of(true_change=truth, omega_signed=3 * truth, omega_size=abs(truth), omega_opposite=-truth)
    scores = figures.estimator_scores(audit.drop(columns="omega_released").assign(run=0))
    assert scores.loc["signed"].tolist() == pytest.approx([0, 1, 1, 1])
    assert scores.loc["size"].tolist()[:3] == pytest.approx([0, 1, 1]) and np.isnan(scores.loc["size", "sign"])
    assert scores.loc["opposite"].tolist() == pytest.approx([0, -1, -1, 0])


def test_signs_are_scored_where_neither_is_zero():
    """Of the four tokens two; one of these has the right sign."""
    audit = audit_of(true_change=[-1.0, 0.0, 2.0, 3.0], omega_signed=[-1.0, 1.0, 0.0, -3.0]).assign(run=0)
    assert figures.estimator_scores(audit).loc["signed", "sign"] == 0.5


def test_scores_are_means_over_updates(audited_run):
    scores = figures.estimator_scores(audited_run.audit.assign(run=0))
    updates = [update for _, update in audited_run.audit.groupby(["step", "mini_batch"])]
    pairs = [(update["omega_clip_aware"], update["true_change"].abs()) for update in updates]
    assert scores.loc["clip_aware", "pearson"] == pytest.approx(np.mean([pearsonr(*pair).statistic for pair in pairs]))
    assert scores.loc["clip_aware", "spearman"] == pytest.approx(
        np.mean([spearmanr(*pair).statistic for pair in pairs])
    )
    assert scores.loc["exact", "pearson"] > 0.98 and scores.loc["exact", "sign"] > 0.95
    assert scores.loc["clip_aware", "spearman"] > scores.loc["released", "spearman"]


def test_updates_of_different_seeds_are_scored_apart():
    """Within a seed the estimate is the truth; across both the second's larger changes have the smaller estimates."""
    seeds = [audit_of(true_change=[1.0, 2.0], omega_signed=[9.0, 10.0]), audit_of(true_change=[5.0, 6.0])]
    seeds[1]["omega_signed"] = [1.0, 2.0]
    audit = figures.audited({"a": [run_with(None), *map(run_with, seeds)]})["a"]
    assert audit["run"].tolist() == [1, 1, 2, 2]
    assert figures.estimator_scores(audit).loc["signed", "pearson"] == pytest.approx(1)


def test_truth_has_a_panel_for_each_estimate_and_medians_over_all_tokens(audited_run):
    drawing = figures.estimator_truth({"steer": [audited_run]})
    names = ["released", "clip_aware", "squared", "exact", "covariance"]
    assert [axis.get_title("left") for axis in drawing.figure.axes] == names
    points, medians = drawing.figure.axes[3].lines
    assert len(points.get_xdata()) == figures.SHOWN and len(medians.get_xdata()) == 20
    assert (np.diff(medians.get_ydata()) > 0).all()
    slope = np.polyfit(np.log(medians.get_xdata()), np.log(medians.get_ydata()), 1)[0]
    assert slope == pytest.approx(1, abs=0.05)


def test_an_audit_in_which_nothing_changed(tmp_path, recwarn):
    """As of a run whose rewards are all the same: each figure is there, with nothing in it, and nothing fails."""
    audit = audit_of(advantage=[0.0, 0.0], text=["a", "b"], omega_exact=[0.0, np.nan], omega_squared=[np.inf, 0.0])
    run = run_with(audit)
    run.folder, run.steps = tmp_path, dict(steer_metrics())
    page = write_report([run], tmp_path, ReportOptions()).read_text()
    assert len(list((tmp_path / "figures").iterdir())) == 14
    assert "Step 1, response 0: 2 tokens, advantage +0" in page
    assert [str(warning.message) for warning in recwarn] == []


def test_clip_counts_by_hand():
    audit = audit_of(
        prob=[0.05, 0.05, 0.05, 0.05, 0.95, 1.0, float("nan")],
        advantage=[1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0],
        clipped=[True, True, True, False, False, True, True],
    )
    counts, shares = figures.clip_counts({"steer": [run_with(audit)]}).figure.axes
    above, below = counts.containers
    assert [bar.get_height() for bar in above] == [2] + [0] * 9
    assert [bar.get_height() for bar in below] == [1] + [0] * 8 + [1]
    assert [bar.get_y() for bar in below] == [2] + [0] * 9
    assert [bar.get_height() for bar in shares.containers[1]] == [0.25] + [0] * 8 + [0.5]


def test_clip_counts_leave_out_a_loss_that_does_not_clip_as_ppo():
    """Its audit has no such column; the rest of the page is there."""
    other = audit_of(prob=[0.5, 0.5], text=["x", "y"]).drop(columns="clipped")
    assert figures.clip_counts({"gspo": [run_with(other)]}) is None
    ppo = run_with(audit_of(prob=[0.5], clipped=[True]))
    assert "gspo" not in figures.clip_counts({"gspo": [run_with(other)], "grpo": [ppo]}).description
    ((_, responses),) = coloured_responses({"gspo": [run_with(other)]}, ReportOptions()).values()
    assert responses[0]["clipped"].tolist() == [False, False]


def test_quadrants_by_hand():
    audit = audit_of(
        advantage=[1.0, 1.0, -2.0, -2.0, 0.0, float("nan")],
        prob=[0.9, 0.5, 0.9, 0.1, 0.9, 0.9],
        omega_released=[1.0, 5.0, 0.0, 2.0, 9.0, 9.0],
        true_change=[-1.0, 1.0, 1.0, -1.0, 9.0, 9.0],
    )
    shares = figures.quadrant_shares(audit, "released", 0.5)
    assert list(shares.index) == ["A > 0, π > 0.5", "A > 0, π ≤ 0.5", "A < 0, π > 0.5", "A < 0, π ≤ 0.5"]
    assert shares["tokens"].tolist() == shares["true change"].tolist() == [0.25] * 4
    assert shares["estimated change"].tolist() == [1 / 8, 5 / 8, 0, 2 / 8]
    assert shares["net"].tolist() == [-1, 1, 1, -1]
    (axis,) = figures.quadrants({"steer": [run_with(audit)]}, "released", 0.5).figure.axes
    assert [bar.get_width() for bar in axis.containers[1]] == [1 / 8, 5 / 8, 0, 2 / 8]
    with pytest.raises(ValueError, match="estimator='best': expected one of released"):
        figures.quadrant_shares(audit, "best", 0.5)


# The page


class Reader(HTMLParser):
    """Elements, attributes and text of a page as a browser sees them."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_nothing_from_a_model_or_a_name_becomes_markup(report, hostile_report, hostile_run):
    clean, page = (Reader(file.read_text()) for file in (report, hostile_report))
    assert page.elements <= clean.elements and "script" not in page.elements
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for text in HOSTILE:
        assert visible(text) in page.text
    assert "<!--" not in hostile_report.read_text()
    assert f"Entropy report: {hostile_run.name}" in page.text


def test_the_policy_of_the_page_forbids_scripts_and_requests(report):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in Reader(report.read_text()).attributes


def test_the_page_asks_for_nothing_outside_itself(report):
    page = report.read_text()
    reader = Reader(page)
    addresses = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert addresses and all(value.startswith("#") or value == "data:," for value in addresses)
    assert "://" not in page and "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_ids_are_unique_and_every_reference_has_its_target(report):
    attributes = Reader(report.read_text()).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for name, value in attributes if name in ("href", "xlink:href") and value.startswith("#")]
    targets += [value for name, value in attributes if name == "aria-labelledby"]
    targets += [found for name, value in attributes for found in re.findall(r"url\(#([^)]*)\)", value or "")]
    assert set(targets) <= set(ids)


def test_the_page_tells_what_is_missing_and_what_gives_it(tmp_path):
    run = read_run(write_metrics(tmp_path / "grpo", [(step, {"actor/entropy": 1 / step}) for step in (1, 2, 3)]))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/quadrants.png").touch()  # of an earlier report
    page = html.unescape(write_report([run], tmp_path, ReportOptions()).read_text())
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["training.png", "training.svg"]
    assert page.count('class="lacks"') == 9
    assert "pass@k: a run with 8 or more samples of each validation problem logs it" in page
    assert page.count("loss_mode=entropy_control logs them") == 2 and page.count("audit/*.parquet") == 4


def test_every_figure_is_there_as_png_and_svg_and_told_in_words(report):
    page = Reader(report.read_text())
    names = (
        "training",
        "tradeoff",
        "weight_maps",
        "weight_against_entropy",
        "estimators",
        "predicted",
        "held",
        "clipped",
        "quadrants",
    )
    assert {file.name for file in (report.parent / "figures").iterdir()} == {
        f"{n}.{e}" for n in names for e in ("png", "svg")
    }
    told = [value for name, value in page.attributes if name == "aria-label"][1:]
    assert len(told) == len(names) and all("steer_exp" in one for one in told)


def test_inline_figures_follow_the_pages_colours(report):
    svg = (report.parent / "figures/training.svg").read_text()
    assert figures.COLOURS[0] in svg and figures.INK in svg
    shown = inline(svg, "training")
    assert "var(--colour-0)" in shown and not any(colour in shown for colour in (*figures.COLOURS, figures.INK))
    assert "viewBox" in shown and "<metadata" not in shown and inline("", "none") == ""


def test_colours_follow_the_figures(audited_run):
    ((edges, responses),) = coloured_responses({"steer": [audited_run]}, ReportOptions(responses=100)).values()
    tokens = pd.concat(responses, ignore_index=True)
    last = audited_run.audit[audited_run.audit["step"] == 3].reset_index(drop=True)
    assert tokens["text"].tolist() == last["text"].tolist()
    changes = last["omega_released"]
    assert tokens["change_level"].tolist() == [sum(change > edge for edge in edges["change"]) for change in changes]
    assert set(tokens["weight_level"][last["weight"] == last["weight"].min()]) == {5}
    assert set(tokens["weight_level"][last["weight"] > 0.97]) == {0}
    assert tokens["change"].tolist() == changes.tolist()


def test_colours_of_entropies_are_on_a_scale_from_zero():
    """Its six levels up to the largest entropy, 6, are of one nat each."""
    run = run_with(audit_of(entropy=[3.5, 6.0]))
    ((_, (tokens,)),) = coloured_responses({"steer": [run]}, ReportOptions()).values()
    assert tokens["entropy_level"].tolist() == [3, 5]


def test_the_page_lists_each_response_and_its_five_largest_changes(audited_run, report):
    """Every token of a response with its figures; below, its five largest estimated changes in order."""
    ((_, responses),) = coloured_responses({"steer": [audited_run]}, ReportOptions()).values()
    page = html.unescape(report.read_text())
    shown = re.findall(r'<p class="tokens" dir="auto">(.*?)</p>.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert len(shown) == len(responses) == 4
    for (coloured, table), tokens in zip(shown, responses, strict=True):
        assert re.sub(r"<span [^>]*>|</span>", "", coloured) == "".join(tokens["text"])
        told = re.findall(r'data-figures="([^"]*)"', coloured)
        for words, token in zip(told, tokens.itertuples(), strict=True):
            assert f"estimated change {token.change:.3g} · true change {token.true_change:+.2g} · " in words
            assert f"· weight {token.weight:.4g}" in words and words.endswith("clipped") == token.clipped
        largest = [told[index] for index in np.argsort(-tokens["change"].to_numpy(), kind="stable")[:5]]
        assert re.findall(r'<td class="left">(.*?)</td>', table) == largest


def test_responses_with_an_advantage_are_chosen_evenly(audited_run):
    audit = audited_run.audit.copy()
    audit.loc[audit["response"] == 0, "advantage"] = 0.0
    ((_, responses),) = coloured_responses({"steer": [run_with(audit)]}, ReportOptions(responses=3)).values()
    assert [set(zip(tokens["step"], tokens["response"], strict=True)) for tokens in responses] == [
        {(3, response)} for response in (1, 6, 11)
    ]
    assert coloured_responses({"steer": [audited_run]}, ReportOptions(responses=0)) == {}


def test_hidden_characters_are_shown():
    assert visible("a\u202eb\x00\u200b\ud800é\n\t😀") == "a\\u202eb\\u0000\\u200b\\ud800é\n\t😀"


def test_logged_scores_are_means_over_the_audited_steps():
    data = {"entropy_audit/exact/mse": 1.0, "entropy_audit/exact/pearson": 0.5, "entropy_audit/exact/spearman": 0.2}
    run = Run("steer", None, {1: data, 2: {}, 3: {**data, "entropy_audit/exact/mse": 3.0}})
    run.audit = None
    (row,) = score_rows({"steer": [run]})
    assert (row["estimator"], row["source"], row["mse"], row["pearson"]) == (
        "exact",
        "logged, mean of 2 steps",
        2.0,
        0.5,
    )


def test_figures_as_text():
    texts = {0.0: "0.000", 0.79: "0.790", -0.5: "-0.500", 0.0012: "1.20e-03", 2e-5: "2.00e-05", None: "–"}
    assert {value: figure_text(value) for value in texts} == texts and figure_text(float("nan")) == "–"


@pytest.mark.parametrize("option", [{"probability_bound": 0.0}, {"probability_bound": 1.5}, {"responses": -1}])
def test_a_bad_option_is_named(option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        ReportOptions(**option)


def test_the_command_writes_the_same_bytes_each_time(audited_run, report, command, root, tmp_path):
    program = (sys.executable, root / "scripts/report.py", audited_run.folder, "--out", tmp_path)
    result = command(*program, PYTHONHASHSEED="1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"report: {tmp_path / 'report.html'}\n"
    here, there = (sorted(folder.rglob("*.*")) for folder in (report.parent, tmp_path))
    assert len(here) == 19
    for one, other in zip(here, there, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("words, message", [((), "no metrics"), (("--responses", "-1"), "responses=-1: expected")])
def test_the_command_says_in_one_line_what_is_wrong(root, tmp_path, monkeypatch, words, message):
    program = str(root / "scripts/report.py")
    monkeypatch.setattr(sys, "argv", [program, str(tmp_path), "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit, match=f"^report: .*{message}[^\n]*$"):
        runpy.run_path(program, run_name="__main__")


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, where the machine has one."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(names)} is on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def contrast(colours):
    """WCAG's contrast ratio of two colours, `rgb(r, g, b) rgb(r, g, b)`."""
    values = np.array(re.findall(r"\d+", colours), float).reshape(2, 3) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (light + 0.05) / (dark + 0.05)


SHOWN = "(one => getComputedStyle(one).backgroundColor + ' ' + getComputedStyle(one).color)"
#: Tokens whose background is not that of their level on the measure's scale; the six of a scale must differ.
UNLIKE_THE_SCALE = """measure => {
  const background = one => getComputedStyle(one).backgroundColor;
  const scale = [...document.querySelectorAll(`.scale.${measure} span`)].map(background);
  if (new Set(scale).size !== 6) return ["scale", ...scale];
  const level = one => Number(one.className.match(new RegExp(measure[0] + "([0-5])"))[1]);
  return [...document.querySelectorAll(".tokens span")].filter(one => background(one) !== scale[level(one)])
    .map(one => one.className);
}"""


def test_in_a_browser(chromium, hostile_report, tmp_path):
    """No error, no request, nothing executed; the switch recolours tokens, and the pointer shows a token's figures."""
    page_file = hostile_report
    colours = {}
    for scheme in ("light", "dark"):
        said, asked = [], []
        page = chromium.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(page_file.as_uri())
        assert page.title().startswith("Entropy report") and said == [] and asked == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page is wider than a phone"

        for measure in ("change", "weight", "entropy"):
            page.locator(f"#by-{measure}").check()
            assert page.evaluate(UNLIKE_THE_SCALE, measure) == []
        colours[scheme] = page.evaluate(
            "[...document.querySelectorAll('body, .e5')].map(shown)".replace("shown", SHOWN)
        )
        assert (
            min(map(contrast, page.evaluate(f"[...document.querySelectorAll('.scale .e5, .e4, .e3')].map({SHOWN})")))
            > 4.5
        )
        page.locator(".tokens span").first.hover()
        shown = page.evaluate("getComputedStyle(document.querySelector('.tokens span:hover'), '::after').content")
        assert "probability" in shown and "estimated change" in shown
        page.screenshot(path=tmp_path / f"{scheme}.png")
        page.close()
    assert len(colours["light"]) > 2
    assert all(light != dark for light, dark in zip(colours["light"], colours["dark"], strict=True))
