# SPDX-License-Identifier: Apache-2.0
"""Log-prob, entropy and the sums of squared probabilities of each token, from one reading of its logits.

With π = softmax(x / T) over the vocabulary, m = max x, d = (x − m) / T and the sums

    s = Σ e^d    t = Σ d·e^d    q = Σ e^2d    u = Σ d·e^2d

the results are ln π_label = d_label − ln s, H = ln s − t/s, Σπ² = q/s² and Σπ² ln π = (u − ln s·q)/s². All terms of
H have one sign, and so have those of Σπ² ln π. What is left to lose digits is ln s where one token has nearly all the
mass, so s − 1 is summed without the largest logit and ln s is log1p of it: an entropy of 1e-6 keeps its digits.

Two implementations give the same numbers: Triton kernels on CUDA (`vocab_reductions_triton`) and the chunked PyTorch
code below everywhere else.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Below this exponent of two float32 has no number left, and float64's contribution to a sum with a term 1 is lost too.
# The bound keeps d·e^d at 0, not NaN, for a logit of −inf.
MIN_EXPONENT = -200.0

# Logits in one chunk of the PyTorch code: its two scratch tensors stay in the last-level cache of a small machine, and
# a chunk is work enough to hide the cost of starting an operation on several threads.
CHUNK_LOGITS = 1 << 21


class VocabReductions(NamedTuple):
    """Reductions over the vocabulary, each of the labels' shape; float32 (float64 for float64 logits).

    `log_prob` and `entropy` carry gradients to the logits; the sums of squares do not.
    """

    log_prob: Tensor
    """ln π(label), nats."""
    entropy: Tensor | None
    """−Σ π ln π, nats; None unless asked for."""
    sum_pi_squared: Tensor | None
    """Σ π²; None unless asked for."""
    sum_pi_squared_log_pi: Tensor | None
    """Σ π² ln π, nats; None unless asked for."""


def vocab_reductions(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = None,
    *,
    with_entropy: bool = True,
    with_squares: bool = False,
    inplace_backward: bool = False,
    implementation: Literal["auto", "torch", "triton"] = "auto",
) -> VocabReductions:
    """Reduce logits over the vocabulary in one pass.

    The extra memory is a few numbers per token, and on a CPU two scratch chunks of fixed size. The backward pass
    computes π anew from the logits and allocates the gradient alone, in the logits' dtype. Logits that are a view with
    at most two leading strides (a slice along the sequence is one) are read where they lie; other views are copied.

    A logit of −inf is a token of probability 0 and adds 0 to every sum; a label there has log-prob −inf. A row whose
    logits are all −inf has no distribution: log-prob −inf, the other results 0. NaN and +inf give NaN.

    Args:
        logits: (..., vocabulary), bfloat16, float16 or float32 (float64 in the PyTorch code).
        labels: (...), int64, each in [0, vocabulary).
        temperature: T, a number or one per token, broadcast to the labels' shape; values below 1e-8 count as 1e-8, as
            in verl's engine. None is 1. It gets no gradient.
        with_entropy: also return the entropy.
        with_squares: also return Σπ² and Σπ² ln π, which carry no gradient.
        inplace_backward: write the gradient over the logits. Whoever else has saved the logits for a backward pass
            that runs later, or repeats this one, gets autograd's error about a tensor modified in place.
        implementation: `auto` takes Triton for CUDA logits where Triton is installed, else PyTorch.

    Raises:
        TypeError: logits of another dtype.
        ValueError: labels of another shape than the logits without their last dimension, an empty vocabulary, or
            inplace_backward with logits that are a leaf (a parameter or input would lose its values).
    """
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(f"logits.dtype is {logits.dtype}; expected bfloat16, float16, float32 or float64")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels.shape is {tuple(labels.shape)}; expected {tuple(logits.shape[:-1])}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits.shape is {tuple(logits.shape)}; expected a vocabulary of at least one token")
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward is True and logits is a leaf; expected logits computed by an operation")
    if implementation == "auto":
        implementation = "triton" if _prefers_triton(logits) else "torch"
    outputs = _VocabReductions.apply(
        logits, labels, temperature, with_entropy, with_squares, inplace_backward, implementation
    )
    return VocabReductions(*outputs)


def _prefers_triton(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


class _VocabReductions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, with_entropy, with_squares, inplace_backward, implementation):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        inverse_temperature = _inverse_temperature(temperature, labels, dtype)
        forward = _triton().forward if implementation == "triton" else _forward
        results, shift, log_s = forward(
            _three_dimensional(logits), labels.reshape(-1), inverse_temperature, with_entropy, with_squares
        )
        log_prob, entropy, *squares = (None if result is None else result.view(labels.shape) for result in results)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(result for result in squares if result is not None))
        ctx.save_for_backward(logits, labels, inverse_temperature, shift, log_s, log_prob, entropy)
        ctx.inplace_backward = inplace_backward
        ctx.implementation = implementation
        return log_prob, entropy, *squares

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_prob, grad_entropy, *_):
        logits, labels, inverse_temperature, shift, log_s, log_prob, entropy = ctx.saved_tensors
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 7
        factors = _gradient_factors(
            None if grad_log_prob is None else grad_log_prob.reshape(-1),
            None if grad_entropy is None else grad_entropy.reshape(-1),
            inverse_temperature,
            log_s,
            log_prob.view(-1),
            None if entropy is None else entropy.view(-1),
        )
        source = _three_dimensional(logits)
        if ctx.inplace_backward:
            grad = source
            # A Triton kernel doesn't tell autograd that it has written.
            torch.autograd.graph.increment_version(logits)
        else:
            grad = torch.empty(source.shape, dtype=logits.dtype, device=logits.device)
        backward = _triton().backward if ctx.implementation == "triton" else _backward
        backward(source, grad, labels.reshape(-1), shift, inverse_temperature, *factors)
        return grad.view(logits.shape), *(None,) * 6


def _triton():
    return importlib.import_module(f"{__name__}_triton")


def _inverse_temperature(temperature: float | Tensor | None, labels: Tensor, dtype: torch.dtype) -> Tensor | None:
    """1/T per token, (tokens,), or None where T is 1."""
    if temperature is None:
        return None
    if not isinstance(temperature, Tensor):
        return torch.full((labels.numel(),), 1.0 / max(temperature, 1e-8), dtype=dtype, device=labels.device)
    positive = temperature.detach().to(device=labels.device, dtype=dtype).clamp(min=1e-8)
    return positive.reciprocal().expand(labels.shape).reshape(-1)


def _three_dimensional(logits: Tensor) -> Tensor:
    """(..., vocabulary) as (outer, inner, vocabulary) with the vocabulary adjacent in memory, a view where possible."""
    vocabulary = logits.shape[-1]
    if logits.stride(-1) != 1 or 0 in logits.stride():
        logits = logits.contiguous()
    if logits.dim() == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        return logits
    return logits.reshape(1, math.prod(logits.shape[:-1]), vocabulary)


def _gradient_factors(
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    inverse_temperature: Tensor | None,
    log_s: Tensor,
    log_prob: Tensor,
    entropy: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What the gradient needs of each token: slope, bias and the label's own value, each (tokens,).

    With the incoming gradients g and h of log-prob and entropy, dL/dx = [g·(1_label − π) − h·π·(ln π + H)] / T. Away
    from the label that is 2^z·(slope·z + bias) with z = d·log2(e); the slope is None without h. At the label 1 − π
    is −expm1(ln π), which keeps its digits where π is nearly 1.
    """
    weight = torch.exp(-log_s)
    if inverse_temperature is not None:
        weight = weight * inverse_temperature
    slope = None
    bias = torch.zeros_like(log_s)
    at_label = torch.zeros_like(log_s)
    if grad_log_prob is not None:
        bias = bias - grad_log_prob * weight
        at_label = at_label - grad_log_prob * torch.expm1(log_prob)
    if grad_entropy is not None:
        slope = -grad_entropy * weight * LN_2
        bias = bias - grad_entropy * weight * (entropy - log_s)
        # exp(−200) is 0 in float32, so the bound only keeps 0·(−inf) from becoming NaN.
        at_label = at_label - grad_entropy * torch.exp(log_prob) * (log_prob.clamp(min=MIN_EXPONENT) + entropy)
    if inverse_temperature is not None:
        at_label = at_label * inverse_temperature
    return slope, bias, at_label


def _chunks(logits: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(outer index, first inner row, end of the inner rows, first token) of each chunk of at most CHUNK_LOGITS."""
    outer, inner, vocabulary = logits.shape
    rows = _rows_per_chunk(vocabulary)
    for index in range(outer):
        for start in range(0, inner, rows):
            yield index, start, min(start + rows, inner), index * inner + start


def _rows_per_chunk(vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS // vocabulary)


def _exponents(logits: Tensor, shift: Tensor, scale: Tensor | float, out: Tensor) -> Tensor:
    """z = (x − m)·log2(e)/T of one chunk, written to `out`; e^d is then 2^z, which costs half an exp on a CPU."""
    if logits.dtype == out.dtype:
        torch.sub(logits, shift, out=out)
    else:
        out.copy_(logits).sub_(shift)
    return out.mul_(scale)


def _forward(
    logits: Tensor, labels: Tensor, inverse_temperature: Tensor | None, with_entropy: bool, with_squares: bool
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
    """The reductions of logits (outer, inner, vocabulary) in chunks of rows, then m and ln s, each (tokens,)."""
    outer, inner, vocabulary = logits.shape
    tokens = outer * inner
    dtype = torch.promote_types(logits.dtype, torch.float32)
    m, s, r, t, q, u = torch.zeros(6, tokens, dtype=dtype, device=logits.device)
    label_logit = torch.zeros_like(m)
    rows = min(_rows_per_chunk(vocabulary), inner)
    scratch_z, scratch_e = torch.empty(2, rows, vocabulary, dtype=dtype, device=logits.device)
    for index, start, end, token in _chunks(logits):
        chunk = logits[index, start:end]
        part = slice(token, token + end - start)
        z, e = scratch_z[: end - start], scratch_e[: end - start]
        label_logit[part] = chunk.gather(1, labels[part, None]).squeeze(1)
        m[part] = chunk.amax(1)
        m[part].masked_fill_(m[part] == -math.inf, 0.0)
        scale = LOG2_E if inverse_temperature is None else inverse_temperature[part, None] * LOG2_E
        torch.exp2(_exponents(chunk, m[part, None], scale, out=z), out=e)
        torch.sum(e, 1, out=s[part])
        # A NaN of this product is 0·(−inf) and counts 0; a NaN among the logits shows in s.
        if with_entropy or with_squares:
            torch.nansum(z.mul_(e), 1, out=t[part])
        if with_squares:
            torch.nansum(z.mul_(e), 1, out=u[part])
            torch.sum(torch.mul(e, e, out=z), 1, out=q[part])
        # Only the largest logits have e = 1, so the fractional parts sum to s without them.
        torch.sum(e.frac_(), 1, out=r[part])
    label_z = label_logit - m
    if inverse_temperature is not None:
        label_z = label_z * inverse_temperature
    results, log_s = _finish(label_z, s, r, t, q, u)
    log_prob, entropy, sum_pi_squared, sum_pi_squared_log_pi = results
    wanted = (
        log_prob,
        entropy if with_entropy else None,
        sum_pi_squared if with_squares else None,
        sum_pi_squared_log_pi if with_squares else None,
    )
    return wanted, m, log_s


def _finish(
    label_z: Tensor, s: Tensor, r: Tensor, t: Tensor, q: Tensor, u: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The results and ln s of each token, from its sums (`t` and `u` in units of ln 2; `r` is s without its ones)."""
    s = torch.where(s == 0, 1.0, s)
    ones = torch.round(s - r)
    log_s = torch.log1p(r + (ones - 1.0))
    log_prob = label_z - log_s
    entropy = log_s - LN_2 * t / s
    sum_pi_squared = q / (s * s)
    sum_pi_squared_log_pi = (LN_2 * u - log_s * q) / (s * s)
    return (log_prob, entropy, sum_pi_squared, sum_pi_squared_log_pi), log_s


def _backward(
    logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    shift: Tensor,
    inverse_temperature: Tensor | None,
    slope: Tensor | None,
    bias: Tensor,
    at_label: Tensor,
) -> None:
    """Write the gradient of logits (outer, inner, vocabulary) to `grad`, which may be the logits themselves."""
    outer, inner, vocabulary = logits.shape
    rows = min(_rows_per_chunk(vocabulary), inner)
    scratch = torch.empty(1 if slope is None else 2, rows, vocabulary, dtype=shift.dtype, device=logits.device)
    for index, start, end, token in _chunks(logits):
        part = slice(token, token + end - start)
        z = scratch[0, : end - start]
        scale = LOG2_E if inverse_temperature is None else inverse_temperature[part, None] * LOG2_E
        _exponents(logits[index, start:end], shift[part, None], scale, out=z)
        target = grad[index, start:end]
        if slope is None:
            factor, e = bias[part, None], z.exp2_()
        else:
            e = torch.exp2(z.clamp_(min=MIN_EXPONENT), out=scratch[1, : end - start])
            factor = z.mul_(slope[part, None]).add_(bias[part, None])
        if target.dtype == e.dtype:
            torch.mul(e, factor, out=target)
        else:
            target.copy_(e.mul_(factor))
        target.scatter_(1, labels[part, None], at_label[part, None].to(target.dtype))
