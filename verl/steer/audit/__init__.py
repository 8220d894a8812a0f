# SPDX-License-Identifier: Apache-2.0
"""The entropy audit: estimated entropy changes against true ones."""
