# SPDX-License-Identifier: Apache-2.0
"""The loss and the configuration of a run that uses none of the fork's options.

    VERL_USE_EXTERNAL_PLUGINS=none python tests/plain_step.py BATCH    # those of verl without the fork

BATCH is a file of a micro-batch and the model's output for it.
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss


def outcome(batch: Path) -> str:
    """The loss, bit for bit, and the configuration as YAML."""
    data, output = torch.load(batch, weights_only=False)
    config = FSDPActorConfig(rollout_n=8, ppo_micro_batch_size_per_gpu=8, policy_loss=PolicyLossConfig())
    loss = ppo_loss(config, output, data)[0].item().hex()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return f"{loss}\n{OmegaConf.to_yaml(compose('ppo_trainer'))}"


if __name__ == "__main__":
    print(outcome(Path(sys.argv[1])), end="")
