# SPDX-License-Identifier: Apache-2.0
"""The checks of the training ranks; torchrun starts `python -m verl.steer.preflight.ranks FOLDER` for each of them."""

import json
import os
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.steer.engine import fsdp  # noqa: F401 - registers the engine
from verl.steer.engine.vocab_reductions import vocab_reductions
from verl.steer.preflight.processes import CHECKPOINT, TOKENS, write_row
from verl.steer.preflight.rows import GIB, run_check
from verl.steer.replacements import replace_in_worker
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_nccl_backend, get_torch_device
from verl.workers.engine import EngineRegistry
from verl.workers.utils.padding import response_from_nested

CHECKS = ("collectives", "kernels", "log-probs", "checkpoint")


class Rank:
    """The checks of one rank, and its engine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.device = folder, OmegaConf.load(folder / "config.yaml"), get_device_name()
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def collectives(self) -> str:
        """A sum over all ranks."""
        backend = get_nccl_backend()
        if self.device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo" if self.device == "cpu" else f"cpu:gloo,{self.device}:{backend}")
        total = torch.full((1 << 20,), self.rank + 1.0, device=self.device)
        dist.all_reduce(total)
        if not (total == self.ranks * (self.ranks + 1) / 2).all():
            raise ValueError(f"{backend}: a sum over {self.ranks} ranks is wrong: see the log with NCCL_DEBUG=INFO")
        return f"{backend}, ranks: {self.ranks}"

    def kernels(self) -> str:
        """Log-prob, entropy and their gradient by one pass over the vocabulary, against torch in float64."""
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        logits = (3 * torch.randn(32, 50_000, device=self.device)).to(dtype).requires_grad_()
        labels = torch.randint(50_000, (32, 1), device=self.device)
        log_pi = logits.double().log_softmax(-1)
        ours: Any = vocab_reductions(logits, labels[:, 0])
        pairs: list[Any] = [
            (ours.log_prob, log_pi.gather(-1, labels)[:, 0]),
            (ours.entropy, -(log_pi.exp() * log_pi).sum(-1)),
        ]
        pairs += [[torch.autograd.grad(sum(way).sum(), logits)[0] for way in zip(*pairs, strict=True)]]
        off = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
        found = "off by {:.0e} (log-prob), {:.0e} (entropy) and {:.0e} (gradient)".format(*off)
        # The gradient has the logits' dtype, and values up to 1.
        if not (max(off[:2]) < 1e-4 and off[2] < 1e-5 + 2 * torch.finfo(dtype).eps):
            raise ValueError(f"{found}: set actor_rollout_ref.actor.fsdp_config.one_pass_reductions=false")
        return f"{found} for {dtype} on {self.device}"

    @cached_property
    def engine(self) -> Any:
        """The run's engine. Its checkpoints have no export, and no optimizer, which has no state yet."""
        replace_in_worker()
        root = self.config.actor_rollout_ref
        root.actor.checkpoint.save_contents = root.actor.checkpoint.load_contents = ["model", "extra"]
        actor, model = omega_conf_to_dataclass(root.actor), omega_conf_to_dataclass(root.model)
        actor.engine.use_remove_padding = model.use_remove_padding
        parts = {"model_config": model, "engine_config": actor.engine, "optimizer_config": actor.optim}
        parts |= {"model_type": "language_model", "checkpoint_config": actor.checkpoint}
        engine = EngineRegistry.new(backend=actor.strategy, **parts)
        engine.initialize()
        return engine

    def engine_log_probs(self, prompt: list[int], responses: list[list[int]]) -> Tensor:
        """The engine's log-probs of all responses' tokens, in one micro-batch."""
        rows = [torch.tensor(prompt + response) for response in responses]
        masks = [torch.ones(len(response), dtype=torch.long) for response in responses]
        columns = {"input_ids": rows, "position_ids": [torch.arange(len(row)) for row in rows], "loss_mask": masks}
        nested = {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in columns.items()}
        batch = TensorDict(nested, batch_size=len(rows)).to(self.device)
        flags = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": len(rows), "compute_loss": False}
        model = self.config.actor_rollout_ref.model
        flags |= {"use_remove_padding": model.use_remove_padding, "use_fused_kernels": model.use_fused_kernels}
        tu.assign_non_tensor(batch, temperature=1.0, **flags)
        with self.engine.eval_mode():
            found = self.engine.infer_batch(batch)["model_output"]["log_probs"]
        return response_from_nested(found.cpu(), batch["loss_mask"].cpu()).values().float()

    def log_probs(self) -> str:
        """The engine's log-probs of vLLM's tokens, against vLLM's."""
        if adapter := self.config.actor_rollout_ref.model.lora_adapter_path:
            return f"not compared: vLLM sampled without model.lora_adapter_path={adapter}"
        if not (self.folder / TOKENS).exists():
            raise ValueError("vLLM sampled no tokens to compare with: repair vLLM first")
        tokens = json.loads((self.folder / TOKENS).read_text())
        theirs = torch.tensor(sum(tokens["log_probs"], []))
        off = (self.engine_log_probs(tokens["prompt"], tokens["responses"]) - theirs).abs()
        found = (
            f"vLLM and FSDP differ by {off.mean():.0e} nats on average ({off.max():.0e} at most) on {len(off)} tokens"
        )
        # In bfloat16 logits of about 10 are rounded by 0.03; other weights differ by whole nats.
        if not off.mean() < (1e-3 if self.device == "cpu" else 0.15):
            raise ValueError(f"{found}: compare the versions of vLLM and transformers with pyproject.toml's")
        return found

    def checkpoint(self) -> str:
        """The trained weights written where the run writes them, wiped, and read back."""
        place, probe = Path(self.config.trainer.default_local_dir, CHECKPOINT), ([1, 2], [[3, 4], [5, 6]])
        before, start = self.engine_log_probs(*probe), time.monotonic()
        self.engine.save_checkpoint(str(place))
        seconds = time.monotonic() - start
        size = sum(file.stat().st_size for file in place.rglob("*.pt")) / GIB
        adapters_alone = self.config.actor_rollout_ref.actor.checkpoint.get("save_lora_only")
        get_torch_device().synchronize()  # an offloading save copies on after its return
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                if parameter.requires_grad or not adapters_alone:
                    parameter.zero_()
        self.engine.load_checkpoint(str(place))
        if not torch.equal(self.engine_log_probs(*probe), before):
            raise ValueError(f"{place}: read other weights than were written: check the file system")
        return f"{size:.2f} GiB written in {seconds:.1f} s and read back, in {place.parent}"


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rank = Rank(place)
    for name in CHECKS:
        write_row(place, "ranks", rank.rank, run_check(name, getattr(rank, name.replace("-", "_"))))
