# SPDX-License-Identifier: Apache-2.0
"""The loss function of the training workers: verl's `ppo_loss`, for the policy losses of this fork as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import verl.steer.methods  # noqa: F401 - registers the losses
from tensordict import TensorDict
from torch import Tensor
from verl.steer.methods.registry import POLICY_LOSSES, clipped_by_loss
from verl.steer.token_metrics import token_metrics
from verl.trainer.ppo.core_algos import (
    LossInputs,
    LossOutputs,
    PerToken,
    agg_loss,
    estimate_entropy_change,
    kl_penalty,
)
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss as verl_ppo_loss
from verl.workers.utils.padding import response_from_nested, response_to_nested

#: Outputs of the update's forward pass that are fields of `LossInputs`: name there -> field.
MODEL_OUTPUTS = {
    "log_probs": "log_prob",
    "entropy": "current_entropys",
    "sum_pi_squared": "sum_pi_squared",
    "sum_pi_squared_log_pi": "sum_pi_squared_log_pi",
    "nucleus_entropy": "nucleus_entropys",
}

#: Columns of the batch that are fields of `LossInputs`.
COLUMNS = {
    "old_log_probs": "old_log_prob",
    "advantages": "advantages",
    "response_mask": "response_mask",
    "entropy": "entropys",
    "rollout_is_weights": "rollout_is_weights",
    "token_weights": "token_weights",
}


def loss_inputs(model_output: dict[str, Tensor], data: TensorDict) -> LossInputs:
    """The inputs of a policy loss.

    Args:
        model_output: nested tensors of the forward pass: `log_probs` and, if requested, `entropy`, `sum_pi_squared`,
            `sum_pi_squared_log_pi` and `nucleus_entropy`; each (batch, tokens of the sequence).
        data: one micro-batch of nested tensors, with the non-tensor data `entropy_change_range`, `entropy_coeff` and
            `entropy_anchor` if a loss reads them.

    Returns:
        Padded tensors, each (batch, response_length). With the flag `skip_old_log_prob` of `data`, `old_log_prob` is
        `log_prob`, detached. Without the old policy's entropies, as in bypass mode, `entropys` are the current
        policy's.
    """
    batch = data.select(*COLUMNS, strict=False).to_padded_tensor()
    fields: dict[str, Any] = {COLUMNS[column]: values for column, values in batch.items()}
    fields["response_mask"] = fields["response_mask"].bool()
    outputs = {field: model_output[name] for name, field in MODEL_OUTPUTS.items() if model_output.get(name) is not None}
    fields |= padded_responses(outputs, data, fields["response_mask"].shape[1])
    if tu.get_non_tensor_data(data, "skip_old_log_prob", False):
        fields["old_log_prob"] = fields["log_prob"].detach()
    if "entropys" not in fields and "current_entropys" in fields:
        fields["entropys"] = fields["current_entropys"].detach()
    fields["change_range"] = tu.get_non_tensor_data(data, "entropy_change_range", None)
    for name in ("entropy_coeff", "entropy_anchor"):
        fields[name] = tu.get_non_tensor_data(data, name, None)
    return LossInputs(**fields)


def padded_responses(outputs: Mapping[str, Tensor], data: TensorDict, response_length: int) -> dict[str, Tensor]:
    """verl's `no_padding_2_padding` of several outputs, without its waits for the device at each sequence.

    Args:
        outputs: nested, (batch, tokens of the sequence); the output at a token is of the token after it.
        data: with the nested columns `prompts` and `responses`.
        response_length: tokens of the longest response.

    Returns:
        (batch, response_length) by the same names, 0 beyond a response.
    """
    lengths = data["responses"].offsets().diff().unsqueeze(1)
    ends = (data["prompts"].offsets() + data["responses"].offsets())[1:].unsqueeze(1) - 1
    position = torch.arange(response_length, device=lengths.device)
    index = torch.minimum(ends - lengths + position, ends - 1).clamp_min(0).flatten()
    beyond = position >= lengths
    return {
        name: values.values().index_select(0, index).view_as(beyond).masked_fill(beyond, 0)
        for name, values in outputs.items()
    }


def ppo_loss(
    config: ActorConfig, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `ppo_loss`, and the same for the policy losses of this fork.

    Args:
        config: the actor's configuration.
        model_output, data: as in `loss_inputs`. Three flags of `data`: with `skip_old_log_prob` the old
            log-probs are those of this forward pass; `token_metrics` requests `verl.steer.token_metrics` of losses that
            estimate no entropy change, `return_model_output` the loss's weights as `model_output["token_weights"]`,
            nested (batch, tokens of the response).
        dp_group: the data-parallel process group.

    Returns:
        The loss, a scalar with gradient, and metrics. Those whose names end in `_min` and `_max` are reduced over
        micro-batches and ranks by minimum and maximum.
    """
    if config.policy_loss.loss_mode in POLICY_LOSSES:
        outputs = _policy_loss(config, loss_inputs(model_output, data), data)
        if outputs.token_weights is not None and tu.get_non_tensor_data(data, "return_model_output", False):
            model_output["token_weights"] = response_to_nested(outputs.token_weights, data["response_mask"])
        return outputs.loss, outputs.metrics
    if tu.get_non_tensor_data(data, "skip_old_log_prob", False):
        data["old_log_probs"] = response_from_nested(model_output["log_probs"].detach(), data["response_mask"])
    outputs = LossOutputs(*verl_ppo_loss(config, model_output, data, dp_group))
    if tu.get_non_tensor_data(data, "token_metrics", False):
        found = on_host(_token_metrics(config, loss_inputs(model_output, data), outputs), outputs.loss.device)
        outputs.metrics |= Metric.from_dict(found, AggregationType.MEAN)
    return outputs.loss, outputs.metrics


def _policy_loss(config: ActorConfig, inputs: LossInputs, data: TensorDict) -> LossOutputs:
    """A policy loss of this fork with verl's entropy bonus and KL loss; metrics, also the tokens', become `Metric`."""
    sizes = {name: data[name] for name in ("batch_num_tokens", "global_batch_size")}
    sizes["loss_scale_factor"] = config.loss_scale_factor
    config.global_batch_info.update(sizes, dp_size=data["dp_size"])
    # With a global size each micro-batch contributes its part of the global mean, and the parts add up.
    is_global = data["dp_size"] > 1 or any(size is not None for size in sizes.values())
    aggregation = AggregationType.SUM if is_global else AggregationType.MEAN

    def aggregate(values: PerToken) -> Tensor:
        return agg_loss(values, inputs.response_mask, config.loss_agg_mode, **config.global_batch_info)

    outputs = POLICY_LOSSES[config.policy_loss.loss_mode].compute(inputs, config)
    losses = {"actor/pg_loss": outputs.loss}
    if inputs.current_entropys is not None:
        entropy = losses["actor/entropy_loss"] = aggregate(inputs.current_entropys.float())
        if config.entropy_coeff:  # else the backward pass over the vocabulary would also take the entropy's gradient, 0
            outputs.loss = outputs.loss - config.entropy_coeff * entropy
    if config.use_kl_loss:
        reference = data["ref_log_prob"].to_padded_tensor(0)
        kl = kl_penalty(inputs.log_prob.float(), reference.float(), config.kl_loss_type)
        kl_loss = losses["kl_loss"] = aggregate(kl if outputs.kl_weights is None else kl * outputs.kl_weights)
        outputs.loss = outputs.loss + config.kl_loss_coef * kl_loss
    if outputs.entropy_change is not None or tu.get_non_tensor_data(data, "token_metrics", False):
        outputs.metrics |= _token_metrics(config, inputs, outputs)
    kinds = {name: name[-3:] if name.endswith(("_min", "_max")) else "mean" for name in outputs.metrics}
    found = on_host(outputs.metrics | losses, outputs.loss.device)
    outputs.metrics = {name: Metric(kinds.get(name, aggregation), value) for name, value in found.items()}
    if config.use_kl_loss:
        outputs.metrics["kl_coef"] = config.kl_loss_coef
    return outputs


def on_host(scalars: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Scalars as numbers. Tensors of one element are read together: the host waits for the device at each read."""
    tensors = [one.detach().to(device).view(()) for one in scalars.values() if torch.is_tensor(one)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return {name: next(numbers) if torch.is_tensor(value) else value for name, value in scalars.items()}


def _token_metrics(config: ActorConfig, inputs: LossInputs, outputs: LossOutputs) -> dict[str, Any]:
    """Metrics of the tokens; for a loss that estimates no entropy change it is the `released` estimate."""
    change = outputs.entropy_change
    if change is None and inputs.entropys is not None:
        change = estimate_entropy_change(inputs).mul_(inputs.response_mask)
    return token_metrics(inputs, clipped_by_loss(config, inputs), change, outputs.token_weights)
