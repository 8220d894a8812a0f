# SPDX-License-Identifier: Apache-2.0
"""The entropy audit: its mathematics, and a real FSDP2 engine with a tiny Qwen2 model, audited and not."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed
from losses import CLIP, actor_config, loss_inputs
from omegaconf import OmegaConf
from scipy.stats import pearsonr, spearmanr
from small_engine import LENGTHS, MINI_BATCHES, ON_CPU, make_engine, mini_batches
from tensordict import TensorDict
from test_entropy_truth import STEP, entropy, gradient, policies
from transfer_queue import KVBatchMeta
from verl.steer import trainer as trainer_steer
from verl.steer.audit import step as step_entropy_audit
from verl.steer.audit.scores import (
    AuditOptions,
    AuditRequest,
    covariance_estimate,
    sampled_lengths,
    score_estimates,
    signed_estimates,
    write_tokens,
)
from verl.steer.audit.update import ENGINE_STATE
from verl.steer.loss import ppo_loss
from verl.steer.options import from_config
from verl.steer.report.run_metrics import Run
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import (
    ENTROPY_CHANGE_ESTIMATORS,
    compute_token_weights,
    ppo_clipped,
    signed_entropy_change,
)
from verl.utils import tensordict_utils as tu

#: All estimators that an audit scores: those of STEER and the covariance.
AUDITED_ESTIMATORS = (*ENTROPY_CHANGE_ESTIMATORS, "covariance")

COLUMNS = (
    "step mini_batch token_id text response position prob entropy advantage ratio clipped omega_released "
    "omega_clip_aware omega_squared omega_exact omega_covariance weight true_change"
).split()


def options(section):
    return from_config(AuditOptions, section, "trainer.entropy_audit")


def test_options():
    assert options(None) == options({"freq": None, "tokens": None}) == AuditOptions() == AuditOptions(0, 4096)
    assert not any(AuditOptions().due(step) for step in range(10))
    every_third = options({"freq": 3, "tokens": 100})
    assert [step for step in range(1, 10) if every_third.due(step)] == [3, 6, 9] and every_third.tokens == 100


@pytest.mark.parametrize("value", [-1, 1.5, "often", True])
def test_a_bad_option_gives_one_line(value):
    with pytest.raises(ValueError, match=r"^trainer.entropy_audit.freq=.*: expected an integer of at least 0$"):
        options({"freq": value})


def test_an_unknown_option_is_named():
    with pytest.raises(
        ValueError,
        match=r"^trainer.entropy_audit.frequency: unknown; expected one of freq, tokens, influence, one_token$",
    ):
        options({"frequency": 1})


def test_the_covariance_by_hand():
    """Means -2 and 1, so the products of the deviations are 1 * 2, -1 * 0 and 0 * -2, with the sign turned."""
    log_prob, advantages = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([3.0, 1.0, -1.0])
    estimate = covariance_estimate(log_prob, advantages, log_prob.mean(), advantages.mean())
    assert estimate.tolist() == [-2.0, 0.0, 0.0]
    covariance = np.cov(log_prob.numpy(), advantages.numpy(), bias=True)[0, 1]
    assert estimate.mean().item() == pytest.approx(-covariance)


def test_the_scores_by_hand():
    """Estimate (1, 2, -1) against (2, 2, -4): the factor is 10 / 6, the rest 1/9, 16/9, 49/9 of a nat squared."""
    scores = score_estimates({"x": torch.tensor([1.0, 2.0, -1.0])}, torch.tensor([2.0, 2.0, -4.0]))
    assert scores["tokens"] == 3 and scores["entropy_change"] == 0.0
    assert scores["x/mse"] == pytest.approx((1 / 9 + 16 / 9 + 49 / 9) / 3)
    # Magnitudes (1, 2, 1) against (2, 2, 4): the factor is 10 / 6 again.
    assert scores["x/mse_magnitude"] == pytest.approx((1 / 9 + 16 / 9 + 49 / 9) / 3)
    assert scores["x/pearson_magnitude"] == pytest.approx(-0.5)


def test_the_correlations_are_scipys():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(500, generator=generator).round(decimals=1)
    told = (truth + torch.randn(500, generator=generator)).round(decimals=1)
    scores = score_estimates({"x": told}, truth)
    told, truth = told.double().numpy(), truth.double().numpy()
    for suffix, size in (("", np.asarray), ("_magnitude", np.abs)):
        assert scores[f"x/pearson{suffix}"] == pytest.approx(pearsonr(size(told), size(truth)).statistic)
        assert scores[f"x/spearman{suffix}"] == pytest.approx(spearmanr(size(told), size(truth)).statistic)


def test_no_score_depends_on_the_size_of_the_step():
    truth, told = torch.randn(2, 100, generator=torch.Generator().manual_seed(1)).double()
    once, often = score_estimates({"x": told}, truth), score_estimates({"x": 1e6 * told}, truth)
    assert once == pytest.approx(often)


@pytest.mark.parametrize("told", [[], [0.0, 0.0], [3.0, 3.0]], ids=["empty", "zero", "constant"])
def test_correlations_of_an_estimate_that_tells_nothing_are_left_out(told):
    scores = score_estimates({"x": torch.tensor(told)}, torch.arange(len(told)).float())
    assert all(math.isfinite(score) for score in scores.values())
    assert "x/pearson" not in scores and "x/spearman" not in scores and ("x/mse" in scores) == bool(told)


def tabular(spread=1.5, off_policy=0.3):
    """Estimates of one step of a tabular softmax policy, (states,), and the exact change per unit step."""
    old_logits, logits, actions, advantages = policies(spread, off_policy)
    step, old_log_prob, log_prob = gradient(old_logits, logits, actions, advantages)
    pi, log_pi = logits.softmax(-1), logits.log_softmax(-1)
    inputs = loss_inputs(
        advantages, entropy(old_logits), old_log_prob, log_prob, current_entropys=entropy(logits),
        sum_pi_squared=pi.square().sum(-1), sum_pi_squared_log_pi=(pi.square() * log_pi).sum(-1),
    )  # fmt: skip
    estimates = signed_estimates(inputs, CLIP)
    estimates["covariance"] = covariance_estimate(log_prob, advantages, log_prob.mean(), advantages.mean())
    return estimates, entropy(logits + STEP * step) - entropy(logits)


def test_scores_on_a_tabular_policy_where_truth_is_exact():
    estimates, truth = tabular()
    scores = score_estimates(estimates, truth)
    print({name: round(score, 3) for name, score in scores.items() if "mse" not in name})
    assert tuple(estimates) == AUDITED_ESTIMATORS
    assert scores["exact/pearson"] > 0.999 and scores["exact/spearman"] > 0.99
    others = [name for name in AUDITED_ESTIMATORS if name != "exact"]
    assert scores["exact/mse"] < 1e-3 * min(scores[f"{name}/mse"] for name in others)
    # All have the right sign: they rise with the truth.
    assert all(scores[f"{name}/spearman"] > 0.3 for name in others)
    assert scores["clip_aware/spearman"] > scores["released/spearman"] > scores["covariance/spearman"]


def test_sampled_lengths_by_hand():
    assert sampled_lengths([3, 4, 2], 9, 100) == [3, 4, 2]
    # The second doesn't fit; the third would, but a sample that skips long responses is one of short ones.
    assert sampled_lengths([3, 4, 2], 6, 100) == [3, 0, 0]
    assert sampled_lengths([9, 1], 5, 5) == [5, 0] and sampled_lengths([9], 4, 5) == [0]
    assert sampled_lengths([1, 1], 0, 0) == [0, 0]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    request, tokens = AuditRequest(7, str(tmp_path / "audit"), 10, 1), pd.DataFrame({"a": [1]})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tokens, request, 3)
    assert not list((tmp_path / "audit").glob("*.parquet"))
    monkeypatch.undo()
    write_tokens(tokens, request, 3)
    assert pd.read_parquet(tmp_path / "audit/step_7_rank_3.parquet").equals(tokens)


# A real engine


pytestmark = pytest.mark.usefixtures("one_rank")


def train(model_folder, request=None, half=None, dropout=0.0, **options):
    """Two updates of a fresh engine; of each mini-batch all is trained on, or this half.

    Returns:
        The engine, its parameters, gradients and optimiser state, metrics of both updates, random state afterwards.
    """
    engine = make_engine(model_folder)
    for layer in engine.module.model.layers:
        layer.self_attn.attention_dropout = dropout
    torch.manual_seed(3)
    loss = partial(ppo_loss, config=actor_config(**options))
    flags = {} if request is None else {"entropy_audit": request}
    metrics = []
    with engine.train_mode(zero_grad_on_exit=False):
        for batch in mini_batches(**flags):
            batch = batch if half is None else tu.chunk_tensordict(batch, 2)[half]
            metrics.append(engine.train_batch(batch, loss)["metrics"])
            assert engine.mode == "train" and all(module.training for module in engine.module.modules())
        engine.lr_scheduler_step()
    state = {
        f"{name} {kind}": value.full_tensor().clone()
        for name, parameter in engine.module.named_parameters()
        for kind, value in (
            ("parameter", parameter.detach()),
            ("gradient", parameter.grad),
            ("first moment", engine.optimizer.state[parameter]["exp_avg"]),
        )
    }
    return engine, state, metrics, torch.get_rng_state()


@pytest.mark.parametrize(
    "options, dropout, measured",
    [
        ({}, 0.0, {}),
        ({"token_weight_normalizer": "ema"}, 0.5, {}),
        ({"loss_mode": "vanilla"}, 0.5, {}),
        ({"token_weight_normalizer": "ema"}, 0.5, {"influence": True, "one_token": 2}),
        ({"token_weight_map": "target", "target_controller": "pi"}, 0.5, {"influence": True}),
    ],
)
def test_training_is_the_same_bit_for_bit_with_and_without_the_audit(
    model_folder, tmp_path, options, dropout, measured
):
    request = AuditRequest(1, str(tmp_path), 1000, MINI_BATCHES, **measured)
    before, plain, plain_metrics, plain_random = train(model_folder, dropout=dropout, **options)
    after, audited, metrics, random = train(model_folder, request, dropout=dropout, **options)
    assert all(getattr(before, name) == getattr(after, name) for name in ENGINE_STATE)
    assert plain.keys() == audited.keys() and len(plain) > 20
    different = [name for name in plain if not torch.equal(plain[name], audited[name])]
    assert not different
    assert torch.equal(plain_random, random)
    for before, after in zip(plain_metrics, metrics, strict=True):
        added = after.keys() - before.keys()
        assert added and all(name.startswith("entropy_audit/") for name in added)
        assert before.keys() <= after.keys()


@pytest.fixture(scope="module")
def audit(model_folder, tmp_path_factory):
    """An audited step of STEER over fixed micro-batches: its file, its metrics, and the engine's view of the policy."""
    folder = tmp_path_factory.mktemp("audit")
    _, _, metrics, _ = train(model_folder, AuditRequest(4, str(folder), 1000, MINI_BATCHES))
    return pd.read_parquet(folder / "step_4_rank_0.parquet"), metrics


def test_the_file_has_its_columns_and_every_valid_token(audit):
    tokens, _ = audit
    assert sorted(tokens.columns) == sorted(COLUMNS)
    batches = mini_batches()
    valid = torch.cat([batch["response_mask"].values() for batch in batches]).bool()
    expected = torch.cat([batch["responses"].values() for batch in batches])[valid]
    assert tokens["token_id"].tolist() == expected.tolist()
    lengths = [length - index % 2 for index, length in enumerate(LENGTHS)] * MINI_BATCHES
    assert tokens.groupby("response").size().tolist() == lengths
    assert tokens["position"].tolist() == [place for length in lengths for place in range(length)]
    assert set(tokens["step"]) == {4} and tokens.groupby("mini_batch").size().tolist() == [sum(lengths) // 2] * 2
    assert tokens["text"].map(type).eq(str).all() and tokens["clipped"].dtype == bool and tokens["clipped"].any()


def test_a_mini_batch_whose_responses_do_not_fit_has_no_rows(model_folder, tmp_path):
    """Of two tokens the first mini-batch has one, and a response of five does not fit into it."""
    train(model_folder, AuditRequest(4, str(tmp_path), 2, MINI_BATCHES))
    tokens = pd.read_parquet(tmp_path / "step_4_rank_0.parquet")
    assert tokens["mini_batch"].tolist() == [1, 1] and tokens["token_id"].dtype == int


@pytest.mark.parametrize(
    "options",
    [
        {"token_weight_map": "target", "target_controller": "pi"},
        {"token_weight_map": "target", "entropy_change_estimator": "influence"},
        {"token_weight_map": "target", "entropy_change_estimator": "influence", "influence_way": "head"},
    ],
    ids=["pi", "parameters", "head"],
)
def test_both_ways_of_the_influence_are_measured_whatever_controls(model_folder, tmp_path, options):
    train(model_folder, AuditRequest(4, str(tmp_path), 1000, MINI_BATCHES, influence=True), **options)
    tokens = pd.read_parquet(tmp_path / "step_4_rank_0.parquet")
    assert (tokens[["influence", "influence_head"]].abs().max() > 0).all()


@pytest.mark.parametrize("options", [{"loss_mode": "cispo"}, {"base_loss": "gspo"}], ids=str)
def test_of_a_loss_that_does_not_clip_as_ppo_nothing_tells_of_ppos_clip(model_folder, tmp_path, options):
    _, _, metrics, _ = train(model_folder, AuditRequest(4, str(tmp_path), 1000, MINI_BATCHES), **options)
    of_ppo = {"clipped", "omega_clip_aware", "omega_exact"}
    file = tmp_path / "audit/step_4_rank_0.parquet"
    write_tokens(pd.read_parquet(tmp_path / "step_4_rank_0.parquet"), AuditRequest(4, str(file.parent), 1000, 1), 0)
    assert set(COLUMNS) - set(Run("run", tmp_path, {4: {"entropy_audit/tokens": 1}}).audit.columns) == of_ppo
    scored = {name.split("/")[1] for name in metrics[0] if name.endswith("/mse")}
    assert scored == set(AUDITED_ESTIMATORS) - {"clip_aware", "exact"}


def entropies_of(engine, batch):
    """Entropies and log-probs of the response tokens by Hugging Face's forward pass, packed."""
    entropies, log_probs = [], []
    for ids, prompt in zip(batch["input_ids"].unbind(), batch["prompts"].unbind(), strict=True):
        logits = engine.module(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        log_probs.append(logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(entropies), torch.cat(log_probs)


def test_the_true_change_is_the_models_own(model_folder, audit):
    """The model run by itself before and after each update, token by token."""
    tokens, _ = audit
    engine, loss = make_engine(model_folder), partial(ppo_loss, config=actor_config())
    found = []
    for batch in mini_batches():
        valid = batch["response_mask"].values().bool()
        with engine.eval_mode(), torch.no_grad():
            before, log_prob = entropies_of(engine, batch)
            engine.module.reshard()
        with engine.train_mode():
            engine.train_batch(batch, loss)
        with engine.eval_mode(), torch.no_grad():
            after, _ = entropies_of(engine, batch)
            engine.module.reshard()
        found.append(torch.stack([before, log_prob.exp(), after - before])[:, valid])
    entropy_before, prob, change = torch.cat(found, 1)
    truth = tokens[["entropy", "prob", "true_change"]].to_numpy().T
    assert np.allclose(truth[0], entropy_before, atol=2e-5) and np.allclose(truth[1], prob, rtol=1e-4)
    assert np.allclose(truth[2], change, atol=2e-5) and change.abs().max() > 0.01


def columns(tokens, *names):
    return [torch.tensor(tokens[name].to_numpy()) for name in names]


def test_the_estimates_and_the_weights_are_core_algos(audit):
    tokens, _ = audit
    batches = mini_batches()
    valid = torch.cat([batch["response_mask"].values() for batch in batches]).bool()
    old_log_prob, old_entropy, advantages = (
        torch.cat([batch[name].values() for batch in batches])[valid]
        for name in ("old_log_probs", "entropy", "advantages")
    )
    log_prob = torch.tensor(tokens["prob"].to_numpy()).log()
    scored = (advantages, old_entropy, old_log_prob, log_prob)
    inputs = loss_inputs(*scored)
    for name in ("released", "clip_aware", "squared"):
        told = torch.tensor(tokens[f"omega_{name}"].to_numpy())
        torch.testing.assert_close(told, signed_entropy_change(inputs, name, CLIP), rtol=1e-4, atol=1e-7)
    assert np.array_equal(tokens["clipped"], torch.logical_or(*ppo_clipped(inputs, CLIP)))
    torch.testing.assert_close(torch.tensor(tokens["ratio"].to_numpy()), (log_prob - old_log_prob).exp())
    for mini_batch, rows in tokens.groupby("mini_batch"):
        told, log, advantage = columns(rows, "omega_covariance", "prob", "advantage")
        expected = -(log.log() - log.log().mean()) * (advantage - advantage.mean())
        torch.testing.assert_close(told, expected, rtol=1e-3, atol=1e-5)
        # Micro-batches of two responses, each measured by its own range.
        for half in range(2):
            first = mini_batch * 4 + 2 * half
            part = (tokens["response"].between(first, first + 1)).to_numpy()
            weights = compute_token_weights(*(values[part][None] for values in scored), torch.ones(1, part.sum()))
            torch.testing.assert_close(torch.tensor(tokens["weight"].to_numpy())[part], weights[0])


def test_the_metrics_are_the_scores_of_each_updates_tokens(audit):
    tokens, metrics = audit
    for mini_batch, rows in tokens.groupby("mini_batch"):
        estimates = dict(zip(AUDITED_ESTIMATORS, columns(rows, *(f"omega_{n}" for n in AUDITED_ESTIMATORS))))  # noqa: B905
        expected = score_estimates(estimates, *columns(rows, "true_change"))
        logged = {
            name.removeprefix("entropy_audit/"): metric.aggregate()
            for name, metric in metrics[mini_batch].items()
            if name.startswith("entropy_audit/")
        }
        assert logged == pytest.approx(expected, rel=1e-6)
        assert logged["tokens"] == len(rows) and logged["entropy_change"] != 0


@pytest.mark.parametrize(
    "options, dynamic",
    [
        ({}, True),
        ({"token_weight_normalizer": "ema"}, False),
        ({"token_weight_map": "threshold"}, True),
        ({"entropy_change_estimator": "exact"}, False),
    ],
)
def test_the_weights_are_those_that_the_loss_gave(model_folder, tmp_path, monkeypatch, options, dynamic):
    """However the mini-batch is split: each token has the weight that its loss was multiplied by."""
    given, inner = [], core_algos.reweighted_policy_loss

    def spy(base_loss, token_weights, inputs, *args, **kwargs):
        valid = token_weights > 0
        given.extend(zip(inputs.old_log_prob[valid].tolist(), token_weights[valid].tolist(), strict=True))
        return inner(base_loss, token_weights, inputs, *args, **kwargs)

    monkeypatch.setattr(core_algos, "reweighted_policy_loss", spy)
    batches = mini_batches(dynamic, entropy_audit=AuditRequest(1, str(tmp_path), 1000, MINI_BATCHES))
    engine, flags = make_engine(model_folder), {"calculate_entropy": True, "calculate_sum_pi_squared": True}
    with engine.train_mode():
        for batch in batches:
            tu.assign_non_tensor(batch, **flags)
            engine.train_batch(batch, partial(ppo_loss, config=actor_config(**options)))
    tokens = pd.read_parquet(tmp_path / "step_1_rank_0.parquet")
    # A token's old log-prob is its own.
    saved = zip(np.log(tokens["prob"] / tokens["ratio"]), tokens["weight"], strict=True)
    assert np.allclose(sorted(saved), sorted(given), atol=1e-5) and tokens["weight"].nunique() > 1


def one_of_two_ranks(rank, model_folder, folder):
    """One rank's half of each mini-batch: its parameters and gradients with and without the audit, and the scores."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    _, plain, _, _ = train(model_folder, half=rank)
    _, audited, metrics, _ = train(model_folder, AuditRequest(1, str(folder), 1000, MINI_BATCHES), half=rank)
    assert not [name for name in plain if not torch.equal(plain[name], audited[name])]
    scores = [
        {n: float(m.aggregate()) for n, m in update.items() if n.startswith("entropy_audit/")} for update in metrics
    ]
    torch.save(scores, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@ON_CPU
def test_two_ranks_tell_what_one_does(model_folder, audit, tmp_path):
    """Tokens of both are scored together, and each rank saves its own."""
    torch.multiprocessing.spawn(one_of_two_ranks, (str(model_folder), str(tmp_path)), nprocs=2)
    tokens, metrics = audit
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for update, other, alone in zip(first, second, metrics, strict=True):
        assert update == other
        assert update == pytest.approx({name: alone[name].aggregate() for name in update}, rel=1e-2, abs=1e-4)
    saved = [pd.read_parquet(tmp_path / f"step_1_rank_{rank}.parquet") for rank in range(2)]
    assert not set(saved[0]["response"]) & set(saved[1]["response"])
    saved = pd.concat(saved).sort_values(["mini_batch", "response", "position"], ignore_index=True)
    for name in COLUMNS[1:]:
        if saved[name].dtype.kind == "f":
            assert np.allclose(saved[name], tokens[name], rtol=1e-3, atol=1e-4), name
        else:
            assert saved[name].tolist() == tokens[name].tolist(), name


def test_the_sample_has_whole_responses_and_keeps_to_its_budget(model_folder, tmp_path):
    budget = 20
    train(model_folder, AuditRequest(1, str(tmp_path), budget, MINI_BATCHES), loss_mode="vanilla")
    tokens = pd.read_parquet(tmp_path / "step_1_rank_0.parquet")
    # Of 5, 8, 1 and 11 valid tokens: 5 of the first ten, then 5, 8 and 1 of the fifteen left.
    assert tokens.groupby("response").size().to_dict() == {0: 5, 4: 5, 5: 8, 6: 1}
    assert (tokens["weight"] == 1).all()


def test_a_new_step_begins_a_new_file(model_folder, tmp_path):
    engine = make_engine(model_folder)
    with engine.train_mode():
        for step in (1, 2):
            for batch in mini_batches(entropy_audit=AuditRequest(step, str(tmp_path), 1000, MINI_BATCHES)):
                engine.train_batch(batch, partial(ppo_loss, config=actor_config()))
    for step in (1, 2):
        tokens = pd.read_parquet(tmp_path / f"step_{step}_rank_0.parquet")
        assert set(tokens["step"]) == {step} and set(tokens["mini_batch"]) == {0, 1}


# The trainer


class Queue:
    """The TransferQueue's fields of one batch, and the workers that write into it."""

    def __init__(self, after):
        generator = torch.Generator().manual_seed(4)
        old_logits, logits, actions, advantages = policies(1.5, 0.0)
        self.tokens = 200
        log_prob = logits.log_softmax(-1)
        pi = log_prob.exp()
        full = {
            "entropy": entropy(logits),
            "sum_pi_squared": pi.square().sum(-1),
            "sum_pi_squared_log_pi": (pi.square() * log_prob).sum(-1),
            "new": entropy(after(old_logits, logits, actions, advantages)),
        }
        lengths = torch.randint(1, 9, (50,), generator=generator).tolist()
        self.fields, self.prompt = {}, 2
        response = {
            "advantages": advantages,
            "old_log_probs": log_prob.gather(-1, actions)[:, 0],
            "entropy": full.pop("entropy"),
            "response_mask": torch.rand(len(advantages), generator=generator) < 0.9,
        }
        self.valid = response["response_mask"][: sum(lengths)]
        for name, values in response.items():
            parts = values[: sum(lengths)].split(lengths)
            self.fields[name] = torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)
        # As a model's outputs: of prompt and response, a token's at the place before it.
        pad = torch.full((self.prompt - 1,), torch.nan), torch.full((1,), torch.nan)
        for name, values in full.items():
            parts = [torch.cat((pad[0], part, pad[1])) for part in values[: sum(lengths)].split(lengths)]
            self.fields[name] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        self.calls = []

    def kv_batch_get(self, keys, partition_id, select_fields):
        return TensorDict({name: self.fields[name] for name in select_fields}, batch_size=50)

    def kv_batch_put(self, keys, partition_id, fields):
        self.fields |= dict(fields.items())

    def compute_log_prob(self, batch):
        self.calls.append(dict(batch.extra_info))
        self.fields["entropy"] = self.fields["new"]


def one_small_step(old_logits, logits, actions, advantages):
    return logits + STEP * gradient(logits, logits, actions, advantages)[0]


def test_the_audit_of_a_step_holds_the_old_policy_against_the_new_one(monkeypatch):
    queue = Queue(one_small_step)
    monkeypatch.setattr(step_entropy_audit, "tq", queue)
    old_entropy = queue.fields["entropy"]
    batch = KVBatchMeta(partition_id="train", keys=["a"], tags=[{}], extra_info={"mini_batch_size": 3})
    scores = step_entropy_audit.audit_step(batch, queue, 0.7)
    assert queue.calls == [{"calculate_entropy": True, "compute_loss": False, "temperature": 0.7}]
    # What others read of the batch is as it was.
    assert queue.fields["entropy"] is old_entropy and batch.extra_info == {"mini_batch_size": 3}
    assert all(name.startswith("entropy_audit/step/") for name in scores)
    assert scores["entropy_audit/step/tokens"] == queue.valid.sum()
    assert scores["entropy_audit/step/exact/pearson"] > 0.999
    # Nothing is clipped at the old policy.
    released, clip_aware = (scores[f"entropy_audit/step/{name}/spearman"] for name in ("released", "clip_aware"))
    assert 0.3 < released == clip_aware < 0.9


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """The steer trainer without Ray, auditing every second step."""
    built = trainer_steer.SteerTrainer.__new__(trainer_steer.SteerTrainer)
    built.batched = False
    built.config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "actor": {
                    "calculate_sum_pi_squared": False,
                    "policy_loss": {"loss_mode": "vanilla"},
                    "ppo_mini_batch_size": 2,
                    "ppo_epochs": 3,
                },
                "rollout": {"n": 4, "temperature": 0.7, "log_prob_micro_batch_size_per_gpu": None},
                "ref": {"log_prob_micro_batch_size_per_gpu": None},
            },
            "trainer": {"skip_old_log_prob": False},
        }
    )
    built.step_state, built.last_entropy, built.target_entropy = None, None, None
    built.ref_in_actor = False
    built.entropy_audit, built.folder, built.actor_rollout_wg = AuditOptions(2, 77, True, 5), tmp_path, "workers"
    built.sent, entropies = [], iter([0.5, 0.3, 0.4])

    def old_log_prob(self, batch, metrics):
        built.sent.append(dict(batch.extra_info))
        metrics["actor/entropy"] = next(entropies)
        return batch

    def update(self, batch, metrics):
        built.sent.append(dict(batch.extra_info))
        metrics |= {"actor/entropy_audit/tokens": 3.0, "actor/pg_loss": 1.0, "actor/entropy_loss": 0.9}
        return batch

    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_compute_old_log_prob", old_log_prob)
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_update_actor", update)
    monkeypatch.setattr(trainer_steer, "audit_step", lambda *arguments: {"entropy_audit/step/x": arguments[1:]})
    return built


def test_the_trainer_asks_for_an_audit_at_audited_steps_only(trainer, tmp_path):
    def step(number):
        trainer.global_steps, metrics = number, {}
        for method in (trainer._compute_old_log_prob, trainer._update_actor):
            batch = KVBatchMeta(partition_id="train", keys=list("abcdefghijklmnop"), tags=[{}] * 16)
            method(batch, metrics)
        return metrics

    plain, audited = step(1), step(2)
    flags = {"calculate_sum_pi_squared": False, "token_metrics": True}
    request = AuditRequest(2, str(tmp_path / "audit"), 77, mini_batches=6, influence=True, one_token=5)
    assert trainer.sent == [{}, flags, {"calculate_sum_pi_squared": True}, flags | {"entropy_audit": request}]
    assert "entropy_audit/step/x" not in plain
    assert audited["entropy_audit/step/x"] == ("workers", 0.7)
    assert audited["entropy_audit/tokens"] == 3.0 and "actor/entropy_audit/tokens" not in audited
    assert audited["actor/pg_loss"] == 1.0


def test_workers_fetch_what_they_read_of_what_the_batched_manager_wrote(trainer, monkeypatch):
    read_by_all = ["input_ids", "loss_mask", "position_ids", "response_mask"]
    read_by_updates = ["advantages", "entropy", "old_log_probs", "prompts", "responses"]
    tensors = [*read_by_all, *read_by_updates, "dummy_tensor", "log_probs", "returns", "rm_scores", "rollout_log_probs"]
    schema = {name: {"is_non_tensor": False} for name in tensors} | {"raw_prompt": {"is_non_tensor": True}}
    monkeypatch.setattr(trainer_steer, "kv_batch_meta2batch_meta", lambda batch: SimpleNamespace(field_schema=schema))
    monkeypatch.setattr(trainer_steer.PPOTrainerSync, "_compute_ref_log_prob", lambda self, batch, metrics: batch)
    trainer.global_steps = 1
    for method, fields in (
        (trainer._compute_old_log_prob, read_by_all),
        (trainer._compute_ref_log_prob, read_by_all),
        (trainer._update_actor, read_by_all + read_by_updates),
    ):
        for trainer.batched, expected in ((False, None), (True, fields)):
            batch = KVBatchMeta(partition_id="train", keys=["a", "b"], tags=[{}] * 2)
            assert method(batch, {}).fields == expected


def test_old_log_probs_are_skipped_only_where_a_step_has_one_update(trainer):
    """16 rows are two mini-batches of 2 * 4."""
    trainer.config.trainer.skip_old_log_prob = True
    for trainer.global_steps, rows, expected in ((1, 8, 0.9), (3, 16, 0.5), (5, 8, 0.9)):
        batch, metrics = KVBatchMeta(partition_id="train", keys=list("abcdefghijklmnop")[:rows], tags=[{}] * rows), {}
        trainer._compute_old_log_prob(batch, metrics)
        assert ("actor/entropy" in metrics) == (rows == 16)
        trainer._update_actor(batch, metrics)
        assert metrics["actor/entropy"] == expected and trainer.sent[-1].get("skip_old_log_prob", False) == (rows == 8)
    assert metrics["actor/entropy_change_per_step"] == pytest.approx(0.4) and len(trainer.sent) == 4


def test_the_entropys_change_from_step_to_step(trainer):
    changes = []
    for trainer.global_steps in (1, 2, 3):
        metrics = {}
        trainer._compute_old_log_prob(SimpleNamespace(extra_info={}), metrics)
        changes.append(metrics.get("actor/entropy_change_per_step"))
    assert changes == [None, pytest.approx(-0.2), pytest.approx(0.1)]


def test_a_request_travels_with_verls_mini_batches(tmp_path):
    request = AuditRequest(1, str(tmp_path), 10, 2)
    batch = mini_batches(entropy_audit=request)[0]
    for part in tu.make_iterator(batch, mini_batch_size=2, epochs=1):
        assert tu.get_non_tensor_data(part, "entropy_audit", None) == request
