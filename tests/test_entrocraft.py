# SPDX-License-Identifier: Apache-2.0
"""`adv_estimator=entrocraft`: which answers are rejected, by hand."""

import pytest
import torch
from test_interventions import MASK, REWARDS, advantages_of, registered_estimators  # noqa: F401 - a fixture
from verl.steer.methods.entrocraft import EntrocraftOptions

CONFIG = {
    "entropy_lower_start": 0.5,
    "entropy_lower_end": 0.3,
    "entropy_upper_start": 1.0,
    "entropy_upper_end": 0.4,
    "norm_adv_by_std_in_grpo": False,
}

#: Below the band right answers are rejected, above it wrong ones, in it none; rewards 1, 1, -1, -1.
REJECTED = {"below": [0.0, 0.0, -1.0, -1.0], "in": [1.0, 1.0, -1.0, -1.0], "above": [1.0, 1.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    "entropy, progress, side",
    [
        (0.49, 0.0, "below"),
        (0.51, 0.0, "in"),
        (0.99, 0.0, "in"),
        (1.01, 0.0, "above"),
        (0.44, 0.25, "below"),
        (0.46, 0.25, "in"),
        (0.84, 0.25, "in"),
        (0.86, 0.25, "above"),
        (0.29, 1.0, "below"),
        (0.35, 1.0, "in"),
        (0.41, 1.0, "above"),
    ],
)
def test_by_hand(entropy, progress, side):
    """At a quarter of the run the band is 0.5 - 0.2 / 4 = 0.45 to 1 - 0.6 / 4 = 0.85."""
    entropys = torch.where(MASK == 1, entropy, 50.0)
    found = advantages_of("entrocraft", REWARDS, MASK, ["a"] * 4, CONFIG, entropy=entropys, progress=progress)
    torch.testing.assert_close(found, torch.tensor(REJECTED[side])[:, None] * MASK)


def test_the_mean_is_over_tokens():
    """Entropies 0.9, 0.9 of a long answer and 0 of a short one: 0.6 over tokens, 0.45 over answers."""
    mask, entropys = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[0.9, 0.9], [0.0, 0.0]])
    found = advantages_of("entrocraft", [1.0, -1.0], mask, ["a"] * 2, CONFIG, entropy=entropys)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))


def test_in_the_band_the_advantages_are_grpos():
    """Rewards 1, -1, -1, -1 have the mean -0.5 and the deviation 1."""
    config = CONFIG | {"norm_adv_by_std_in_grpo": True}
    rewards = [1.0, -1.0, -1.0, -1.0]
    found = advantages_of("entrocraft", rewards, MASK, ["a"] * 4, config, entropy=torch.full((4, 2), 0.7))
    torch.testing.assert_close(found, torch.tensor([1.5, -0.5, -0.5, -0.5])[:, None] * MASK)


def test_a_band_upside_down_is_refused():
    with pytest.raises(ValueError, match="algorithm.entropy_lower_end=0.6: expected at most entropy_upper_end=0.5"):
        EntrocraftOptions(entropy_lower_end=0.6)
