# SPDX-License-Identifier: Apache-2.0
"""Packed sequences give what each gives alone."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers import packed_attention

LENGTHS = (5, 1, 9, 3)


@pytest.fixture(params=[1, 2, 4], ids=lambda heads: f"{heads}_key_value_heads")
def model(request):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation=packed_attention.NAME).double()


def packed():
    torch.manual_seed(1)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return {"input_ids": torch.randint(31, position_ids.shape), "position_ids": position_ids, "use_cache": False}


def gradients(model, logits):
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), list(model.parameters()))


def test_logits_and_gradients_are_those_of_each_sequence_alone(model):
    batch = packed()
    together = model(**batch).logits
    reference = Qwen2ForCausalLM._from_config(model.config, attn_implementation="eager").double()
    reference.load_state_dict(model.state_dict())
    alone = torch.cat([reference(ids.unsqueeze(0)).logits for ids in batch["input_ids"][0].split(LENGTHS)], 1)
    torch.testing.assert_close(together, alone)
    for ours, theirs in zip(gradients(model, together), gradients(reference, alone), strict=True):
        # the norms and the rotation compute in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_padded_batch_is_refused(model):
    with pytest.raises(ValueError, match="use_remove_padding=true"):
        model(torch.ones(2, 3, dtype=torch.long), position_ids=torch.arange(3).expand(2, 3), use_cache=False)


def test_a_sequence_beyond_the_sliding_window_is_refused():
    heads = torch.zeros(1, 2, 6, 4)
    with pytest.raises(ValueError, match="sliding_window=4"):
        packed_attention.packed_sdpa(
            None, heads, heads, heads, None, position_ids=torch.arange(6).unsqueeze(0), sliding_window=4
        )
