# SPDX-License-Identifier: Apache-2.0
"""The policy loss `entropy_control`, alone and as verl's `ppo_loss` calls it."""

import math

import pytest
import torch
from losses import NoHostSynchronisation, actor_config, gradient, micro_batch, random_batch, squares, steer_loss
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from verl.steer import loss as loss_module
from verl.steer.loss import ppo_loss
from verl.steer.methods.registry import POLICY_LOSSES, clips_as_ppo
from verl.trainer.ppo.core_algos import (
    BASE_LOSSES,
    ENTROPY_CONTROL_MODES,
    POLICY_LOSS_REGISTRY,
    ClipRatios,
    EntropyChangeRange,
    LossInputs,
    compute_policy_loss_vanilla,
    compute_token_weights,
    estimate_entropy_change,
    get_policy_loss_fn,
    ppo_clipped,
    reweighted_policy_loss,
)
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType
from verl.workers.utils.losses import ppo_loss as verl_ppo_loss
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("options", [{}, {"linear": False}, {"entropy_change_estimator": "clip_aware"}])
def test_gradient_is_the_weight_times_the_vanilla_gradient(options, agg):
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    config = actor_config(agg=agg, **options)
    weights = compute_token_weights(
        advantages, entropys, old_log_prob, log_prob, mask,
        config.policy_loss.token_weight_min, config.policy_loss.token_weight_max, config.policy_loss.linear,
        estimator=config.policy_loss.entropy_change_estimator,
        clip=ClipRatios(0.2, 0.28, 10.0),
    )  # fmt: skip
    steer = gradient(lambda x: steer_loss((advantages, entropys, old_log_prob, x, mask), config), log_prob)
    vanilla = gradient(lambda x: compute_policy_loss_vanilla(old_log_prob, x, advantages, mask, agg, config), log_prob)
    assert vanilla.any()
    torch.testing.assert_close(steer, weights * vanilla, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("base_loss", BASE_LOSSES)
def test_every_base_loss_has_each_tokens_gradient_multiplied_by_its_weight(base_loss):
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    config = actor_config(base_loss=base_loss, dro_beta=0.1, clip_cov_ratio=0.1, clip_cov_lb=0.0, kl_cov_ratio=0.1)
    weights = compute_token_weights(advantages, entropys, old_log_prob, log_prob, mask)
    base = get_policy_loss_fn(base_loss)

    def seeded(loss):
        torch.manual_seed(0)  # clip_cov draws its tokens
        return loss

    steer = gradient(lambda x: seeded(steer_loss)((advantages, entropys, old_log_prob, x, mask), config), log_prob)
    plain = gradient(lambda x: seeded(base)(old_log_prob, x, advantages, mask, "token-mean", config), log_prob)
    assert (plain != 0).sum() > 50 and weights[mask].std() > 0.01
    if base_loss == "geo_mean":
        # One loss for a whole response has one weight.
        weights = torch.exp((weights.clamp_min(1e-10).log() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))
    torch.testing.assert_close(steer, weights * plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("base_loss", sorted({*BASE_LOSSES} - {"clip_cov", "kl_cov"}))
def test_micro_batches_and_ranks_share_the_gradient_of_the_mini_batch(base_loss, agg):
    """`clip_cov` and `kl_cov` are left out: they choose tokens of each micro-batch."""
    advantages, _, old_log_prob, log_prob, mask = random_batch()
    config = actor_config(base_loss=base_loss, dro_beta=0.1, agg=agg)
    sizes = {"batch_num_tokens": mask.sum(), "global_batch_size": len(mask)}
    weights = torch.linspace(0.5, 1.5, mask.numel()).view(mask.shape)

    def of_rows(rows, ranks):
        def loss(x):
            inputs = LossInputs(old_log_prob[rows], x[rows], advantages[rows], mask[rows])
            return reweighted_policy_loss(base_loss, weights[rows], inputs, config).loss

        config.global_batch_info.update(sizes, dp_size=ranks)
        return gradient(lambda x: (loss(x),), log_prob) / ranks

    expected = of_rows(slice(None), 1)
    assert expected.any() and len(mask) > 4
    for ranks in (1, 2):
        parts = [of_rows(rows, ranks) for rows in (slice(3), slice(3, 4), slice(4, None))]
        torch.testing.assert_close(sum(parts), expected)


def test_base_losses_are_all_that_verl_weights():
    """verl's registry has them, `bypass_mode`, which ignores weights, and STEER with verl's signature."""
    assert POLICY_LOSS_REGISTRY.keys() == {*BASE_LOSSES, "bypass_mode", "entropy_control"}


def test_weights_of_one_give_the_vanilla_loss_bit_for_bit():
    advantages, _, old_log_prob, log_prob, mask = batch = random_batch()
    config = actor_config(token_weight_min=1.0, token_weight_max=1.0)
    loss, metrics = steer_loss(batch, config)
    vanilla, vanilla_metrics = compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, mask, "token-mean", config
    )
    assert torch.equal(loss, vanilla)
    assert {name: float(metrics[name]) for name in vanilla_metrics} == vanilla_metrics


def test_rollout_weights_are_multiplied_in():
    batch = random_batch()
    config = actor_config()
    doubled, _ = steer_loss(batch, config, rollout_is_weights=torch.full_like(batch[0], 2.0))
    torch.testing.assert_close(doubled, 2 * steer_loss(batch, config)[0])


def test_bf16_inputs_give_the_float32_loss():
    *tensors, mask = random_batch()
    rounded = [tensor.bfloat16() for tensor in tensors]
    loss, _ = steer_loss((*rounded, mask), actor_config())
    expected, _ = steer_loss((*(tensor.float() for tensor in rounded), mask), actor_config())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_all_tokens_masked_gives_no_gradient():
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    mask = torch.zeros_like(mask)
    grad = gradient(lambda x: steer_loss((advantages, entropys, old_log_prob, x, mask), actor_config()), log_prob)
    assert not grad.any()


def test_metrics_by_hand():
    """Ratios 1.5, 0.5, 1, 1 of advantages 1, -1, 1, 1: one of four clipped from above, one from below."""
    advantages = torch.tensor([[1.0, -1.0, 1.0, 1.0, 5.0]])
    log_prob = torch.tensor([[1.5, 0.5, 1.0, 1.0, 1.0]]).mul(0.1).log()
    old_log_prob = torch.full((1, 5), 0.1).log()
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    _, metrics = steer_loss((advantages, torch.ones(1, 5), old_log_prob, log_prob, mask), actor_config())
    assert metrics["actor/pg_clipfrac_high"] == 0.25 and metrics["actor/pg_clipfrac_low"] == 0.25
    assert metrics["actor/pg_clipfrac"] == 0.5
    assert metrics["actor/token_weights_min"] == pytest.approx(0.8) and metrics["actor/token_weights_max"] == 1.2
    weights = compute_token_weights(advantages, torch.ones(1, 5), old_log_prob, log_prob, mask)
    assert metrics["actor/token_weights_mean"] == pytest.approx(weights.sum().item() / 4)


@pytest.mark.parametrize("mode", ENTROPY_CONTROL_MODES)
def test_estimates_of_tokens_that_are_not_valid_are_not_logged(mode):
    """A * 0.5 * (ln 0.5 + ln 2 + 1) of the valid tokens is 0.05 and -0.1, of the other one 5; sizes are logged."""
    log_prob = torch.tensor([[0.5, 0.5, 0.5]]).log()
    advantages, entropys = torch.tensor([[0.1, -0.2, 10.0]]), torch.full((1, 3), math.log(2) + 1)
    batch = (advantages, entropys, log_prob, log_prob, torch.tensor([[1, 1, 0]]))
    _, metrics = steer_loss(batch, actor_config(entropy_control_mode=mode))
    assert float(metrics["actor/entropy_change_mean"]) == pytest.approx(0.075)
    assert float(metrics["actor/entropy_change_max"]) == pytest.approx(0.1)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_threshold_map_has_the_configured_quantile(quantile):
    batch = random_batch()
    config = actor_config(token_weight_map="threshold", token_weight_quantile=quantile)
    _, metrics = steer_loss(batch, config)
    advantages, entropys, old_log_prob, log_prob, mask = batch
    inputs = LossInputs(old_log_prob, log_prob, advantages, mask, entropys)
    change = estimate_entropy_change(inputs)[mask].sort().values
    held_back = len(change) - 1 - int(quantile * (len(change) - 1))
    assert change.unique().numel() == len(change)
    assert float(metrics["actor/token_weights_below_0.9"]) == pytest.approx(held_back / len(change))


@pytest.mark.parametrize("loss_mode", sorted({*BASE_LOSSES, *POLICY_LOSSES} - {"entropy_control"}))
def test_the_losses_that_clip_as_ppo_does_are_known(loss_mode):
    """In those a token with an advantage is without gradient just where PPO clips it, in others not."""
    advantages, entropys, old_log_prob, log_prob, mask = random_batch(spread=1.5)
    config = actor_config(
        loss_mode, agg="token-sum", high_entropy_share=1.0, dro_beta=0.1, clip_cov_lb=0.0, kl_cov_ratio=0.1
    )
    torch.manual_seed(0)  # clip_cov draws its tokens

    def loss_of(x):
        inputs = LossInputs(
            old_log_prob,
            x,
            advantages,
            mask,
            entropys,
            entropys,
            entropy_coeff=0.01,
            nucleus_entropys=entropys,
            **squares(advantages),
        )
        if loss_mode in POLICY_LOSSES:
            return [POLICY_LOSSES[loss_mode].compute(inputs, config).loss]
        return get_policy_loss_fn(loss_mode)(old_log_prob, x, advantages, mask, config.loss_agg_mode, config)

    found = gradient(loss_of, log_prob)
    inputs = LossInputs(old_log_prob, log_prob, advantages, mask)
    above, below = ppo_clipped(inputs, ClipRatios(0.2, 0.28, 10.0))
    negative = advantages < 0
    assert all((side & mask).any() for side in (above & negative, above & ~negative, below))
    assert ((found == 0)[mask] == (above | below)[mask]).all() == clips_as_ppo(config.policy_loss)


@pytest.mark.parametrize("base_loss", BASE_LOSSES)
def test_ppos_clip_is_counted_only_where_the_loss_has_it(base_loss):
    config = actor_config(base_loss=base_loss, dro_beta=0.1)
    _, metrics = steer_loss(random_batch(), config)
    counted = {name for name in metrics if name.startswith(("actor/pg_clipfrac_high", "actor/pg_clipfrac_low/"))}
    assert ("actor/pg_clipfrac_low" in metrics) is bool(counted) is (base_loss == "vanilla")
    assert "actor/quadrant/positive_likely/change" in metrics


def test_missing_entropys_are_named():
    advantages, _, old_log_prob, log_prob, mask = random_batch()
    with pytest.raises(ValueError, match="entropys=None"):
        steer_loss((advantages, None, old_log_prob, log_prob, mask), actor_config())


def test_weights_of_the_mini_batch_multiply_each_tokens_loss():
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    config = actor_config(entropy_change_estimator="influence")
    batch = (advantages, entropys, old_log_prob, log_prob.requires_grad_(), mask)
    weights = torch.rand(mask.shape) * mask
    loss, metrics = steer_loss(batch, config, token_weights=weights)
    plain, _ = compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, mask.float(), "token-mean", config=config, rollout_is_weights=weights
    )
    torch.testing.assert_close(loss, plain)
    assert metrics["actor/token_weights_max"] == weights.max() and "actor/entropy_change_mean" not in metrics
    with pytest.raises(ValueError, match="^token_weights=None: the weights of the whole mini-batch are expected"):
        steer_loss(batch, config)


FORMS = [
    {},
    {"linear": False},
    {"entropy_change_estimator": "clip_aware"},
    {"entropy_change_estimator": "exact"},
    {"token_weight_map": "threshold"},
    {"entropy_control_mode": "asymmetric"},
    {"token_weight_normalizer": "global"},
    {"token_weight_normalizer": "rank"},
    {"token_weight_normalizer": "winsorised"},
    {"entropy_change_estimator": "influence"},
]


def form_statistics(batch, options):
    """What a form of STEER takes besides the old entropies."""
    if options.get("entropy_change_estimator") == "exact":
        return {"current_entropys": batch[1], **squares(batch[0])}
    if options.get("entropy_change_estimator") == "influence":
        return {"token_weights": 2 * batch[4].float()}
    return {"change_range": EntropyChangeRange(0.1, 0.5)} if "global" in options.values() else {}


ALL_LOSSES = [*FORMS, *({"loss_mode": mode} for mode in sorted(POLICY_LOSSES))]


def loss_on(device, options):
    """The inputs of a form or a loss mode on a device, and its outputs and metrics as a function."""
    batch, config = random_batch(), actor_config(**options)
    others = {"current_entropys": batch[1], "nucleus_entropys": batch[1], **squares(batch[0])}
    others |= form_statistics(batch, options)
    advantages, entropys, old_log_prob, log_prob, mask = [tensor.to(device) for tensor in batch]
    fields = {name: value.to(device) if torch.is_tensor(value) else value for name, value in others.items()}
    fields |= {"entropy_anchor": 0.5, "entropy_coeff": 0.1}
    inputs = LossInputs(old_log_prob, log_prob.requires_grad_(), advantages, mask, entropys, **fields)

    def compute():
        outputs = POLICY_LOSSES[config.policy_loss.loss_mode].compute(inputs, config)
        outputs.loss.backward()
        return outputs.loss.detach(), outputs.metrics | loss_module._token_metrics(config, inputs, outputs)

    return inputs, compute


@pytest.mark.parametrize("options", ALL_LOSSES, ids=str)
def test_no_loss_waits_for_the_device(options):
    _, compute = loss_on("meta", options)
    with NoHostSynchronisation():
        compute()


def test_waits_for_the_device_are_noticed():
    values = torch.ones(2, device="meta")
    for wait in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.item, torch.nonzero):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), NoHostSynchronisation():
            wait(values)
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSynchronisation():
        values[values > 0] = 0


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_loss_compiles_to_one_graph(options):
    torch._dynamo.reset()  # it counts how often the forms before this one made it compile the same code
    config = actor_config(**options)
    advantages, entropys, old_log_prob, log_prob, mask = random_batch()
    batch = (advantages, entropys, old_log_prob, log_prob.requires_grad_(), mask)
    statistics = form_statistics(batch, options)
    compiled = torch.compile(
        lambda *batch: steer_loss(batch, config, **statistics), fullgraph=True, backend="aot_eager"
    )
    loss, metrics = compiled(*batch)
    expected, expected_metrics = steer_loss(batch, config, **statistics)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob), torch.autograd.grad(expected, log_prob))


def test_ppo_loss_hands_over_the_old_policys_entropy():
    data, output = micro_batch()
    loss, metrics = ppo_loss(actor_config(), {"log_probs": output["log_probs"]}, data)
    other, _ = micro_batch(seed=0)
    other["entropy"] = other["entropy"] * 3
    changed, _ = ppo_loss(actor_config(), {"log_probs": output["log_probs"]}, other)
    assert loss != changed
    assert metrics["actor/token_weights_min"].aggregation is AggregationType.MIN
    assert metrics["actor/token_weights_max"].aggregation is AggregationType.MAX
    assert metrics["actor/token_weights_mean"].aggregation is AggregationType.MEAN


@pytest.mark.parametrize(
    "agg, sizes, aggregation",
    [
        ("token-mean", {}, AggregationType.MEAN),
        ("token-mean", {"batch_num_tokens": 9}, AggregationType.SUM),
        ("seq-mean-token-mean", {"global_batch_size": 3}, AggregationType.SUM),
    ],
)
def test_losses_of_micro_batches_add_up_where_each_is_a_part_of_the_whole(agg, sizes, aggregation):
    data, output = micro_batch()
    tu.assign_non_tensor(data, **{"batch_num_tokens": None, "global_batch_size": None} | sizes)
    _, metrics = ppo_loss(actor_config(agg=agg), {"log_probs": output["log_probs"]}, data)
    assert metrics["actor/pg_loss"].aggregation is aggregation


def test_ppo_loss_falls_back_to_the_current_entropy():
    data, output = micro_batch(with_entropy=False)
    loss, _ = ppo_loss(actor_config(), dict(output), data)
    changed = {"log_probs": output["log_probs"], "entropy": output["entropy"] * 3}
    assert loss != ppo_loss(actor_config(), changed, data)[0]
    with pytest.raises(ValueError, match="entropys=None"):
        ppo_loss(actor_config(), {"log_probs": output["log_probs"]}, data)


def test_ppo_loss_hands_the_exact_estimator_the_current_policy():
    """Its entropies and sums over the vocabulary, in place of the old entropies that the batch has too."""
    data, output = micro_batch()
    values = output["entropy"].values()
    for name, scale in (("sum_pi_squared", 0.5), ("sum_pi_squared_log_pi", -0.3)):
        output[name] = torch.nested.nested_tensor_from_jagged(scale * values.flip(0), output["entropy"].offsets())
    config = actor_config(entropy_change_estimator="exact")
    _, metrics = ppo_loss(config, dict(output), data)
    padded = {name: no_padding_2_padding(value, data) for name, value in output.items()}
    batch = data.select("advantages", "old_log_probs", "response_mask").to_padded_tensor()
    inputs = LossInputs(
        batch["old_log_probs"], padded["log_probs"], batch["advantages"], batch["response_mask"],
        current_entropys=padded["entropy"], sum_pi_squared=padded["sum_pi_squared"],
        sum_pi_squared_log_pi=padded["sum_pi_squared_log_pi"],
    )  # fmt: skip
    change = estimate_entropy_change(inputs, "exact", ClipRatios(0.2, 0.28, 10.0))
    assert float(metrics["actor/entropy_change_max"].values[0]) == pytest.approx(float(change.max()))
    for missing in ("entropy", "sum_pi_squared", "sum_pi_squared_log_pi"):
        with pytest.raises(ValueError, match="=None|is None"):
            ppo_loss(config, {name: value for name, value in output.items() if name != missing}, data)


def test_ppo_loss_hands_over_the_range_of_the_mini_batch():
    data, output = micro_batch()
    config = actor_config(token_weight_normalizer="global")
    with pytest.raises(ValueError, match="change_range=None: token_weight_normalizer=global expects"):
        ppo_loss(config, dict(output), data)
    tu.assign_non_tensor(data, entropy_change_range=EntropyChangeRange(0.0, 1e9))
    _, metrics = ppo_loss(config, dict(output), data)
    assert float(metrics["actor/token_weights_min"].values[0]) == pytest.approx(1.2)


def test_ppo_loss_of_other_modes_is_verls():
    for mode in ("vanilla", "gspo", "clip_cov"):
        data, output = micro_batch()
        loss, metrics = ppo_loss(actor_config(mode), dict(output), data)
        verl_loss, verl_metrics = verl_ppo_loss(actor_config(mode), dict(output), data)
        assert torch.equal(loss, verl_loss) and metrics.keys() == verl_metrics.keys()


@pytest.mark.parametrize("mode", ["entropy_control", "clip_v", "vanilla", "gspo"])
def test_ppo_loss_that_skips_old_log_probs_takes_those_of_its_forward_pass(mode):
    """The ratio is 1 and the gradient is that of the same log-probs from a pass of their own."""
    gradients = []
    for own_pass in (True, False):
        data, output = micro_batch()
        output |= {name: output["entropy"] * -0.5 for name in ("sum_pi_squared", "sum_pi_squared_log_pi")}
        del data["old_log_probs"]
        if own_pass:
            data["old_log_probs"] = response_from_nested(output["log_probs"], data["response_mask"])
        else:
            tu.assign_non_tensor(data, skip_old_log_prob=True)
        leaf = output["log_probs"].values().requires_grad_()
        output["log_probs"] = torch.nested.nested_tensor_from_jagged(leaf, output["log_probs"].offsets())
        loss, metrics = ppo_loss(actor_config(mode), output, data)
        loss.backward()
        gradients.append(leaf.grad)
    assert metrics["actor/ppo_kl"].values == [0.0] and torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("mode", ["entropy_control", "clip_v", "vanilla", "gspo"])
def test_ppo_loss_does_not_replace_old_log_probs_that_are_missing(mode):
    data, output = micro_batch()
    del data["old_log_probs"]
    with pytest.raises((KeyError, TypeError), match="old_log_prob"):
        ppo_loss(actor_config(mode), dict(output), data)


@pytest.mark.parametrize("mode", ["entropy_control", "positive_advantage"])
def test_ppo_loss_hands_over_the_rollouts_weights(mode):
    data, output = micro_batch()
    plain, _ = ppo_loss(actor_config(mode), dict(output), data)
    data["rollout_is_weights"] = torch.full_like(data["advantages"], 2.0)
    weighted, _ = ppo_loss(actor_config(mode), dict(output), data)
    torch.testing.assert_close(weighted, 2 * plain)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("use_kl_loss", [False, True])
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.02])
def test_ppo_loss_adds_verls_entropy_bonus_and_kl_loss(use_kl_loss, entropy_coeff, agg):
    """With weights of 1 STEER's loss and its metrics are those of verl's `ppo_loss` with the vanilla loss."""
    results = []
    for mode, loss_fn in (("entropy_control", ppo_loss), ("vanilla", verl_ppo_loss)):
        data, output = micro_batch()
        data["ref_log_prob"] = data["old_log_probs"] * 0.9
        config = actor_config(mode, agg=agg, token_weight_min=1.0, token_weight_max=1.0)
        object.__setattr__(config, "use_kl_loss", use_kl_loss)
        object.__setattr__(config, "entropy_coeff", entropy_coeff)
        object.__setattr__(config, "loss_scale_factor", 7)
        results.append(loss_fn(config, output, data))
    (loss, metrics), (verl_loss, verl_metrics) = results
    assert torch.equal(loss, verl_loss) and metrics.keys() >= verl_metrics.keys()
    for name in ("actor/pg_loss", "actor/entropy_loss", "kl_loss"):
        assert (name in metrics) == (name in verl_metrics)
        if name in metrics:
            assert metrics[name].aggregation == verl_metrics[name].aggregation
            assert float(metrics[name].aggregate()) == pytest.approx(float(verl_metrics[name].aggregate()))


def test_ppo_loss_returns_the_weights_where_outputs_are_requested():
    data, output = micro_batch()
    ppo_loss(actor_config(), output, data)
    assert "token_weights" not in output
    tu.assign_non_tensor(data, return_model_output=True)
    _, metrics = ppo_loss(actor_config(), output, data)
    weights = output["token_weights"]
    assert weights.offsets().equal(data["responses"].offsets())
    assert float(weights.values().min()) == pytest.approx(metrics["actor/token_weights_min"].values[0])
    assert float(weights.values().mean()) == pytest.approx(metrics["actor/token_weights_mean"].values[0])


def test_the_loss_with_verls_signature_is_steers():
    advantages, entropys, old_log_prob, log_prob, mask = batch = random_batch()
    config = actor_config()
    found, _ = get_policy_loss_fn("entropy_control")(
        old_log_prob, log_prob, advantages, mask, "token-sum", config, entropys=entropys
    )
    assert torch.equal(found, steer_loss(batch, actor_config(agg="token-sum"))[0])
    assert not torch.equal(found, steer_loss(batch, config)[0])


@pytest.mark.parametrize("mode", ["entropy_control", "opefo"])
def test_ppo_loss_reads_its_metrics_from_the_device_together(mode):
    """A read of single values waits for the device each time; `tolist` copies a whole tensor once."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
            return func(*args, **(kwargs or {}))

    data, output = micro_batch()
    output |= {name: output["entropy"] * -0.5 for name in ("sum_pi_squared", "sum_pi_squared_log_pi")}
    tu.assign_non_tensor(data, token_metrics=True)
    # The longest response is known to tensors that verl cuts from a longer tensor, as here after a first call.
    data.select("response_mask", "old_log_probs", "advantages", "entropy").to_padded_tensor()
    with Reads() as reads:
        _, metrics = ppo_loss(actor_config(mode), dict(output), data)
    assert len(metrics) > 10 and reads.count == 0


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_entropy_has_a_gradient_only_with_a_coefficient(coefficient):
    """The backward pass over the vocabulary takes longer with one, even with one of 0."""
    data, output = micro_batch()
    output["entropy"].requires_grad_()
    output["log_probs"].requires_grad_()
    config = actor_config()
    object.__setattr__(config, "entropy_coeff", coefficient)
    loss, metrics = ppo_loss(config, output, data)
    (gradient,) = torch.autograd.grad(loss, output["entropy"], allow_unused=True)
    assert (gradient is None) == (coefficient == 0) and "actor/entropy_loss" in metrics


def test_responses_are_padded_as_by_verl():
    """Also a response of no token, at the batch's beginning; values and gradients."""
    lengths, generator = [0, 4, 1], torch.Generator().manual_seed(0)
    rows = [torch.rand(1 + n, generator=generator) for n in lengths]
    output = torch.nested.as_nested_tensor(rows, layout=torch.jagged).requires_grad_()
    prompts, responses = (
        torch.nested.as_nested_tensor([torch.ones(n) for n in sizes], layout=torch.jagged)
        for sizes in ([1] * 3, lengths)
    )
    data = TensorDict({"prompts": prompts, "responses": responses}, batch_size=[3])
    expected, found = no_padding_2_padding(output, data), loss_module.padded_responses({"x": output}, data, 4)["x"]
    assert torch.equal(found, expected)
    slopes = torch.rand(3, 4, generator=generator)
    gradients = [torch.autograd.grad((padded * slopes).sum(), output)[0].values() for padded in (found, expected)]
    assert torch.equal(*gradients)
