# SPDX-License-Identifier: Apache-2.0
"""The FSDP engine's outputs from one reading of the logits, held against upstream's separate functions."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from verl.steer.config import FSDPEngineConfig
from verl.steer.engine.fsdp import SteerFSDPEngineWithLMHead
from verl.steer.replacements import replace_in_worker
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.device import get_device_name
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

LENGTHS, VOCABULARY = [5, 1, 7, 3], 33


def engine(one_pass: bool) -> SteerFSDPEngineWithLMHead:
    """An engine without a model: these methods read its configuration only."""
    built = SteerFSDPEngineWithLMHead.__new__(SteerFSDPEngineWithLMHead)
    built.engine_config = FSDPEngineConfig(one_pass_reductions=one_pass, use_torch_compile=False)
    built.pad_to_length, built.pad_to_length_bucket = False, 0
    built.use_ulysses_sp = False
    built.compute_entropy_from_logits = lambda logits: torch.distributions.Categorical(logits=logits).entropy()
    return built


def outputs_and_gradient(one_pass, packed, temperature, dtype=torch.float32, **flags):
    """The outputs' packed values by name, and the logits' gradient of a fixed sum of them, on the valid tokens."""
    torch.manual_seed(1)
    rows = [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    positions = torch.nested.nested_tensor([torch.arange(length) for length in LENGTHS], layout=torch.jagged)
    batch = TensorDict({"input_ids": nested, "position_ids": positions}, batch_size=len(LENGTHS))
    if isinstance(temperature, torch.Tensor):
        batch["temperature"] = temperature
        temperature = None
    else:
        tu.assign_non_tensor(batch, temperature=temperature)
    tu.assign_non_tensor(batch, use_remove_padding=packed, pad_mode=DatasetPadMode.NO_PADDING, **flags)
    built = engine(one_pass)
    inputs, arguments = built.prepare_model_inputs(batch)
    valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if not packed:
        valid = inputs["attention_mask"].bool()
    # The same logits for a token wherever it lies.
    token_logits = 3 * torch.randn(sum(LENGTHS), VOCABULARY)
    logits = torch.zeros(*valid.shape, VOCABULARY)
    logits[valid] = token_logits
    leaf = logits.to(dtype).requires_grad_()
    found = built.prepare_model_outputs(SimpleNamespace(logits=leaf * 1), arguments, batch, None)
    generator = torch.Generator().manual_seed(2)
    total = sum(
        (found[name].values() * torch.randn(sum(LENGTHS), generator=generator)).sum()
        for name in ("log_probs", "entropy", "nucleus_entropy")
        if name in found
    )
    total.backward()
    assert all(torch.equal(values.offsets(), nested.offsets()) for values in found.values())
    return {name: values.values().detach() for name, values in found.items()}, leaf.grad[valid]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.5, 1.0, 2.0, 1.3])], ids=["1", "0.7", "each"])
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "log_prob"])
def test_the_outputs_and_gradients_are_upstreams(packed, temperature, entropy):
    flags = {"calculate_entropy": entropy, "calculate_sum_pi_squared": entropy}
    ours, our_gradient = outputs_and_gradient(True, packed, temperature, **flags)
    theirs, their_gradient = outputs_and_gradient(False, packed, temperature, **flags)
    assert ours.keys() - theirs.keys() == ({"sum_pi_squared_log_pi"} if entropy else set())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_packed_and_padded_batches_agree():
    flags = {"calculate_entropy": True, "calculate_sum_pi_squared": True}
    packed, packed_gradient = outputs_and_gradient(True, True, 0.7, **flags)
    padded, padded_gradient = outputs_and_gradient(True, False, 0.7, **flags)
    assert packed.keys() == {"log_probs", "entropy", "sum_pi_squared", "sum_pi_squared_log_pi"}
    for name in packed:
        torch.testing.assert_close(packed[name], padded[name])
    torch.testing.assert_close(packed_gradient, padded_gradient)


def test_the_outputs_are_float32_for_logits_in_bfloat16():
    ours, _ = outputs_and_gradient(True, False, 1.0, torch.bfloat16, calculate_entropy=True)
    assert {values.dtype for values in ours.values()} == {torch.float32}


@pytest.mark.parametrize("flag", ["distillation_use_topk", "distillation_only", "use_fused_kernels"])
def test_what_upstream_reduces_otherwise_stays_upstreams(flag, monkeypatch):
    calls = []
    monkeypatch.setattr(
        transformer_impl.FSDPEngineWithLMHead, "prepare_model_outputs", lambda *arguments: calls.append(arguments)
    )
    batch = TensorDict({}, batch_size=1)
    tu.assign_non_tensor(batch, **{flag: True})
    engine(True).prepare_model_outputs(None, {}, batch, None)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "backend, device, vendor", [("fsdp2", "cpu", "cpu"), ("fsdp2", "cuda", "nvidia"), ("fsdp", "cuda", "nvidia")]
)
def test_the_engine_is_the_one_verl_picks(backend, device, vendor, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", device)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
    assert EngineRegistry.get_engine_cls("language_model", backend) is SteerFSDPEngineWithLMHead


def test_without_the_option_the_engine_is_upstreams():
    assert FSDPEngineConfig().one_pass_reductions is False


def test_a_reference_model_on_a_cpu_is_not_offloaded_to_pinned_memory(monkeypatch):
    if get_device_name() != "cpu":
        pytest.skip("a platform with an accelerator")
    for module, name in (
        (transformer_impl, "CPUOffloadPolicy"),
        (tu, "index_select_tensor_dict"),
        (tu, "chunk_tensordict"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    replace_in_worker()
    assert transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory is False
