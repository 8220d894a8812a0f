# SPDX-License-Identifier: Apache-2.0
"""Rewards of mathematical answers and of programs, and those of a reward model."""
