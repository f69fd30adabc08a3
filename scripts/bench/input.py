"""What a step of SmolLM2-135M waits for beside its arithmetic, on a CPU: the table `input` of docs/benchmarks.md.

    python scripts/bench/input.py [--rounds N] [--only ROW ...] [--toy]

Input is what the training loop does between two steps: the next batch of the plan, put on the device. A checkpoint is
the time that `save` holds the loop, of weights and both moments in fp32. Both are held against the loop's own step.
Pictures are JPEGs of 640 x 480 that a tower of random weights, some 20 M of them, sees as 196 features each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from cpu import model_of
from harness import Row, main, measured, timed

ROOT = Path(__file__).parents[2]
BETWEEN = 50  # steps from a save to the next
PHOTOS = 16
TOWER = {"model_type": "clip_vision_model", "hidden_size": 512, "intermediate_size": 2048}
TOWER |= {"num_hidden_layers": 6, "num_attention_heads": 8, "image_size": 224, "patch_size": 16}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
Json = dict[str, Any]


def setup(args: argparse.Namespace, folder: Path, *, pictures: bool = False) -> Any:
    """An SFT stage in `folder`, of 4 rows of 256 tokens a step, ready but for its weights: packed text, or questions
    about pictures."""
    from peers.rows import answered, real_rows, toy_rows

    from ntjax.config import load_config
    from ntjax.prepare import Job, prepare

    model = (seeing(args, folder) if pictures else model_of(args)).resolve()
    text = None if pictures else answered(toy_rows() if args.toy else real_rows(args.data))
    rows = photos(folder, args) if text is None else text
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "rows.jsonl", **({"image_field": "image"} if pictures else {})}
    stage = {"stage_type": "sft", "packing": not pictures, "max_length": 256, "num_train_epochs": 100}
    config = {
        "model": {
            "model_name_or_path": str(model),
            "model_type": "vlm" if pictures else "llm",
            "dtype": "float32",
        },
        "datasets": {"vlm_sft" if pictures else "sft": data},
        "stages": [stage],
    }
    (folder / "config.json").write_text(json.dumps(config))
    read = load_config(str(folder / "config.json"), [])
    return prepare(Job(read, read.stages[0], model, folder / "stage"))


def seeing(args: argparse.Namespace, folder: Path) -> Path:
    """The model with a tower."""
    (folder / "tower.json").write_text(json.dumps(TOWER | SMALL if args.toy else TOWER))
    grafted = folder / "sees"
    command = [sys.executable, "-m", "ntjax.import", "--model", str(model_of(args).resolve())]
    command += ["--vision", str(folder / "tower.json"), "--out", str(grafted)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return grafted


def photos(folder: Path, args: argparse.Namespace) -> list[Json]:
    """Rows, each with a picture of its own."""
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(0)
    for number in range(PHOTOS):  # blocks of colours: JPEG is slow on noise, and photos aren't
        colours = drawn.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Colours."}]
    return [{"image": f"{number}.jpg", "conversations": turns} for number in range(PHOTOS)]


def fed(args: argparse.Namespace, **kind: bool) -> Json:
    """Batches as the loop gets them."""
    import jax

    from ntjax.mesh import place_batch

    with tempfile.TemporaryDirectory() as folder:
        ready = setup(args, Path(folder), **kind)
        with ready.train.open() as batches:

            def following() -> float:
                jax.block_until_ready(place_batch(next(batches).batch, ready.layout.mesh))
                return 0.0

            return {**timed(following, 5 if args.toy else 100), "loss": []}


def step(args: argparse.Namespace, times: int = 1, **kind: bool) -> Json:
    """The loop's step on the first batch, `times` over."""
    from ntjax.checkpoint import Checkpoints
    from ntjax.loop import Loop
    from ntjax.trainer import start

    with tempfile.TemporaryDirectory() as folder:
        ready = setup(args, Path(folder), **kind)
        loop = Loop(ready, start(ready), None, Checkpoints(Path(folder)))
        with ready.train.open() as batches:
            batch = loop.prepared(next(batches).batch)

        def taken() -> float:
            loop.state, metrics = loop.step(loop.state, loop.frozen, batch)
            return float(metrics["loss"].total / metrics["loss"].weight)

        found = timed(taken, 2 if args.toy else 4)
    return {**found, **{name: [one * times for one in found[name]] for name in ("seconds", "cpu")}}


def saved(args: argparse.Namespace) -> Json:
    """How long `save` holds whoever calls it; the disk is waited for in between."""
    from ntjax.checkpoint import Checkpoints
    from ntjax.loop import Loop
    from ntjax.trainer import start

    seconds, cpu = [], []
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        ready = setup(args, Path(folder))
        checkpoints = Checkpoints(Path(folder) / "kept", keep=1)
        loop = Loop(ready, start(ready), None, checkpoints)
        for number in range(4):
            wall, used = time.perf_counter(), time.process_time()
            loop.done = number
            loop.save()
            seconds.append(time.perf_counter() - wall)
            cpu.append(time.process_time() - used)
            checkpoints.wait()
        checkpoints.close()
    return measured(seconds[1:], cpu[1:], first_s=seconds[0])


ROWS = [
    Row("text", "SFT, 4 packed rows of 256 tokens", {"input": fed, "step": step}, "50: below 2% of a step"),
    Row(
        "pictures",
        "SFT, 4 rows of 256 tokens, a picture in each",
        {"input": partial(fed, pictures=True), "step": partial(step, pictures=True)},
        "50: below 2% of a step",
    ),
    Row(
        "checkpoint",
        f"checkpoints, {BETWEEN} steps apart",
        {"held by save": saved, f"{BETWEEN} steps": partial(step, times=BETWEEN)},
        "20: below 5% of the time",
    ),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "bench", help="where real rows are kept")
    parser.add_argument("--disk", type=Path, help="where checkpoints are written and deleted")
    packages = ("jax", "flax", "grain", "orbax-checkpoint")
    main("input", ROWS, parser, packages, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
