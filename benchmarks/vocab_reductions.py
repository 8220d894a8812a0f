# SPDX-License-Identifier: Apache-2.0
"""Time and peak extra memory of log-prob and entropy over a vocabulary: `vocab_reductions` against verl's functions.

    python benchmarks/vocab_reductions.py --tokens 1024 --dtype bfloat16 float32
    python benchmarks/vocab_reductions.py --tokens 4096 1024 --compile      # on a GPU

One row for each way, medians over interleaved rounds after a warm-up. `forward` is without gradients; `forward and
backward` takes gradients of the log-prob and of the entropy. Extra memory is the allocator's peak above the logits.
On CUDA the share of bandwidth is bytes of logits over the forward time, over that of a device-to-device copy (bytes
read plus bytes written) measured in the same run. verl's functions hold up to 15 times the logits: `--passes` and
`--ways` leave out what a machine can't hold.

Needs torch alone, and triton on CUDA; verl's own functions are measured where verl is installed, else their formulas.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import peak_extra_bytes, seconds
from torch import Tensor

PASSES = ("forward", "forward and backward")
REPOSITORY = Path(__file__).resolve().parents[1]
Way = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Formulas:
    """What verl's functions of these names compute, for a machine without verl."""

    @staticmethod
    def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def entropy_from_logits(logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)

    @staticmethod
    def entropy_from_logits_with_chunking(logits: Tensor) -> Tensor:
        return torch.cat([Formulas.entropy_from_logits(chunk.float()) for chunk in logits.split(2048)])

    @staticmethod
    def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
        return torch.exp(torch.logsumexp(2.0 * logits, -1) - 2.0 * torch.logsumexp(logits, -1))


def upstream():
    """verl's functions and their name, or the formulas of the same."""
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        return Formulas, "verl's formulas"
    return importlib.import_module("verl.utils.torch_functional"), "verl"


def operator():
    """The operator, by its place in this repository."""
    sys.path.insert(0, str(REPOSITORY / "verl" / "steer" / "engine"))
    return importlib.import_module("vocab_reductions").vocab_reductions


def ways(arguments: argparse.Namespace) -> dict[str, Way]:
    """Every way of computing (log-prob, entropy) and, with --squares, the sums of squares, by its name in the table."""
    functions, name = upstream()
    vocab_reductions = operator()

    def ours(inplace_backward: bool) -> Way:
        def way(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            # A view is no leaf, so its values may be overwritten.
            return vocab_reductions(
                logits.view_as(logits) if inplace_backward else logits,
                labels,
                arguments.temperature,
                with_squares=arguments.squares,
                inplace_backward=inplace_backward,
            )

        return way

    def theirs(entropy: Callable[[Tensor], Tensor]) -> Way:
        def way(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            if arguments.temperature is not None:
                logits = logits / arguments.temperature
            squares = (functions.calculate_sum_pi_squared_from_logits(logits),) if arguments.squares else ()
            return functions.logprobs_from_logits(logits, labels), entropy(logits), *squares

        return way

    table = {
        "vocab_reductions": ours(False),
        "vocab_reductions, in place": ours(True),
        name: theirs(functions.entropy_from_logits),
        f"{name}, entropy in chunks": theirs(functions.entropy_from_logits_with_chunking),
    }
    if arguments.compile:
        table[f"{name}, entropy compiled"] = theirs(torch.compile(functions.entropy_from_logits, dynamic=True))
    if arguments.ways is None:
        return table
    return {way: table[way] for way in table if way == "vocab_reductions" or way in arguments.ways}


def run(way: Way, logits: Tensor, labels: Tensor, backward: bool) -> None:
    """One forward pass, or one forward and backward pass with a gradient of 1 for log-prob and 0.1 for entropy."""
    if not backward:
        with torch.no_grad():
            way(logits, labels)
        return
    log_prob, entropy, *_ = way(logits.requires_grad_(), labels)
    ones = torch.ones_like(log_prob), torch.full_like(entropy, 0.1)
    torch.autograd.grad((log_prob, entropy), logits, ones)
    logits.requires_grad_(False)


def copy_bandwidth(device: str, rounds: int) -> float:
    """Bytes read plus bytes written per second by a device-to-device copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(rounds + 3)][3:]
    return 2 * source.nbytes / statistics.median(times)


def random_logits(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> Tensor:
    """Logits of standard deviation 3, filled a few rows at a time: a float32 draft of all would be the peak."""
    logits = torch.empty(tokens, vocabulary, dtype=dtype, device=device)
    for rows in logits.split(64):
        rows.copy_(torch.randn(rows.shape, device=device) * 3)
    return logits


def measure(tokens: int, dtype: torch.dtype, arguments: argparse.Namespace, table: dict[str, Way]) -> list[list[str]]:
    """The rows of the table for one shape and dtype."""
    device = arguments.device
    logits = random_logits(tokens, arguments.vocab, dtype, device)
    labels = torch.randint(arguments.vocab, (tokens,), device=device)
    copy = copy_bandwidth(device, arguments.rounds) if device == "cuda" else None
    rows = []
    for backward in [backward for backward in (False, True) if PASSES[backward] in arguments.passes]:

        def work(name: str, backward: bool = backward) -> None:
            # In place the logits become their gradient; a row of such logits is as good to measure on.
            run(table[name], logits, labels, backward)

        names = [name for name in table if backward or "in place" not in name]
        extra = {name: peak_extra_bytes(partial(work, name), device) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                times[name].append(seconds(partial(work, name), device))
        medians = {name: statistics.median(times[name]) for name in names}
        ours = medians["vocab_reductions"], extra["vocab_reductions"]
        for name in names:
            rows.append(
                [
                    f"{tokens:,} × {arguments.vocab:,}",
                    str(dtype).removeprefix("torch."),
                    PASSES[backward],
                    name,
                    f"{medians[name] * 1e3:,.2f}",
                    f"{medians[name] / ours[0]:.2f}",
                    f"{extra[name] / 2**20:,.1f}",
                    f"{extra[name] / ours[1]:.2f}",
                    "" if copy is None or backward else f"{logits.nbytes / medians[name] / copy:.0%}",
                ]
            )
    if copy is not None:
        print(f"{str(dtype).removeprefix('torch.')}: a device-to-device copy moves {copy / 1e12:.2f} TB/s")
    return rows


def show(rows: list[list[str]]) -> None:
    header = ["logits", "dtype", "pass", "way", "ms", "× time", "extra MiB", "× memory", "of copy"]
    if importlib.util.find_spec("rich") is not None:
        console = importlib.import_module("rich.console").Console(width=140)
        table = importlib.import_module("rich.table").Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    for line in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocab", type=int, default=151936, help="151,936 is Qwen2.5's")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5, help="timed; one before is not, and measures memory")
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--ways", nargs="+", help="only these beside vocab_reductions, by their names in the table")
    parser.add_argument("--temperature", type=float, help="verl divides the logits first unless it is 1")
    parser.add_argument("--squares", action="store_true", help="Σπ² (and here Σπ² ln π) too")
    parser.add_argument("--compile", action="store_true", help="verl's entropy through torch.compile too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"{where}, torch {torch.__version__}; medians of {arguments.rounds} interleaved rounds")
    table = ways(arguments)
    rows = []
    for tokens in arguments.tokens:
        for dtype in arguments.dtype:
            rows += measure(tokens, getattr(torch, dtype), arguments, table)
    show(rows)


if __name__ == "__main__":
    main()
