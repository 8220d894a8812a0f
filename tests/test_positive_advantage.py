# SPDX-License-Identifier: Apache-2.0
"""`loss_mode=positive_advantage`, by hand."""

import pytest
import torch
from loss_properties import check_loss, loss_of, row, token_gradients


def batch_of(advantages, ratios):
    log_prob = row(*ratios).log() - 1
    return row(*advantages), None, torch.full_like(log_prob, -1.0), log_prob, torch.ones_like(log_prob).bool()


def test_by_hand():
    """Ratios 1, 1.1, 0.9 and 1.5: the first two losses, -2 and -1.1, count 0.3 times, that of A = -1, 0.9, once.

    A positive advantage has no gradient above the ratio 1.28, and its loss is -1.28.
    """
    batch = batch_of((2.0, 1.0, -1.0, 0.0, 1.0), (1.0, 1.1, 0.9, 1.0, 1.5))
    found = token_gradients("positive_advantage", batch, positive_advantage_weight=0.3)
    torch.testing.assert_close(found, row(0.6, 0.33, -0.9, 0.0, 0.0))
    loss = loss_of("positive_advantage", batch, positive_advantage_weight=0.3).loss
    assert loss.item() == pytest.approx((0.3 * (-2 - 1.1 - 1.28) + 0.9) / 5)
    torch.testing.assert_close(token_gradients("positive_advantage", batch), row(1.0, 0.55, -0.9, 0.0, 0.0))


def test_properties():
    check_loss("positive_advantage", {})
