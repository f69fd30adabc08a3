"""`python -m ntjax.import --model SRC --out DIR`: any checkpoint ntjax reads -> a plain Hugging Face folder.

SRC is a safetensors folder, an HF Flax folder (flax_model.msgpack), a GGUF file or a model of the hub.
Tensors pass through one at a time.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntjax.errors import ConfigError, run

if TYPE_CHECKING:
    import numpy as np

    from ntjax.hf.files import Layout, Source

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> None:
    """Parses the command line and imports."""
    parser = argparse.ArgumentParser(
        prog="python -m ntjax.import",
        description="Any checkpoint ntjax reads -> a plain Hugging Face folder.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="SRC", help="a folder, a GGUF file, or org/name on the hub")
    add(
        "--vision",
        metavar="TOWER",
        help="make a LLaVA: a CLIP's, SigLIP's or LLaVA's folder, or a tower's config.json",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="where SRC is a config.json: random weights, and this tokenizer",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    add("--dtype", choices=DTYPES, help="default: as it is; bfloat16 for a quantised GGUF file")
    add("--seed", type=int, default=0, help="of weights that are drawn")
    add("--cache-dir", type=Path, metavar="DIR", help="for downloads; default: Hugging Face's")
    add("--debug", action="store_true", help="show a traceback with an error")
    options = parser.parse_args(argv)

    from ntjax.hf.hub import locate

    if options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"--out {options.out} isn't empty", fix="name a new folder")
    source, dtype = locate(options.model, cache_dir=options.cache_dir), options.dtype
    if options.tokenizer and source.suffix != ".json":
        raise ConfigError(
            f"{source} has a tokenizer of its own",
            where="--tokenizer",
            fix="leave it out, or name a config.json",
        )
    if options.vision or source.suffix == ".json":
        make(source, options)
        return
    convert(source, options.out, dtype)


def make(source: Path, options: argparse.Namespace) -> None:
    """Writes a model that wasn't there: one of random weights, or a LLaVA of a language model and a tower."""
    from ntjax.hf.graft import fresh, graft
    from ntjax.hf.hub import locate

    dtype = options.dtype or "float32"
    if source.suffix == ".json":
        if options.tokenizer is None:
            raise ConfigError(
                "a config.json has no tokenizer", where="--tokenizer", fix="name a folder with one"
            )
        if options.vision:
            raise ConfigError("a config.json has no weights", where="--vision", fix="make its folder first")
        fresh(source, options.tokenizer, options.out, dtype, options.seed)
    else:
        graft(source, locate(options.vision, cache_dir=options.cache_dir), options.out, dtype, options.seed)
    print(f"{options.out}: a new model, {dtype}")


def convert(path: Path, out: Path, dtype: str | None) -> None:
    """Writes the model at `path` to the folder `out` as safetensors of `dtype`, or of its own dtypes if None.

    Names and shapes are checked against the model that config.json describes, where ntjax has it.
    """
    from ntjax.hf.files import exported_config, read_config, to_json
    from ntjax.hf.folder import open_weights
    from ntjax.hf.gguf_file import GGUF
    from ntjax.hf.names import in_file
    from ntjax.hf.shards import write_safetensors

    source = open_weights(path)
    config = source.config if isinstance(source, GGUF) else read_config(path)
    if dtype is None and isinstance(source, GGUF) and source.quantised():
        dtype = "bfloat16"
    layouts = _layouts(source, _names(source, config), dtype)
    size: Counter[str] = Counter()
    for layout in layouts.values():
        size[layout.dtype.name] += layout.nbytes
    main_dtype = size.most_common(1)[0][0]
    extra = {"config.json": to_json(exported_config(config, main_dtype))}
    files = {in_file(name, config.get("model_type")): name for name in layouts}
    read = _reader(source, layouts)
    placed = {file: layouts[name] for file, name in files.items()}
    write_safetensors(out, placed, lambda file: read(files[file]), extra=extra)
    _side_files(source, out)
    count = sum(layout.nbytes // layout.dtype.itemsize for layout in layouts.values())
    print(f"{out}: {len(layouts)} tensors, {count:,} parameters, {main_dtype}, {size.total() / 1e9:.2f} GB")


def _names(source: Source, config: dict[str, Any]) -> list[str]:
    """Names to write, layer by layer, checked if ntjax has the model."""
    from ntjax import models
    from ntjax.hf.folder import HARMLESS, by_number, check
    from ntjax.scorer import HEAD

    if config.get("model_type") in models.families():
        labels = source.shape(HEAD)[0] if models.is_scoring(config) and HEAD in source.names() else 0
        specs = models.build(config, labels=labels).specs
        check(source, specs)
        names = {name for spec in specs.values() for _, name in spec.tensors()}
    else:
        print(
            f"names and shapes are not checked: ntjax has no model of type {config.get('model_type')!r} yet"
        )
        names = {name for name in source.names() if not any(re.search(pattern, name) for pattern in HARMLESS)}
    return sorted(names, key=by_number)


def _layouts(source: Source, names: Sequence[str], dtype: str | None) -> dict[str, Layout]:
    import jax.numpy as jnp

    from ntjax.hf.files import Layout

    return {name: Layout(source.shape(name), jnp.dtype(dtype or source.dtype(name))) for name in names}


def _reader(source: Source, layouts: dict[str, Layout]) -> Callable[[str], np.ndarray]:
    """`source.read` in the dtype asked for, showing on a terminal how far it is."""
    from tqdm import tqdm

    bar = tqdm(
        total=sum(layout.nbytes for layout in layouts.values()), unit="B", unit_scale=True, disable=None
    )

    def read(name: str) -> np.ndarray:
        bar.update(layouts[name].nbytes)
        return source.read(name).astype(layouts[name].dtype, copy=False)

    return read


def _side_files(source: Source, out: Path) -> None:
    """Tokenizer, generation config, processor: made from a GGUF file's fields, copied from a folder."""
    from ntjax.hf.files import inside, to_json
    from ntjax.hf.gguf_file import GGUF
    from ntjax.hf.hub import SIDE_FILES
    from ntjax.hf.tokenizer import save_tokenizer

    if isinstance(source, GGUF):
        save_tokenizer(source.tokenizer(), out)
        (out / "generation_config.json").write_bytes(to_json(source.generation_config()))
        return
    for path in sorted({path for pattern in SIDE_FILES for path in source.path.glob(pattern)}):
        if path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(inside(source.path, path.name), out / path.name)


if __name__ == "__main__":
    run(main)
