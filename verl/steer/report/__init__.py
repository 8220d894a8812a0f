# SPDX-License-Identifier: Apache-2.0
"""Metrics files, figures and the page of a run."""
