# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: the kernels and every loss, in the environment that `run/setup.sh gpu` makes.

    .venv/bin/python -m pytest -n 0 tests/test_gpu.py tests/test_influence.py

The second file's engine is on the GPU there.
"""

import subprocess
import sys

import pytest
import torch
from test_policy_loss import ALL_LOSSES, loss_on
from test_vocab_reductions import CASES, INTERPRETED, assert_matches, reference
from verl.plugin.platform import get_platform
from verl.steer.engine import vocab_reductions as reductions_module
from verl.steer.engine.vocab_reductions import vocab_reductions

if not torch.cuda.is_available() or get_platform().device_name != "cuda":
    pytest.skip("verl's platform has no GPU here", allow_module_level=True)

VOCABULARY = 151_936


def test_the_kernels_match_pytorch_where_few_logits_are_special(root, tmp_path):
    """The cases of the interpreter's test, with the real compiler: NaN, -inf, views, splits, temperatures."""
    script = tmp_path / "compiled.py"
    script.write_text("import torch\ntorch.set_default_device('cuda')\n" + INTERPRETED)
    run = subprocess.run([sys.executable, script, root / "verl/steer/engine"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == CASES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_the_kernels_match_float64_on_a_whole_vocabulary(tokens, dtype):
    generator = torch.Generator("cuda").manual_seed(tokens)
    logits = (3 * torch.randn(tokens, VOCABULARY, device="cuda", generator=generator)).to(dtype)
    logits[0, 5] = logits[0].max() + 12  # one token with nearly all the mass
    labels = torch.randint(VOCABULARY, (tokens,), device="cuda", generator=generator)
    labels[0] = 5
    temperature = torch.linspace(1.0, 0.6, tokens, device="cuda")
    assert reductions_module._uses_triton(logits)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    inner = leaf * 1
    found = vocab_reductions(inner, labels, temperature, with_squares=True, inplace_backward=True)
    wanted = reference(exact, labels, temperature[:, None])
    assert_matches(found, wanted)
    weights = torch.linspace(0.5, 2, tokens, device="cuda")
    for log_prob, entropy, *_ in (found, wanted):
        (weights * (log_prob + 0.3 * entropy)).sum().backward()
    largest = exact.grad.abs().amax(-1, keepdim=True)
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad / largest, exact.grad / largest, rtol=rtol, atol=1e-6, check_dtype=False)


def test_the_kernels_reach_logits_beyond_32_bits():
    """A micro-batch of 8 rollouts of 4,096 tokens has more than 2^32; its last tokens are those of a small one."""
    tokens, last = (1 << 32) // VOCABULARY + 8, 16
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.zeros(tokens, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    logits[-last:] = 3 * torch.randn(last, VOCABULARY, device="cuda", generator=generator)
    labels = torch.randint(VOCABULARY, (tokens,), device="cuda", generator=generator)
    outcomes = []
    for some, chosen in ((logits, labels), (logits[-last:].clone(), labels[-last:])):
        leaf = some.requires_grad_()
        inner = leaf * 1
        found = vocab_reductions(inner, chosen, None, with_squares=True, inplace_backward=True)
        loss = sum(values[-last:].sum() for values in found)
        (gradient,) = torch.autograd.grad(loss, leaf)
        outcomes.append([*(values[-last:] for values in found), gradient[-last:]])
    # A small one is split among more programs, which round in another order.
    torch.testing.assert_close(*outcomes, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.parametrize("options", ALL_LOSSES, ids=str)
def test_no_loss_waits_for_the_gpu_and_all_are_those_of_the_cpu(options):
    outcomes = []
    for device, waiting in (("cuda", "error"), ("cpu", "default")):
        inputs, compute = loss_on(device, options)
        torch.manual_seed(0)
        torch.cuda.set_sync_debug_mode(waiting)
        try:
            loss, metrics = compute()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        logged = {name: float(value) for name, value in metrics.items()}
        outcomes.append((loss.cpu(), inputs.log_prob.grad.cpu(), logged))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)
