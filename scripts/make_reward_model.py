# SPDX-License-Identifier: Apache-2.0
"""Make a reward model for a countdown task: a continuous reward that no rule verifies.

The task's model answers training problems, several times each. An answer is better the nearer its result is to the
target, if its steps are right and use all numbers; other answers are worst. From pairs of answers to one problem the
reward model, which starts with the weights of the task's model, learns by the loss of Bradley and Terry to give the
better answer the higher score. It is saved as a Hugging Face folder, with which `task=countdown_learned` trains.
"""

import argparse
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from make_laptop_task import THREADS, sample
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from verl.steer.grading.learned import dialogue_ids
from verl.steer.tasks import countdown
from verl.steer.tasks.rows import SPLITS

BATCH_SIZE = 32  # pairs
PEAK_LR = 1e-3

#: A prompt, its better answer, and its worse one.
Pair = tuple[str, str, str]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task-dir", type=Path, required=True, metavar="DIR", help="made by make_laptop_task.py")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: reward_model in the task's folder")
    parser.add_argument("--seed", type=int, default=0, help="of the answers and the training")
    parser.add_argument("--problems", type=int, default=2048, help="training problems that are answered")
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--steps", type=int, default=1500, help=f"training steps of {BATCH_SIZE} pairs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    for option, least in (("problems", 1), ("samples", 2), ("steps", 0)):
        if getattr(args, option) < least:
            parser.error(f"--{option} {getattr(args, option)}: expected at least {least}")
    return args


def quality(prompt: str, answer: str) -> float:
    """0 for an answer with a wrong step or an unused number, else 1 / (1 + distance of its result from the target)."""
    answer = answer.strip()
    numbers, _, target = prompt.partition("=")
    result = answer.rpartition("=")[2]
    # An answer solves the problem with its own result as the target if its steps are right and use all numbers.
    if not (result.isascii() and result.isdigit() and countdown.compute_score(answer, f"{numbers}={result}")["acc"]):
        return 0.0
    return 1 / (1 + abs(int(result) - int(target)))


def preference_pairs(prompt: str, answers: list[str]) -> list[Pair]:
    """All pairs of different answers that differ in quality, the better one first."""
    qualities = {answer: quality(prompt, answer) for answer in answers}
    pairs = []
    for first, second in combinations(qualities, 2):
        if qualities[first] != qualities[second]:
            better, worse = sorted((first, second), key=qualities.__getitem__, reverse=True)
            pairs.append((prompt, better, worse))
    return pairs


def sampled_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], samples: int
) -> list[Pair]:
    """Pairs of the model's answers to each prompt, at least one."""
    answers = sample(model, tokenizer, prompts, samples)
    pairs = [
        pair
        for index, prompt in enumerate(prompts)
        for pair in preference_pairs(prompt, answers[index * samples : (index + 1) * samples])
    ]
    if not pairs:
        raise SystemExit(
            f"make_reward_model: {len(answers)} answers, none better than another to the same problem; expected a "
            "better model, more --problems or more --samples"
        )
    return pairs


def margins(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> Tensor:
    """Scores of the better answers minus those of the worse ones, (pairs,)."""
    better = [dialogue_ids(tokenizer, prompt, answer) for prompt, answer, _ in pairs]
    worse = [dialogue_ids(tokenizer, prompt, answer) for prompt, _, answer in pairs]
    batch = tokenizer.pad({"input_ids": better + worse}, padding_side="right", return_tensors="pt")
    scores = model(**batch).logits[:, 0]
    return scores[: len(pairs)] - scores[len(pairs) :]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], args: argparse.Namespace
) -> None:
    rng = random.Random(f"{args.seed} pairs")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LR, total_steps=args.steps + 1)
    for _ in (bar := tqdm(range(args.steps), desc="reward model", disable=args.quiet or None)):
        loss = -torch.nn.functional.logsigmoid(margins(model, tokenizer, rng.choices(pairs, k=BATCH_SIZE))).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def pair_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> float:
    """Share of the pairs of which the better answer has the higher score."""
    right = [margins(model, tokenizer, pairs[start : start + 128]).gt(0) for start in range(0, len(pairs), 128)]
    return torch.cat(right).float().mean().item()


def prompts_of(file: Path, limit: int) -> list[str]:
    if not file.exists():
        raise SystemExit(f"{file}: no such file; expected a task that make_laptop_task.py made")
    rows: Any = pd.read_parquet(file, columns=["data_source", "extra_info"])
    if (sources := set(rows["data_source"])) != {countdown.DATA_SOURCE}:
        raise SystemExit(f"{file}: data_source is {sorted(sources)}, expected {countdown.DATA_SOURCE!r}")
    return [info["raw_problem"] for info in rows["extra_info"][:limit]]


def main() -> None:
    args = parse_args()
    out = args.out or args.task_dir / "reward_model"
    prompts = {split: prompts_of(args.task_dir / f"{split}.parquet", args.problems) for split in SPLITS}
    set_verbosity_error()  # the new weights of the reward model's head are no mistake
    disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    source = args.task_dir / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    pairs = {split: sampled_pairs(policy, tokenizer, found, args.samples) for split, found in prompts.items()}
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    train(model, tokenizer, pairs["train"], args)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    accuracy = pair_accuracy(model.eval(), tokenizer, pairs["test"])
    print(
        f"reward model made in {out}: it prefers the better answer in {accuracy:.1%} of {len(pairs['test'])} test pairs"
    )


if __name__ == "__main__":
    main()
