# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `vocab_reductions`: the logits are read once forward, and read and written once backward.

Every lane of a thread keeps the sums of its own column of logits against its own running maximum, so that the loop
over the vocabulary needs no exchange between threads; the lanes are merged once, at the end. Where there are too few
tokens to fill the device, several programs share a token and a second small kernel merges their sums.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
MIN_EXPONENT = tl.constexpr(-200.0)
NAN = tl.constexpr(math.nan)
NEGATIVE_INFINITY = tl.constexpr(-math.inf)
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)

NUM_WARPS = 4
# Each lane takes so many logits of a tile at once: loads in flight, and the cost of a new maximum spread over them.
TILE_DEPTH = 8
# Programs per multiprocessor that suffice to hide how unevenly they end.
PROGRAMS_PER_MULTIPROCESSOR = 32
MAX_SPLITS = 64
BACKWARD_BLOCK = 8192


@triton.jit
def _finite(maximum):
    return tl.where(maximum == NEGATIVE_INFINITY, 0.0, maximum)


@triton.jit
def _exponent(x, shift, scale):
    # Bounded, so that a logit of -inf gives z·2^z = 0, not NaN.
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
    shift = _finite(maximum)
    delta = _exponent(m, shift, scale)
    alpha = tl.exp2(delta)
    if ENTROPY or SQUARES:
        t = alpha * (t + delta * r)
    r = alpha * r
    if SQUARES:
        u = alpha * alpha * (u + delta * q)
        q = alpha * alpha * q
    for i in tl.static_range(DEPTH):
        z = _exponent(losers[i], shift, scale)
        e = tl.exp2(z)
        r += e
        if ENTROPY or SQUARES:
            t += z * e
        if SQUARES:
            q += e * e
            u += z * e * e
    return maximum, r, t, q, u


@triton.jit
def _merge(m, r, t, q, u, scale):
    """The sums of several parts (parts,) as those of the whole: of all its logits but its largest."""
    maximum = tl.max(m, axis=0)
    delta = _exponent(m, _finite(maximum), scale)
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
def _log1p(x):
    # ln(1 + x) for what 1 + x has kept of x, in proportion.
    grown = 1.0 + x
    kept = grown - 1.0
    return tl.where(kept == 0.0, x, tl.log(grown) * (x / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def _store_results(
    m,
    r,
    t,
    q,
    u,
    scale,
    token,
    tokens,
    row,
    vocabulary,
    labels,
    results,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """The last step: from a token's sums to its column of `results` (6, tokens)."""
    # All logits -inf; where NaN is among them, the sums are NaN.
    no_distribution = (m == NEGATIVE_INFINITY) & (r == r)
    shift = _finite(m)
    r = tl.where(no_distribution, 0.0, r)
    s = 1.0 + r
    log_s = _log1p(r)
    label = tl.load(labels + token)
    inside = (label >= 0) & (label < vocabulary)
    label_logit = tl.load(row + label, mask=inside, other=NAN).to(tl.float32)
    tl.store(results + token, (label_logit - shift) * scale * LN_2 - log_s)
    tl.store(results + tokens + token, shift)
    tl.store(results + 2 * tokens + token, log_s)
    if ENTROPY:
        tl.store(results + 3 * tokens + token, tl.where(no_distribution, 0.0, log_s - t * LN_2 / s))
    if SQUARES:
        pi_squared = tl.where(no_distribution, 0.0, (1.0 + q) / (s * s))
        pi_squared_log_pi = tl.where(no_distribution, 0.0, (u * LN_2 - log_s * (1.0 + q)) / (s * s))
        tl.store(results + 4 * tokens + token, pi_squared)
        tl.store(results + 5 * tokens + token, pi_squared_log_pi)


@triton.jit
def _load_tile(pointers, remaining, MASKED: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """DEPTH tensors (lanes,) of logits in float32; those past the `remaining` are -inf."""
    lanes = tl.arange(0, LANES)
    xs = ()
    for i in tl.static_range(DEPTH):
        if MASKED:
            mask = i * LANES + lanes < remaining
            x = tl.load(pointers + i * LANES, mask=mask, other=NEGATIVE_INFINITY, eviction_policy="evict_first")
        else:
            x = tl.load(pointers + i * LANES, eviction_policy="evict_first")
        xs = xs + (x.to(tl.float32),)
    return xs


@triton.jit
def _row(logits, token, inner, stride_outer, stride_inner):
    # Offsets in int64: 4,096 × 151,936 logits are more bytes than 2^31 even in bfloat16.
    return logits + (token // inner).to(tl.int64) * stride_outer + (token % inner).to(tl.int64) * stride_inner


@triton.jit
def _scale_of(inverse_temperature, token, HAS_TEMPERATURE: tl.constexpr):
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature + token) * LOG2_E
    else:
        scale = tl.full((), LOG2_E, tl.float32)
    return scale


@triton.jit
def _forward_kernel(
    logits,
    labels,
    inverse_temperature,
    results,
    partials,
    tokens,
    inner,
    stride_outer,
    stride_inner,
    vocabulary,
    span,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reduce `span` logits of one token. Grid (tokens, splits)."""
    token = tl.program_id(0)
    split = tl.program_id(1)
    row = _row(logits, token, inner, stride_outer, stride_inner)
    scale = _scale_of(inverse_temperature, token, HAS_TEMPERATURE)
    start = split * span
    end = tl.minimum(start + span, vocabulary)
    tile: tl.constexpr = DEPTH * LANES
    last = start + (end - start) // tile * tile
    pointers = row + tl.arange(0, LANES)

    m = tl.full((LANES,), NEGATIVE_INFINITY, tl.float32)
    r = tl.zeros((LANES,), tl.float32)
    t, q, u = r, r, r
    for first in tl.range(start, last, tile):
        xs = _load_tile(pointers + first, 0, False, DEPTH, LANES)
        m, r, t, q, u = _accumulate(xs, m, r, t, q, u, scale, ENTROPY, SQUARES, DEPTH)
    if last < end:
        xs = _load_tile(pointers + last, end - last, True, DEPTH, LANES)
        m, r, t, q, u = _accumulate(xs, m, r, t, q, u, scale, ENTROPY, SQUARES, DEPTH)

    m, r, t, q, u = _merge(m, r, t, q, u, scale)
    if SPLITS == 1:
        _store_results(m, r, t, q, u, scale, token, tokens, row, vocabulary, labels, results, ENTROPY, SQUARES)
    else:
        place = partials + token * SPLITS + split
        step = tokens * SPLITS
        tl.store(place, m)
        tl.store(place + step, r)
        tl.store(place + 2 * step, t)
        tl.store(place + 3 * step, q)
        tl.store(place + 4 * step, u)


@triton.jit
def _combine_kernel(
    logits,
    labels,
    inverse_temperature,
    results,
    partials,
    tokens,
    inner,
    stride_outer,
    stride_inner,
    vocabulary,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Merge the sums (5, tokens, splits) of one token. Grid (tokens,)."""
    token = tl.program_id(0)
    row = _row(logits, token, inner, stride_outer, stride_inner)
    scale = _scale_of(inverse_temperature, token, HAS_TEMPERATURE)
    split = tl.arange(0, LANES)
    mask = split < SPLITS
    place = partials + token * SPLITS + split
    step = tokens * SPLITS
    m = tl.load(place, mask=mask, other=NEGATIVE_INFINITY)
    r = tl.load(place + step, mask=mask, other=0.0)
    t = tl.load(place + 2 * step, mask=mask, other=0.0)
    q = tl.load(place + 3 * step, mask=mask, other=0.0)
    u = tl.load(place + 4 * step, mask=mask, other=0.0)
    m, r, t, q, u = _merge(m, r, t, q, u, scale)
    _store_results(m, r, t, q, u, scale, token, tokens, row, vocabulary, labels, results, ENTROPY, SQUARES)


@triton.jit
def _backward_kernel(
    logits,
    grad,
    labels,
    shift,
    inverse_temperature,
    slope,
    bias,
    at_label,
    inner,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    vocabulary,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of BLOCK logits of one token. Grid (tokens, blocks). `grad` may be `logits`."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    row = _row(logits, token, inner, stride_outer, stride_inner)
    grad_row = _row(grad, token, inner, grad_stride_outer, grad_stride_inner)
    scale = _scale_of(inverse_temperature, token, HAS_TEMPERATURE)
    x = tl.load(row + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    z = (x - tl.load(shift + token)) * scale
    z = tl.maximum(z, MIN_EXPONENT, propagate_nan=KEEP_NAN)
    factor = tl.load(bias + token)
    if HAS_SLOPE:
        factor = z * tl.load(slope + token) + factor
    value = tl.exp2(z) * factor
    value = tl.where(columns == tl.load(labels + token), tl.load(at_label + token), value)
    tl.store(grad_row + columns, value.to(grad.dtype.element_ty), mask=mask)


def _splits(tokens: int, vocabulary: int, tile: int, device: torch.device) -> int:
    """Programs per token, so that the device is filled however few tokens there are."""
    programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-programs // tokens), -(-vocabulary // tile), MAX_SPLITS))


def forward(
    logits: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor | None,
    with_entropy: bool,
    with_squares: bool,
    splits: int | None = None,
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
    """The reductions of logits (outer, inner, vocabulary), then m and ln s, each (tokens,) in float32."""
    outer, inner, vocabulary = logits.shape
    tokens = outer * inner
    results = torch.empty(6, tokens, dtype=torch.float32, device=logits.device)
    if tokens > 0:
        # 16 bytes are the widest load of a thread.
        lanes = NUM_WARPS * 32 * (16 // logits.element_size())
        depth = min(TILE_DEPTH, triton.next_power_of_2(triton.cdiv(vocabulary, lanes)))
        tile = depth * lanes
        if splits is None:
            splits = _splits(tokens, vocabulary, tile, logits.device)
        span = triton.cdiv(triton.cdiv(vocabulary, splits), tile) * tile
        splits = triton.cdiv(vocabulary, span)
        partials = results if splits == 1 else results.new_empty(5, tokens, splits)
        tensors = (logits, labels, inverse_temperature, results, partials)
        layout = (tokens, inner, logits.stride(0), logits.stride(1), vocabulary)
        flags = {
            "HAS_TEMPERATURE": inverse_temperature is not None,
            "ENTROPY": with_entropy,
            "SQUARES": with_squares,
            "SPLITS": splits,
        }
        grid = (tokens, splits)
        # Triton launches on the current device, which need not be the logits'.
        with torch.cuda.device_of(logits):
            _forward_kernel[grid](*tensors, *layout, span, **flags, DEPTH=depth, LANES=lanes, num_warps=NUM_WARPS)
            if splits > 1:
                lanes = triton.next_power_of_2(splits)
                _combine_kernel[(tokens,)](*tensors, *layout, **flags, LANES=lanes, num_warps=1)
    log_prob, shift, log_s, entropy, sum_pi_squared, sum_pi_squared_log_pi = results
    wanted = (
        log_prob,
        entropy if with_entropy else None,
        sum_pi_squared if with_squares else None,
        sum_pi_squared_log_pi if with_squares else None,
    )
    return wanted, shift, log_s


def backward(
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
    if outer * inner == 0:
        return
    block = min(BACKWARD_BLOCK, triton.next_power_of_2(vocabulary))
    tensors = (logits, grad, labels, shift, inverse_temperature, slope, bias, at_label)
    strides = (logits.stride(0), logits.stride(1), grad.stride(0), grad.stride(1))
    grid = (outer * inner, triton.cdiv(vocabulary, block))
    flags = {"HAS_TEMPERATURE": inverse_temperature is not None, "HAS_SLOPE": slope is not None, "BLOCK": block}
    with torch.cuda.device_of(logits):
        _backward_kernel[grid](*tensors, inner, *strides, vocabulary, **flags, num_warps=8)
