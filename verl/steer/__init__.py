# SPDX-License-Identifier: Apache-2.0
"""What this fork adds that has no counterpart in verl."""
