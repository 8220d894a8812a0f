# SPDX-License-Identifier: Apache-2.0
"""Batches, configurations and calls of policy losses for the tests."""

import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from verl.steer import loss as loss_module
from verl.steer.config import PolicyLossConfig
from verl.trainer.ppo.core_algos import (
    ClipRatios,
    LossInputs,
    steer_policy_loss,
)
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig

CLIP = ClipRatios(0.2, 0.28, 10.0)


def random_batch(shape=(6, 33), seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    old_log_prob = -torch.rand(shape, generator=generator).mul(6).pow(1.5)
    log_prob = (old_log_prob + spread * torch.randn(shape, generator=generator)).clamp(max=0.0)
    advantages = torch.randn(shape, generator=generator)
    entropys = torch.rand(shape, generator=generator) * 3
    mask = torch.rand(shape, generator=generator) < 0.7
    return advantages, entropys, old_log_prob, log_prob, mask


def loss_inputs(advantages, entropys, old_log_prob, log_prob, mask=None, **fields):
    """A micro-batch; without a mask all tokens are valid."""
    mask = torch.ones_like(advantages) if mask is None else mask
    return LossInputs(old_log_prob, log_prob, advantages, mask, entropys, **fields)


def squares(like):
    """Sums over a vocabulary that some policy could have: of pi^2, and of pi^2 ln pi."""
    generator = torch.Generator().manual_seed(like.numel())
    total = torch.rand(like.shape, generator=generator)
    return {"sum_pi_squared": total, "sum_pi_squared_log_pi": -total * torch.rand(like.shape, generator=generator)}


def exact_inputs(advantages, entropys, old_log_prob, log_prob, sum_pi_squared, sum_pi_squared_log_pi):
    return loss_inputs(
        advantages, None, old_log_prob, log_prob,
        current_entropys=entropys, sum_pi_squared=sum_pi_squared, sum_pi_squared_log_pi=sum_pi_squared_log_pi,
    )  # fmt: skip


def actor_config(loss_mode="entropy_control", clip=(0.2, 0.28, 10.0), agg="token-mean", **policy_loss):
    low, high, c = clip
    return FSDPActorConfig(
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=8,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=c,
        loss_agg_mode=agg,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, **policy_loss),
    )


def steer_loss(batch, config, rollout_is_weights=None, **fields):
    """STEER's loss and all metrics of its tokens."""
    advantages, entropys, old_log_prob, log_prob, mask = batch
    inputs = LossInputs(
        old_log_prob, log_prob, advantages, mask, entropys, rollout_is_weights=rollout_is_weights, **fields
    )
    outputs = steer_policy_loss(inputs, config)
    return outputs.loss, outputs.metrics | loss_module._token_metrics(config, inputs, outputs)


def gradient(loss_of, log_prob):
    leaf = log_prob.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf)[0], leaf)[0]


class NoHostSynchronisation(TorchDispatchMode):
    """Fails on the operators that make a host wait for its device.

    Those that only copy values to the host, such as `tolist`, are no operators on a CPU: tensors on the device `meta`
    have no values and fail there.
    """

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        boolean = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        assert name not in self.forbidden and not boolean, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def micro_batch(seed=0, with_entropy=True):
    """A micro-batch as a training worker holds it: nested tensors, prompts of two tokens, ragged responses."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 1, 5]

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def values(scale=1.0):
        return nested([-scale * torch.rand(n, generator=generator) for n in lengths])

    data = {
        "prompts": nested([torch.ones(2, dtype=torch.long) for _ in lengths]),
        "responses": nested([torch.ones(n, dtype=torch.long) for n in lengths]),
        "response_mask": nested([torch.ones(n, dtype=torch.long) for n in lengths]),
        "attention_mask": nested([torch.ones(n + 2, dtype=torch.long) for n in lengths]),
        "input_ids": nested([torch.ones(n + 2, dtype=torch.long) for n in lengths]),
        "old_log_probs": values(3.0),
        "advantages": nested([torch.randn(n, generator=generator) for n in lengths]),
    }
    if with_entropy:
        data["entropy"] = nested([torch.rand(n, generator=generator) for n in lengths])
    batch = TensorDict(data, batch_size=[3])
    tu.assign_non_tensor(batch, dp_size=1, batch_num_tokens=sum(lengths), global_batch_size=3)
    output = {
        "log_probs": nested([-3 * torch.rand(n + 2, generator=generator) for n in lengths]),
        "entropy": nested([torch.rand(n + 2, generator=generator) for n in lengths]),
    }
    return batch, output
