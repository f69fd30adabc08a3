"""A vision-language folder as transformers and TRL read it, and conversations with photos for it and for us."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
)

from tests import vlm
from tests.trl_reference import Row, turn

TURNED = 6  # the EXIF orientation of a camera held upright

Said = Sequence[str | int]  # words, and numbers of photos between them
# How a row tells the places of its images, and what user and assistant say in turn.
TALKS: tuple[tuple[str, tuple[Said, ...]], ...] = (
    ("parts", ([0, "What is this?"], ["The sea."])),
    ("words", (["How are you today?"], ["I am well, thank you."])),
    ("words", ([1, 2, "Add the numbers: 12, 7 and 30."], ["2 + 3 = 5"], ["And ", 3, " you?"], ["Paris"])),
    ("parts", (["The sky is ", 4, " blue, or is it ", 5, "?"], ["It is wide."])),
    ("words", ([3, "user"], ["x"], ["1 + 1"], ["= 2"], [0, "the capital of France?"], ["a, b"])),
    ("column", ([6, "Paris"], ["The sky is wide and the sea is blue."])),
    ("parts", (["hi"], ["yo"], ["What is the capital?"], ["It is Paris."])),
    ("column", ([2, 2, 1, "thrice"], ["No."])),
)


class QwenProcessor(Qwen2_5_VLProcessor):
    """Without its part for videos, which wants torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        return None


def processor(folder: Path) -> Any:
    """transformers' own, computing with Pillow and NumPy."""
    if "qwen2_5_vl" not in (folder / "config.json").read_text():
        return AutoProcessor.from_pretrained(folder, backend="pil")
    words, images = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    return QwenProcessor(images, words, None, chat_template=words.chat_template)


def model(folder: Path) -> Any:
    """transformers' own, in eager attention and float32, which has every tensor that it looks for and no other."""
    loaded, found = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    return loaded.eval()


def photos(folder: Path) -> list[Path]:
    """Photos of odd sizes: PNGs, and a JPEG that lies on its side."""
    made = [folder / f"{number}.png" for number in range(len(vlm.SIZES))]
    for number, (path, size) in enumerate(zip(made, vlm.SIZES, strict=True)):
        vlm.photo(size, seed=number).save(path)
    turned = vlm.photo((90, 41), seed=9)
    exif = turned.getexif()
    exif[0x0112] = TURNED
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    return [*made, folder / "turned.jpg"]


def row(talk: int, shown: Sequence[Path]) -> Row:
    """A talk as our files have it: images in a column; their places in parts, as words, or told by nothing."""
    how, turns = TALKS[talk]
    column = [shown[part].name for said in turns for part in said if isinstance(part, int)]
    if how == "parts":
        return {"messages": _turns(turns, lambda number: {"type": "image"}), "images": column}
    word = "<image>" if how == "words" else ""
    contents = ("".join(word if isinstance(part, int) else part for part in said) for said in turns)
    messages = [turn(role, content) for role, content in zip(_roles(turns), contents, strict=True)]
    return {"messages": messages, "images": column}


def talk(number: int, shown: Sequence[Path]) -> list[Row]:
    """The same with images in their places, as transformers' processor takes it."""
    return _turns(TALKS[number][1], lambda photo: {"type": "image", "path": str(shown[photo])})


def _turns(turns: Sequence[Said], image: Callable[[int], Row]) -> list[Row]:
    def part(one: str | int) -> Row:
        return image(one) if isinstance(one, int) else {"type": "text", "text": one}

    return [
        {"role": role, "content": [part(one) for one in said]}
        for role, said in zip(_roles(turns), turns, strict=True)
    ]


def _roles(turns: Sequence[Said]) -> list[str]:
    return ["user", "assistant"] * (len(turns) // 2)


def called(folder: Path, talks: Sequence[Sequence[Row]]) -> Any:
    """What transformers' model is called with: rows padded on the right."""
    given = {"return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    return processor(folder).apply_chat_template(list(talks), tokenize=True, **given)
