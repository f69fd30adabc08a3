"""`python -m ntjax.init`: a short config to start from, and a few rows of data that it runs with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ntjax import errors
from ntjax.errors import ConfigError

TEXT_MODEL, VISION_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
WIDTH, COLUMN = 116, 42  # of a line; where comments begin

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A setting; commented out unless `on`."""

    name: str
    value: Any
    on: bool = True


@dataclass(frozen=True)
class Stage:
    """A stage, its data set's rows, and the settings that are changed most."""

    kind: str
    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    data: tuple[Line, ...] = ()


def main(argv: Sequence[str]) -> None:
    """Writes a config and its data."""
    parser = argparse.ArgumentParser(
        "ntjax init",
        description="Writes a short, commented config, and a few rows of data beside it that it runs with.",
        epilog="example:\n  ntjax init sft && ntjax inspect --config sft.toml && ntjax train --config sft.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "kind", choices=tuple(KINDS), help="a stage; vlm: sft with images; chain: sft, dpo, grpo"
    )
    parser.add_argument("--out", metavar="FILE", help="where to write the config; KIND.toml by default")
    parser.add_argument("--model", metavar="DIR", help="a folder or a name of the hub to start from")
    parser.add_argument("--force", action="store_true", help="write over files that are there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    path = Path(args.out or f"{args.kind}.toml")
    if path.suffix != ".toml":
        raise ConfigError(f"--out {path}: what is written is TOML", fix=f"--out {path.with_suffix('.toml')}")
    stages = KINDS[args.kind]
    model = args.model or (VISION_MODEL if args.kind == "vlm" else TEXT_MODEL)
    files = {path: config(args.kind, stages, model, path)}
    for stage in stages:
        data = path.parent / data_name(args.kind, stage)
        files[data] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _shown(stage.rows))
    _write(files, args.force)
    print("wrote", ", ".join(map(str, files)))
    print(f"next: ntjax inspect --config {path}, then ntjax train --config {path}")


def _write(files: Mapping[Path, str], force: bool) -> None:
    """Writes all files or none; those that are there with another content only with `force`."""
    for path, text in files.items():
        if path.exists() and not force and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise ConfigError(f"{path} is there already", fix="name another file with --out, or give --force")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def data_name(kind: str, stage: Stage) -> str:
    """The data file of a stage, seen from the config."""
    return f"data/{'vlm' if kind == 'vlm' else stage.kind}.jsonl"


def config(kind: str, stages: Sequence[Stage], model: str, path: Path) -> str:
    """The config's text. Comments are what the settings' meanings say."""
    images = kind == "vlm"
    blocks = [list(_head(kind, path)), ["[model]", *_lines("model", _model_lines(model, images))]]
    for stage in stages:
        lines = (Line("dataset_path", data_name(kind, stage)), *stage.data)
        blocks.append([f"[datasets.{stage.kind}]", *_lines("datasets", lines)])
    for stage in stages:
        lines = (Line("stage_type", stage.kind), *stage.lines)
        blocks.append(["[[stages]]", *_lines(stage.kind, lines)])
    if len(stages) == 1:
        blocks.append(["# [mesh]", *_lines("mesh", (Line("zero_stage", 3, on=False),))])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _head(kind: str, path: Path) -> Iterator[str]:
    if (path.parent / "ntjax.schema.json").exists():
        yield "#:schema ./ntjax.schema.json"
    yield f"# ntjax train --config {path}"
    yield "#"
    yield "# The settings that are changed most, and in comments those that are worth knowing. All there are:"
    yield "# docs/LLM_VLM_TRAINING_GUIDE.md, and in an editor after `ntjax schema > ntjax.schema.json`."
    yield ""
    top = (Line("task_name", kind), Line("seed", 42, on=False), Line("use_wandb", True, on=False))
    yield from _lines("", top)


def _model_lines(model: str, images: bool) -> Iterator[Line]:
    yield Line("model_name_or_path", model)
    if images:
        yield Line("model_type", "vlm")
    yield Line("dtype", "bfloat16", on=False)
    yield Line("gradient_checkpointing", True, on=False)
    yield Line("use_lora", True, on=False)
    yield Line("load_in_4bit", True, on=False)


def _lines(table: str, lines: Sequence[Line] | Iterator[Line]) -> Iterator[str]:
    """Settings of a table with their meanings: beside them, or above where that is too long."""
    from ntjax import lookup
    from ntjax.config import meanings, schema
    from ntjax.config.settings import settings_of

    tables = {
        "": schema.Config,
        "model": schema.ModelConfig,
        "datasets": schema.DatasetConfig,
        "mesh": schema.MeshConfig,
    }
    known = settings_of(tables[table] if table in tables else lookup.stage_options(table))
    for line in lines:
        written = f"{'' if line.on else '# '}{line.name} = {json.dumps(line.value, ensure_ascii=False)}"
        meaning = meanings.meaning(table, known[line.name])
        if len(beside := f"{written:{COLUMN}}# {meaning}") <= WIDTH:
            yield beside
        else:
            yield from (f"# {meaning}", written)


def _shown(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows as they are written: a colour in "image" becomes a picture of it."""
    for row in rows:
        yield {**row, "image": _picture(row["image"])} if "image" in row else row


def _picture(colour: str) -> str:
    """A square of one colour as a data URI."""
    import base64
    import io

    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def _chat(question: str, answer: str) -> Row:
    turns = ("user", question), ("assistant", answer)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _asked(question: str, **columns: str) -> Row:
    return {"prompt": [{"role": "user", "content": question}], **columns}


def _preferred(question: str, chosen: str, rejected: str) -> Row:
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": [{"role": "user", "content": question}], **answers}


FACTS = (
    ("Where does the sun rise?", "In the east.", "The sun is a star, and stars are many and far away."),
    ("How many legs has a spider?", "Eight.", "Spiders are animals that people talk about a lot."),
    ("What is ice made of?", "Water.", "Ice is something cold, as everyone knows."),
    ("Which month comes after May?", "June.", "There are twelve months in all."),
    ("What do bees make?", "Honey.", "Bees are busy all summer long."),
    ("How many days has a week?", "Seven.", "A week is over sooner than one thinks."),
    ("What colour is a ripe lemon?", "Yellow.", "Lemons grow on trees in warm countries."),
    ("What is frozen rain called?", "Hail.", "Rain falls from clouds."),
)
SUMS = tuple((a, b) for a, b in ((2, 3), (4, 5), (6, 1), (7, 2), (3, 3), (8, 4), (9, 6), (5, 7)))
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")

CHATS = tuple(_chat(question, answer) for question, answer, _ in FACTS)
PREFERENCES = tuple(_preferred(*fact) for fact in FACTS)
QUESTIONS = tuple(
    _asked(f"What is {a} + {b}? Answer with the number alone.", answer=str(a + b)) for a, b in SUMS
)
TEXTS = tuple({"text": f"{question} {answer}"} for question, answer, _ in FACTS)
PICTURES = tuple(
    {"image": colour, **_chat("<image>\nWhat colour is this?", f"{colour.capitalize()}.")}
    for colour in COLOURS
)

LENGTH = (Line("max_length", 512),)
HELD_OUT = Line("validation_split_ratio", 0.1, on=False)
EVALUATED = Line("eval_strategy", "epoch", on=False)


def _trained(rate: float, rows: int, *, epochs: int = 3) -> tuple[Line, ...]:
    return (
        Line("num_train_epochs", epochs),
        Line("per_device_train_batch_size", rows),
        Line("gradient_accumulation_steps", 4, on=False),
        Line("learning_rate", rate),
        Line("warmup_steps", 0.03),
        Line("optimizer", "adamw_8bit", on=False),
    )


KEPT = (Line("logging_steps", 1), Line("save_steps", 500, on=False), Line("save_total_limit", 2, on=False))
DRAWN = (Line("reward_function", ["numeric"]), Line("temperature", 1.0))
SFT = Stage(
    "sft", CHATS, (*_trained(2e-5, 4), Line("packing", True, on=False), EVALUATED, *KEPT), (*LENGTH, HELD_OUT)
)
DPO = Stage(
    "dpo", PREFERENCES, (Line("dpo_beta", 0.1), *_trained(1e-6, 2), EVALUATED, *KEPT), (*LENGTH, HELD_OUT)
)
REWARD = Stage("reward", PREFERENCES, (*_trained(1e-5, 2), EVALUATED, *KEPT), (*LENGTH, HELD_OUT))
GRPO = Stage(
    "grpo",
    QUESTIONS,
    (
        *DRAWN,
        Line("num_generations", 8),
        Line("max_completion_length", 64),
        Line("beta", 0.04, on=False),
        *_trained(1e-6, 8, epochs=1),
        *KEPT,
    ),
    LENGTH,
)
PPO = Stage(
    "ppo",
    QUESTIONS,
    (*DRAWN, Line("response_length", 64), Line("init_kl_coef", 0.05), *_trained(3e-6, 8, epochs=1), *KEPT),
    LENGTH,
)
PRETRAIN = Stage("pretrain", TEXTS, (*_trained(2e-4, 4), Line("packing", True), *KEPT), LENGTH)
VLM = replace(SFT, rows=PICTURES, lines=(*SFT.lines, Line("freeze", ["vision_tower"], on=False)))
KINDS: dict[str, tuple[Stage, ...]] = {
    **{stage.kind: (stage,) for stage in (SFT, DPO, GRPO, PPO, REWARD, PRETRAIN)},
    "vlm": (VLM,),
    "chain": (SFT, DPO, GRPO),
}


if __name__ == "__main__":
    errors.run(main)
