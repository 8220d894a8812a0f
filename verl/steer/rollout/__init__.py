# SPDX-License-Identifier: Apache-2.0
"""Rollouts generated, graded and stored a batch at a time."""
