# SPDX-License-Identifier: Apache-2.0
"""Packed sequences give what each gives alone."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.steer.cpu import packed_attention

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


def test_the_lengths_are_found_once_for_all_layers(model, monkeypatch):
    """The host waits for the device where it reads them."""
    found, diff = [], torch.diff
    monkeypatch.setattr(torch, "diff", lambda *args, **options: found.append(args) or diff(*args, **options))
    batch = packed()
    model(**batch)
    assert len(found) == 1
    other = torch.arange(sum(LENGTHS)).unsqueeze(0)
    torch.testing.assert_close(
        model(**batch | {"position_ids": other}).logits, model(**batch | {"position_ids": other.clone()}).logits
    )
    assert len(found) == 3


def test_a_padded_batch_is_refused(model):
    with pytest.raises(ValueError, match="use_remove_padding=true"):
        model(torch.ones(2, 3, dtype=torch.long), position_ids=torch.arange(3).expand(2, 3), use_cache=False)


def heads(count, seed=2):
    """Queries, keys and values of a head size of 4, (1, 2, count, 4), and positions of sequences of 4 and count - 4."""
    torch.manual_seed(seed)
    position_ids = torch.cat([torch.arange(4), torch.arange(count - 4)]).unsqueeze(0)
    return torch.randn(3, 1, 2, count, 4, dtype=torch.float64).unbind(), position_ids


def attention(inputs, position_ids, attention_mask=None, **options):
    output, weights = packed_attention.packed_sdpa(None, *inputs, attention_mask, position_ids=position_ids, **options)
    assert weights is None
    return output.transpose(1, 2)


@pytest.mark.parametrize("scaling", [None, 0.5, 0.1, 2.0])
def test_logits_are_scaled(scaling):
    (query, key, value), position_ids = heads(10)
    same_sequence = torch.arange(10).ge(4).unsqueeze(0) == torch.arange(10).ge(4).unsqueeze(1)
    logits = query @ key.mT * (4**-0.5 if scaling is None else scaling)
    expected = logits.masked_fill(~(same_sequence & torch.ones(10, 10).tril().bool()), -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(attention((query, key, value), position_ids, scaling=scaling), expected)


def test_dropout_reaches_the_probabilities():
    """Of values that are all 1 the mean over the probabilities is 1, until dropout takes some away."""
    (query, key, value), position_ids = heads(10)
    inputs = query, key, torch.ones_like(value)
    torch.testing.assert_close(attention(inputs, position_ids), inputs[2])
    dropped = attention(inputs, position_ids, dropout=0.5)
    assert (dropped[:, :, 0] == 2).logical_or(dropped[:, :, 0] == 0).all()  # a first token has one probability
    assert not torch.allclose(dropped, inputs[2])


def test_a_mask_is_refused():
    inputs, position_ids = heads(10)
    with pytest.raises(ValueError, match="attention_mask"):
        attention(inputs, position_ids, torch.ones(1, 1, 10, 10, dtype=torch.bool))


def test_a_sequence_may_be_as_long_as_the_sliding_window_and_no_longer():
    inputs, position_ids = heads(10)
    assert torch.equal(attention(inputs, position_ids, sliding_window=6), attention(inputs, position_ids))
    with pytest.raises(ValueError, match=r"sliding_window=5: .* 6 tokens"):
        attention(inputs, position_ids, sliding_window=5)
