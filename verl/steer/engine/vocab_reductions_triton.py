# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `vocab_reductions`: the logits are read once forward, and read and written once backward.

Each lane sums its own column of logits relative to its own running maximum, so that threads exchange nothing before the
lanes are merged, after the loop. With few tokens several programs split the vocabulary of each, to fill the device; a
second small kernel merges their sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
MIN_EXPONENT = tl.constexpr(-200.0)
NEGATIVE_INFINITY = tl.constexpr(-math.inf)
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)

NUM_WARPS = 4
# Logits of a tile per lane: loads in flight, and the cost of a new maximum spread over them.
TILE_DEPTH = 8
# Enough programs per multiprocessor to hide their uneven ends.
PROGRAMS_PER_MULTIPROCESSOR = 32
MAX_SPLITS = 64
BACKWARD_BLOCK = 8192


@triton.jit
def _exponent(x, maximum, scale):
    # Bounded, so that a logit of -inf gives z·2^z = 0, not NaN.
    shift = tl.where(maximum == NEGATIVE_INFINITY, 0.0, maximum)
    return tl.maximum((x - shift) * scale, MIN_EXPONENT, propagate_nan=KEEP_NAN)


@triton.jit
def _accumulate(xs, m, r, t, q, u, scale, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, DEPTH: tl.constexpr):
    """Add a tile, DEPTH tensors (lanes,) of logits, to each lane's sums of all logits but its largest, `m`."""
    winner = xs[0]
    losers = ()
    for i in tl.static_range(1, DEPTH):
        losers = losers + (tl.minimum(winner, xs[i], propagate_nan=KEEP_NAN),)
        winner = tl.maximum(winner, xs[i])
    losers = losers + (tl.minimum(winner, m, propagate_nan=KEEP_NAN),)
    maximum = tl.maximum(winner, m)
    delta = _exponent(m, maximum, scale)
    alpha = tl.exp2(delta)
    if ENTROPY:
        t = alpha * (t + delta * r)
    r = alpha * r
    if SQUARES:
        u = alpha * alpha * (u + delta * q)
        q = alpha * alpha * q
    for i in tl.static_range(DEPTH):
        z = _exponent(losers[i], maximum, scale)
        e = tl.exp2(z)
        r += e
        if ENTROPY:
            t += z * e
        if SQUARES:
            q += e * e
            u += z * e * e
    return maximum, r, t, q, u


@triton.jit
def _merge(m, r, t, q, u, scale):
    """The sums of several parts (parts,) as those of the whole: of all its logits but its largest."""
    maximum = tl.max(m, axis=0)
    delta = _exponent(m, maximum, scale)
    alpha = tl.exp2(delta)
    # The largest logits of the parts, without one that is the largest of all.
    rest = tl.where(m < maximum, alpha, 0.0)
    equals = tl.sum(tl.where(m == maximum, 1.0, 0.0)) - 1.0
    whole_r = tl.sum(alpha * r + rest) + equals
    whole_t = tl.sum(alpha * (t + delta * r) + delta * rest)
    whole_q = tl.sum(alpha * alpha * q + rest * rest) + equals
    whole_u = tl.sum(alpha * alpha * (u + delta * q) + delta * rest * rest)
    return maximum, whole_r, whole_t, whole_q, whole_u


@triton.jit
def _load_tile(pointers, remaining, MASKED: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """DEPTH tensors (lanes,) of logits in float32; those past the `remaining` are -inf."""
    xs = ()
    for i in tl.static_range(DEPTH):
        mask = i * LANES + tl.arange(0, LANES) < remaining if MASKED else None
        other = NEGATIVE_INFINITY if MASKED else None
        x = tl.load(pointers + i * LANES, mask=mask, other=other, eviction_policy="evict_first")
        xs = xs + (x.to(tl.float32),)
    return xs


@triton.jit
def _row(logits, token, inner, stride_outer, stride_inner):
    # Offsets in int64: 4,096 × 151,936 logits are more bytes than 2^31 even in bfloat16.
    return logits + (token // inner).to(tl.int64) * stride_outer + (token % inner).to(tl.int64) * stride_inner


@triton.jit
def _forward_kernel(
    logits,
    inverse_temperature,
    partials,
    inner,
    stride_outer,
    stride_inner,
    vocabulary,
    span,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reduce `span` logits of one token to its sums in `partials` (tokens, splits, 5). Grid (tokens, splits)."""
    token = tl.program_id(0)
    split = tl.program_id(1)
    scale = tl.load(inverse_temperature + token) * LOG2_E
    start = split * span
    end = tl.minimum(start + span, vocabulary)
    tile: tl.constexpr = DEPTH * LANES
    last = start + (end - start) // tile * tile
    pointers = _row(logits, token, inner, stride_outer, stride_inner) + tl.arange(0, LANES)

    m = tl.full((LANES,), NEGATIVE_INFINITY, tl.float32)
    r = tl.zeros((LANES,), tl.float32)
    t, q, u = r, r, r
    for first in tl.range(start, last, tile):
        xs = _load_tile(pointers + first, 0, False, DEPTH, LANES)
        m, r, t, q, u = _accumulate(xs, m, r, t, q, u, scale, ENTROPY, SQUARES, DEPTH)
    if last < end:
        xs = _load_tile(pointers + last, end - last, True, DEPTH, LANES)
        m, r, t, q, u = _accumulate(xs, m, r, t, q, u, scale, ENTROPY, SQUARES, DEPTH)

    sums = _merge(m, r, t, q, u, scale)
    for i in tl.static_range(5):
        tl.store(partials + (token * tl.num_programs(1) + split) * 5 + i, sums[i])


@triton.jit
def _combine_kernel(partials, label_logit, inverse_temperature, results, splits, LANES: tl.constexpr):
    """Merge the sums (tokens, splits, 5) of one token to its column of `results` (6, tokens). Grid (tokens,)."""
    token = tl.program_id(0)
    scale = tl.load(inverse_temperature + token) * LOG2_E
    split = tl.arange(0, LANES)
    mask = split < splits
    source = partials + (token * splits + split) * 5
    m = tl.load(source, mask=mask, other=NEGATIVE_INFINITY)
    r = tl.load(source + 1, mask=mask, other=0.0)
    t = tl.load(source + 2, mask=mask, other=0.0)
    q = tl.load(source + 3, mask=mask, other=0.0)
    u = tl.load(source + 4, mask=mask, other=0.0)
    m, r, t, q, u = _merge(m, r, t, q, u, scale)

    # All logits are -inf; with a NaN among them the sums are NaN.
    no_distribution = (m == NEGATIVE_INFINITY) & (r == r)
    shift = tl.where(m == NEGATIVE_INFINITY, 0.0, m)
    r = tl.where(no_distribution, 0.0, r)
    s = 1.0 + r
    # log1p(r): ln(1 + r), corrected for the digits of r that 1 + r drops.
    kept = s - 1.0
    log_s = tl.where(kept == 0.0, r, tl.log(s) * (r / tl.where(kept == 0.0, 1.0, kept)))
    log_prob = (tl.load(label_logit + token).to(tl.float32) - shift) * scale * LN_2 - log_s
    entropy = tl.where(no_distribution, 0.0, log_s - t * LN_2 / s)
    pi_squared = tl.where(no_distribution, 0.0, (1.0 + q) / (s * s))
    pi_squared_log_pi = tl.where(no_distribution, 0.0, (u * LN_2 - log_s * (1.0 + q)) / (s * s))
    column = (shift, log_s, log_prob, entropy, pi_squared, pi_squared_log_pi)
    for i in tl.static_range(6):
        tl.store(results + i * tl.num_programs(0) + token, column[i])


@triton.jit
def _backward_kernel(
    logits,
    grad,
    shift,
    inverse_temperature,
    slope,
    bias,
    inner,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """The gradient of BLOCK logits of one token, except at its label. Grid (tokens, blocks). `grad` may be `logits`."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    row = _row(logits, token, inner, stride_outer, stride_inner)
    x = tl.load(row + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    z = _exponent(x, tl.load(shift + token), tl.load(inverse_temperature + token) * LOG2_E)
    factor = tl.load(bias + token)
    if slope is not None:
        factor = z * tl.load(slope + token) + factor
    grad_row = _row(grad, token, inner, grad_stride_outer, grad_stride_inner)
    tl.store(grad_row + columns, (tl.exp2(z) * factor).to(grad.dtype.element_ty), mask=mask)


def _splits(tokens: int, vocabulary: int, tile: int, device: torch.device) -> int:
    """Programs per token, so that the device is filled however few tokens there are."""
    programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(programs, tokens), triton.cdiv(vocabulary, tile), MAX_SPLITS))


def forward(
    logits: Tensor, label_logit: Tensor, inverse_temperature: Tensor, with_entropy: bool, with_squares: bool
) -> tuple[Tensor, ...]:
    """m, ln s and the four reductions of logits (outer, inner, vocabulary), each (tokens,) in float32.

    Without its flag, the entropy or a sum of squares has no meaning.
    """
    outer, inner, vocabulary = logits.shape
    tokens = outer * inner
    results = inverse_temperature.new_empty(6, tokens)
    if tokens == 0:
        return results.unbind()
    # 16 bytes are the widest load of a thread.
    lanes = NUM_WARPS * 32 * (16 // logits.element_size())
    depth = min(TILE_DEPTH, triton.next_power_of_2(triton.cdiv(vocabulary, lanes)))
    tile = depth * lanes
    span = triton.cdiv(triton.cdiv(vocabulary, _splits(tokens, vocabulary, tile, logits.device)), tile) * tile
    splits = triton.cdiv(vocabulary, span)
    partials = results.new_empty(tokens, splits, 5)
    layout = (inner, logits.stride(0), logits.stride(1), vocabulary, span)
    flags = {"ENTROPY": with_entropy or with_squares, "SQUARES": with_squares, "DEPTH": depth, "LANES": lanes}
    # Triton launches on the current device, which need not be the logits'.
    with torch.cuda.device_of(logits):
        _forward_kernel[(tokens, splits)](logits, inverse_temperature, partials, *layout, **flags, num_warps=NUM_WARPS)
        lanes = triton.next_power_of_2(splits)
        _combine_kernel[(tokens,)](
            partials, label_logit, inverse_temperature, results, splits, LANES=lanes, num_warps=1
        )
    return results.unbind()


def backward(
    logits: Tensor, grad: Tensor, shift: Tensor, inverse_temperature: Tensor, slope: Tensor | None, bias: Tensor
) -> None:
    """Write the gradient of logits (outer, inner, vocabulary) except at the labels to `grad`, which may be `logits`."""
    outer, inner, vocabulary = logits.shape
    if outer * inner == 0:
        return
    block = min(BACKWARD_BLOCK, triton.next_power_of_2(vocabulary))
    tensors = (logits, grad, shift, inverse_temperature, slope, bias)
    strides = (logits.stride(0), logits.stride(1), grad.stride(0), grad.stride(1))
    grid = (outer * inner, triton.cdiv(vocabulary, block))
    with torch.cuda.device_of(logits):
        _backward_kernel[grid](*tensors, inner, *strides, vocabulary, BLOCK=block, num_warps=8)
