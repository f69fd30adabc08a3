"""`python -m ntjax.export`: an orbax checkpoint to a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntjax import errors
from ntjax.errors import ConfigError, InputMissing

if TYPE_CHECKING:
    from ntjax.params import Params
    from ntjax.policy import Policy


def main(argv: Sequence[str]) -> None:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(
        "ntjax export", description="Turns a checkpoint into a Hugging Face folder."
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint-N, or a stage folder: its newest")
    parser.add_argument("--out", required=True, help="a folder that isn't there yet, or is empty")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--adapter-only", action="store_true", help="the adapter alone, as PEFT reads it")
    kind.add_argument(
        "--merge",
        action="store_true",
        help="the model with the adapter merged into it: the default, said aloud",
    )
    parser.add_argument("--format", choices=["safetensors", "flax"], default="safetensors")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.adapter_only and args.format == "flax":
        raise ConfigError("PEFT has no Flax format", where="--format", fix="leave it out")
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", where="--out", fix="name a new folder")
    folder, step = _checkpoint(Path(args.checkpoint).resolve())
    if args.adapter_only:
        base = export_adapter(folder, step, out)
        print(f"{out}: the adapter at step {step} of {folder.name}, on {base}")
        return
    how = export(folder, step, out, flax=args.format == "flax", dtype=args.dtype, merge=args.merge)
    print(f"{out}: step {step} of {folder.name}{how}, {args.format}, {args.dtype}")


def export(
    folder: Path, step: int, out: Path, *, flax: bool = False, dtype: str = "float32", merge: bool = False
) -> str:
    """Writes the model of `folder`/checkpoint-`step` with config and tokenizer; weights may be in Flax's msgpack.

    An adapter is merged; what is returned says so. With `merge` there must be one.
    """
    from ntjax.hf.folder import save_flax, save_params
    from ntjax.hf.processor import load_words, save_words
    from ntjax.hf.tokenizer import pad_id, save_generation_config

    stage = _Saved(folder, step)
    if merge:
        stage.require_adapter("--merge")
    params = stage.params()
    # The tokenizer is the one the stage started with; a finished stage has a copy of its own.
    source = folder if (folder / "tokenizer_config.json").exists() else stage.source
    pixels = {"min_pixels": stage.settings.image_min_pixels, "max_pixels": stage.settings.image_max_pixels}
    tokenizer, vision = load_words(source, stage.model.hf, **pixels)
    out.mkdir(parents=True, exist_ok=True)
    save = save_flax if flax else save_params
    save(out, params, stage.model.specs, dtype=dtype, config=stage.model.exported(pad_id(tokenizer)))
    save_words(tokenizer, vision, out)
    if not stage.model.config.labels:
        save_generation_config(out, source, tokenizer)
    return stage.how


def export_adapter(folder: Path, step: int, out: Path) -> str:
    """Writes the adapter of `folder`/checkpoint-`step` as PEFT reads it, and returns the name of its base."""
    stage = _Saved(folder, step)
    stage.require_adapter("--adapter-only")
    out.mkdir(parents=True, exist_ok=True)
    stage.save_adapter(out)
    return stage.base


class _Saved:
    """A checkpoint, and the frozen weights that it leaves out: they are read again from where the stage started."""

    def __init__(self, folder: Path, step: int):
        from ntjax.config import ModelConfig
        from ntjax.leaves import load_part
        from ntjax.models import build
        from ntjax.policy import VALUE

        self.folder = folder
        self.trainable, self.meta = load_part(folder, step, "params/")
        self.trainable.pop(VALUE, None)  # a Hugging Face model has no place for a head of values
        self.settings = ModelConfig.of(self.meta["model"])
        self.model = build(self.meta["hf"], labels=int(self.meta["scores"]))
        self.source, self.base = Path(self.meta["source"]), str(self.meta["base"])
        self.how = ""

    def require_adapter(self, flag: str) -> None:
        """Raises `ConfigError` where all weights were trained."""
        if not self.settings.use_lora:
            raise ConfigError(f"{self.folder.name} trained no adapter", where=flag, fix="leave it out")

    def policy(self) -> Policy:
        """The weights as they were before the stage's first step."""
        from ntjax.parts import frozen
        from ntjax.policy import adapters, load_policy

        self.require_source("its weights")
        folder = Path(self.meta["adapter"]) if self.meta["adapter"] else None
        still = frozen(self.meta["settings"].get("freeze", ()), self.model.specs)
        plan, adapter = adapters(self.settings, self.model.specs, folder, frozen=still)
        how = {"plan": plan, "adapter": adapter, "seed": self.meta["seed"], "frozen": still}
        return load_policy(self.source, self.model, self.settings, **how)

    def params(self) -> Params:
        """The model's weights at the checkpoint."""
        from ntjax.policy import is_quantised

        self.require_source("its tokenizer")
        if self.trainable.keys() == self.model.specs.keys():
            return self.trainable
        policy = self.policy()
        quantised = any(is_quantised(w) for w in policy.frozen.values())
        if policy.plan is not None:
            self.how = f", the adapter merged{' into the dequantised weights' if quantised else ''}"
        return policy.join(policy.frozen, self.trainable, None)

    def save_adapter(self, out: Path) -> None:
        """Writes the adapter as PEFT reads it."""
        from ntjax.hf.peft import save_adapter

        policy = self.policy()
        assert policy.plan is not None
        kind = "SEQ_CLS" if self.meta["scores"] else "CAUSAL_LM"
        given = (policy.plan, self.trainable, self.model.specs, self.settings.lora_config, self.base)
        save_adapter(out, *given, task_type=kind, start=policy.start)

    def require_source(self, what: str) -> None:
        """Raises `InputMissing` where the model the stage started from is gone."""
        if not self.source.exists() and (
            what == "its weights" or not (self.folder / "tokenizer_config.json").exists()
        ):
            raise InputMissing(
                f"the model this stage started from, {self.source}, isn't there, and so {what} can't be read",
                where=str(self.folder),
                fix="put it back, or finish the stage",
            )


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
