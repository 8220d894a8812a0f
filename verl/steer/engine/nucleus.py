# SPDX-License-Identifier: Apache-2.0
"""Entropy of the nucleus of a policy: of its most probable actions alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from verl.steer.engine.vocab_reductions import CHUNK_LOGITS

#: Logits of a chunk on a GPU, where each chunk costs launches of kernels; a chunk takes about 1 GiB.
GPU_CHUNK_LOGITS = 1 << 25


def nucleus_entropy(logits: Tensor, top_p: float, temperature: float | Tensor | None = None) -> Tensor:
    """Entropy of the distribution over the nucleus, renormalised.

    The nucleus is the smallest set of most probable actions whose probabilities add up to at least `top_p`, and the
    actions as probable as the least probable of them; its choice carries no gradient. The logits are read in chunks,
    and again in the backward pass, so that the extra memory is a few chunks and the gradient.

    Args:
        logits: (..., vocabulary).
        top_p: above 0.
        temperature: a number or one per token, broadcast to the logits' shape without their last dimension; None is 1.

    Returns:
        Nats, float32, of that shape, with a gradient to the logits.
    """
    shape = logits.shape[:-1]
    flat = logits.flatten(0, -2)
    scale = torch.as_tensor(
        1.0 if temperature is None else temperature, dtype=torch.float32, device=logits.device
    ).clamp_min(1e-8)
    scale = scale.expand(shape).reshape(-1, 1)
    rows = max(1, (CHUNK_LOGITS if logits.is_cpu else GPU_CHUNK_LOGITS) // logits.shape[-1])
    chunks = zip(flat.split(rows), scale.split(rows), strict=True)
    return torch.cat(
        [
            checkpoint(_entropy_above, *chunk, _least(*chunk, top_p), use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    ).view(shape)


@torch.no_grad()
def _least(logits: Tensor, temperature: Tensor, top_p: float) -> Tensor:
    """The log-prob of the least probable action of each token's nucleus, (tokens, 1).

    Apart from the rest, so that the backward pass does not sort a second time.
    """
    ordered = (logits.float() / temperature).log_softmax(-1).sort(-1, descending=True).values
    before = ordered.exp().cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return ordered.gather(-1, last)


def _entropy_above(logits: Tensor, temperature: Tensor, least: Tensor) -> Tensor:
    """Of one chunk, (tokens, vocabulary): of the actions whose log-prob is at least `least`."""
    scaled = logits.float() / temperature
    with torch.no_grad():
        log_pi = scaled.log_softmax(-1)
        outside = (log_pi < least) | log_pi.isneginf()
    log_q = scaled.masked_fill(outside, -torch.inf).log_softmax(-1)
    # 0 * -inf is no number.
    return -(log_q.exp() * log_q.masked_fill(outside, 0.0)).sum(-1)
