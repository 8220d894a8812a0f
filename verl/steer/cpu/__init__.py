# SPDX-License-Identifier: Apache-2.0
"""What Ray, FSDP2 and vLLM need on a machine without an accelerator."""
