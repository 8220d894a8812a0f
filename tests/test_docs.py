# SPDX-License-Identifier: Apache-2.0
"""The pages: the method of docs/adding_a_method.md works, and links, paths, modules and commands exist."""

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from configurations import LAUNCHERS, configuration_of, resolved
from verl.steer import requirements
from verl.steer.config import PolicyLossConfig
from verl.steer.methods.advantages import ESTIMATORS
from verl.steer.methods.registry import POLICY_LOSSES
from verl.steer.report.run_metrics import read_run, run_figures
from verl.steer.requirements import check_and_complete
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, LossInputs
from verl.workers.config import FSDPActorConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = ROOT / "verl/trainer/config"
FOLDERS = ("verl/", "run/", "scripts/", "datasets/", "benchmarks/", "docs/", "tests/")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def block(language, heading):
    """The page's only code block in a language below a heading."""
    section = (ROOT / "docs/adding_a_method.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)
    return text


@pytest.fixture
def method():
    """The names that the page's Python block defines; its loss is registered during the test."""
    names, before = {"__name__": "added_method"}, dict(POLICY_LOSSES)
    with patch.dict(POLICY_LOSSES):
        exec(block("python", "The loss"), names)
        yield names
    assert before == POLICY_LOSSES


def compute(method, log_prob, **options):
    """The outputs of the page's loss on one response of four tokens at a ratio of 1; the last one is not valid."""

    @dataclass
    class Config(method["ProbabilityWeightOptions"], PolicyLossConfig):
        """The base class that the page adds."""

    config = FSDPActorConfig(
        rollout_n=8, ppo_micro_batch_size_per_gpu=8, policy_loss=Config(loss_mode="probability_weight", **options)
    )
    advantages, mask = torch.tensor([[1.0, -1.0, 2.0, 1.0]]), torch.tensor([[True, True, True, False]])
    inputs = LossInputs(log_prob.detach(), log_prob, advantages, mask)
    return POLICY_LOSSES["probability_weight"].compute(inputs, config)


@pytest.mark.parametrize(
    "options, expected",
    [({}, [0.5, -0.8, 0.4, 0.0]), ({"probability_exponent": 1.0}, [0.25, -0.64, 0.08, 0.0])],
)
def test_gradient_of_the_added_method_by_hand(method, options, expected):
    """A token's gradient is its advantage times prob ** exponent: sqrt(0.25), -sqrt(0.64), 2 sqrt(0.04) by default."""
    log_prob = torch.tensor([[0.25, 0.64, 0.04, 0.5]]).log().requires_grad_()
    outputs = compute(method, log_prob, **options)
    (gradient,) = torch.autograd.grad(outputs.loss, log_prob)
    torch.testing.assert_close(-3 * gradient, torch.tensor([expected]))  # the mean over three valid tokens
    assert not outputs.token_weights.requires_grad and outputs.token_weights[0, 3] == 0


def test_the_added_estimator_by_hand():
    """Rewards 1 and -1, mean entropies 0 and 1, 0.5 a nat: 1 and -1.5, mean -0.25; the last token is not valid."""
    with patch.dict(ESTIMATORS), patch.dict(ADV_ESTIMATOR_REGISTRY):
        exec(block("python", "Advantage estimators"), {"__name__": "added_estimator"})
        advantages, _ = ESTIMATORS["entropy_discount"](
            token_level_rewards=torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]),
            response_mask=torch.tensor([[1, 1, 0], [1, 1, 0]]),
            index=np.array(["a", "a"], dtype=object),
            config={"norm_adv_by_std_in_grpo": False, "entropy_discount": 0.5},
            entropy=torch.tensor([[0.0, 0.0, 9.0], [0.5, 1.5, 9.0]]),
        )
    torch.testing.assert_close(advantages, torch.tensor([[1.25, 1.25, 0.0], [-1.25, -1.25, 0.0]]))


def test_range_of_the_added_option(method):
    with pytest.raises(ValueError, match="policy_loss.probability_exponent=-1.0: expected a finite number of at least"):
        compute(method, torch.zeros(1, 4), probability_exponent=-1.0)


def test_configuration_of_the_added_method(method):
    """The block sets keys that exist, and has the form of the other methods' files."""
    config, example = block("yaml", "The configuration"), (CONFIGS / "method/quadrant.yaml").read_text()
    assert config.splitlines()[0] == example.splitlines()[0]
    config, example = yaml.safe_load(config), yaml.safe_load(example)
    assert config.keys() == example.keys()
    policy_loss = config["actor_rollout_ref"]["actor"]["policy_loss"]
    assert policy_loss.pop("loss_mode") in POLICY_LOSSES
    assert policy_loss and policy_loss.keys() <= {field.name for field in fields(method["ProbabilityWeightOptions"])}
    compute(method, torch.zeros(1, 4), **policy_loss)


@pages
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        linked = page.parent / file if file else page
        assert linked.is_file(), link
        headings = re.findall(r"^#+ (.*)", linked.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


@pages
def test_paths_in_backticks_exist(page):
    """Names with one of the repository's folders or a source file's ending; runs make those below outputs/."""
    for name in re.findall(r"`([\w./-]+)`", page.read_text()):
        if name.startswith(FOLDERS) or re.search(r"\.(py|sh|md|toml|yaml|html|png)$", name):
            assert (ROOT / name).exists() or name.startswith("outputs/"), name


@pages
def test_modules_exist(page):
    """`verl.steer.x.y.Name` is a module of this fork, or defined in one."""
    for name in re.findall(r"\bverl\.steer\.[\w.]*\w", page.read_text()):
        file, rest = ROOT, name.split(".")
        while rest and (file / rest[0]).is_dir():
            file /= rest.pop(0)
        if rest:
            file = file / f"{rest.pop(0)}.py"
            assert file.is_file(), name
        assert not rest or re.search(rf"^(class |def )?{rest[0]}\b", file.read_text(), re.M), name


@pages
def test_commands_name_files_and_configurations_that_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:bash|python|pytest)(?: -s)? \"?((?:\w+/)+\w+\.(?:sh|py))", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"python -m (verl_steer|verl[\w.]*)", text):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name
    for group, name in re.findall(r"\b(method|task|hardware)=([a-z]\w*)", text):
        assert (CONFIGS / group / f"{name}.yaml").is_file(), f"{group}={name}"


def test_reward_function_of_the_readme():
    (text,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names = {}
    exec(text, names)
    grades = [names["compute_score"]("source", response, "12", extra_info={}) for response in ("so 12", "so 21")]
    assert grades == [{"score": 1.0, "acc": True}, {"score": -1.0, "acc": False}]


def runs_of(page):
    """Configuration and overrides of each training run and evaluation in the page's blocks of commands."""
    for text in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in text.replace("\\\n", " ").splitlines():
            words = re.sub(r"^(\S+ )*(bash|\S*python) (run/|-m verl\.)", r"\3", line)
            program, *words = shlex.split(words, comments=True) or [""]
            overrides = [word for word in words if re.match(r"\+{0,2}\w[\w.]*=", word)]
            name = Path(program).stem
            if name == "launch":
                yield words[0], overrides
            elif name in LAUNCHERS:
                yield configuration_of(name), overrides
            elif name == "eval":
                yield "eval", overrides
            elif name == "preflight" or program == "-m":
                (method,) = [word for word in overrides if word.startswith("method=")] or ["method=grpo"]
                yield method.partition("=")[2], [word for word in overrides if word != method]


@pages
def test_runs_pass_the_checks(page, monkeypatch, tmp_path):
    """On their hardware, but for what this machine has."""
    for check in ("check_platform", "check_gpus", "check_cpus"):
        monkeypatch.setattr(requirements, check, lambda config: None)
    monkeypatch.setenv("MODEL_PATH", "model")
    (tmp_path / "my_reward.py").write_text("def compute_score(**_): ...")  # README's own reward function
    for name, overrides in runs_of(page):
        check_and_complete(resolved(name, *(override.replace("$PWD", str(tmp_path)) for override in overrides)))


def test_the_pages_have_runs():
    assert [len(list(runs_of(ROOT / page))) for page in ("README.md", "docs/control.md")] == [12, 5]


def test_readme_has_its_commands():
    """The checks above find something."""
    text = (ROOT / "README.md").read_text()
    for name in (
        "bash run/quickstart.sh",
        "bash run/test.sh",
        "bash run/preflight.sh --cpu",
        "python scripts/report.py",
        "python -m verl.steer.main",
    ):
        assert name in text


def test_the_study_has_the_figures_of_the_runs_that_are_kept():
    text = (ROOT / "docs/study_countdown.md").read_text().replace("**", "")  # without bold type
    files = sorted((ROOT / "docs/study_runs").rglob("*.jsonl"))
    assert files
    for file in files:
        found = run_figures(read_run(file))
        figures = {"final": 3, "pass@8": 3, "pass@64": 3, "distinct right": 2, "last ten": 3}
        assert " | ".join(f"{found[name]:.{decimals}f}" for name, decimals in figures.items()) in text, file
