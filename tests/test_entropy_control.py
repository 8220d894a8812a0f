# SPDX-License-Identifier: Apache-2.0
"""Options of the control of the entropy: what a run accepts, and what it refuses before Ray starts."""

import re
from dataclasses import dataclass

import pytest
from configurations import ACTOR, POLICY_LOSS, validated
from verl.steer.options import at_step, option, resolve_options

AUDIT = "trainer.entropy_audit"


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("influence_target", [f"{ACTOR}.strategy=fsdp"], "actor.strategy=fsdp: expected fsdp2 with entropy_change_est"),
        (
            "influence_band",
            [f"{ACTOR}.optim.optimizer=SGD"],
            "actor.optim.optimizer=SGD: expected AdamW with entropy_change",
        ),
        ("influence_band", [f"{ACTOR}.optim.optimizer_impl=torch.optim.adamw"], "expected torch.optim with"),
        ("influence_band", [f"+{ACTOR}.optim.override_optimizer_config.amsgrad=true"], "amsgrad=True: expected false"),
        ("influence_target", [f"{ACTOR}.fsdp_config.model_dtype=bf16"], "model_dtype=bf16: expected fp32 or float32"),
        (
            "influence_band",
            [f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp16"],
            "param_dtype=fp16: expected fp32 or",
        ),
        ("influence_exp", [f"{ACTOR}.entropy_coeff=0.01"], "actor.entropy_coeff=0.01: expected 0 with entropy_change"),
        ("influence_exp", [f"{ACTOR}.use_kl_loss=true"], "actor.use_kl_loss=True: expected false with entropy_change"),
        ("pi_released", ["actor_rollout_ref.model.use_fused_kernels=true"], "model.use_fused_kernels=True: expected f"),
        ("pi_exact", [f"{ACTOR}.fsdp_config.one_pass_reductions=false"], "one_pass_reductions=False: expected true"),
        (
            "influence_band",
            [f"{POLICY_LOSS}.influence_way=head", f"{ACTOR}.fsdp_config.one_pass_reductions=false"],
            "one_pass_reductions=False: expected true",
        ),
        ("pi_released", ["trainer.v1.trainer_mode=sync"], "trainer.v1.trainer_mode=sync: expected steer with policy_l"),
        (
            "influence_target",
            [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm"],
            "actor.loss_scale_factor=None: expect",
        ),
        ("influence_target", [f"{POLICY_LOSS}.target_entropy={{3:0.2}}"], "target_entropy={3: 0.2}: expected training"),
        (
            "grpo",
            [f"{AUDIT}.freq=1", f"{AUDIT}.influence=true", f"{ACTOR}.entropy_coeff=1"],
            "entropy_coeff=1: expecte",
        ),
        (
            "clip_cov",
            [f"{AUDIT}.freq=1", f"{AUDIT}.one_token=9"],
            "loss_mode=clip_cov: expected vanilla or STEER's with",
        ),
        ("influence_exp", [f"{AUDIT}.freq=1", f"{AUDIT}.one_token=9"], f"{AUDIT}.one_token=9: expected 0 with a loss"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(name, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        validated(name, *overrides)
    assert "\n" not in str(error.value)


def test_a_schedule_comes_through_hydra():
    _, options = validated("influence_target", f"+{POLICY_LOSS}.target_entropy={{1:0.35,21:0.2,41:0.3}}")
    assert [at_step(options.target_entropy, step) for step in (1, 20, 21, 40, 41, 99)] == [
        0.35, 0.35, 0.2, 0.2, 0.3, 0.3,
    ]  # fmt: skip
    assert (options.token_weight_min, options.token_weight_max) == (0.0, 2.0)
    _, options = validated("influence_target", f"{POLICY_LOSS}.target_entropy=0.4")
    assert at_step(options.target_entropy, 7) == 0.4


@pytest.mark.parametrize("name", ["influence_target", "influence_band", "influence_exp", "pi_released", "pi_exact"])
def test_a_controlled_run_needs_no_entropy_with_gradient(name):
    config, _ = validated(name)
    assert not config.actor_rollout_ref.actor.calculate_entropy


def test_only_options_with_a_schedule_take_one():
    @dataclass
    class Options:
        plain: float = option(0.5)

    with pytest.raises(ValueError, match=r"^x.plain={1: 0.5}: expected a finite number$"):
        resolve_options(Options({1: 0.5}), "x")
