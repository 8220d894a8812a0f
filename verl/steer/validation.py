# SPDX-License-Identifier: Apache-2.0
"""The validations of this fork's trainer: missing samples are no wrong ones, and an evaluation keeps finished files."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import open_dict
from torch.utils.data import DataLoader
from verl.steer.rollout.lost_rollouts import means_over_stored_samples, stored_samples
from verl.steer.validation_metrics import problems_of, sampling_metrics
from verl.trainer.ppo.utils import create_rl_dataset
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.dataset.rl_dataset import collate_fn


def metrics_of_files(by_file: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Join the metrics of several validation files.

    Args:
        by_file: each file's metrics by its name.

    Returns:
        Metric -> value. A metric of several files gets the file's name: `val-core/SOURCE/acc/mean@1` of the file F
        becomes `val-core/F/SOURCE/acc/mean@1`.
    """
    files = Counter(name for metrics in by_file.values() for name in metrics)
    together = {}
    for file, metrics in by_file.items():
        for name, value in metrics.items():
            section, _, rest = name.partition("/")
            together[name if files[name] == 1 else f"{section}/{file}/{rest}"] = value
    return together


class Validates(PPOTrainer):
    """Mix-in for a trainer: this fork's metrics of a validation; `trainer.val_only` evaluates file after file."""

    #: Whether rollouts come from the batched manager.
    batched: bool
    val_prompts: list[str]

    def _validate(self) -> dict[str, float]:
        by_file = self.config.trainer.val_only and hasattr(self.val_dataset, "data_files")  # not of each own class
        return self._validate_one_file_after_another() if by_file else super()._validate()

    def _maybe_log_val_generations(self, inputs: list[str], outputs: list[str], scores: list[float]) -> None:
        """Keep the prompts of the stored samples. verl computes the samples' metrics after this call."""
        self.val_prompts = inputs
        super()._maybe_log_val_generations(inputs, outputs, scores)

    def _val_metrics_update(
        self,
        data_sources: list[str],
        sample_uids: list[str],
        reward_extra_infos_dict: dict[str, list[Any]],
        sample_turns: list[int],
        expected_acc_counts: dict[tuple[str, str], int] | None = None,
    ) -> dict[str, float]:
        """verl's metrics of a validation, but with missing samples left out of the means; verl counts them as wrong."""
        asked = expected_acc_counts or {}
        stored, counts = stored_samples(data_sources, sample_uids, asked)
        metrics = super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, expected_acc_counts=stored
        )
        if stored != asked:
            metrics = means_over_stored_samples(metrics, data_sources, sample_uids, reward_extra_infos_dict, asked)
        # The text of a prompt with images doesn't tell them apart.
        prompts = sample_uids if self.processor else self.val_prompts
        problems = problems_of(data_sources, sample_uids, prompts, asked)
        return metrics | counts | sampling_metrics(data_sources, problems, reward_extra_infos_dict)

    def _validate_one_file_after_another(self) -> dict[str, float]:
        """Evaluate; each file's responses are on disk before the next file begins, so a killed run keeps them."""
        folder, data = self.config.trainer.validation_data_dir, self.config.data
        by_file = {}
        for file in self.val_dataset.data_files:
            name, samples = Path(file).stem, data.get("val_max_samples", -1)
            dataset = create_rl_dataset(
                [file], data, self.tokenizer, self.processor, is_train=False, max_samples=samples
            )
            batch_size = data.get("val_batch_size") or len(dataset)
            self.val_dataloader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn)
            if folder:
                shutil.rmtree(f"{folder}/{name}.part", ignore_errors=True)  # left by a killed evaluation
                with open_dict(self.config):
                    self.config.trainer.validation_data_dir = f"{folder}/{name}.part"
            if self.batched:
                # A file's seeds do not depend on the files before it.
                self.agent_loop_manager.submitted.clear()  # type: ignore[attr-defined]
            by_file[name] = super()._validate()
            if folder:
                self._shutdown_dump_executor()
                self._init_dump_executor()
                os.replace(f"{folder}/{name}.part", f"{folder}/{name}")
        return metrics_of_files(by_file)
