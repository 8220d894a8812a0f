# SPDX-License-Identifier: Apache-2.0
"""Log-prob, entropy and the sums of squared probabilities of each token, from one reading of its logits.

With π = softmax(x / T) over the vocabulary, m = max x, d = (x − m) / T and the sums

    s = Σ e^d    t = Σ d·e^d    q = Σ e^2d    u = Σ d·e^2d

the results are ln π_label = d_label − ln s, H = ln s − t/s, Σπ² = q/s² and Σπ² ln π = (u − ln s·q)/s². All terms of
H have one sign, and so have those of Σπ² ln π: only ln s can lose digits, where one token has nearly all the mass. So
s − 1 is summed without the largest logit, and ln s is log1p of that sum: an entropy of 1e-6 keeps its digits.

CUDA tensors are reduced by Triton kernels (`vocab_reductions_triton`), others by the chunked PyTorch code below.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Lower bound of exponents of 2: 2^−200 is 0 in float32, and adds nothing to a float64 sum with a term 1. With the bound
# d·e^d is 0, not NaN, for a logit of −inf.
MIN_EXPONENT = -200.0

# Logits in one chunk of the PyTorch code: its two scratch tensors fit in the last-level cache of a small machine, and
# a chunk is large enough for several threads.
CHUNK_LOGITS = 1 << 21


class VocabReductions(NamedTuple):
    """Reductions over the vocabulary, each of the labels' shape; float32 (float64 for float64 logits).

    `log_prob` and `entropy` carry gradients to the logits; the sums of squares do not.
    """

    log_prob: Tensor
    """ln π(label), nats."""
    entropy: Tensor | None
    """−Σ π ln π, nats; None without `with_entropy`."""
    sum_pi_squared: Tensor | None
    """Σ π²; None without `with_squares`."""
    sum_pi_squared_log_pi: Tensor | None
    """Σ π² ln π, nats; None without `with_squares`."""


def vocab_reductions(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = None,
    *,
    with_entropy: bool = True,
    with_squares: bool = False,
    inplace_backward: bool = False,
) -> VocabReductions:
    """Reduce logits over the vocabulary in one pass.

    The extra memory is a few numbers per token, and on a CPU two scratch chunks of fixed size. The backward pass
    computes π again from the logits and allocates only the gradient, in the logits' dtype. Logits that are a view with
    at most two leading strides (such as a slice along the sequence) are read without a copy; other views are copied.

    A logit of −inf is a token of probability 0 and adds 0 to every sum; a label there has log-prob −inf. A row whose
    logits are all −inf has no distribution: log-prob −inf, the other results 0. NaN and +inf give NaN.

    Args:
        logits: (..., vocabulary), bfloat16, float16 or float32 (float64 in the PyTorch code).
        labels: (...), int64, each in [0, vocabulary).
        temperature: T, a number or one per token, broadcast to the labels' shape; values below 1e-8 count as 1e-8, as
            in verl's engine. None is 1. It gets no gradient.
        with_entropy: also return the entropy.
        with_squares: also return Σπ² and Σπ² ln π, which carry no gradient.
        inplace_backward: write the gradient over the logits. A later backward pass that needs the logits, or a second
            one through this function, raises autograd's error about a tensor modified in place.

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
    return VocabReductions(
        *_VocabReductions.apply(logits, labels, temperature, with_entropy, with_squares, inplace_backward)
    )


def _uses_triton(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


def _kernels() -> ModuleType:
    return importlib.import_module(f"{__name__}_triton")


class _VocabReductions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperature, with_entropy, with_squares, inplace_backward):
        inverse_temperature = _inverse_temperature(temperature, labels, logits.dtype)
        label_logit = logits.gather(-1, labels.unsqueeze(-1)).view(-1)
        forward = _kernels().forward if _uses_triton(logits) else _forward
        shift, log_s, log_prob, entropy, *squares = forward(
            _three_dimensional(logits), label_logit, inverse_temperature, with_entropy, with_squares
        )
        ctx.save_for_backward(logits, labels, inverse_temperature, shift, log_s, log_prob, entropy)
        ctx.inplace_backward = inplace_backward
        ctx.set_materialize_grads(False)
        wanted = (True, with_entropy, with_squares, with_squares)
        results = (log_prob, entropy, *squares)
        outputs = [values.view(labels.shape) if want else None for values, want in zip(results, wanted, strict=True)]
        ctx.mark_non_differentiable(*(values for values in outputs[2:] if values is not None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_prob, grad_entropy, *_):
        """dL/dx = [g·(1_label − π) − h·π·(ln π + H)] / T for the incoming gradients g and h of log-prob and entropy.

        Away from the label that is 2^z·(slope·z + bias) with z = d·log2(e); the slope is None without h. At the label
        1 − π is −expm1(ln π), which keeps its digits where π is nearly 1.
        """
        logits, labels, inverse_temperature, shift, log_s, log_prob, entropy = ctx.saved_tensors
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 6
        weight = torch.exp(-log_s) * inverse_temperature
        slope, bias, at_label = None, torch.zeros_like(log_s), torch.zeros_like(log_s)
        if grad_log_prob is not None:
            g = grad_log_prob.reshape(-1)
            bias = bias - g * weight
            at_label = at_label - g * torch.expm1(log_prob)
        if grad_entropy is not None:
            h = grad_entropy.reshape(-1)
            slope = -h * weight * LN_2
            bias = bias - h * weight * (entropy - log_s)
            # The bound keeps 0·(−inf) from becoming NaN.
            at_label = at_label - h * torch.exp(log_prob) * (log_prob.clamp(min=MIN_EXPONENT) + entropy)
        source = _three_dimensional(logits)
        grad = source if ctx.inplace_backward else torch.empty(source.shape, dtype=logits.dtype, device=logits.device)
        backward = _kernels().backward if _uses_triton(logits) else _backward
        backward(source, grad, shift, inverse_temperature, slope, bias)
        outer, inner = (torch.arange(size, device=grad.device) for size in grad.shape[:2])
        at_label = (at_label * inverse_temperature).to(grad.dtype)
        # Not `scatter_`, which copies bfloat16 tensors. The assignment also counts as a modification of the logits in
        # place for autograd, which the writes of a Triton kernel don't.
        grad[outer[:, None], inner, labels.reshape(grad.shape[:2])] = at_label.view(grad.shape[:2])
        return grad.view(logits.shape), *(None,) * 5


def _inverse_temperature(temperature: float | Tensor | None, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """1/T per token, (tokens,), in at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        inverse = 1.0 if temperature is None else 1.0 / max(temperature, 1e-8)
        return torch.full((labels.numel(),), inverse, dtype=dtype, device=labels.device)
    positive = temperature.detach().to(device=labels.device, dtype=dtype).clamp(min=1e-8)
    # Contiguous, since the kernels index it by token and an expanded scalar reshapes to a view of stride 0.
    return positive.reciprocal().expand(labels.shape).reshape(-1).contiguous()


def _three_dimensional(logits: Tensor) -> Tensor:
    """(..., vocabulary) as (outer, inner, vocabulary) with the vocabulary adjacent in memory, a view where possible."""
    if logits.stride(-1) != 1 or 0 in logits.stride():
        logits = logits.contiguous()
    if logits.dim() == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        return logits
    return logits.reshape(1, math.prod(logits.shape[:-1]), logits.shape[-1])


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, min(CHUNK_LOGITS // logits.shape[2], logits.shape[1]))


def _chunks(logits: Tensor) -> Iterator[tuple[tuple[int, slice], slice]]:
    """Index into logits (outer, inner, vocabulary) and slice of the tokens of each chunk of rows."""
    outer, inner, _ = logits.shape
    rows = _rows_per_chunk(logits)
    for index, start in product(range(outer), range(0, inner, rows)):
        end = min(start + rows, inner)
        yield (index, slice(start, end)), slice(index * inner + start, index * inner + end)


def _exponents(logits: Tensor, shift: Tensor, inverse_temperature: Tensor, out: Tensor) -> Tensor:
    """z = (x − m)·log2(e)/T of one chunk, written to `out`; e^d is then 2^z, which costs half an exp on a CPU."""
    source = logits if logits.dtype == out.dtype else out.copy_(logits)
    return torch.sub(source, shift[:, None], out=out).mul_(inverse_temperature[:, None] * LOG2_E)


def _forward(
    logits: Tensor, label_logit: Tensor, inverse_temperature: Tensor, with_entropy: bool, with_squares: bool
) -> tuple[Tensor, ...]:
    """m, ln s and the four reductions of logits (outer, inner, vocabulary), each (tokens,).

    Without its flag, the entropy or a sum of squares has no meaning.
    """
    m, s, r, t, q, u = inverse_temperature.new_zeros(6, len(label_logit))
    scratch = m.new_empty(2, _rows_per_chunk(logits), logits.shape[2])
    for index, tokens in _chunks(logits):
        chunk = logits[index]
        z, e = scratch[:, : len(chunk)]
        m[tokens] = chunk.amax(1)
        m[tokens].masked_fill_(m[tokens] == -math.inf, 0.0)
        torch.exp2(_exponents(chunk, m[tokens], inverse_temperature[tokens], out=z), out=e)
        torch.sum(e, 1, out=s[tokens])
        # A NaN of this product is 0·(−inf) and counts 0; a NaN among the logits shows in s.
        if with_entropy or with_squares:
            torch.nansum(z.mul_(e), 1, out=t[tokens])
        if with_squares:
            torch.nansum(z.mul_(e), 1, out=u[tokens])
            torch.sum(torch.mul(e, e, out=z), 1, out=q[tokens])
        # Only the largest logits have e = 1, so r, the sum of the fractional parts, is s without them.
        torch.sum(e.frac_(), 1, out=r[tokens])
    s = torch.where(s == 0, 1.0, s)
    ones = torch.round(s - r)
    log_s = torch.log1p(r + (ones - 1.0))
    log_prob = (label_logit - m) * inverse_temperature - log_s
    # t and u are in units of ln 2.
    entropy = log_s - LN_2 * t / s
    return m, log_s, log_prob, entropy, q / (s * s), (LN_2 * u - log_s * q) / (s * s)


def _backward(
    logits: Tensor, grad: Tensor, shift: Tensor, inverse_temperature: Tensor, slope: Tensor | None, bias: Tensor
) -> None:
    """Write the gradient of logits (outer, inner, vocabulary) except at the labels to `grad`, which may be `logits`."""
    scratch = shift.new_empty(2, _rows_per_chunk(logits), logits.shape[2])
    for index, tokens in _chunks(logits):
        target = grad[index]
        z, e = scratch[:, : len(target)]
        _exponents(logits[index], shift[tokens], inverse_temperature[tokens], out=z)
        if slope is None:
            factor, e = bias[tokens, None], z.exp2_()
        else:
            torch.exp2(z.clamp_(min=MIN_EXPONENT), out=e)
            factor = z.mul_(slope[tokens, None]).add_(bias[tokens, None])
        if target.dtype == e.dtype:
            torch.mul(e, factor, out=target)
        else:
            target.copy_(e.mul_(factor))
