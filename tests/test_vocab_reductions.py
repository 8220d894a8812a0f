# SPDX-License-Identifier: Apache-2.0
"""The reductions over the vocabulary against a float64 reference, by their properties, and kernel against PyTorch."""

import importlib
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.steer.engine import vocab_reductions as module
from verl.steer.engine.vocab_reductions import vocab_reductions

RTOL = 1e-5
FIELDS = ("log_prob", "entropy", "sum_pi_squared", "sum_pi_squared_log_pi")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def log_softmax(logits):
    """ln π in float64, its digits kept where one token has nearly all the mass."""
    logits = logits.double()
    top, place = logits.max(-1, keepdim=True)
    others = (logits - top).scatter(-1, place, -math.inf)
    return logits - top - torch.log1p(others.exp().sum(-1, keepdim=True))


def reference(logits, labels, temperature=1.0):
    """The four reductions, straight from their definitions, in float64."""
    log_pi = log_softmax(logits.double() / temperature)
    pi = log_pi.exp()
    finite = log_pi.masked_fill(pi == 0, 0.0)
    log_prob = log_pi.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return log_prob, -(pi * finite).sum(-1), (pi * pi).sum(-1), (pi * pi * finite).sum(-1)


def assert_matches(results, expected, rtol=RTOL):
    for name, result, wanted in zip(FIELDS, results, expected, strict=True):
        torch.testing.assert_close(
            result.double(), wanted.double(), rtol=rtol, atol=0.0, msg=lambda m, n=name: f"{n}: {m}"
        )


def sample(shape, dtype=torch.float32, scale=2.0, seed=0):
    """Logits of all kinds, the first row nearly deterministic, and labels, every other one the likeliest token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * scale
    rows = logits.view(-1, shape[-1])
    rows[0, shape[-1] // 2] = rows[0].max() + 12
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    logits = logits.to(dtype)
    labels.view(-1)[::2] = logits.view(-1, shape[-1]).float().argmax(-1)[::2]
    return logits, labels


@pytest.fixture(params=[None, 64, 1000])
def chunk(request, monkeypatch):
    """Chunks of the usual size, of one row, and of several rows with a ragged last one."""
    if request.param is not None:
        monkeypatch.setattr(module, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 333), (2, 3, 1000), (5, 1), (4, 2), (3, 50257)], ids=str)
def test_matches_float64(shape, dtype, chunk):
    logits, labels = sample(shape, dtype)
    results = vocab_reductions(logits, labels, with_squares=True)
    assert all(result.dtype == torch.float32 and result.shape == shape[:-1] for result in results)
    assert_matches(results, reference(logits, labels))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_matches_float64_at_any_scale(scale):
    logits, labels = sample((6, 2000), scale=scale)
    results = vocab_reductions(logits + 500.0, labels, with_squares=True)
    # exp(−100) and what is smaller are no float32, so what is compared is no smaller than that.
    for result, wanted in zip(results, reference(logits + 500.0, labels), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=RTOL, atol=1e-30)


@pytest.mark.parametrize("gap", [1.0, 10.0, 20.0, 40.0, 80.0])
def test_keeps_its_digits_where_one_token_has_the_mass(gap):
    # Two tokens, π = 1/(1 + exp(±gap)): every result in closed form.
    results = vocab_reductions(torch.tensor([[gap, 0.0]]), torch.tensor([0]), with_squares=True)
    rare, log_likely = math.exp(-gap) / (1 + math.exp(-gap)), -math.log1p(math.exp(-gap))
    likely, log_rare = math.exp(log_likely), log_likely - gap
    expected = (
        log_likely,
        -likely * log_likely - rare * log_rare,
        likely**2 + rare**2,
        likely**2 * log_likely + rare**2 * log_rare,
    )
    assert_matches(results, [torch.tensor([value], dtype=torch.float64) for value in expected])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, torch.tensor(0.7), "per token", "per sequence"])
def test_temperature(temperature):
    logits, labels = sample((3, 4, 250))
    if temperature == "per token":
        temperature = torch.linspace(0.3, 2.0, 12).view(3, 4)
    elif temperature == "per sequence":
        temperature = torch.tensor([[0.3], [1.0], [2.0]])
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    expected = reference(logits, labels, divisor)
    assert_matches(vocab_reductions(logits, labels, temperature, with_squares=True), expected)


def test_a_temperature_of_zero_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    results = vocab_reductions(logits, torch.tensor([1]), torch.zeros(1), with_squares=True)
    assert [result.item() for result in results] == [0.0, 0.0, 1.0, 0.0]


def test_tokens_of_minus_infinity_count_as_absent():
    logits, _ = sample((4, 100))
    present = torch.arange(100) % 3 > 0
    labels = torch.tensor([1, 2, 4, 5])
    masked = logits.masked_fill(~present, -math.inf)
    without = logits[:, present]
    places = present.cumsum(0)[labels] - 1
    assert_matches(vocab_reductions(masked, labels, with_squares=True), reference(without, places))


def test_a_label_of_minus_infinity():
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    results = vocab_reductions(logits, torch.tensor([1]), with_squares=True)
    assert results.log_prob.item() == -math.inf
    for result, wanted in zip(results[1:], reference(logits.detach(), torch.tensor([1]))[1:], strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=RTOL, atol=0.0)
    (results.log_prob + results.entropy).sum().backward()
    assert logits.grad.isfinite().all()


def test_a_row_of_minus_infinity_has_no_distribution():
    logits = torch.full((1, 5), -math.inf, requires_grad=True)
    results = vocab_reductions(logits, torch.tensor([2]), with_squares=True)
    assert [result.item() for result in results] == [-math.inf, 0.0, 0.0, 0.0]
    results.entropy.sum().backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_show_in_their_row_only(value):
    logits, labels = sample((3, 40))
    expected = vocab_reductions(logits, labels, with_squares=True)
    logits[1, 7] = value
    for result, wanted in zip(vocab_reductions(logits, labels, with_squares=True), expected, strict=True):
        assert result[1].isnan()
        assert torch.equal(result[::2], wanted[::2])


def test_a_row_of_equal_logits_is_uniform():
    results = vocab_reductions(torch.full((2, 151936), 7.0), torch.tensor([0, 151935]), with_squares=True)
    log_n = math.log(151936)
    expected = [-log_n, log_n, 1 / 151936, -log_n / 151936]
    assert_matches(results, [torch.full((2,), value, dtype=torch.float64) for value in expected])


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 10), (3, 0, 10)], ids=str)
def test_no_tokens(shape):
    logits = torch.empty(shape, requires_grad=True)
    results = vocab_reductions(logits, torch.empty(shape[:-1], dtype=torch.int64), with_squares=True)
    assert all(result.shape == shape[:-1] for result in results)
    results.log_prob.sum().backward()
    assert logits.grad.shape == shape


def test_one_token_without_a_leading_dimension():
    logits, labels = sample((1, 30))
    results = vocab_reductions(logits[0], labels[0], with_squares=True)
    assert all(result.shape == () for result in results)
    assert_matches(results, reference(logits[0], labels[0]))


rows = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=1, max_size=6)


@given(rows, st.floats(-50, 50, width=32), st.data())
def test_properties(rows, shift, data):
    logits = torch.tensor(rows)
    labels = torch.tensor([data.draw(st.integers(0, 4)) for _ in rows])
    order = torch.tensor(data.draw(st.permutations(range(5))))
    results = vocab_reductions(logits, labels, with_squares=True)
    log_prob, entropy, sum_pi_squared, sum_pi_squared_log_pi = results
    for result, wanted in zip(results, reference(logits, labels), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=RTOL, atol=1e-30)
    # Bounds, with one rounding to spare.
    assert (log_prob <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(5) * (1 + 1e-6)).all()
    assert (sum_pi_squared >= (1 - 1e-6) / 5).all() and (sum_pi_squared <= 1 + 1e-6).all()
    assert (sum_pi_squared_log_pi <= 0).all()
    permuted = vocab_reductions(logits[:, order], order.argsort()[labels], with_squares=True)
    for result, wanted in zip(permuted, results, strict=True):
        torch.testing.assert_close(result, wanted, rtol=RTOL, atol=1e-30)
    # A shift rounds the logits, each by up to 2^-18 at 80.
    for result, wanted in zip(vocab_reductions(logits + shift, labels, with_squares=True), results, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-3, atol=1e-4)


def gradients(logits, labels, temperature=1.0, weight_entropy=0.3, **options):
    """The gradient by the operator and by float64 autograd through the reference."""
    weights = torch.linspace(-1.0, 2.0, labels.numel()).view(labels.shape)
    leaf = logits.clone().requires_grad_()
    results = vocab_reductions(leaf, labels, temperature, **options)
    (weights * (results.log_prob + weight_entropy * results.entropy)).sum().backward()
    exact = logits.double().requires_grad_()
    log_prob, entropy, *_ = reference(exact, labels, temperature)
    (weights * (log_prob + weight_entropy * entropy)).sum().backward()
    return leaf.grad, exact.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("weight_entropy", [0.0, 0.3])
def test_gradient_matches_float64_autograd(temperature, weight_entropy, chunk):
    grad, exact = gradients(*sample((3, 4, 333)), temperature, weight_entropy)
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(grad / largest, exact / largest, rtol=RTOL, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_half_logits_is_rounded_once(dtype):
    grad, exact = gradients(*sample((6, 333), dtype))
    assert grad.dtype == dtype
    # Half a unit in the last place, and fp16's smallest number.
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(dtype).eps / 2 + RTOL, atol=2**-24)


def test_gradient_keeps_its_digits_where_one_token_has_the_mass():
    logits = torch.tensor([[18.0, 0.0]], requires_grad=True)
    vocab_reductions(logits, torch.tensor([0])).log_prob.sum().backward()
    rare = math.exp(-18) / (1 + math.exp(-18))
    torch.testing.assert_close(logits.grad, torch.tensor([[rare, -rare]]), rtol=RTOL, atol=0.0)


def test_gradcheck():
    logits, labels = sample((2, 3, 9))
    logits = logits.double().requires_grad_()
    temperature = torch.linspace(0.5, 2.0, 6).view(2, 3)
    assert torch.autograd.gradcheck(lambda x: vocab_reductions(x, labels, temperature)[:2], logits)


def test_gradient_of_the_entropy_alone():
    logits, labels = sample((4, 50))
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    vocab_reductions(leaf, labels).entropy.sum().backward()
    reference(exact, labels)[1].sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=RTOL, atol=1e-7, check_dtype=False)


def test_what_is_returned_and_what_carries_gradients():
    logits, labels = sample((4, 50))
    logits.requires_grad_()
    results = vocab_reductions(logits, labels, with_squares=True)
    assert [result.requires_grad for result in results] == [True, True, False, False]
    assert vocab_reductions(logits, labels, with_entropy=False)[1:] == (None, None, None)
    alone = vocab_reductions(logits, labels, with_entropy=False, with_squares=True)
    assert alone.entropy is None
    assert torch.equal(alone.sum_pi_squared_log_pi, results.sum_pi_squared_log_pi)
    with torch.no_grad():
        assert not vocab_reductions(logits, labels).log_prob.requires_grad


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :-1], lambda x: x[:, 1:, :90], lambda x: x.transpose(0, 1), lambda x: x[0].t(), lambda x: x[:1]],
    ids=["slice of the sequence", "slice of both", "transposed rows", "transposed vocabulary", "rows"],
)
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_views(view, inplace_backward):
    storage = torch.randn(3, 6, 100)
    logits = view(storage)
    labels = torch.randint(logits.shape[-1], logits.shape[:-1])
    leaf = logits.detach().clone().contiguous().requires_grad_()
    vocab_reductions(leaf, labels).log_prob.sum().backward()
    source = storage.clone().requires_grad_()
    other = view(source * 1.0)
    results = vocab_reductions(other, labels, with_squares=True, inplace_backward=inplace_backward)
    assert_matches(results, reference(logits, labels))
    grad = torch.autograd.grad(results.log_prob.sum(), source)[0]
    torch.testing.assert_close(view(grad), leaf.grad)


def test_expanded_logits_are_not_written_over_one_another():
    row = torch.randn(1, 20, requires_grad=True)
    labels = torch.tensor([3, 4, 5])
    results = vocab_reductions((row * 1.0).expand(3, 20), labels, inplace_backward=True)
    grad = torch.autograd.grad(results.log_prob.sum(), row)[0]
    expected = torch.autograd.grad(torch.log_softmax(row.expand(3, 20), -1).gather(-1, labels[:, None]).sum(), row)[0]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_the_gradient_over_the_logits(dtype):
    logits, labels = sample((3, 4, 100), dtype)
    expected, _ = gradients(logits, labels)
    leaf = logits.clone().requires_grad_()
    seen = []
    inner = leaf * 1.0
    inner.register_hook(seen.append)
    weights = torch.linspace(-1.0, 2.0, 12).view(3, 4)
    results = vocab_reductions(inner, labels, inplace_backward=True)
    (weights * (results.log_prob + 0.3 * results.entropy)).sum().backward()
    assert seen[0].data_ptr() == inner.data_ptr()
    assert torch.equal(leaf.grad, expected)


def test_inplace_backward_is_loud_where_the_logits_are_still_needed(monkeypatch):
    leaf = torch.randn(3, 10, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    inner = leaf * 1.0
    other = inner.square().sum()
    results = vocab_reductions(inner, labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (results.log_prob.sum() + other).backward()
    # Also where autograd can't see the writing, as with a kernel of Triton's.
    monkeypatch.setattr(module, "_backward", lambda *_: None)
    inner = leaf * 1.0
    results = vocab_reductions(inner, labels, inplace_backward=True)
    results.log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results.log_prob.sum().backward()


def test_errors_name_the_value():
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        vocab_reductions(logits.long(), labels)
    with pytest.raises(ValueError, match=r"labels.shape is \(1,\); expected \(2,\)"):
        vocab_reductions(logits, labels[:1])
    with pytest.raises(ValueError, match="at least one token"):
        vocab_reductions(logits[:, :0], labels)
    with pytest.raises(ValueError, match="leaf"):
        vocab_reductions(logits.requires_grad_(), labels, inplace_backward=True)


def peak_bytes(work):
    """Peak of the CPU allocator during `work`, above what was held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory(dtype, monkeypatch):
    vocabulary, rows = 1000, 8
    monkeypatch.setattr(module, "CHUNK_LOGITS", rows * vocabulary)
    chunk = rows * vocabulary * 4
    per_token = 200
    for tokens in (64, 1024):
        # A slice along the sequence, which must not be copied.
        logits, labels = sample((4, tokens // 4 + 1, vocabulary), dtype)
        logits, labels = logits[:, :-1].requires_grad_(), labels[:, :-1]
        with torch.no_grad():
            forward = peak_bytes(lambda x=logits, y=labels: vocab_reductions(x, y, 0.7, with_squares=True))
        assert forward < 2.5 * chunk + per_token * tokens

        def both(logits=logits, labels=labels, inplace_backward=False):
            results = vocab_reductions(logits, labels, 0.7, inplace_backward=inplace_backward)
            torch.autograd.grad((results.log_prob + results.entropy).sum(), logits)

        bound = 3.5 * chunk + per_token * tokens
        gradient = tokens * vocabulary * logits.element_size()
        assert gradient < peak_bytes(both) < gradient + bound
        inner = logits.view_as(logits)
        assert peak_bytes(lambda x=inner: both(x, inplace_backward=True)) < bound


# Run where TRITON_INTERPRET is set before triton is imported: its own functions are bound to the interpreter then.
INTERPRETED = '''
import math, sys
import torch
sys.path.insert(0, sys.argv[1])
import vocab_reductions, vocab_reductions_triton
torch.manual_seed(0)

def error_bound(logits, labels, of_log_prob, of_entropy, temperatures):
    """Largest permitted difference of two float32 gradients of of_log_prob * log_prob + of_entropy * entropy.

    An element is a sum of pi * of_log_prob and pi * of_entropy * (ln pi + H), over the temperature, which may cancel:
    the bound is relative to their absolute values. Rounding an exponent d changes e^d by eps * |d|, and |d| and ln s
    are at most |ln pi|, so each term is exact to a few eps * (1 + |ln pi|) whatever the order of the sums.
    """
    log_pi = torch.log_softmax(logits / temperatures.unsqueeze(-1), -1)
    pi = log_pi.exp().nan_to_num(0.0)  # a row of nothing but -inf has no distribution and no gradient
    log_pi = log_pi.masked_fill(pi == 0, 0.0)
    entropy = -(pi * log_pi).sum(-1, keepdim=True)
    terms = of_log_prob.unsqueeze(-1) * (pi + torch.nn.functional.one_hot(labels, logits.shape[-1]))
    terms = terms + of_entropy.unsqueeze(-1) * pi * (log_pi.abs() + entropy)
    return 8 * torch.finfo(torch.float32).eps * (1 + log_pi.abs()) * terms / temperatures.unsqueeze(-1)

cases = 0
for vocabulary in (1, 5, 1000, 9001):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        per_token = torch.rand(2, 4) + 0.5
        for splits, temperature, squares in ((1, None, True), (3, per_token, True), (1, torch.tensor(0.7), False)):
            vocab_reductions_triton._splits = lambda *_: splits
            logits = (torch.randn(2, 5, vocabulary) * 2).to(dtype)
            labels = torch.randint(vocabulary, (2, 4))
            labels[0] = logits[0, :-1].float().argmax(-1)
            logits[0, 0, labels[0, 0]] += 10
            logits[0, 1, ::2] = -math.inf
            logits[0, 2] = 1.0
            logits[1, 1, vocabulary // 2] = math.nan
            logits[1, 2] = -math.inf
            outcomes = []
            for implementation, inplace in (("torch", False), ("triton", False), ("triton", True)):
                leaf = logits.clone().requires_grad_()
                inner = (leaf * 1.0)[:, :-1]
                vocab_reductions._uses_triton = lambda _: implementation == "triton"
                results = vocab_reductions.vocab_reductions(
                    inner, labels, temperature, with_squares=squares, inplace_backward=inplace
                )
                weights = torch.arange(8.0).view(2, 4)
                loss = weights * results.log_prob + (0.3 * weights * results.entropy if squares else 0)
                (grad,) = torch.autograd.grad(loss.sum(), inner)
                assert (grad.data_ptr() == inner.data_ptr()) == inplace
                outcomes.append([*(result for result in results if result is not None), grad])
            temperatures = torch.ones(2, 4) if temperature is None else temperature.expand(2, 4)
            bound = error_bound(logits[:, :-1].double(), labels, weights, 0.3 * weights * squares, temperatures)
            for torch_s, *triton_s in zip(*outcomes):
                assert torch_s[1, 1].isnan().all() and torch_s.isnan().sum() == torch_s[1, 1].numel()
                for triton_ in triton_s:
                    if torch_s.dtype == torch.float32 and torch_s.dim() == 3:
                        excess = ((triton_ - torch_s).abs() - bound).nan_to_num(-math.inf)
                        assert excess.amax() <= 0, (vocabulary, splits, excess.amax(), excess.argmax())
                        assert torch.equal(triton_.isnan(), torch_s.isnan())
                        continue
                    rtol = 1e-5 if torch_s.dtype == torch.float32 else torch.finfo(torch_s.dtype).eps
                    atol = 0.0 if torch_s.dtype == torch.float32 else 2.0**-24
                    torch.testing.assert_close(triton_, torch_s, rtol=rtol, atol=atol, equal_nan=True)
                cases += 1
print(cases)
'''
#: Vocabularies times dtypes, and the results of each kind of call.
CASES = 4 * 3 * (5 + 5 + 3)


@needs_triton
def test_triton_kernels_match_pytorch_under_the_interpreter(tmp_path):
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    folder = os.path.dirname(module.__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, script, folder], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == CASES


def compiled_for_hopper(kernel, constants, pointers, num_warps):
    """A kernel's code for compute capability 9.0; the interpreter accepts code that the compiler refuses."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no CUDA backend")
    types = {name: "i64" if name.endswith("stride_outer") else "i32" for name in kernel.arg_names} | pointers
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # Triton finds this by itself where addresses and sizes are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("squares", [False, True])
def test_triton_forward_compiles_for_hopper(dtype, squares):
    kernels = importlib.import_module("verl.steer.engine.vocab_reductions_triton")
    lanes = kernels.NUM_WARPS * 32 * (16 // (2 if dtype == "bf16" else 4))
    constants = {"ENTROPY": True, "SQUARES": squares, "DEPTH": kernels.TILE_DEPTH, "LANES": lanes}
    pointers = {"logits": f"*{dtype}", "inverse_temperature": "*fp32", "partials": "*fp32"}
    asm = compiled_for_hopper(kernels._forward_kernel, constants, pointers, kernels.NUM_WARPS)
    # Loads of 16 bytes a thread, and lanes that nothing moves between threads before the merge.
    assert asm["ptx"].count("v4.b32") >= 2 * kernels.TILE_DEPTH
    loop = asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "convert_layout" not in loop and "tt.reduce" not in loop


@needs_triton
@pytest.mark.parametrize("lanes", [1, 4])
def test_triton_merge_compiles_for_hopper(lanes):
    kernels = importlib.import_module("verl.steer.engine.vocab_reductions_triton")
    pointers = {"partials": "*fp32", "label_logit": "*bf16", "inverse_temperature": "*fp32", "results": "*fp32"}
    assert "tt.store" in compiled_for_hopper(kernels._combine_kernel, {"LANES": lanes}, pointers, 1)["ttir"]


@needs_triton
@pytest.mark.parametrize("slope", [False, True])
def test_triton_backward_compiles_for_hopper(slope):
    kernels = importlib.import_module("verl.steer.engine.vocab_reductions_triton")
    pointers = dict.fromkeys(("shift", "inverse_temperature", "slope", "bias"), "*fp32")
    pointers |= {"logits": "*bf16", "grad": "*bf16"}
    constants = {"BLOCK": kernels.BACKWARD_BLOCK} | ({} if slope else {"slope": None})
    assert "tt.store" in compiled_for_hopper(kernels._backward_kernel, constants, pointers, 8)["ttir"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_for_the_squares_changes_no_bit_of_the_rest(dtype):
    """The entropy audit asks for them where a run without it does not, and must leave the training as it is."""
    logits = 3 * torch.randn(50, 997, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(50)
    without, with_squares = (vocab_reductions(logits, labels, 0.7, with_squares=squares) for squares in (False, True))
    assert torch.equal(without.log_prob, with_squares.log_prob)
    assert torch.equal(without.entropy, with_squares.entropy)
