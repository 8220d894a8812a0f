# SPDX-License-Identifier: Apache-2.0
"""Tasks that a laptop can train on."""
