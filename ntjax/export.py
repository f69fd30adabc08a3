"""`python -m ntjax.export`: an orbax checkpoint to a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ntjax import errors
from ntjax.errors import ConfigError, InputMissing


def main(argv: Sequence[str]) -> None:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(
        "ntjax export", description="Turns a checkpoint into a Hugging Face folder."
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint-N, or a stage folder: its newest")
    parser.add_argument("--out", required=True, help="a folder that isn't there yet, or is empty")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--adapter-only", action="store_true", help="the adapter alone, as PEFT reads it")
    kind.add_argument("--merge", action="store_true", help="with the adapter merged into the weights")
    parser.add_argument("--format", choices=["safetensors", "flax"], default="safetensors")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.adapter_only or args.merge:
        flag = "--merge" if args.merge else "--adapter-only"
        raise ConfigError("not built yet: LoRA adapters", where=flag, fix="leave it out: there is no adapter")
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", where="--out", fix="name a new folder")
    folder, step = _checkpoint(Path(args.checkpoint).resolve())
    export(folder, step, out, flax=args.format == "flax", dtype=args.dtype)
    print(f"{out}: step {step} of {folder.name}, {args.format}, {args.dtype}")


def export(folder: Path, step: int, out: Path, *, flax: bool = False, dtype: str = "float32") -> None:
    """Writes the weights of `folder`/checkpoint-`step` with config and tokenizer; weights may be in Flax's msgpack."""
    from ntjax.hf.folder import save_flax, save_params
    from ntjax.hf.tokenizer import load_tokenizer, save_generation_config, save_tokenizer
    from ntjax.leaves import load_part
    from ntjax.models import build

    params, meta = load_part(folder, step, "params/")
    # The tokenizer is the one the stage started with; a finished stage has a copy of its own.
    source = folder if (folder / "tokenizer_config.json").exists() else Path(meta["source"])
    if not source.exists():
        raise InputMissing(
            f"the model this stage started from, {source}, isn't there, and so its tokenizer isn't",
            where=str(folder),
            fix="put it back, or finish the stage",
        )
    tokenizer = load_tokenizer(source)
    model = build(meta["hf"])
    out.mkdir(parents=True, exist_ok=True)
    save = save_flax if flax else save_params
    save(out, params, model.specs, dtype=dtype, config=model.hf)
    save_tokenizer(tokenizer, out)
    save_generation_config(out, source, tokenizer)


def _checkpoint(path: Path) -> tuple[Path, int]:
    """The stage folder and the step that `path` names."""
    from ntjax.checkpoint import saved_steps

    named = re.fullmatch(r"checkpoint-(\d+)", path.name)
    folder = path.parent if named else path
    steps = saved_steps(folder)
    step = int(named[1]) if named else max(steps, default=-1)
    if step not in steps:
        there = ", ".join(f"checkpoint-{n}" for n in steps) or "none"
        raise InputMissing(
            f"there is no such checkpoint: {path}", where="--checkpoint", fix=f"{folder} has {there}"
        )
    return folder, step


if __name__ == "__main__":
    errors.run(main)
