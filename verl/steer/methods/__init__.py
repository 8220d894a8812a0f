# SPDX-License-Identifier: Apache-2.0
"""Losses and advantage estimators of other papers, to compare STEER with."""
