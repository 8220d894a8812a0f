# SPDX-License-Identifier: Apache-2.0
"""The entropy audit of an optimiser update: the same tokens' entropies just before and just after it.

Both come from passes without gradient, on the same micro-batches, beside the update's own forward and backward pass,
which is left alone: parameters, gradients and random numbers are those of a run without the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
import torch.distributed
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from verl.steer.audit.scores import (
    AuditRequest,
    covariance_estimate,
    sampled_lengths,
    score_estimates,
    signed_estimates,
    write_tokens,
)
from verl.steer.engine.normalizer import gather
from verl.trainer.ppo.core_algos import clip_ratios, clipped_by_loss, clips_as_ppo, map_to_token_weights
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.padding import no_padding_2_padding

#: Flags of the audit's own passes, whatever those of the update are.
FLAGS = {
    "calculate_entropy": True,
    "calculate_sum_pi_squared": True,
    "distillation_use_topk": False,
    "distillation_only": False,
}

#: Fields of the batch, each (batch, response_length), that are audited.
FIELDS = ("advantages", "old_log_probs", "response_mask", "responses")


class EntropyAudit:
    """Stands before an engine among a class's bases: audits the updates of mini-batches that ask for it."""

    #: What is saved of the step under way, a frame for each mini-batch so far.
    audited_tokens: list[pd.DataFrame]
    audited_step: int | None = None

    def train_batch(self, data: TensorDict, loss_function: Callable) -> dict[str, Any]:
        """The engine's; with the non-tensor datum `entropy_audit` its metrics hold `entropy_audit/...` too.

        Args:
            data: one mini-batch of nested tensors; `entropy_audit` is an `AuditRequest` or missing.
            loss_function: verl's, with the actor's configuration bound to it.
        """
        request = tu.get_non_tensor_data(data, "entropy_audit", None)
        if request is None:
            return super().train_batch(data, loss_function)  # type: ignore[misc]
        before = self._statistics(data)
        output = super().train_batch(data, loss_function)  # type: ignore[misc]
        # After the update: the range that its weights were measured by is among the data only now.
        after = self._statistics(data)
        config = loss_function.keywords["config"]  # type: ignore[attr-defined]
        scores = self._audit(data, config, before, after["entropy"] - before["entropy"], request)
        named = {f"entropy_audit/{name}": score for name, score in scores.items()}
        output["metrics"] |= Metric.from_dict(named, AggregationType.MEAN)
        return output

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """The engine's evaluation mode inside its training mode, which is as it was afterwards."""
        mode, training = self.mode, self.module.training  # type: ignore[has-type]
        with self.eval_mode(disable_auto_offload=True):
            yield
        self.mode = mode
        self.module.train(training)
        if isinstance(self.module, FSDPModule):
            # A forward pass leaves the root's parameters gathered for a backward pass, of which there is none here.
            self.module.reshard()

    def _statistics(self, data: TensorDict) -> dict[str, torch.Tensor]:
        """log_probs, entropy and the sums over the vocabulary of the policy as it is, each (batch, response_length)."""
        copy = data.copy()
        tu.assign_non_tensor(copy, **FLAGS)
        with self._inference():
            outputs = self.infer_batch(copy)["model_output"]
        responses = data.select("prompts", "responses").cpu()
        return {name: no_padding_2_padding(values.cpu(), responses) for name, values in outputs.items()}

    def _audit(
        self,
        data: TensorDict,
        config: Any,
        before: dict[str, torch.Tensor],
        true_change: torch.Tensor,
        request: AuditRequest,
    ) -> dict[str, float]:
        """Scores of the mini-batch over all ranks; some of this rank's tokens are saved on the way."""
        fields = (*FIELDS, "entropy") if "entropy" in data else FIELDS
        batch = data.select(*fields).cpu().to_padded_tensor()
        valid, group = batch["response_mask"].bool(), self.get_data_parallel_group()
        advantages, old_log_prob, log_prob = batch["advantages"], batch["old_log_probs"], before["log_probs"]
        estimates = signed_estimates(
            advantages,
            batch.get("entropy", before["entropy"]),
            before["entropy"],
            old_log_prob,
            log_prob,
            before["sum_pi_squared"],
            before["sum_pi_squared_log_pi"],
            clip_ratios(config) if clips_as_ppo(config.policy_loss) else None,
        )
        means = mean_over_ranks(torch.stack([log_prob[valid], advantages[valid].float()]), group)
        estimates["covariance"] = covariance_estimate(log_prob, advantages, *means)
        above, below = clipped_by_loss(config, advantages, old_log_prob, log_prob)
        tokens = {
            "token_id": batch["responses"],
            "prob": log_prob.exp(),
            "entropy": before["entropy"],
            "advantage": advantages,
            "ratio": (log_prob - old_log_prob).exp(),
            **({} if above is None else {"clipped": above | below}),
            **{f"omega_{name}": estimate for name, estimate in estimates.items()},
            "weight": self._token_weights(data, estimates, valid, config.policy_loss),
            "true_change": true_change,
        }
        self._save(tokens, valid, request)
        told = torch.stack([true_change[valid], *(estimate[valid] for estimate in estimates.values())], 1)
        told = told[told.isfinite().all(1)]
        truth, *gathered = gather(told.flatten(), group).cpu().view(-1, told.shape[1]).unbind(1)
        return score_estimates(dict(zip(estimates, gathered, strict=True)), truth)

    def _token_weights(
        self, data: TensorDict, estimates: dict[str, torch.Tensor], valid: torch.Tensor, options: Any
    ) -> torch.Tensor:
        """The weights that the update gave the tokens, (batch, response_length); 1 with a loss other than STEER's."""
        if options.loss_mode != "entropy_control":
            return valid.float()
        scored = data.copy()
        scored["entropy_change"], scored["valid"] = estimates[options.entropy_change_estimator].abs(), valid
        # The same split as the update's: each micro-batch may have a range of its own.
        micro_batches, indices = prepare_micro_batches(
            scored, dp_group=self.get_data_parallel_group(), same_micro_num_in_dp=True
        )
        rows = [
            map_to_token_weights(
                part["entropy_change"],
                part["valid"],
                options.token_weight_min,
                options.token_weight_max,
                token_weight_map=options.token_weight_map,
                quantile=options.token_weight_quantile,
                change_range=tu.get_non_tensor_data(data, "entropy_change_range", None),
            )
            for part in micro_batches
        ]
        weights = torch.cat(rows)
        if indices is None:
            return weights
        order = torch.tensor([index for part in indices for index in part])
        return torch.empty_like(weights).index_copy_(0, order, weights)

    def _save(self, tokens: dict[str, torch.Tensor], valid: torch.Tensor, request: AuditRequest) -> None:
        """Take some responses' valid tokens, and write all that the step has so far."""
        if self.audited_step != request.step:
            self.audited_step, self.audited_tokens = request.step, []
        mini_batch, saved = len(self.audited_tokens), sum(map(len, self.audited_tokens))
        allowance = request.tokens * (mini_batch + 1) // request.mini_batches - saved
        kept = torch.tensor(sampled_lengths(valid.sum(1).tolist(), allowance, request.tokens))
        # The first so many valid tokens of a response.
        response, position = torch.nonzero(valid & (valid.cumsum(1) <= kept[:, None]), as_tuple=True)
        rank = self.get_data_parallel_rank()
        frame = pd.DataFrame(
            {
                "step": request.step,
                "mini_batch": mini_batch,
                "response": (mini_batch * self.get_data_parallel_size() + rank) * len(valid) + response.numpy(),
                "position": position.numpy(),
            }
            | {name: values[response, position].numpy() for name, values in tokens.items()}
        )
        text = self.model_config.tokenizer.batch_decode([[token] for token in frame["token_id"]])
        frame.insert(2, "text", text)
        self.audited_tokens.append(frame)
        if self.is_mp_src_rank_with_outputs():
            write_tokens(pd.concat(self.audited_tokens, ignore_index=True), request, rank)


def mean_over_ranks(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Means of the rows of (rows, tokens), with tokens of its own on each rank, over all ranks of a group: (rows,)."""
    counts = values.new_full((1,), values.shape[1])
    sums = torch.cat([values.sum(1), counts]).double().to(get_device_id())
    torch.distributed.all_reduce(sums, group=group)
    return (sums[:-1] / sums[-1].clamp_min(1)).float().cpu()
