# SPDX-License-Identifier: Apache-2.0
"""Time of STEER's policy loss against upstream's, on the same micro-batch in the same run.

    python benchmarks/policy_loss.py --shape 256 3072
    python benchmarks/policy_loss.py --threads 1 --modes eager --rounds 30
    python benchmarks/policy_loss.py --profile          # where the time of STEER's loss goes, by operator

One row for each way, medians over interleaved rounds after a warm-up, forward and backward to the log-probs:

    vanilla            upstream's `compute_policy_loss_vanilla`
    vanilla, logged    the same with the token metrics that every run of this fork logs, as `ppo_loss` adds them
    steer …            `steer_policy_loss` and the token metrics, the first with its default options
    largest estimate   STEER's estimates and their largest, forward alone: what the loss needs before its first weight
    boolean-indexed    the default options once more, on the valid tokens picked out by a boolean index and scattered
                       back: the same weights, which the program checks, then upstream's loss with them

and below them the token weights alone, forward only. Compiled rows are torch.compile with one graph. On CUDA every
way of STEER's runs once with `torch.cuda.set_sync_debug_mode("error")`: a loss that waits for the device fails.

Goals, set for a CPU: STEER's loss takes at most 1.5 times upstream's, compiled 1.15 times, and the boolean-indexed way
at least 2.5 times STEER's.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from verl.steer.config import PolicyLossConfig
from verl.steer.token_metrics import token_metrics
from verl.trainer.ppo.core_algos import (
    ENTROPY_CHANGE_ESTIMATORS,
    ENTROPY_CHANGE_FLOOR,
    PROBABILITY_MARGIN,
    LossInputs,
    clip_ratios,
    compute_policy_loss_vanilla,
    compute_token_weights,
    estimate_entropy_change,
    ppo_clipped,
    steer_policy_loss,
)
from verl.workers.config import FSDPActorConfig

LOSS, WEIGHTS = "loss, forward and backward", "token weights alone"
MODES = ("eager", "compiled")
Work = Callable[[], object]
Batch = dict[str, Tensor]

# What upstream reads with `.item()` stays in the graph: without this its loss can't be compiled to one.
torch._dynamo.config.capture_scalar_outputs = True


def actor_config(**policy_loss: object) -> FSDPActorConfig:
    """The actor of the released runs, as far as the loss reads it."""
    return FSDPActorConfig(
        rollout_n=8,
        ppo_micro_batch_size_per_gpu=8,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=10.0,
        policy_loss=PolicyLossConfig(**policy_loss),
    )


def micro_batch(rows: int, length: int, device: str) -> Batch:
    """A batch padded as verl pads it: zeros and a boolean mask; lengths log-normal, one row in ten cut off at the end.

    Log-probs as of a language model: most tokens all but certain, some far from it.
    """
    lengths = (torch.randn(rows).mul(0.8).exp() * length * 0.35).clamp(1, length).long()
    mask = torch.arange(length) < lengths.unsqueeze(1)
    old_log_prob = -torch.rand(rows, length).pow(6).mul(8)
    columns = {
        "old_log_prob": old_log_prob,
        "log_prob": (old_log_prob + 0.05 * torch.randn(rows, length)).clamp(max=0.0),
        "advantages": torch.randn(rows, 1).expand(rows, length),
        "entropys": torch.rand(rows, length).pow(4).mul(3),
    }
    batch = {name: (values * mask).to(device) for name, values in columns.items()} | {"response_mask": mask.to(device)}
    batch["log_prob"].requires_grad_()
    return batch


def boolean_indexed_weights(
    advantages: Tensor,
    entropys: Tensor,
    old_log_prob: Tensor,
    log_prob: Tensor,
    response_mask: Tensor,
    token_weight_min: float = 0.8,
    token_weight_max: float = 1.2,
    linear: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """STEER's weights and their metrics by picking the valid tokens out, computing on those, and putting them back."""
    valid = response_mask.bool()
    log_pi, old_log_pi = log_prob.detach()[valid], old_log_prob[valid]
    prob = log_pi.exp().clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)
    old_prob = old_log_pi.exp().clamp(PROBABILITY_MARGIN, 1.0)
    change = advantages[valid] / old_prob * prob * -torch.expm1(log_pi) * (log_pi + entropys[valid])
    change = torch.nan_to_num(change.abs(), nan=0.0, posinf=0.0)
    if linear:
        low, high = change.min(), change.max()
        position = (change - low) / (high - low) if high > low else torch.full_like(change, 0.5)
        weights = token_weight_max + (token_weight_min - token_weight_max) * position
    else:
        decay = -math.log(token_weight_min) / max(change.max(), ENTROPY_CHANGE_FLOOR)
        weights = torch.exp(-decay * change).clamp(token_weight_min, token_weight_max)
    metrics = {
        "actor/token_weights_mean": weights.mean().item(),
        "actor/token_weights_min": weights.min().item(),
        "actor/token_weights_max": weights.max().item(),
        "actor/entropy_change_mean": change.mean().item(),
        "actor/entropy_change_max": change.max().item(),
    }
    token_weights = torch.zeros_like(log_prob)
    token_weights[valid] = weights
    return token_weights, metrics


def vanilla_loss(config: FSDPActorConfig, batch: Batch) -> Tensor:
    arguments = (batch["old_log_prob"], batch["log_prob"], batch["advantages"], batch["response_mask"])
    return compute_policy_loss_vanilla(*arguments, "token-mean", config)[0]


def logged_vanilla_loss(config: FSDPActorConfig, batch: Batch) -> Tensor:
    inputs = LossInputs(**batch)
    token_metrics(inputs, ppo_clipped(inputs, clip_ratios(config)), estimate_entropy_change(inputs))
    return vanilla_loss(config, batch)


def steer_loss(config: FSDPActorConfig, batch: Batch) -> Tensor:
    # `exact` reads these too; the time doesn't depend on the values.
    read_by_exact = dict.fromkeys(("current_entropys", "sum_pi_squared", "sum_pi_squared_log_pi"), batch["entropys"])
    inputs = LossInputs(**batch, **read_by_exact)
    outputs = steer_policy_loss(inputs, config)
    token_metrics(inputs, ppo_clipped(inputs, clip_ratios(config)), outputs.entropy_change, outputs.token_weights)
    return outputs.loss


def boolean_indexed_loss(config: FSDPActorConfig, batch: Batch) -> Tensor:
    with torch.no_grad():
        token_weights, _ = boolean_indexed_weights(**batch)
        ratio, advantages = torch.exp(batch["log_prob"] - batch["old_log_prob"]), batch["advantages"]
        valid = batch["response_mask"].bool()
        negative, ratio = advantages[valid] < 0, ratio[valid]
        # The two metrics that STEER's loss has beside those of the weights.
        (~negative & (ratio > 1.28) | negative & (ratio > 10.0)).float().mean().item()
        (negative & (ratio < 0.8)).float().mean().item()
    arguments = (batch["old_log_prob"], batch["log_prob"], batch["advantages"], batch["response_mask"])
    return compute_policy_loss_vanilla(*arguments, "token-mean", config, token_weights)[0]


def largest_estimate(batch: Batch) -> Tensor:
    return estimate_entropy_change(LossInputs(**batch)).mul_(batch["response_mask"]).amax()


def losses() -> dict[str, Callable[[Batch], Tensor]]:
    """Every loss by its name in the table."""
    table = {
        "vanilla": partial(vanilla_loss, actor_config()),
        "vanilla, logged": partial(logged_vanilla_loss, actor_config()),
        "steer": partial(steer_loss, actor_config()),
        "steer, exponential": partial(steer_loss, actor_config(linear=False)),
    }
    for estimator in ENTROPY_CHANGE_ESTIMATORS:
        if estimator != "released":
            table[f"steer, {estimator}"] = partial(steer_loss, actor_config(entropy_change_estimator=estimator))
    return table | {"boolean-indexed": partial(boolean_indexed_loss, actor_config())}


def forward_and_backward(loss: Callable[[Batch], Tensor], batch: Batch) -> None:
    torch.autograd.grad(loss(batch), batch["log_prob"])


def in_mode(mode: str, loss: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    return torch.compile(loss, fullgraph=True, dynamic=False) if mode == "compiled" else loss


def works(batch: Batch, modes: list[str]) -> dict[tuple[str, str, str], Work]:
    """What is timed, by part, mode and way."""
    table: dict[tuple[str, str, str], Work] = {}
    for mode in modes:
        for name, loss in losses().items():
            # A boolean index and a branch on a maximum leave no single graph.
            if mode == "compiled" and name == "boolean-indexed":
                continue
            table[LOSS, mode, name] = partial(forward_and_backward, in_mode(mode, loss), batch)
        table[LOSS, mode, "largest estimate"] = partial(in_mode(mode, largest_estimate), batch)
    for linear in (True, False):
        options = {**batch, "linear": linear, "token_weight_max": 1.2 if linear else 1.0}
        suffix = "" if linear else ", exponential"
        table[WEIGHTS, "eager", f"steer{suffix}"] = partial(compute_token_weights, **options)
        table[WEIGHTS, "eager", f"boolean-indexed{suffix}"] = partial(boolean_indexed_weights, **options)
        torch.testing.assert_close(
            boolean_indexed_weights(**options)[0], compute_token_weights(**options), rtol=1e-5, atol=1e-6
        )
    return table


def seconds(work: Work, device: str) -> float:
    """Wall time of `work`, the device's own work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check_no_synchronisation(table: dict[tuple[str, str, str], Work]) -> None:
    """Run every way of STEER's once while anything that waits for the CUDA device is an error."""
    ways = [key for key in table if key[2].startswith("steer")]
    torch.cuda.set_sync_debug_mode("error")
    for key in ways:
        table[key]()
    torch.cuda.set_sync_debug_mode("default")
    print(f"none of {len(ways)} ways of STEER's waits for the device (torch.cuda.set_sync_debug_mode)")


def medians(table: dict[tuple[str, str, str], Work], rounds: int, device: str) -> dict[tuple[str, str, str], float]:
    """Median seconds of each, over rounds that run all of them in turn; a warm-up of three comes first."""
    for work in table.values():
        for _ in range(3):
            work()
    if device == "cuda":
        check_no_synchronisation(table)
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in table}
    for _ in range(rounds):
        for key, work in table.items():
            times[key].append(seconds(work, device))
    return {key: statistics.median(values) for key, values in times.items()}


def show(result: dict[tuple[str, str, str], float], title: str) -> None:
    table = Table("", "mode", "way", "ms", "× vanilla", "× steer", title=title, title_justify="left")
    for column in table.columns[3:]:
        column.justify = "right"
    for (part, mode, way), median in result.items():
        vanilla = result.get((part, mode, "vanilla"))
        # A boolean-indexed way is compared with STEER under the same options.
        steer = result[part, mode, "steer, exponential" if "indexed, exponential" in way else "steer"]
        table.add_row(
            part,
            mode,
            way,
            f"{median * 1e3:.2f}",
            "" if vanilla is None else f"{median / vanilla:.2f}",
            f"{median / steer:.2f}",
        )
    Console(width=110).print(table)


def profile(batch: Batch, device: str) -> None:
    """Print the operators of three eager passes of STEER's loss, the costliest first."""
    loss = losses()["steer"]
    forward_and_backward(loss, batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            forward_and_backward(loss, batch)
    print(profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[256, 3072], metavar=("ROWS", "TOKENS"))
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rounds", type=int, default=15, help="timed; three before are not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true", help="only the operators of STEER's loss, by their time")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    batch = micro_batch(*arguments.shape, arguments.device)
    if arguments.profile:
        profile(batch, arguments.device)
        return
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    rows, tokens = arguments.shape
    title = (
        f"{where}, torch {torch.__version__}; {rows:,} × {tokens:,} float32, "
        f"{batch['response_mask'].float().mean():.0%} of it valid; medians of {arguments.rounds} interleaved rounds"
    )
    show(medians(works(batch, arguments.modes), arguments.rounds, arguments.device), title)


if __name__ == "__main__":
    main()
