"""`python -m ntjax.eval`: the loss of a model on rows, or the rewards of what it answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax import errors
from ntjax.errors import ConfigError, InputMissing

if TYPE_CHECKING:
    from ntjax.config import Config
    from ntjax.loaded import LoadedModel

SCORED = 8  # completions that a reward model reads at a time on a device
STAGES = ("sft", "pretrain", "dpo", "reward")
# Options that mean something where completions are drawn, and what they are by default.
DRAWING = {
    "num_completions": 1,
    "pass_at": None,
    "max_new_tokens": 128,
    "temperature": None,
    "threshold": 1.0,
    "seed": 42,
    "out": None,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "ntjax eval",
        description="Loss, perplexity and accuracy on rows as stages train on them; with --reward, the rewards of "
        "what a model answers to their prompts.",
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder or repository")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows, as a stage is trained on")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT folder; --model is what it was trained on")
    parser.add_argument("--stage", choices=STAGES, help="how rows are read; their columns say it by default")
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="as reward_function of a grpo stage; may be repeated",
    )
    parser.add_argument("--num-completions", type=int, metavar="K", help="of each prompt (1)")
    parser.add_argument(
        "--pass-at", metavar="1,4", help="k of pass@k (by default 1 and K, where K is above 1)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a completion (128)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0 for K = 1, else 1)")
    parser.add_argument("--threshold", type=float, help="the reward from which a completion is right (1.0)")
    parser.add_argument("--seed", type=int, help="of what is drawn (42)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="keeps every completion with its rewards")
    parser.add_argument("--max-length", type=int, default=1024, help="of rows, or of prompts (1024)")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="rows (8), or completions (64), at a time on a device"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first rows alone")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="datasets.eval.prompt_field=question, stages.0.top_p=0.9, mesh.fsdp=-1: what a config can say",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Parses the command line, evaluates and prints."""
    args = parser().parse_intermixed_args(argv)
    given = [name for name in DRAWING if getattr(args, name) is not None]
    if given and not args.reward:
        option = "--" + given[0].replace("_", "-")
        raise ConfigError(
            f"{option} is for completions, which are drawn for a reward alone",
            where=option,
            fix="add --reward NAME",
        )
    if not Path(args.data).exists():
        raise InputMissing(f"there is no file {args.data}", where="--data")
    for name, default in DRAWING.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.pass_at = _pass_at(args.pass_at, args.num_completions)

    from ntjax.hf.hub import locate

    args.folder = locate(args.model)
    told = _rewards(args) if args.reward else _likelihoods(args)
    if args.json:
        print(json.dumps({"model": args.model, "data": args.data, **told}, ensure_ascii=False))
    else:
        show(told)


def _pass_at(text: str | None, drawn: int) -> list[int]:
    if text is None:
        return [1, drawn] if drawn > 1 else []
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= number <= drawn for number in numbers):
        raise ConfigError(
            f"{text}: pass@k is estimated from {drawn} completions of a prompt",
            where="--pass-at",
            fix=f"write numbers from 1 to {drawn}, or draw more by --num-completions",
        )
    return numbers


def _likelihoods(args: argparse.Namespace) -> dict[str, Any]:
    config = _config(args, {"stage_type": args.stage or "sft"}, of_stage=args.stage is not None)
    model = _model(args, config)
    kind = args.stage or _kind(config, model)
    rows = 8 if args.batch_size is None else args.batch_size
    stage = {"stage_type": kind, "max_length": args.max_length, "per_device_eval_batch_size": rows}
    config = _config(args, stage)

    from ntjax.evaluation import likelihoods
    from ntjax.feed import encoded_rows

    model.as_in(config)  # raises where the model is of another kind
    vocab = model.model.config.vocab
    examples, _ = encoded_rows(config, config.stages[0], model.tokenizer, vocab, model.vision)
    assert examples is not None
    print(examples.report(), file=sys.stderr)
    return {"stage": kind, "rows": len(examples), **likelihoods(model, config, examples)}


def _rewards(args: argparse.Namespace) -> dict[str, Any]:
    if args.stage is not None:
        raise ConfigError("--stage says how losses read rows, and rewards read prompts", where="--stage")
    if args.num_completions < 1:
        raise ConfigError(f"can't draw {args.num_completions} completions", where="--num-completions")
    warmth = args.temperature
    if warmth is None:
        warmth = 0.0 if args.num_completions == 1 else 1.0
    stage = {
        "stage_type": "grpo",
        "reward_function": args.reward,
        "max_length": args.max_length,
        "max_completion_length": args.max_new_tokens,
        "eval_temperature": warmth,
        "sampler_slots": 64 if args.batch_size is None else args.batch_size,
        "seed": args.seed,
    }
    config = _config(args, stage)
    model = _model(args, config)

    from ntjax.data.prompts import Prompts
    from ntjax.evaluation import Asking
    from ntjax.feed import encoded_rows
    from ntjax.judge import open_judge
    from ntjax.prepare import Job

    model.as_in(config)
    vocab = model.model.config.vocab
    prompts, _ = encoded_rows(config, config.stages[0], model.tokenizer, vocab, model.vision)
    assert isinstance(prompts, Prompts)
    print(prompts.report(), file=sys.stderr)
    job, rows = Job(config, config.stages[0], model.folder, Path()), SCORED * model.layout.rows
    judge = open_judge(job, prompts, model.layout, rows)
    try:
        out = _emptied(args.out)
        answers = Asking(model, config, prompts, judge, args.num_completions, out)()
    finally:
        judge.close()
    told = answers.summary(args.threshold, args.pass_at)
    return {"prompts": len(prompts), "completions": len(answers.completions), **told}


def _config(args: argparse.Namespace, stage: Mapping[str, Any], *, of_stage: bool = True) -> Config:
    """A config of one stage on the data; without those `of_stage`, the overrides are the others."""
    from ntjax.hf.files import read_config
    from ntjax.models import sees
    from ntjax.runner import configured

    kind = "vlm" if sees(read_config(args.folder)) else "llm"
    data = {"dataset_path": args.data, **({} if args.limit is None else {"num_samples": args.limit})}
    model = {"model_name_or_path": args.folder, "model_type": kind, "dtype": args.dtype}
    overrides = [one for one in args.overrides if of_stage or not one.startswith("stages")]
    config = configured({"model": model, "datasets": {"eval": data}, "stages": [dict(stage)]}, overrides)
    places = {"stages.0.reward_function": "--reward", "datasets.eval": "--data", "model": "--model"}
    return replace(config, places={**places, **config.places})


def _model(args: argparse.Namespace, config: Config) -> LoadedModel:
    """The model, over the devices as the config says; its weights are read later."""
    from ntjax.hf.hub import locate
    from ntjax.loaded import LoadedModel
    from ntjax.prepare import layout_of

    adapter = locate(args.adapter) if args.adapter else None
    return LoadedModel(args.folder, layout=layout_of(config), dtype=args.dtype, adapter=adapter)


def _kind(config: Config, model: LoadedModel) -> str:
    """The stage that rows of these columns are for."""
    from ntjax.data.chat import layout
    from ntjax.data.rows import open_rows

    dataset = config.datasets["eval"]
    row = open_rows(dataset, [Path.cwd()])[0]
    if {dataset.chosen_field or "chosen", dataset.rejected_field or "rejected"} <= row.keys():
        return "reward" if model.model.config.labels else "dpo"
    plain = dataset.formatting_func is None and layout(row, dataset)[0] == "text"
    return "pretrain" if plain and model.vision is None else "sft"


def _emptied(out: str | None) -> Path | None:
    if out is None:
        return None
    try:
        Path(out).write_text("")
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error}", where="--out") from error
    return Path(out)


def show(told: Mapping[str, Any]) -> None:
    """Tables on stdout: of rewards, then of everything else."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    rewards = told.get("rewards", {})
    if rewards:
        columns = list(next(iter(rewards.values())))
        table = Table("reward", *columns)
        for name, values in rewards.items():
            table.add_row(name, *(_number(values[column]) for column in columns))
        console.print(table)
    table = Table("metric", "value")
    for name, value in told.items():
        if name != "rewards" and not (name == "reward" and len(rewards) == 1):
            table.add_row(name, _number(value))
    console.print(table)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    errors.run(main)
