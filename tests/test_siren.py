# SPDX-License-Identifier: Apache-2.0
"""`loss_mode=siren`: peak tokens, regulariser and anchor by hand."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from configurations import validated
from loss_properties import check_loss, loss_of, random_fields
from losses import actor_config, random_batch
from small_engine import make_engine, mini_batches
from test_interventions import trainer  # noqa: F401 - a fixture
from verl.steer import trainer as trainer_steer
from verl.steer.config import PolicyLossConfig
from verl.steer.loss import ppo_loss
from verl.steer.methods.registry import POLICY_LOSSES
from verl.steer.methods.siren import EntropyAnchor
from verl.trainer.ppo.core_algos import LossInputs

#: Two responses of five and four tokens, and one of none.
ENTROPYS = torch.tensor([[0.1, 0.9, 0.3, 0.7, 0.5], [2.0, 0.0, 0.0, 1.0, 9.0], [9.0] * 5])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0] * 5]).bool()


def penalty(anchor, entropys=ENTROPYS, mask=MASK, global_batch=None, **options):
    """The loss without advantages: the regulariser alone; and its gradient by the entropies."""
    zeros = torch.zeros(entropys.shape)
    leaf = entropys.clone().requires_grad_()
    inputs = LossInputs(zeros - 1, zeros - 1, zeros, mask, nucleus_entropys=leaf, entropy_anchor=anchor)
    config = actor_config("siren", siren_quantile=0.5, **options)
    config.global_batch_info.update(global_batch or {})
    outputs = POLICY_LOSSES["siren"].compute(inputs, config)
    slope = torch.autograd.grad(outputs.loss, leaf)[0] if outputs.loss.requires_grad else None
    return outputs, slope


def test_regulariser_by_hand():
    """Means of the peak tokens 0.8 and 1.5, H = 1.15, anchor 0.65: 0.01 * 0.5^2; slopes 0.01 * 2 * 0.5 / 2 / 2."""
    outputs, slope = penalty(0.65, siren_coeff=0.01)
    assert outputs.loss.item() == pytest.approx(0.01 * 0.25)
    assert outputs.metrics["actor/peak_entropy"].item() == pytest.approx(1.15)
    expected = 0.0025 * torch.tensor([[0.0, 1, 0, 1, 0], [1, 0, 0, 1, 0], [0] * 5])
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(penalty(1.65, siren_coeff=0.01)[1], -expected)


def test_a_micro_batch_counts_by_its_share_of_the_responses():
    """Two of the mini-batch's eight responses."""
    alone, _ = penalty(0.65)
    part, _ = penalty(0.65, global_batch={"global_batch_size": 8, "dp_size": 1})
    assert part.loss.item() == pytest.approx(alone.loss.item() * 2 / 8)


def test_without_an_anchor_or_a_peak_there_is_no_regulariser():
    outputs, slope = penalty(None)
    assert outputs.loss == 0 and slope is None
    flat, slope = penalty(3.0, entropys=torch.ones(3, 5))
    assert flat.loss == 0 and not slope.any()


def test_the_rest_is_ppos_loss():
    batch, fields = random_batch(), random_fields("nucleus_entropys", entropy_anchor=0.2)
    found = loss_of("siren", batch, fields).loss - loss_of("siren", batch, fields, siren_coeff=0.0).loss
    expected = loss_of("siren", (torch.zeros_like(batch[0]), *batch[1:]), fields).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_anchor_of_the_first_step(trainer, tmp_path, monkeypatch):  # noqa: F811
    """The first step sends none and sets it, later steps send it, and a resumed run sends the same."""

    def update(self, batch, metrics):
        metrics |= {"actor/peak_entropy": 0.1 * self.global_steps, "actor/peak_share": 1.0}
        return batch

    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_update_actor", update)
    options = PolicyLossConfig(loss_mode="siren", siren_top_p=0.7)

    def sent(step):
        batch, metrics, trainer.global_steps = SimpleNamespace(extra_info={}), {}, step
        trainer._update_actor(batch, metrics)
        assert batch.extra_info["nucleus_p"] == 0.7
        assert metrics.get("actor/entropy_anchor") == batch.extra_info.get("entropy_anchor")
        return batch.extra_info.get("entropy_anchor")

    trainer.step_state = EntropyAnchor.from_options(options)
    assert [sent(step) for step in (1, 2, 3)] == [None, 0.1, 0.1]
    trainer.step_state.save(tmp_path)
    trainer.step_state = EntropyAnchor.from_options(options)
    trainer.step_state.load(tmp_path)
    assert sent(4) == 0.1


@pytest.mark.parametrize("anchor, sign", [(0.0, -1), (5.5, 1)])
def test_updates_of_a_real_engine(one_rank, model_folder, anchor, sign):
    """Without advantages the regulariser moves the entropy of the peaks, about 4.9 of a random model, to its anchor."""
    engine = make_engine(model_folder, weight_decay=0.0)
    loss, entropys = partial(ppo_loss, config=actor_config("siren", siren_coeff=1.0)), []
    with engine.train_mode():
        for _ in range(4):
            batch = mini_batches(nucleus_p=0.8, entropy_anchor=anchor)[0]
            batch["advantages"] = 0.0 * batch["advantages"]
            found = engine.train_batch(batch, loss)["metrics"]["actor/peak_entropy"]
            entropys.append(float(found.aggregate()))
    changes = [sign * (after - before) for before, after in pairwise(entropys)]
    assert 4.8 < entropys[0] < 5.1 and min(changes) > 0


def test_the_engine_must_read_logits():
    config, _ = validated("siren", "actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false")
    assert config.actor_rollout_ref.actor.fsdp_config.one_pass_reductions
    with pytest.raises(ValueError, match="use_fused_kernels=true: expected false with loss_mode=siren"):
        validated("siren", "actor_rollout_ref.model.use_fused_kernels=true")


@pytest.mark.parametrize("key", ["siren_quantile", "archer_quantile"])
def test_a_quantile_that_leaves_no_token_above_it_is_refused(key):
    with pytest.raises(ValueError, match=rf"^policy_loss\.{key}=1\.0: expected a number of at least 0 and below 1$"):
        PolicyLossConfig(**{key: 1.0})


def test_missing_entropies_are_named():
    with pytest.raises(ValueError, match="nucleus_entropys=None: loss_mode=siren expects trainer.v1"):
        loss_of("siren", random_batch())


def test_properties():
    check_loss("siren", random_fields("nucleus_entropys", entropy_anchor=0.2))


def test_micro_batches_without_a_response_have_no_part_in_the_anchor():
    """One of four has none: the mean of 0.3 over four is one of 0.4 over three."""
    anchor = EntropyAnchor(0.8)
    anchor.observe({"actor/peak_entropy": 0.0, "actor/peak_share": 0.0})
    assert anchor.value is None
    anchor.observe({"actor/peak_entropy": math.nan, "actor/peak_share": 0.75})
    assert anchor.value is None
    anchor.observe({"actor/peak_entropy": 0.3, "actor/peak_share": 0.75})
    assert anchor.value == pytest.approx(0.4)
