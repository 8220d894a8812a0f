# SPDX-License-Identifier: Apache-2.0
"""Rare cases of the advantage estimators: empty responses, several prompts, bounds, bfloat16."""

import pytest
import torch
from test_entrocraft import CONFIG, REJECTED
from test_interventions import MASK, REWARDS, advantages_of, registered_estimators  # noqa: F401 - a fixture


def test_a_response_without_tokens_takes_no_part_of_its_classes_reward():
    """Of three right answers one has no valid token: 0.8 + 0.2 * 2 * H / 3 of the others' H of 1 and 2, less 1.

    Of three wrong ones, 0.8 + 0.2 * 2 / H / 1.5 negated, plus 1: the empty one's 1 / H would take nearly all.
    """
    mask = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    entropys = torch.tensor([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
    config = {"entropy_reward_share": 0.2, "norm_adv_by_std_in_grpo": False}
    end = 0.2 / 3
    for reward in (1.0, -1.0):
        found = advantages_of("grpo_s", [reward] * 3, mask, ["a"] * 3, config, entropy=entropys)
        torch.testing.assert_close(found, torch.tensor([[-end, -end], [end, end], [0.0, 0.0]]))


@pytest.mark.parametrize("name", ["gtpo", "grpo_s"])
def test_the_classes_of_different_prompts_are_standardised_apart(name):
    """The right answers to the first prompt and the wrong ones to the second; each has one response of each class.

    The only response of its class has its class's mean, so that no token has an advantage in GRPO-S, nor in GTPO,
    where tokens of a response without others have equal rewards. With another prompt's class they would have some.
    """
    entropys, mask = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]), torch.ones(4, 2)
    config = {"norm_adv_by_std_in_grpo": False}
    found = advantages_of(name, [1.0, -1.0, 1.0, -1.0], mask, ["a", "a", "b", "b"], config, entropy=entropys)
    alone = [
        advantages_of(name, [1.0, -1.0], mask[:2], ["x", "x"], config, entropy=entropys[rows])
        for rows in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("entropy", [0.5, 1.0])
def test_the_ends_of_the_band_are_in_it(entropy):
    entropys = torch.where(MASK == 1, entropy, 50.0)
    found = advantages_of("entrocraft", REWARDS, MASK, ["a"] * 4, CONFIG, entropy=entropys, progress=0.0)
    torch.testing.assert_close(found, torch.tensor(REJECTED["in"])[:, None] * MASK)


def test_the_mean_of_bf16_entropies_is_computed_in_float32():
    """256 tokens of 0.5 and one of 0.25: 0.49903, below the band from 0.5; in bfloat16 their sum is that of 257."""
    mask = torch.ones(2, 257)
    entropys = torch.full((2, 257), 0.5)
    entropys[:, -1] = 0.25
    rewards = [1.0, -1.0]
    found, expected = (
        advantages_of("entrocraft", rewards, mask, ["a"] * 2, CONFIG, entropy=values, progress=0.0)
        for values in (entropys.bfloat16(), entropys)
    )
    assert (expected[0] == 0).all()
    assert torch.equal(found, expected)


def test_clip_b_clips_small_scores_too():
    """Log-probs -20, -20 and, of the wrong answer, -18: scores exp(ln pi) (1 + ln pi) of -3.9e-8 and -2.6e-7.

    The mean is -1.1e-7 and the deviation 1.0e-7, so that the wrong answer's is 1.4 deviations below the mean.
    """
    fields = {"old_log_probs": torch.tensor([[-20.0], [-20.0], [-18.0]]), "entropy": torch.ones(3, 1)}
    for mu, kept in ((1.5, -1.0), (1.3, 0.0)):
        config = {"norm_adv_by_std_in_grpo": False, "clip_b_mu": mu}
        found = advantages_of("clip_b", [0.5, 0.5, -1.0], torch.ones(3, 1), ["a"] * 3, config, **fields)
        assert found[2].item() == kept and (found[:2] > 0).all()
