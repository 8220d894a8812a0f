# SPDX-License-Identifier: Apache-2.0
"""Makes the training set and the benchmarks as parquet files, from their sources on the Hugging Face hub.

    python datasets/make_datasets.py                       # the nine of mathematics, into data/
    python datasets/make_datasets.py --only humaneval mbpp livecodebench
    python datasets/make_datasets.py --only aime24 math500
    python datasets/make_datasets.py --source raw/         # from raw/aime24.parquet, raw/math500.jsonl, …
    python datasets/make_datasets.py --check

README.md in this folder says where each file comes from and how its prompts are built. A file that is there with
the right rows is left alone; a file is either whole or absent, however the program ends. Exit code: 0 if every file
asked for is there, 1 if a source failed (one line for each on stderr), 2 for a wrong command line.
"""

import argparse
import base64
import hashlib
import io
import json
import logging
import os
import pickle
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "data"
# The reader that `load_dataset` takes for each kind of raw file, in the order in which `--source` looks for them.
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
# A leftover of a killed run is removed once no living run can still be writing it (writing takes seconds).
STALE_SECONDS = 3600

ASK_ANSWER_LINE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    '\n\nRemember to put your answer on its own line after "Answer:".',
)
ASK_BOXED = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "\\boxed{Answer} where Answer is the answer to the problem.\n\n",
    "\n\nRemember to put your answer in \\boxed{...} format on its own line.",
)

ASK_PROGRAM = "{problem}\n\nWrite the solution in Python, as one block:\n\n```python\n{start}\n```\n"

Row = Mapping[str, Any]


class SourceError(Exception):
    """A source that can't be read, or isn't what its spec says. The message is one line and names the remedy."""


class HubUnreachableError(SourceError):
    """The hub can't be reached, so no other source on it can be either."""


@dataclass(frozen=True)
class Problem:
    """One row of a file before repetition.

    `index` identifies the problem in its source, `text` is the problem alone, `prompt` is what the model is asked.
    """

    index: int | str
    text: str
    prompt: str
    ground_truth: str | None


@dataclass(frozen=True)
class Spec:
    """One parquet file: where it comes from, what its source must look like and how its rows are built.

    `columns` are the source columns that are used, dots leading into structs and lists. `rows` counts the finished
    file, repetition included. `revision` is a commit, tag or branch of the source (None: its main branch). `checksum`
    is `content_checksum` of the file published with STEER, None where that file was not at hand. `role` becomes
    `extra_info.split`. `files` are JSON files in the source, where it has a loading script that is not to be run.
    """

    name: str
    hub_id: str
    config: str | None
    split: str
    revision: str | None
    licence: str
    columns: tuple[str, ...]
    problems: Callable[[Iterable[Row]], Iterator[Problem]]
    repeats: int
    rows: int
    data_source: str
    ability: str
    style: str
    role: str
    checksum: str | None
    files: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The hub id, with the configuration where there is one."""
        return f"{self.hub_id} ({self.config})" if self.config else self.hub_id


def wrap(problem: str, template: tuple[str, str]) -> str:
    """The problem between an instruction and a reminder."""
    return template[0] + problem + template[1]


def unwrap(prompt: str, template: tuple[str, str]) -> str | None:
    """The problem inside a prompt made by `wrap`, None for a prompt that is not of that form."""
    start, end = template
    if not (prompt.startswith(start) and prompt.endswith(end)):
        return None
    return prompt[len(start) : len(prompt) - len(end)]


def as_text(value: Any) -> str | None:
    """An answer without the white space around it; a missing one stays missing."""
    return None if value is None else str(value).strip()


def dapo_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """The first row of each distinct prompt, asking for a box in place of an answer line.

    The source repeats each problem about a hundred times. Its Chinese prompts have no English wrapper and already
    ask for a box, so they stay as they are. Prompts are compared exactly: some differ by white space alone, and the
    published file keeps those apart.
    """
    seen: set[str] = set()
    wrapped = 0
    for row in rows:
        prompt = row["prompt"][0]["content"]
        if prompt in seen:
            continue
        seen.add(prompt)
        problem, ground_truth = unwrap(prompt, ASK_ANSWER_LINE), row["reward_model"]["ground_truth"]
        if problem is None:
            yield Problem(row["extra_info"]["index"], prompt, prompt, ground_truth)
        else:
            wrapped += 1
            yield Problem(row["extra_info"]["index"], problem, wrap(problem, ASK_BOXED), ground_truth)
    if not wrapped:
        raise SourceError(f"none of its {len(seen)} prompts begins with {ASK_ANSWER_LINE[0][:40]!r}: it has changed")


def aime24_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Every row of a source that already holds each problem 32 times, shuffled."""
    for row in rows:
        info = row["extra_info"]
        problem = info["raw_problem"]
        yield Problem(info["index"], problem, wrap(problem, ASK_ANSWER_LINE), row["reward_model"]["ground_truth"])


def aime25_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """One problem a row, numbered in the order of the source."""
    for index, row in enumerate(rows):
        yield Problem(index, row["problem"], wrap(row["problem"], ASK_ANSWER_LINE), as_text(row["answer"]))


def amc23_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """The problems of 2023 out of a source that has 2022 too, with its whole-number floats written as integers."""
    for row in rows:
        if "/2023_AMC_12" in row["url"]:
            answer = float(row["answer"])
            if not answer.is_integer():
                raise SourceError(f"problem {row['id']} has the answer {answer}, expected a whole number")
            yield Problem(row["id"], row["problem"], wrap(row["problem"], ASK_ANSWER_LINE), str(int(answer)))


def math500_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Bare problems, sorted by `unique_id` as text: the order of the published file."""
    for index, row in enumerate(sorted(rows, key=lambda row: row["unique_id"])):
        yield Problem(index, row["problem"], row["problem"], plain_answer(str(row["answer"])))


def plain_answer(latex: str) -> str:
    r"""A MATH answer in the published file's spelling: no spaces, sizing commands, units, currency or degree signs.

    `\left( 3, \frac{\pi}{2} \right)` becomes `(3,\frac{\pi}{2})`, `\text{Evelyn}` becomes `Evelyn`.
    """
    answer = re.sub(r"(?<=\d),\\!(?=\d)", "", latex)
    answer = re.sub(r"\\(left|right)(?![A-Za-z])|\\!|\\\$|\\%|\^\{?\\circ\}?", "", answer)
    answer = re.sub(r"^\s*[a-z]\s*\\in(?![A-Za-z])", "", answer)
    if name := re.fullmatch(r"\s*\\text\{([^{}]*)\}\s*", answer):
        answer = name[1]
    answer = re.sub(r"\\(text|mbox)\{[^{}]*\}(\^\d)?\s*$", "", answer)
    return "".join(answer.split())


def minerva_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Bare problems, numbered in the order of the source."""
    for index, row in enumerate(rows):
        yield Problem(index, row["question"], row["question"], as_text(row["answer"]))


def olympiadbench_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Bare problems; the one string in `final_answer` without the dollar signs around it."""
    for row in rows:
        if len(row["final_answer"]) != 1:
            raise SourceError(f"problem {row['id']} has {len(row['final_answer'])} final answers, expected 1")
        yield Problem(row["id"], row["question"], row["question"], row["final_answer"][0].strip("$"))


def gsm8k_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Bare problems; the truth is what follows `####` in the worked answer, without thousands separators."""
    for index, row in enumerate(rows):
        _, marker, answer = row["answer"].rpartition("####")
        if not marker:
            raise SourceError(f"row {index} has no '####' in its answer {row['answer'][-40:]!r}")
        yield Problem(index, row["question"], row["question"], answer.strip().replace(",", ""))


def omni_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Bare problems, numbered in the order of the source. A few have an empty answer, which no response matches."""
    for index, row in enumerate(rows):
        yield Problem(index, row["problem"], row["problem"], as_text(row["answer"]) or "")


def asking_for_equal_shapes(test: str) -> str:
    """EvalPlus's test of a task, with one more assertion: numpy finds an empty list close to any number."""
    head = "def assertion(out, exp, atol):\n"
    return test.replace(head, f"{head}    assert out == exp or np.shape(out) == np.shape(exp)\n")


def humaneval_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """A function's head and docstring; the test is one assertion over all of EvalPlus's inputs."""
    for row in rows:
        test = f"{asking_for_equal_shapes(row['test'])}\ncheck({row['entry_point']})\n"
        prompt = ASK_PROGRAM.format(problem="Complete this function.", start=row["prompt"].strip())
        index = int(row["task_id"].rpartition("/")[2])
        yield Problem(index, row["prompt"], prompt, json.dumps({"assert_case": [test]}))


def mbpp_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """A task in words with its first public assertion, which has the function's name; the test is as HumanEval+'s."""
    for row in rows:
        test = "\n".join([*row["test_imports"], asking_for_equal_shapes(row["test"])])
        problem = f"{row['prompt'].strip()}\nThe function must pass this test: {row['test_list'][0].strip()}"
        prompt = ASK_PROGRAM.format(problem=problem, start="# your code")
        yield Problem(int(row["task_id"]), row["prompt"], prompt, json.dumps({"assert_case": [test]}))


def livecodebench_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Problems for standard input, or with the head of a method; their public and private tests, compressed."""
    for index, row in enumerate(rows):
        cases = json.loads(row["public_test_cases"]) + private_cases(row["private_test_cases"])
        tests = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
        if name := json.loads(row["metadata"]).get("func_name"):
            tests["fn_name"] = name
        head = row["starter_code"].strip()
        problem = row["question_content"].strip() + ("" if head else "\n\nRead standard input, print the answer.")
        packed = base64.b64encode(zlib.compress(json.dumps(tests).encode())).decode()
        prompt = ASK_PROGRAM.format(problem=problem, start=head or "# your code")
        yield Problem(index, row["question_content"], prompt, json.dumps({"zlib": packed}))


class PlainUnpickler(pickle.Unpickler):
    """Reads text, numbers and containers; anything else would import a module and call what it names."""

    def find_class(self, module: str, name: str) -> Any:
        raise SourceError(f"private tests that want to call {module}.{name}: not those of LiveCodeBench")


def private_cases(text: str) -> list[dict[str, str]]:
    """LiveCodeBench's private tests: JSON, or base64 of compressed pickled JSON.

    Raises:
        SourceError: they are something else.
    """
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return json.loads(PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise SourceError(f"private tests that can't be read ({error})") from error


SPECS = (
    Spec(
        name="DAPO-Math-17k",
        hub_id="BytedTsinghua-SIA/DAPO-Math-17k",
        config=None,
        split="train",
        revision=None,
        licence="apache-2.0",
        columns=("prompt.content", "reward_model.ground_truth", "extra_info.index"),
        problems=dapo_problems,
        repeats=1,
        rows=17398,
        data_source="math_dapo",
        ability="MATH",
        style="rule-lighteval/MATH_v2",
        role="train",
        checksum="7fff68d11a114d73b23f34958afbf69ffc31d155b716fce52d374de67dfcae2b",
    ),
    Spec(
        name="aime24",
        hub_id="BytedTsinghua-SIA/AIME-2024",
        config=None,
        split="train",
        revision="aa49075e24ad594b79fdf0bdcefa735c2181be67",
        licence="apache-2.0",
        columns=("reward_model.ground_truth", "extra_info.index", "extra_info.raw_problem"),
        problems=aime24_problems,
        repeats=1,
        rows=960,
        data_source="aime_2024_dapo_boxed",
        ability="MATH",
        style="rule-lighteval/MATH_v2",
        role="test",
        checksum="5d75d98e99bb7b9825f5100bb75269e19bfa739faa2d27b57933661f4030fb77",
    ),
    Spec(
        name="aime25",
        hub_id="math-ai/aime25",
        config=None,
        split="test",
        revision=None,
        licence="none stated",
        columns=("problem", "answer"),
        problems=aime25_problems,
        repeats=32,
        rows=960,
        data_source="aime_2025_dapo_boxed",
        ability="math",
        style="rule",
        role="test",
        checksum="5ee189fe180bd999877ced065d1903fb1ba6e63b09ffd566ff3c9aaf65824e1c",
    ),
    Spec(
        name="amc23",
        hub_id="AI-MO/aimo-validation-amc",
        config=None,
        split="train",
        revision="8ef249608d65c2de7763ca7525f438e540ba285e",
        licence="not verified",
        columns=("id", "problem", "answer", "url"),
        problems=amc23_problems,
        repeats=32,
        rows=1280,
        data_source="amc2023_dapo_boxed",
        ability="math",
        style="rule",
        role="test",
        checksum="448877fb4c51d97a35bbd068e079a1b2f85a6a8f678800a69053f5e55e01cb3e",
    ),
    Spec(
        name="math500",
        hub_id="HuggingFaceH4/MATH-500",
        config=None,
        split="test",
        revision="ff5b20257d8185524591543f8ff5993951537bb8",
        licence="none stated",
        columns=("problem", "answer", "unique_id"),
        problems=math500_problems,
        repeats=1,
        rows=500,
        data_source="math500",
        ability="MATH",
        style="rule_mine",
        role="test",
        checksum="bc7085f1eaa0d470e383876d1e28bfeb65836a9542a4461ed81323bccc83d298",
    ),
    Spec(
        name="minerva_math",
        hub_id="math-ai/minervamath",
        config=None,
        split="test",
        revision=None,
        licence="none stated",
        columns=("question", "answer"),
        problems=minerva_problems,
        repeats=1,
        rows=272,
        data_source="minerva_math",
        ability="math",
        style="rule",
        role="test",
        checksum=None,
    ),
    Spec(
        name="olympiadbench",
        hub_id="FUfu99/OlympiadBench_maths_origin",
        config="OE_TO_maths_en_COMP",
        split="test",
        revision=None,
        licence="apache-2.0",
        columns=("id", "question", "final_answer"),
        problems=olympiadbench_problems,
        repeats=1,
        rows=675,
        data_source="olympiadbench",
        ability="math",
        style="rule",
        role="test",
        checksum="0e8ad8c16fd7fd8d49b4879dfb257b09f47e49e23cc38576debcc2c0bdc7cb32",
    ),
    Spec(
        name="gsm8k_test",
        hub_id="openai/gsm8k",
        config="main",
        split="test",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        licence="mit",
        columns=("question", "answer"),
        problems=gsm8k_problems,
        repeats=1,
        rows=1319,
        data_source="gsm8k_test",
        ability="math",
        style="rule",
        role="test",
        checksum=None,
    ),
    Spec(
        name="omni",
        hub_id="KbsdJames/Omni-MATH",
        config=None,
        split="test",
        revision=None,
        licence="apache-2.0",
        columns=("problem", "answer"),
        problems=omni_problems,
        repeats=1,
        rows=4428,
        data_source="omni",
        ability="math",
        style="rule",
        role="test",
        checksum=None,
    ),
    Spec(
        name="humaneval",
        hub_id="evalplus/humanevalplus",
        config=None,
        split="test",
        revision="d32357cf319e50e9c8d8dab5ea876c72b0fd321b",
        licence="apache-2.0",
        columns=("task_id", "prompt", "entry_point", "test"),
        problems=humaneval_problems,
        repeats=1,
        rows=164,
        data_source="humaneval",
        ability="code",
        style="rule",
        role="test",
        checksum=None,
    ),
    Spec(
        name="mbpp",
        hub_id="evalplus/mbppplus",
        config=None,
        split="test",
        revision=None,
        licence="apache-2.0",
        columns=("task_id", "prompt", "test_imports", "test_list", "test"),
        problems=mbpp_problems,
        repeats=1,
        rows=378,
        data_source="mbpp",
        ability="code",
        style="rule",
        role="test",
        checksum=None,
    ),
    Spec(
        name="livecodebench",
        hub_id="livecodebench/code_generation_lite",
        config=None,
        split="test",
        revision=None,
        licence="cc",
        columns=("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        problems=livecodebench_problems,
        repeats=1,
        rows=880,
        data_source="livecodebench",
        ability="code",
        style="rule",
        role="test",
        checksum=None,
        files=("test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl"),
    ),
)
BY_NAME = {spec.name: spec for spec in SPECS}
# LiveCodeBench alone is gigabytes.
DEFAULT = [spec.name for spec in SPECS if spec.ability != "code"]


def load_source(spec: Spec, source: Path | None, revision: str | None) -> datasets.Dataset:
    """The rows that `spec` is built from: the hub's, or those of the raw file in the folder `source`.

    Raises:
        SourceError: the source is absent, unreadable, closed to this account, or lacks a column.
    """
    try:
        if source is None and spec.files:
            place = f"hf://datasets/{spec.hub_id}@{revision or spec.revision or 'main'}"
            rows = datasets.load_dataset("json", data_files=[f"{place}/{file}" for file in spec.files], split="train")
        elif source is None:
            rows = datasets.load_dataset(spec.hub_id, spec.config, split=spec.split, revision=revision or spec.revision)
        else:
            raw = raw_file(spec, source)
            rows = datasets.load_dataset(READERS[raw.suffix], data_files=str(raw), split="train")
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise explain(error, spec, source) from error
    missing = [column for column in spec.columns if not has_column(rows.features, column)]
    if missing:
        raise SourceError(
            f"the source has changed: no column {', '.join(missing)} among {', '.join(rows.column_names)}; "
            f"{another_source(spec)}"
        )
    return rows.select_columns(list(dict.fromkeys(column.split(".")[0] for column in spec.columns)))


def raw_file(spec: Spec, source: Path) -> Path:
    """The raw file of a dataset in a folder: its name with the first suffix of `READERS` that exists."""
    for suffix in READERS:
        if (path := source / (spec.name + suffix)).is_file():
            return path
    wanted = ", ".join(spec.name + suffix for suffix in READERS)
    raise SourceError(f"{source} has none of {wanted}; put the rows of {spec.source} there, or drop --source")


def has_column(features: Mapping[str, Any], path: str) -> bool:
    """Whether a dotted path leads to a column, through structs and lists of structs."""
    level: Any = features
    for name in path.split("."):
        level = getattr(level, "feature", level)
        if not isinstance(level, Mapping) or name not in level:
            return False
        level = level[name]
    return True


def another_source(spec: Spec) -> str:
    """The remedy where the source is at fault: an older commit, or rows from disk."""
    return f"take an older commit with --revision {spec.name}=COMMIT, or a raw file with --source DIR"


def explain(error: Exception, spec: Spec, source: Path | None) -> SourceError:
    """One line for what `load_dataset` raised, with what to do about it."""
    if source is not None:
        reason = " ".join(str(error.__cause__ or error).split())
        return SourceError(f"the raw file can't be read ({reason}); write it again as parquet, JSON or JSON lines")
    reason = " ".join(str(error).split())
    if isinstance(error, ConnectionError | httpx.TransportError):
        return HubUnreachableError(f"{reason}; connect to the network, or put raw files in DIR and pass --source DIR")
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        page = f"https://huggingface.co/datasets/{spec.hub_id}"
        return SourceError(f"{reason}; if {page} asks for it, accept the terms there and run 'hf auth login'")
    return SourceError(f"{spec.source} can't be loaded ({reason}); {another_source(spec)}")


def schema(spec: Spec) -> pa.Schema:
    """The columns of a file. All benchmarks share one schema, so that they can be read together."""
    text = pa.string()
    index = text if spec.role == "train" else pa.int64()
    return pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"content": text, "role": text})),
            "ability": text,
            "reward_model": pa.struct({"ground_truth": text, "style": text}),
            "extra_info": pa.struct({"index": index, "raw_problem": text, "split": text}),
        }
    )


def record(spec: Spec, problem: Problem) -> dict[str, Any]:
    """One row of the file.

    Raises:
        SourceError: the problem is empty or has no answer.
    """
    if not problem.text or problem.ground_truth is None:
        raise SourceError(f"problem {problem.index} has no text or no answer; {another_source(spec)}")
    return {
        "data_source": spec.data_source,
        "prompt": [{"content": problem.prompt, "role": "user"}],
        "ability": spec.ability,
        "reward_model": {"ground_truth": problem.ground_truth, "style": spec.style},
        "extra_info": {"index": problem.index, "raw_problem": problem.text, "split": spec.role},
    }


def build(spec: Spec, source: Path | None, revision: str | None, allow_partial: bool) -> pa.Table:
    """The whole file as a table; repetition runs through all problems before it begins again.

    Raises:
        SourceError: the source can't be used, or gives another number of rows than `spec.rows`.
    """
    rows = load_source(spec, source, revision)
    # `disable=None` draws the bar on a terminal only.
    problems = list(spec.problems(tqdm(rows, desc=spec.name, unit=" rows", disable=None)))
    records = [record(spec, problem) for problem in problems] * spec.repeats
    if len(records) != spec.rows and not allow_partial:
        raise SourceError(
            f"the source has changed: it gives {len(records)} rows, expected {spec.rows}; {another_source(spec)}"
        )
    return pa.Table.from_pylist(records, schema=schema(spec))


def write_whole(table: pa.Table, path: Path) -> None:
    """Writes a file beside `path` and renames it, so that `path` is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
            leftover.unlink()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    # mkstemp gives a file to its owner alone; the data are for everybody who may read the folder.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def is_complete(spec: Spec, path: Path, allow_partial: bool) -> bool:
    """Whether `path` already holds the file, by its footer alone.

    Parquet's footer is written last and files appear by renaming, so a readable footer means a whole file; it has the
    row count and the columns. With `allow_partial` any number of rows will do.
    """
    try:
        footer = pq.read_metadata(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    columns = set(footer.schema.to_arrow_schema().names)
    return columns >= set(schema(spec).names) and (allow_partial or footer.num_rows == spec.rows)


def content_checksum(table: pa.Table) -> str:
    """SHA-256 over prompts and truths, whatever the order of rows and the way the parquet file is written.

    A row is the JSON array [[[role, content], …], ground_truth], with non-ASCII characters as they are and no spaces
    between elements; the rows are sorted as text, each ended by a line feed, and hashed as UTF-8.
    """
    digest = hashlib.sha256()
    lines = []
    for row in table.select(["prompt", "reward_model"]).to_pylist():
        messages = [[message["role"], message["content"]] for message in row["prompt"]]
        content = [messages, row["reward_model"]["ground_truth"]]
        lines.append(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    for line in sorted(lines):
        digest.update(line.encode())
    return digest.hexdigest()


def check(spec: Spec, path: Path) -> str:
    """Compares a file with its spec and returns what was found, as one line.

    Raises:
        SourceError: the file is missing, broken or different.
    """
    remake = "delete it and run without --check"
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise SourceError("missing; run without --check") from error
    except pa.ArrowInvalid as error:
        raise SourceError(f"not a whole parquet file; {remake}") from error
    if missing := set(schema(spec).names) - set(table.column_names):
        raise SourceError(f"no column {', '.join(sorted(missing))}; {remake}")
    if table.num_rows != spec.rows:
        raise SourceError(f"{table.num_rows} rows, expected {spec.rows}; {remake}")
    checksum = content_checksum(table)
    if spec.checksum is None:
        return f"{table.num_rows} rows, sha256 {checksum} (no published checksum to compare with)"
    if checksum != spec.checksum:
        raise SourceError(f"sha256 {checksum}, published {spec.checksum}; prompts or truths differ, {remake}")
    return f"{table.num_rows} rows, sha256 {checksum} as published"


def make(spec: Spec, path: Path, source: Path | None, revision: str | None, allow_partial: bool) -> str:
    """Makes one file unless it is there, and returns what was done, as one line."""
    if is_complete(spec, path, allow_partial):
        return f"{pq.read_metadata(path).num_rows} rows, already there (delete it to make it again)"
    table = build(spec, source, revision, allow_partial)
    write_whole(table, path)
    return f"{table.num_rows} rows, made from {source or spec.source}"


def pinned_revision(text: str) -> tuple[str, str]:
    """Reads NAME=REV."""
    name, _, revision = text.partition("=")
    if name not in BY_NAME or not revision:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=REV with NAME one of {', '.join(BY_NAME)}")
    return name, revision


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=BY_NAME, default=DEFAULT, metavar="NAME", help="these files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where the files go (%(default)s)")
    parser.add_argument("--source", type=Path, metavar="DIR", help="read NAME.parquet, .jsonl or .json there, no hub")
    parser.add_argument(
        "--revision", nargs="+", type=pinned_revision, default=[], metavar="NAME=REV", help="pin sources"
    )
    parser.add_argument("--allow-partial", action="store_true", help="take any number of rows, for tests and trials")
    parser.add_argument("--check", action="store_true", help="compare the files with what is published, make nothing")
    return parser.parse_args()


def main() -> int:
    """Makes or checks the files asked for; returns the exit code."""
    arguments = parse_arguments()
    revisions = dict(arguments.revision)
    # What these two log of a failure is raised as well, and told in one line below.
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    failed = False
    for name in arguments.only:
        spec, path = BY_NAME[name], arguments.out / f"{name}.parquet"
        try:
            if arguments.check:
                outcome = check(spec, path)
            else:
                outcome = make(spec, path, arguments.source, revisions.get(name), arguments.allow_partial)
            print(f"{path}: {outcome}", flush=True)
        except (SourceError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr, flush=True)
            failed = True
            if isinstance(error, HubUnreachableError):
                break
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
