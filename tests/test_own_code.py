# SPDX-License-Identifier: Apache-2.0
"""A user's own classes, modules and files are looked up before Ray starts, and the modules are not run."""

import re
import sys

import pytest
from configurations import resolved
from verl.steer.requirements.model import check_model
from verl.steer.requirements.own_code import check_own_code
from verl.steer.requirements.rewards import check_reward_manager

MANAGER = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
CALLBACK = "trainer.checkpoint_callback_class"
LOOPS = "actor_rollout_ref.rollout.agent.agent_loop_config_path"
ROUTER = "actor_rollout_ref.rollout.router_config_path"
LIBRARY = "actor_rollout_ref.model.external_lib"
SAMPLER = "trainer.v1.sampler.custom_sampler"
DATASET = "data.custom_cls"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package `mine`, with a module `parts` that would end the process that runs it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("")
    (tmp_path / "mine/parts.py").write_text("class Part: ...\nraise SystemExit('this module was run')\n")
    (tmp_path / "mine/wrong.py").write_text("class :")
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing/__init__.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "loops.yaml").write_text("[]")
    return tmp_path


def check(check_one, *overrides, message):
    config = resolved("grpo", "hardware=cpu", "task=arithmetic", *overrides)
    if message is None:
        check_one(config)
        return
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_one(config)


@pytest.mark.parametrize("key", [MANAGER, CALLBACK])
@pytest.mark.parametrize(
    "name, message",
    [
        ("mine.parts.Part", None),
        ("mine.parts.Whole", "=mine.parts.Whole: expected a class of /"),
        ("mine.no_such.Part", "=mine.no_such.Part: expected the full name of a class, such as package.module.Class"),
        ("no_such.parts.Part", "=no_such.parts.Part: expected the full name of a class"),
        ("Part", "=Part: expected the full name of a class"),
        ("mine.wrong.Part", "=mine.wrong.Part: expected Python: invalid syntax ("),
        ("failing.parts.Part", "=failing.parts.Part: RuntimeError: no licence"),
    ],
)
def test_a_class_is_named_in_full(mine, key, name, message):
    check(check_own_code, f"{key}={name}", message=message and key + message)


@pytest.mark.parametrize("section", [DATASET, SAMPLER])
@pytest.mark.parametrize(
    "path, name, message",
    [
        ("{}/mine/parts.py", "Part", None),
        ("file://{}/mine/parts.py", "Part", None),
        ("pkg://mine.parts", "Part", None),
        ("pkg://mine/parts", "Part", None),
        ("{}/mine/parts.py", "Whole", ".name=Whole: expected a class of /"),
        ("{}/mine/parts.py", "null", ".name=None: expected a class of /"),
        ("/no/parts.py", "Part", ".path=/no/parts.py: expected a file, or pkg:// and a module"),
        ("pkg://mine.no_such", "Part", ".path=pkg://mine.no_such: expected a file, or pkg:// and a module"),
        ("pkg://failing.parts", "Part", ".path=pkg://failing.parts: RuntimeError: no licence"),
    ],
)
def test_a_module_defines_the_class(mine, section, path, name, message):
    overrides = [f"{section}.path={path.format(mine)}", f"{section}.name={name}"]
    check(check_own_code, *overrides, message=message and section + message)


@pytest.mark.parametrize(
    "path, message",
    [
        ("pkg://mine.parts", None),
        ("null", "reward.reward_manager.module.path=null: expected a file, or pkg:// and a module"),
        ("pkg://mine", "reward.reward_manager.name=Part: expected a class of /"),
    ],
)
def test_a_reward_manager_of_ones_own_is_there(mine, path, message):
    module = f"reward.reward_manager.module.path={path}"
    check(
        check_reward_manager,
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.name=Part",
        module,
        message=message,
    )


@pytest.mark.parametrize(
    "libraries, message",
    [
        ("mine.parts", None),
        ("[mine,mine.parts]", None),
        ("5", f"{LIBRARY}=5: expected the name of a module that is installed"),
        ("null", None),
        ("no_such", f"{LIBRARY}=no_such: expected the name of a module that is installed"),
        ("[mine,no_such]", f"{LIBRARY}=no_such: expected the name of a module that is installed"),
    ],
)
def test_modules_that_a_worker_imports_are_installed(mine, libraries, message):
    check(check_own_code, f"{LIBRARY}={libraries}", message=message)


@pytest.mark.parametrize("key", [LOOPS, ROUTER])
def test_files_of_rollouts_are_there(mine, monkeypatch, key):
    monkeypatch.chdir(mine)
    for path in (mine / "loops.yaml", "loops.yaml"):
        check(check_own_code, f"{key}={path}", message=None)
    for path in (mine, mine / "no.yaml", "no.yaml"):
        check(check_own_code, f"{key}={path}", message=f"{key}={path}: expected a file")


def test_the_folder_of_a_tokenizer_is_there(laptop_files):
    key = "actor_rollout_ref.model.tokenizer_path"
    check(check_model, f"{key}={laptop_files}/model", message=None)
    check(check_model, f"{key}=Qwen/Qwen3-4B", message=None)
    check(check_model, f"{key}=hdfs://node/user/model", message=None)
    check(check_model, f"{key}=/no/model", message=f"{key}=/no/model: expected the folder of a tokenizer")


@pytest.mark.parametrize(
    "first, code, said",
    [
        ("import verl_steer\n", 0, "registered"),
        ("", 1, "begins with `import verl_steer`"),
    ],
)
def test_a_module_of_the_environment_registers_a_loss(tmp_path, command, root, first, code, said):
    """verl imports such modules before its plugins."""
    (tmp_path / "my_losses.py").write_text(
        f"{first}from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, register_policy_loss\n"
        "register_policy_loss('my_loss')(compute_policy_loss_vanilla)\n"
    )
    script = (
        "import verl, sys\nsys.path.insert(0, 'tests')\nfrom configurations import resolved\n"
        "from verl.steer.requirements import check_and_complete\n"
        "mode = 'actor_rollout_ref.actor.policy_loss.loss_mode=my_loss'\n"
        "check_and_complete(resolved('grpo', 'hardware=cpu', mode))\n"
        "print('registered')"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "VERL_USE_EXTERNAL_MODULES": "my_losses", "VERL_PLATFORM": "cpu"}
    result = command(sys.executable, "-c", script, **environment)
    assert result.returncode == code and said in result.stdout + result.stderr, result.stderr
    assert code == 0 or "Traceback" not in result.stderr
