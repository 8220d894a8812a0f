# SPDX-License-Identifier: Apache-2.0
"""Properties that every policy loss of this fork has, for the test files of single losses."""

import torch
from losses import actor_config, gradient, random_batch
from verl.steer.methods.registry import POLICY_LOSSES
from verl.trainer.ppo.core_algos import LossInputs

#: Fields of LossInputs with one value for each token that `loss_of` takes beside the batch's.
PER_TOKEN = ("current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi", "nucleus_entropys", "rollout_is_weights")


def row(*values):
    """One response, float32."""
    return torch.tensor([values], dtype=torch.float32)


def loss_of(mode, batch, fields=None, agg="token-mean", **options):
    """The outputs of a loss on one micro-batch; the current entropies are the old ones unless `fields` has them."""
    advantages, entropys, old_log_prob, log_prob, mask = batch
    fields = {"current_entropys": entropys} | (fields or {})
    inputs = LossInputs(old_log_prob, log_prob, advantages, mask, entropys, **fields)
    return POLICY_LOSSES[mode].compute(inputs, actor_config(mode, agg=agg, **options))


def token_gradients(mode, batch, fields=None, **options):
    """d(-loss * tokens) / d log_prob: on policy that is each token's advantage as the loss has it."""
    advantages, entropys, old_log_prob, log_prob, mask = batch

    def loss(x):
        return [loss_of(mode, (advantages, entropys, old_log_prob, x, mask), fields, **options).loss]

    return -gradient(loss, log_prob) * mask.sum()


def random_fields(*names, seed=1, **others):
    """Random values from 0 to 1 for some of `PER_TOKEN`, for `random_batch`, and other fields as they are."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(random_batch()[0].shape, generator=generator) for name in names} | others


def check_loss(mode, fields, **options):
    """A loss does not depend on padding or what is in it, and is computed in float32.

    Its log-probs have no gradient where no token is valid or none has an advantage.
    """
    advantages, entropys, old_log_prob, log_prob, _ = random_batch()
    mask = torch.arange(advantages.shape[1]) < torch.tensor([[33], [7], [1], [20], [12], [3]])
    batch = (advantages, entropys, old_log_prob, log_prob, mask)

    def changed(change, tensors):
        return {name: change(value) if name in PER_TOKEN else value for name, value in tensors.items()}

    def dirty(tensor):
        return torch.nn.functional.pad(tensor.masked_fill(~mask, -9.0), (0, 5), value=-2.0)

    for agg in ("token-mean", "seq-mean-token-mean"):
        clean = loss_of(mode, batch, fields, agg, **options)
        found = loss_of(
            mode,
            (*map(dirty, batch[:4]), torch.nn.functional.pad(mask, (0, 5))),
            changed(dirty, fields),
            agg,
            **options,
        )
        torch.testing.assert_close(found.loss, clean.loss)
        torch.testing.assert_close(found.metrics, clean.metrics)
    for nothing in ((*batch[:4], torch.zeros_like(mask)), (torch.zeros_like(advantages), *batch[1:])):
        slopes = token_gradients(mode, nothing, fields, **options)
        assert slopes.isfinite().all() and not slopes.any()

    def rounded(tensor):
        return tensor.bfloat16()

    found = loss_of(mode, (*map(rounded, batch[:4]), mask), changed(rounded, fields), **options).loss
    exact = loss_of(
        mode,
        (*(rounded(tensor).float() for tensor in batch[:4]), mask),
        changed(lambda tensor: rounded(tensor).float(), fields),
        **options,
    ).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
