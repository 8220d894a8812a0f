# SPDX-License-Identifier: Apache-2.0
"""A real FSDP2 engine with a tiny Qwen2 model, and mini-batches for it, without Ray."""

import pytest
import torch
from tensordict import TensorDict
from verl.plugin.platform import get_platform
from verl.steer.config import FSDPEngineConfig
from verl.steer.engine import fsdp  # noqa: F401 - registers the engine
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.config import FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry

#: For tests of several ranks: they talk by gloo, which FSDP2 does not take for a GPU's tensors.
ON_CPU = pytest.mark.skipif(get_platform().device_name != "cpu", reason="these ranks are for CPUs")


def make_engine(model_folder, packed=False, dtype="fp32", reshard=True, **optimizer):
    model = HFModelConfig(
        path=str(model_folder),
        use_remove_padding=packed,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "packed_sdpa" if packed else "sdpa"},
    )
    precision = {"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            mixed_precision=precision,
            one_pass_reductions=True,
            reshard_after_forward=reshard,
        ),  # fmt: skip
        optimizer_config=FSDPOptimizerConfig(
            **{"lr": 1e-3, "total_training_steps": 10, "lr_warmup_steps": 0} | optimizer
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


LENGTHS, MINI_BATCHES = [5, 9, 1, 12], 2


def mini_batches(dynamic=False, seed=0, packed=False, **flags):
    """Two mini-batches of four responses, some off policy, the last token of each second response not valid."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(MINI_BATCHES):
        rows = {name: [] for name in ("prompts", "responses", "input_ids", "position_ids", "response_mask")}
        rows |= {name: [] for name in ("loss_mask", "old_log_probs", "advantages", "entropy")}
        for index, length in enumerate(LENGTHS):
            prompt, response = torch.randint(256, (3 + length,), generator=generator).split([3, length])
            mask = torch.ones(length, dtype=torch.long)
            mask[-1] = index % 2 == 0
            rows["prompts"].append(prompt)
            rows["responses"].append(response)
            rows["input_ids"].append(torch.cat((prompt, response)))
            rows["position_ids"].append(torch.arange(3 + length))
            rows["response_mask"].append(mask)
            rows["loss_mask"].append(mask)
            rows["old_log_probs"].append(-5.6 + 0.3 * torch.randn(length, generator=generator))
            rows["advantages"].append(torch.randn(1, generator=generator).expand(length).clone())
            rows["entropy"].append(5 + 0.3 * torch.rand(length, generator=generator))
        nested = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in rows.items()}
        batch = TensorDict(nested, batch_size=len(LENGTHS))
        tu.assign_non_tensor(
            batch,
            use_remove_padding=packed,
            pad_mode=DatasetPadMode.NO_PADDING,
            temperature=1.0,
            use_dynamic_bsz=dynamic,
            max_token_len_per_gpu=16,  # sequences 0 and 2, 3, 1: a dynamic split that changes the order
            micro_batch_size_per_gpu=2,
            use_fused_kernels=False,
            calculate_entropy=False,
            global_batch_size=len(LENGTHS),
            **flags,
        )
        found.append(batch)
    return found
