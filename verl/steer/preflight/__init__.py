# SPDX-License-Identifier: Apache-2.0
"""Checks of a machine and a configuration before training: `run/preflight.sh`."""
