# SPDX-License-Identifier: Apache-2.0
"""Rewards of mathematical answers."""
