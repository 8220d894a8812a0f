# SPDX-License-Identifier: Apache-2.0
"""The checks of verl's own keys whose bad values verl finds in a worker, or never."""

from __future__ import annotations

import os
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf
from verl.steer.methods.advantages import compares_rollouts
from verl.steer.options import Option
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.trainer.ppo.rollout_corr_helper import (
    SUPPORTED_ROLLOUT_RS_OPTIONS,
    compute_rollout_correction_and_rejection_mask,
)
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.torch_dtypes import BFLOAT_LIST, FLOAT_LIST, HALF_LIST
from verl.utils.tracking import Tracking
from verl.workers.config.optimizer import build_optimizer
from verl.workers.rollout.replica import RolloutReplicaRegistry

#: Numbers that verl does not check; those with a default may not be null.
NUMBERS = {
    "actor_rollout_ref.actor.data_loader_seed": Option(integer=True),
    "actor_rollout_ref.actor.entropy_coeff": Option(0.0),
    "actor_rollout_ref.actor.kl_loss_coef": Option(0.001, at_least=0.0),
    "actor_rollout_ref.actor.loss_scale_factor": Option(above=0.0),
    "actor_rollout_ref.actor.optim.clip_grad": Option(1.0, above=0.0),  # a bound below 0 would reverse the gradient
    "actor_rollout_ref.actor.optim.lr": Option(1e-6, at_least=0.0),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": Option(at_least=-1, integer=True),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": Option(at_least=0.0, at_most=1.0),
    "actor_rollout_ref.actor.optim.min_lr_ratio": Option(at_least=0.0, at_most=1.0),
    "actor_rollout_ref.actor.optim.weight_decay": Option(0.01, at_least=0.0),
    "actor_rollout_ref.actor.ppo_epochs": Option(1, at_least=1, integer=True),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": Option(at_least=1, integer=True),
    "actor_rollout_ref.actor.ppo_mini_batch_size": Option(256, at_least=1, integer=True),
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": Option(at_least=1, integer=True),
    "actor_rollout_ref.model.lora_alpha": Option(16, above=0.0),
    "actor_rollout_ref.model.lora_rank": Option(0, at_least=0, integer=True),
    "actor_rollout_ref.rollout.agent.num_workers": Option(8, at_least=1, integer=True),
    "actor_rollout_ref.rollout.data_parallel_size": Option(1, at_least=1, integer=True),
    "actor_rollout_ref.rollout.gpu_memory_utilization": Option(0.5, above=0.0, at_most=1.0),
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": Option(at_least=1, integer=True),
    "actor_rollout_ref.rollout.max_model_len": Option(at_least=1, integer=True),
    "actor_rollout_ref.rollout.max_num_batched_tokens": Option(at_least=1, integer=True),
    "actor_rollout_ref.rollout.max_num_seqs": Option(1024, at_least=1, integer=True),
    "actor_rollout_ref.rollout.n": Option(1, at_least=1, integer=True),
    "actor_rollout_ref.rollout.pipeline_model_parallel_size": Option(1, at_least=1, integer=True),
    "actor_rollout_ref.rollout.seed": Option(42, at_least=0, at_most=2**31 - 1, integer=True),
    "actor_rollout_ref.rollout.temperature": Option(1.0, above=0.0),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": Option(1, at_least=1, integer=True),
    "actor_rollout_ref.rollout.top_k": Option(-1, at_least=-1, integer=True),
    "actor_rollout_ref.rollout.top_p": Option(1.0, above=0.0, at_most=1.0),
    "actor_rollout_ref.rollout.val_kwargs.n": Option(1, at_least=1, integer=True),
    "actor_rollout_ref.rollout.val_kwargs.temperature": Option(0.0, at_least=0.0),
    "actor_rollout_ref.rollout.val_kwargs.top_k": Option(-1, at_least=-1, integer=True),
    "actor_rollout_ref.rollout.val_kwargs.top_p": Option(1.0, above=0.0, at_most=1.0),
    "algorithm.filter_groups.max_inflight_gen_batches": Option(at_least=1, integer=True),
    "algorithm.kl_ctrl.horizon": Option(10000, above=0.0),
    "algorithm.kl_ctrl.kl_coef": Option(0.001, at_least=0.0),
    "algorithm.kl_ctrl.target_kl": Option(0.1, above=0.0),
    "data.dataloader_num_workers": Option(8, at_least=0, integer=True),
    "data.filter_overlong_prompts_workers": Option(at_least=1, integer=True),
    "data.gen_batch_size": Option(at_least=1, integer=True),
    "data.max_prompt_length": Option(512, at_least=1, integer=True),
    "data.max_response_length": Option(512, at_least=1, integer=True),
    "data.seed": Option(integer=True),
    "data.train_batch_size": Option(1024, at_least=1, integer=True),
    "data.train_max_samples": Option(-1, integer=True),
    "data.val_max_samples": Option(-1, integer=True),
    "reward.num_workers": Option(8, at_least=1, integer=True),
    "trainer.critic_warmup": Option(0, at_least=0, integer=True),
    "trainer.n_gpus_per_node": Option(1, at_least=1, integer=True),
    "trainer.nnodes": Option(1, at_least=1, integer=True),
    "trainer.total_epochs": Option(1, at_least=1, integer=True),
    "trainer.total_training_steps": Option(at_least=1, integer=True),
    "trainer.v1.sampler.max_off_policy_threshold": Option(at_least=1, integer=True),
}

#: Estimators whose inputs verl's trainers of `trainer.use_v1` do not compute, and what that is.
WITHOUT_INPUTS_IN_V1 = {
    "remax": "the rewards of greedy answers",
    "gdpo": "the parts of the reward",
    "optimal_token_baseline": "the sums of the squared probabilities",
    "tir_optimal_token_baseline": "the sums of the squared probabilities",
}

#: Values of `trainer.v1.trainer_mode`.
TRAINER_MODES = ("steer", "sync", "colocate_async", "separate_async")

#: Values of `rollout.dtype`, by vLLM's names.
VLLM_TYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")

#: Values of `actor.loss_agg_mode`.
LOSS_AVERAGES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm",
)  # fmt: skip

#: Values of FSDP's data types.
TYPES = tuple(name for name in HALF_LIST + FLOAT_LIST + BFLOAT_LIST if isinstance(name, str))

#: Each of Adam's betas.
BETA = Option(0.9, at_least=0.0, below=1.0)

#: Names of verl's estimates of a KL divergence; a + at the end gives each the gradient of k2.
KL_ESTIMATES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def check_verl_values(config: DictConfig) -> None:
    """Check numbers and names that verl takes as they are.

    Raises:
        ValueError: if a number is out of range, or a name is unknown.
    """
    for key, number in NUMBERS.items():
        number.check(key.removeprefix("actor_rollout_ref."), OmegaConf.select(config, key))
    actor, algorithm, loggers = config.actor_rollout_ref.actor, config.algorithm, config.trainer.logger
    sampler, rollout = config.trainer.v1.sampler, config.actor_rollout_ref.rollout
    names: list[tuple[str, Any, Any]] = [
        ("algorithm.adv_estimator", algorithm.adv_estimator, ADV_ESTIMATOR_REGISTRY),
        ("actor.loss_agg_mode", actor.loss_agg_mode, LOSS_AVERAGES),
        ("rollout.dtype", rollout.dtype, VLLM_TYPES),
        ("rollout.name", rollout.name, RolloutReplicaRegistry._registry),
        ("trainer.v1.sampler.max_off_policy_strategy", sampler.max_off_policy_strategy, ("drop", "wait")),
    ]
    kl_estimates = (*KL_ESTIMATES, *(f"{name}+" for name in KL_ESTIMATES))
    if config.trainer.use_v1 and not os.environ.get("VERL_USE_EXTERNAL_MODULES"):  # which may register others
        names.append(("trainer.v1.trainer_mode", config.trainer.v1.trainer_mode, TRAINER_MODES))
    if actor.use_kl_loss:
        names.append(("actor.kl_loss_type", actor.kl_loss_type, kl_estimates))
    if algorithm.use_kl_in_reward:
        names.append(("algorithm.kl_penalty", algorithm.kl_penalty, kl_estimates))
        names.append(("algorithm.kl_ctrl.type", algorithm.kl_ctrl.type, ("fixed", "adaptive")))
    if config.model_engine == "dp":
        names.append(("actor.optim.lr_scheduler_type", actor.optim.lr_scheduler_type, ("constant", "cosine")))
        names.append(("actor.optim.warmup_style", actor.optim.warmup_style, (None, "constant", "cosine")))
        names += [
            (f"{section}.fsdp_config.{key}", str(name), TYPES)
            for section in ("actor", "ref")
            for key in ("model_dtype", *(f"mixed_precision.{kind}_dtype" for kind in ("param", "reduce", "buffer")))
            if (name := OmegaConf.select(config, f"actor_rollout_ref.{section}.fsdp_config.{key}")) is not None
        ]
    if correction := algorithm.get("rollout_correction"):
        criteria = str(correction.rollout_rs).split(",") if correction.rollout_rs else ()
        names.append(("algorithm.rollout_correction.rollout_is", correction.rollout_is, (None, "token", "sequence")))
        names += [
            ("algorithm.rollout_correction.rollout_rs", one.strip(), sorted(SUPPORTED_ROLLOUT_RS_OPTIONS))
            for one in criteria
        ]
    for logger in [loggers] if isinstance(loggers, str) else loggers or [None]:
        names.append(("trainer.logger", logger, Tracking.supported_backend))
    for key, name, known in names:
        if name not in known:
            raise ValueError(f"{key}={name}: expected one of {', '.join(map(str, known))}")
    if correction:
        _check_thresholds(correction)
    trains = config.trainer.use_v1 and not config.trainer.val_only
    if trains and algorithm.adv_estimator in WITHOUT_INPUTS_IN_V1:
        raise ValueError(
            f"algorithm.adv_estimator={algorithm.adv_estimator}: expected another with trainer.use_v1=true, whose "
            f"trainers do not compute {WITHOUT_INPUTS_IN_V1[algorithm.adv_estimator]}"
        )
    compares = compares_rollouts(algorithm.adv_estimator) and not config.trainer.val_only
    if rollout.n == 1 and compares:
        raise ValueError(f"rollout.n=1: expected at least 2 with algorithm.adv_estimator={algorithm.adv_estimator}")
    if rollout.n == 1 and OmegaConf.select(algorithm, "filter_groups.enable") and not config.trainer.val_only:
        raise ValueError(
            "rollout.n=1: expected at least 2 with algorithm.filter_groups.enable=true, which drops groups of equal "
            "rewards and asks for others"
        )
    tokens = rollout.max_num_batched_tokens  # without chunks verl raises them
    if rollout.name == "vllm" and rollout.enable_chunked_prefill and tokens and tokens < rollout.max_num_seqs:
        raise ValueError(
            f"rollout.max_num_batched_tokens={tokens}: expected at least rollout.max_num_seqs={rollout.max_num_seqs}"
        )
    if config.model_engine == "dp":
        _check_optimizer(actor.optim)
        _check_adapter(config.actor_rollout_ref.model)
    if not config.data.filter_overlong_prompts and config.data.truncation != "left":
        raise ValueError(
            f"data.truncation={config.data.truncation}: expected left with data.filter_overlong_prompts=false: verl "
            "cuts the beginning of a long prompt, whatever the key says"
        )
    _check_lengths(config)


def _check_thresholds(correction: DictConfig) -> None:
    """verl reads the thresholds of its rollout correction after the first rollouts; without one it takes no weights."""
    section = "algorithm.rollout_correction"
    if correction.rollout_is and correction.rollout_is_threshold is None:
        raise ValueError(f"{section}.rollout_is_threshold=None: expected a number with rollout_is")
    names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")
    try:
        compute_rollout_correction_and_rejection_mask(
            *torch.tensor([[[0.0]], [[0.0]], [[1.0]]]), **{name: correction[name] for name in names}
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{section}: {error}") from error


def _check_adapter(model: DictConfig) -> None:
    """verl's FSDP engine has an adapter where `lora_rank` is above 0, and trains the whole model otherwise."""
    for key in ("lora.rank", "lora_adapter_path"):
        if (value := OmegaConf.select(model, key)) and not model.lora_rank:
            raise ValueError(f"model.{key}={value}: expected model.lora_rank above 0 with it, which FSDP reads")
    path = str(model.lora_adapter_path or "")
    if path and "://" not in path and not Path(path, "adapter_config.json").is_file():
        raise ValueError(f"model.lora_adapter_path={path}: expected a folder with adapter_config.json")


def _check_optimizer(optim: DictConfig) -> None:
    """verl looks its class up in a worker, and gives betas to the kinds of Adam; its scheduler takes no null."""
    if optim.lr_warmup_steps is None:
        raise ValueError("actor.optim.lr_warmup_steps=None: expected an integer of at least -1; -1 is for the ratio")
    name, module = str(optim.optimizer), str(optim.optimizer_impl)
    if not _is_installed(module):
        raise ValueError(f"actor.optim.optimizer_impl={module}: expected a module that is installed")
    known = [one for one, found in vars(torch.optim).items() if isinstance(found, type) and one != "Optimizer"]
    if module == torch.optim.__name__ and name not in known:
        close = get_close_matches(name, known) or known
        raise ValueError(f"actor.optim.optimizer={name}: expected one of {', '.join(close)}")
    if "adam" in name.lower():
        if not isinstance(optim.betas, ListConfig) or len(optim.betas) != 2:
            raise ValueError(f"actor.optim.betas={optim.betas}: expected two numbers")
        for i, beta in enumerate(optim.betas):
            BETA.check(f"actor.optim.betas[{i}]", beta)
    if module == torch.optim.__name__:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (3,))]
        try:
            build_optimizer(parameters, omega_conf_to_dataclass(optim))
        except InstantiationException as error:
            raise ValueError(f"actor.optim: {_message(error)}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            given = optim.override_optimizer_config
            raise ValueError(
                f"actor.optim.optimizer={name}, actor.optim.override_optimizer_config={given}: {error}"
            ) from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package in which it would be
        return False


def _check_lengths(config: DictConfig) -> None:
    """vLLM and verl's agent loops would cut prompts and responses at their own limits without a word."""
    for kind in ("prompt", "response"):
        length, most = config.actor_rollout_ref.rollout[f"{kind}_length"], config.data[f"max_{kind}_length"]
        if length != most:
            raise ValueError(f"rollout.{kind}_length={length}: expected data.max_{kind}_length={most}")
    longest = config.data.max_prompt_length + config.data.max_response_length
    limit = config.actor_rollout_ref.rollout.max_model_len
    if limit is not None and limit < longest:
        raise ValueError(
            f"rollout.max_model_len={limit}: expected at least {longest}, data.max_prompt_length + "
            "data.max_response_length"
        )


def as_dataclass(config: DictConfig, key: str) -> Any:
    """A section below `actor_rollout_ref.actor` as the dataclass that it names.

    Raises:
        ValueError: if the section has an unknown key or a bad value.
    """
    section = config.actor_rollout_ref.actor[key]
    known = [field.name for field in fields(get_class(section._target_))]
    for name in section.keys() - {*known, "_target_"}:
        close = get_close_matches(str(name), known) or known
        raise ValueError(f"{key}.{name}: unknown; expected one of {', '.join(close)}")
    try:
        return omega_conf_to_dataclass(section)
    except InstantiationException as error:
        raise ValueError(_message(error)) from error


def check_by_verl(config: DictConfig) -> None:
    """verl's check of a configuration.

    Raises:
        ValueError: if verl refuses the configuration, with whichever error.
    """
    try:
        omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
        validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, InstantiationException) as error:
        raise ValueError(_message(error)) from error


def _message(error: BaseException) -> str:
    """The message of an error's cause or, where that has none, of the error, in one line."""
    return " ".join((str(error.__cause__ or "") or str(error)).split())
