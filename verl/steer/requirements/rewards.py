# SPDX-License-Identifier: Apache-2.0
"""The checks of the reward function, its code rewards and its reward model."""

from __future__ import annotations

import ast
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER
from verl.steer.data_files import column_values
from verl.steer.grading import sandbox
from verl.steer.grading.code import TRAINING_SOURCES, CodeOptions, is_code
from verl.steer.grading.score import is_own_source
from verl.steer.options import Option, from_config
from verl.steer.requirements.own_code import module_with
from verl.utils.reward_score import default_compute_score

#: The reward functions of this fork.
GRADING = "pkg://verl.steer.grading.score"
LEARNED = "pkg://verl.steer.grading.learned"

#: Options of `GRADING`, and of verl's graders, to which it passes them on.
GRADING_OPTIONS = {"rule": Option("auto", choices=("auto", "train", "eval")), "timeout": Option(2.0, above=0.0)}
PASSED_ON = ("code", "concurrent_semaphore", "max_concurrent", "memory_limit_mb", "sandbox_fusion_url")

#: Values of `algorithm.filter_groups.metric`: a response's reward, and numbers that this fork's graders return.
FILTER_METRICS = ("reward", "score", "acc")

#: The section of the reward function.
FUNCTION = "reward.custom_reward_function"

#: The section of the penalty for long responses.
PENALTY = "overlong_buffer_cfg"


def check_reward_manager(config: DictConfig) -> None:
    """Check the reward manager's name, and that what it would not give is not asked for.

    Raises:
        ValueError: if verl has no such manager, another than DAPO's has a penalty for long responses, or groups are
            filtered by a number that no grader of this fork returns.
    """
    reward, manager, groups = config.reward, config.reward.reward_manager, config.algorithm.get("filter_groups")
    if manager.source not in ("register", "importlib"):
        raise ValueError(f"reward.reward_manager.source={manager.source}: expected register or importlib")
    if manager.source == "importlib":
        if not OmegaConf.select(manager, "module.path"):
            raise ValueError("reward.reward_manager.module.path=null: expected a file, or pkg:// and a module")
        module_with(config, "reward.reward_manager.module.path", "reward.reward_manager.name", "a class")
        return
    if manager.name not in REWARD_MANAGER:
        known = ", ".join(sorted(REWARD_MANAGER))
        raise ValueError(f"reward.reward_manager.name={manager.name}: expected one of {known}")
    if OmegaConf.select(reward, f"reward_kwargs.{PENALTY}.enable"):
        if manager.name != "dapo":
            raise ValueError(
                f"reward.reward_manager.name={manager.name}: expected dapo with reward.reward_kwargs.{PENALTY}."
                "enable=true, which it alone reads"
            )
        _check_penalty(reward.reward_kwargs, config.data.max_response_length)
    by_this_fork = reward.custom_reward_function.path in (GRADING, LEARNED)
    if groups and groups.enable and by_this_fork and groups.metric not in FILTER_METRICS:
        raise ValueError(
            f"algorithm.filter_groups.metric={groups.metric}: expected one of {', '.join(FILTER_METRICS)} with "
            f"reward.custom_reward_function.path={reward.custom_reward_function.path}"
        )


def _check_penalty(reward_kwargs: DictConfig, longest: int) -> None:
    for key in ("max_resp_len", f"{PENALTY}.len", f"{PENALTY}.penalty_factor"):
        Option(1, above=0.0).check(f"reward.reward_kwargs.{key}", OmegaConf.select(reward_kwargs, key))
    penalty = reward_kwargs[PENALTY]
    most = reward_kwargs.max_resp_len
    if most > longest:  # no response would have the whole penalty
        raise ValueError(
            f"reward.reward_kwargs.max_resp_len={most}: expected at most data.max_response_length={longest}"
        )
    if penalty.len > most:
        raise ValueError(f"reward.reward_kwargs.{PENALTY}.len={penalty.len}: expected at most max_resp_len={most}")
    if "log" not in penalty:  # which verl's manager reads without a default
        with open_dict(penalty):
            penalty.log = False


def check_reward_function(config: DictConfig) -> None:
    """Check that the reward function is there and takes what verl gives it.

    Raises:
        ValueError: if not.
    """
    function = config.reward.custom_reward_function
    module = module_with(config, f"{FUNCTION}.path", f"{FUNCTION}.name", "a function")
    if module is None:
        return
    if config.reward.reward_manager.source != "register" or config.reward.reward_model.enable:
        return  # which give it other arguments too
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in [node for node in functions if node.name == function.name][-1:]:
        _check_parameters(node, function)


def _check_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, function: DictConfig) -> None:
    """verl gives these keywords and `reward_kwargs`, unless a decorator takes others."""
    given = {"data_source", "solution_str", "ground_truth", "extra_info", *(function.get("reward_kwargs") or {})}
    args = node.args
    known = {arg.arg for arg in (*args.args, *args.kwonlyargs)}
    needed = [arg.arg for arg in args.posonlyargs + args.args][: len(args.posonlyargs + args.args) - len(args.defaults)]
    needed += [arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    wrong = sorted(set(needed) - given) + ([] if args.kwarg else sorted(given - known))
    if wrong and not node.decorator_list:
        raise ValueError(
            f"reward.custom_reward_function.name={function.name}: expected the parameters data_source, solution_str, "
            f"ground_truth and extra_info, by name, and those of reward_kwargs; it differs in {', '.join(wrong)}"
        )


def check_data_sources(config: DictConfig) -> None:
    """Check that each data source of the run's files is a text and has a grader.

    Rewards of the user's own function, manager or model need none, and a data set of the user's own names its sources.

    Raises:
        ValueError: if one has none, or its grader in verl needs a package that is not installed.
    """
    reward, path = config.reward, config.reward.custom_reward_function.path
    by_model = path is None and reward.reward_model.enable
    if path not in (None, GRADING) or by_model or reward.reward_manager.source != "register":
        return
    if OmegaConf.select(config, "data.custom_cls.path"):
        return
    for source in sorted(_data_sources(config), key=str):
        if not isinstance(source, str):
            raise ValueError(f"data_source={source} in the data: expected the name of a source, a text")
        if source in TRAINING_SOURCES or path == GRADING and is_own_source(source):
            continue
        if obstacle := _obstacle_to_verls_grader(source):
            raise ValueError(
                f"data_source={source} in the data: {obstacle}: expected a source that this fork or verl grades, or "
                "the file of a reward function as reward.custom_reward_function.path"
            )


def _obstacle_to_verls_grader(source: str) -> str | None:
    """Why verl does not grade this source; only its function knows its sources."""
    try:
        default_compute_score(source, "", "")
    except (NotImplementedError, ImportError) as error:
        return str(error)
    except Exception:  # a grader that fails on the empty answer is there
        pass
    return None


def check_code_rewards(config: DictConfig) -> None:
    """Check the options of this fork's reward function and, if rows of this run need it, the sandbox of code rewards.

    With verl's `reward.sandbox_fusion.url` that service runs the programs: the reward function gets the section.

    Raises:
        ValueError: if an option is out of range, or the sandbox doesn't start.
    """
    function, service = config.reward.custom_reward_function, config.reward.sandbox_fusion
    if function.path != GRADING:
        return
    given = function.get("reward_kwargs") or {}
    for name, value in given.items():
        if name in GRADING_OPTIONS:
            GRADING_OPTIONS[name].check(f"{FUNCTION}.reward_kwargs.{name}", value)
        elif name not in PASSED_ON:
            known = ", ".join([*GRADING_OPTIONS, *PASSED_ON])
            raise ValueError(f"{FUNCTION}.reward_kwargs.{name}: unknown; expected one of {known}")
    options = from_config(CodeOptions, given.get("code"), sandbox.SECTION)
    if service.url:
        with open_dict(config):
            function.reward_kwargs = {
                **given,
                "sandbox_fusion_url": service.url,
                "memory_limit_mb": service.memory_limit_mb,
                "max_concurrent": max(1, service.max_concurrent // config.reward.num_workers),
            }
    elif options.sandbox == "bwrap" and any(
        isinstance(source, str) and is_code(source) for source in _data_sources(config)
    ):
        sandbox.check()


def check_reward_model(config: DictConfig) -> None:
    """Check that a reward model, verl's or that of `verl.steer.grading.learned`, is there and read.

    Raises:
        ValueError: if its folder is not named or holds no model, or the reward function does not read it.
    """
    function, of_verl = config.reward.custom_reward_function, config.reward.reward_model
    if of_verl.enable and function.path in (GRADING, LEARNED):
        raise ValueError(
            f"reward.reward_model.enable=true: expected {FUNCTION}.path=null or a function of the user's own with it: "
            f"{function.path} does not read the model's scores"
        )
    if of_verl.enable and not of_verl.model_path:
        raise ValueError(
            f"reward.reward_model.model_path={of_verl.model_path}: expected the folder of a model, or a name on the "
            "Hugging Face Hub, with reward.reward_model.enable=true"
        )
    if function.path == LEARNED:
        folder = (function.get("reward_kwargs") or {}).get("model_path")
        if not folder or not Path(folder, "config.json").is_file():
            raise ValueError(
                f"reward.custom_reward_function.reward_kwargs.model_path={folder}: expected the folder of a reward "
                "model, such as scripts/make_reward_model.py makes"
            )


def _data_sources(config: DictConfig) -> set[str]:
    """The data sources of the run's files, as far as these are at hand."""
    keys = ("val_files",) if config.trainer.val_only else ("val_files", "train_files")
    return {source for key in keys for _, source in column_values(config, key, "data_source")}
