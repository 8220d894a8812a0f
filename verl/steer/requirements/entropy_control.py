# SPDX-License-Identifier: Apache-2.0
"""The checks of the control of the entropy, and of its audit."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.steer.audit.scores import AuditOptions
from verl.steer.methods.registry import base_loss_of
from verl.steer.options import from_config
from verl.steer.requirements.allowed import refuse_others
from verl.steer.requirements.loss import FSDP_STRATEGIES, bypasses_old_log_prob
from verl.trainer.ppo.core_algos import INFLUENCE, weighs_mini_batches


def check_entropy_control(config: DictConfig, policy_loss: Any) -> None:
    """Check that the engine can find the weights of a whole mini-batch if the loss reads them.

    Raises:
        ValueError: if it cannot.
    """
    if not weighs_mini_batches(policy_loss):
        return
    estimator = policy_loss.entropy_change_estimator
    reason = f"entropy_change_estimator={estimator}, token_weight_map={policy_loss.token_weight_map}"
    if estimator == INFLUENCE:
        _check_influence(config, reason)
    if estimator == INFLUENCE and policy_loss.influence_way == "head":
        _check_head(config)
    one_pass = config.actor_rollout_ref.actor.fsdp_config.get("one_pass_reductions")
    fused = config.actor_rollout_ref.model.use_fused_kernels
    needs: list[tuple[str, Any, tuple[Any, ...]]] = [("model.use_fused_kernels", fused, (False,))]
    if estimator == "exact" or policy_loss.influence_way == "head":
        needs.append(("actor.fsdp_config.one_pass_reductions", one_pass, (True,)))
    refuse_others(needs, reason)


def _check_influence(config: DictConfig, reason: str) -> None:
    """Check that an update is AdamW's on the policy's loss alone, which the prediction by influence assumes.

    Raises:
        ValueError: if the update has parts that the prediction lacks.
    """
    actor = config.actor_rollout_ref.actor
    override = actor.optim.get("override_optimizer_config") or {}
    dtype = (actor.fsdp_config.get("mixed_precision") or {}).get("param_dtype", "bf16")
    refuse_others(
        [
            ("actor.strategy", actor.strategy, ("fsdp2",)),
            ("actor.optim.optimizer", actor.optim.optimizer, ("AdamW",)),
            ("actor.optim.optimizer_impl", actor.optim.optimizer_impl, ("torch.optim",)),
            ("actor.optim.override_optimizer_config.amsgrad", override.get("amsgrad", False), (False,)),
            ("actor.fsdp_config.mixed_precision.param_dtype", dtype, ("fp32", "float32", "bf16", "bfloat16")),
            ("actor.fsdp_config.model_dtype", actor.fsdp_config.get("model_dtype") or "fp32", ("fp32", "float32")),
            ("actor.entropy_coeff", actor.entropy_coeff, (0,)),
            ("actor.use_kl_loss", actor.use_kl_loss, (False,)),
        ],
        reason,
    )
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
        raise ValueError(f"actor.loss_scale_factor=None: expected a number with loss_agg_mode={actor.loss_agg_mode}")


def _check_head(config: DictConfig) -> None:
    """Check that the last layer is trained, and on the device.

    Raises:
        ValueError: if not.
    """
    model, fsdp_config = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.fsdp_config
    refuse_others(
        [
            ("model.lora_rank", model.get("lora_rank", 0), (0,)),
            ("actor.fsdp_config.offload_policy", fsdp_config.get("offload_policy", False), (False,)),
        ],
        "policy_loss.influence_way=head",
    )


def check_entropy_audit(config: DictConfig, policy_loss: Any) -> None:
    """Check that an audited run has this fork's engine, whose statistics the audit reads, and this fork's trainer.

    Raises:
        ValueError: if it has others.
    """
    trainer, actor = config.trainer, config.actor_rollout_ref.actor
    options = from_config(AuditOptions, trainer.get("entropy_audit"), "trainer.entropy_audit")
    if not options.freq:
        return
    needs = [
        ("trainer.use_v1", trainer.use_v1, (True,)),
        ("trainer.v1.trainer_mode", trainer.v1.trainer_mode, ("steer",)),
        ("actor.strategy", actor.strategy, FSDP_STRATEGIES),
        ("actor.fsdp_config.one_pass_reductions", OmegaConf.select(actor, "fsdp_config.one_pass_reductions"), (True,)),
        ("model.use_fused_kernels", config.actor_rollout_ref.model.use_fused_kernels, (False,)),
        ("algorithm.rollout_correction.bypass_mode", bypasses_old_log_prob(config), (False,)),
        ("trainer.skip_old_log_prob", trainer.get("skip_old_log_prob", False), (False,)),
    ]
    refuse_others(needs, f"trainer.entropy_audit.freq={options.freq}")
    if options.influence or options.one_token:
        name = "influence" if options.influence else "one_token"
        reason = f"trainer.entropy_audit.{name}={getattr(options, name)}"
        _check_influence(config, reason)
        if base_loss_of(policy_loss) != "vanilla":
            raise ValueError(
                f"policy_loss.loss_mode={policy_loss.loss_mode}: expected vanilla or STEER's with {reason}"
            )
        if options.one_token and weighs_mini_batches(policy_loss):
            raise ValueError(
                f"trainer.entropy_audit.one_token={options.one_token}: expected 0 with a loss whose weights are "
                "those of the whole mini-batch"
            )
