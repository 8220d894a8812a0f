# SPDX-License-Identifier: Apache-2.0
"""Make a laptop task: problems, and a tiny Qwen2 model that solves some of them by sampling.

The folder given by `--out` receives `train.parquet`, `test.parquet`, `model/` (a Hugging Face folder) and
`laptop_task.json` (the settings that it was made with). A folder already made with the same settings is left as it is.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar
from verl.steer.tasks import TASKS
from verl.steer.tasks.rows import SPLITS, Problem, make_rows, split_of

# Part of the stamp: raise it whenever the same settings give another result.
VERSION = 3
STAMP = "laptop_task.json"

PAD, END = "<|endoftext|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# One token opens a turn and one closes it, since each token costs a tiny model as much as a digit.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

#: Options whose defaults depend on the task. Countdown's are those of the study (docs/task_choice.md).
DEFAULTS: dict[str, dict[str, Any]] = {
    "arithmetic": {"difficulty": 2, "test_size": 256, "steps": 600, "slip": 0.3},
    "countdown": {"difficulty": 2, "test_size": 128, "steps": 1500, "slip": 0.5},
}

BATCH_SIZE = 64
PEAK_LR = 3e-3
# Results depend on the number of threads, and two that spin on a busy machine are many times slower than one.
THREADS = 1
MAX_NEW_TOKENS = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--task", choices=sorted(TASKS), default="arithmetic", help="a module of verl.steer.tasks")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the model and its training")
    # The defaults of these four depend on the task.
    own: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--difficulty",
        type=int,
        **own,
        help=f"a level of the task, a key of its `DIFFICULTIES` {by_task('difficulty')}",
    )
    parser.add_argument("--train-size", type=int, default=4096, help="rows of train.parquet")
    parser.add_argument("--test-size", type=int, **own, help=f"rows of test.parquet {by_task('test_size')}")
    parser.add_argument(
        "--steps", type=int, **own, help=f"pre-training steps of {BATCH_SIZE} solutions {by_task('steps')}"
    )
    parser.add_argument("--slip", type=float, **own, help=f"share of wrong or aimless steps in these {by_task('slip')}")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the model, a multiple of 64")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(**DEFAULTS[parser.parse_known_args()[0].task])
    args = parser.parse_args()
    for option, fits, expected in (
        ("hidden_size", args.hidden_size >= 64 and args.hidden_size % 64 == 0, "a multiple of 64"),
        *((size, getattr(args, size) >= 1, "at least 1") for size in ("layers", "train_size", "test_size")),
        ("steps", args.steps >= 0 and args.steps != 9, "at least 0, and not 9: its schedule would divide by zero"),
        ("slip", 0 <= args.slip <= 1, "a probability"),
        ("out", args.out.is_dir() or not args.out.exists(), "a folder"),
    ):
        if not fits:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)}: expected {expected}")
    return args


def by_task(option: str) -> str:
    """The defaults of an option, for its help."""
    return f"({', '.join(f'{task}: {values[option]}' for task, values in DEFAULTS.items())})"


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer without merges: one token a byte, so that it encodes any text."""
    specials = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *specials])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens=specials[2:],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer, layers: int = 2, hidden_size: int = 128) -> Qwen2ForCausalLM:
    """An untrained model; the head dimension of 32 is one that vLLM's CPU attention takes."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        # The usual 0.02 is for wide models: at this width training takes about twice as many steps from it.
        initializer_range=0.06,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def prompt_ids(tokenizer: Qwen2Tokenizer, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def training_problems(task: Any, rng: random.Random, difficulty: int) -> Iterator[Problem]:
    while True:
        problem = task.make_problem(rng, difficulty)
        if split_of(problem.terms) == "train":
            yield problem


def supervised_batch(tokenizer: Qwen2Tokenizer, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Prompts with one solution each, padded on the right; only the solutions have labels."""
    sequences, labels = [], []
    for question, solution in pairs:
        prompt = prompt_ids(tokenizer, question)
        response = tokenizer.encode(solution + END)
        sequences.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def pretrain(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, args: argparse.Namespace) -> None:
    task, rng = TASKS[args.task], random.Random(f"{args.seed} pretrain")
    problems = training_problems(task, rng, args.difficulty)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))
    schedule = OneCycleLR(optimizer, max_lr=PEAK_LR, total_steps=args.steps + 1, pct_start=0.1)
    for _ in (bar := tqdm(range(args.steps), desc="pre-training", disable=args.quiet or None)):
        batch = [next(problems) for _ in range(BATCH_SIZE)]
        pairs = [(problem.prompt, task.noisy_solution(problem, rng, args.slip)) for problem in batch]
        loss = model(**supervised_batch(tokenizer, pairs)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str], count: int = 1) -> list[str]:
    """`count` responses to each prompt at temperature 1, those of a prompt one after the other."""
    responses = []
    size = max(1, 256 // count)
    for start in range(0, len(prompts), size):
        encoded = [{"input_ids": prompt_ids(tokenizer, prompt)} for prompt in prompts[start : start + size]]
        batch = tokenizer.pad(encoded, padding_side="left", return_tensors="pt")
        output = model.generate(
            **batch, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=count
        )
        responses += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return responses


def sampled_accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: list[dict[str, Any]]) -> float:
    """Share of the problems solved by one sample each."""
    responses = sample(model, tokenizer, [row["extra_info"]["raw_problem"] for row in rows])
    solved = 0
    for row, response in zip(rows, responses, strict=True):
        grade = TASKS[row["data_source"]].compute_score(response, row["reward_model"]["ground_truth"])
        solved += bool(grade["acc"])
    return solved / len(rows)


def build(folder: Path, args: argparse.Namespace, settings: dict[str, Any]) -> float:
    """Make everything in a new folder, the stamp last; return the sampled accuracy."""
    folder.mkdir()
    rows = {
        split: make_rows(TASKS[args.task], split, size, args.seed, args.difficulty)
        for split, size in zip(SPLITS, (args.train_size, args.test_size), strict=True)
    }
    for split in SPLITS:
        pd.DataFrame(rows[split]).to_parquet(folder / f"{split}.parquet")

    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.layers, args.hidden_size)
    pretrain(model, tokenizer, args)
    model.eval()
    accuracy = sampled_accuracy(model, tokenizer, rows["test"])
    disable_progress_bar()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / STAMP).write_text(json.dumps({"settings": settings, "sampled_accuracy": accuracy}, indent=2) + "\n")
    return accuracy


def replace_folder(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``, whose present content goes to a sibling of ``new``."""
    if out.exists():
        out.rename(new.with_name("replaced"))
    new.rename(out)


def main() -> None:
    args = parse_args()
    out = args.out.resolve()
    settings = {
        "version": VERSION,
        **{name: value for name, value in vars(args).items() if name not in ("out", "quiet")},
    }
    stamp = json.loads((out / STAMP).read_text()) if (out / STAMP).exists() else None
    if stamp is None and out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty and has no {STAMP}: expected a new folder or one made by this program")

    files = (*(f"{split}.parquet" for split in SPLITS), "model/config.json")
    if stamp is not None and stamp["settings"] == settings and all((out / name).exists() for name in files):
        accuracy, done = stamp["sampled_accuracy"], "already made"
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            try:
                accuracy = build(Path(scratch) / "new", args, settings)
            except ValueError as error:
                raise SystemExit(f"make_laptop_task: {error}") from error
            replace_folder(Path(scratch) / "new", out)
        done = "made"
    print(f"laptop task {done} in {out}: the model solves {accuracy:.1%} of {args.test_size} test problems by sampling")


if __name__ == "__main__":
    main()
