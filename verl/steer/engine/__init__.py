# SPDX-License-Identifier: Apache-2.0
"""The FSDP engine's additions: one reading of the logits, ranges of a mini-batch, jagged mini-batches."""
