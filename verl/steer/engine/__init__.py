# SPDX-License-Identifier: Apache-2.0
"""The FSDP engine's additions: one reading of the logits, ranges and weights of a mini-batch, and the influence."""
