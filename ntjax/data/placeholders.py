"""Which image of a row stands where, in its text and among its tokens.

Images are in a column of their own, or in the parts that a turn's content may be a list of. Where one of the column's
belongs, a part {"type": "image"} or the word <image> holds its place; where there is no place, all come first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.pictures import KEYS, Picture, Vision, counted, located
from ntjax.errors import BadData

if TYPE_CHECKING:
    from ntjax.config import DatasetConfig

Turn = dict[str, Any]
Part = dict[str, Any]
Found = dict[str, tuple[Picture, ...]]  # {"pictures": ...}, or nothing where there is none

WORD = "<image>"
COLUMNS = ("images", "image")
PART_KEYS = (*KEYS, "image_url")
SHOWN_BY = ("user", "tool")  # roles that can show an image


@dataclass(frozen=True)
class Placing:
    """How the rows of a stage show images; without `vision` they can't.

    `column` is the name of the images' column, None for either of `COLUMNS`. With `lists`, the chat template takes
    every content as a list of parts; else as a string in which the image token stands for an image.
    """

    vision: Vision | None = None
    column: str | None = None
    lists: bool = False

    @classmethod
    def of(cls, vision: Vision | None, tokenizer: Any, fields: DatasetConfig) -> Placing:
        """The one for a tokenizer's chat template and the columns that the config names."""
        return cls() if vision is None else cls(vision, fields.image_field, takes_lists(tokenizer))

    def turns(self, turns: Sequence[Turn], row: Mapping[str, Any], where: str) -> tuple[list[Turn], Found]:
        """The turns as the template takes them, and the pictures that they show, in order.

        Contents are texts, or lists of parts in which {"type": "image", "image": ...} is an image of its own. Raises
        BadData where there aren't as many places as images, or an image in a turn of the system or the assistant.
        """
        if self.vision is None:
            if any(isinstance(turn.get("content"), list) for turn in turns):
                raise BadData(
                    "an image, but the model reads text alone",
                    where=where,
                    fix="name a model that sees images, or leave them out",
                )
            return list(turns), {}
        contents = [self._parts(turn) for turn in turns]
        column = self._column(row, where)
        if column and not any(map(_images, contents)):
            at = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
            if at is None:
                raise BadData("images, but no turn of the user's to show them", where=where)
            contents[at] = [*({"type": "image"} for _ in column), *self._break, *(contents[at] or [])]
        for turn, parts in zip(turns, contents, strict=True):
            if _images(parts) and turn["role"] not in SHOWN_BY:
                raise BadData(
                    f"an image in the {turn['role']}'s turn; allowed: {', '.join(SHOWN_BY)}", where=where
                )
        images = [part for parts in contents for part in _images(parts)]
        self._check(sum("image" not in part for part in images), column, where)
        spare = iter(column)
        pictures = tuple(
            Picture.of(part["image"], f"{where} image {number}") if "image" in part else next(spare)
            for number, part in enumerate(images, 1)
        )
        shown = [
            turn if parts is None else {**turn, "content": self._content(parts)}
            for turn, parts in zip(turns, contents, strict=True)
        ]
        return shown, _found(pictures)

    def told(self, turns: Sequence[Turn]) -> list[Turn]:
        """Turns as rewards are given them, whatever the template takes: where one shows an image, every content is in
        parts, as in TRL, but for the images themselves; else contents are text."""
        if self.vision is None:
            return list(turns)
        contents = [replace(self, lists=True)._parts(turn) for turn in turns]
        shows = any(map(_images, contents))
        return [
            turn if parts is None else {**turn, "content": parts if shows else worded(parts)}
            for turn, parts in zip(turns, contents, strict=True)
        ]

    def text(self, text: str, row: Mapping[str, Any], where: str) -> tuple[str, Found]:
        """Plain text with the image token in every place, and the pictures; the same errors."""
        if self.vision is None:
            return text, {}
        column, token = self._column(row, where), self.vision.image_token
        words = len(self._word.findall(text))
        if column and not words:
            return token * len(column) + "\n" + text, _found(column)
        self._check(words, column, where)
        return self._word.sub(lambda _: token, text), _found(column)

    def answer(self, text: str, where: str) -> str:
        """An answer that is plain text: it can't show an image."""
        if self.vision is not None and self._word.search(text):
            raise BadData(f"{WORD} in an answer: only what is asked can show an image", where=where)
        return text

    @cached_property
    def _word(self) -> re.Pattern[str]:
        assert self.vision is not None
        return re.compile("|".join(map(re.escape, {WORD, self.vision.image_token})))

    @property
    def _break(self) -> list[Part]:
        """What stands between images and the text after them; templates that take lists see to it."""
        return [] if self.lists else [{"type": "text", "text": "\n"}]

    def _parts(self, turn: Turn) -> list[Part] | None:
        """A turn's content in parts, split where the word for an image stands; None if it has none."""
        content = turn.get("content")
        if content is None:
            return None
        parts: list[Part] = []
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            parts += [part] if part["type"] == "image" else self._split(part["text"])
        return parts

    def _split(self, text: str) -> list[Part]:
        first, *others = self._word.split(text)
        if not others:
            return [{"type": "text", "text": text}]
        if self.lists:  # templates set the image off themselves
            last = others.pop().lstrip("\n")
            first, others = first.rstrip("\n"), [*(piece.strip("\n") for piece in others), last]
        parts: list[Part] = [{"type": "text", "text": first}]
        for piece in others:
            parts += [{"type": "image"}, {"type": "text", "text": piece}]
        return [part for part in parts if part.get("text") != ""]

    def _content(self, parts: Sequence[Part]) -> str | list[Part]:
        assert self.vision is not None
        if self.lists:
            return [{"type": "image"} if part["type"] == "image" else part for part in parts]
        return "".join(part.get("text", self.vision.image_token) for part in parts)

    def _column(self, row: Mapping[str, Any], where: str) -> tuple[Picture, ...]:
        """The images of the column, of which there may be none."""
        for name in columns(self.column):
            value = row.get(name)
            if value is None or (isinstance(value, str | list | tuple) and not value):
                continue
            if isinstance(value, list | tuple):
                return tuple(Picture.of(one, f"{where} {name}[{i}]") for i, one in enumerate(value))
            return (Picture.of(value, f"{where} {name}"),)
        return ()

    def _check(self, places: int, column: Sequence[Picture], where: str) -> None:
        if places != len(column):
            named = "" if column or self.column else ", or name the images' column with image_field"
            raise BadData(
                f"{counted(len(column), 'image')}, but {counted(places, 'placeholder')}",
                where=where,
                fix=f"write {WORD} once for each image of the column, or nowhere{named}",
            )


WORDS = Placing()


def columns(named: str | None) -> tuple[str, ...]:
    """The columns that images may be in."""
    return COLUMNS if named is None else (named,)


def takes_lists(tokenizer: Any) -> bool:
    """Whether the chat template goes over a content's parts; one that takes strings shows the list, or fails."""
    from jinja2 import TemplateError

    probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
    try:
        text = tokenizer.chat_template and tokenizer.apply_chat_template(probe, tokenize=False)
    except (TemplateError, TypeError):
        return False
    return bool(text) and "probe" in text and "'type'" not in text and '"type"' not in text


def expanded(
    tokens: Sequence[int], mask: np.ndarray, pictures: Sequence[Picture], vision: Vision | None, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [t] int32 and mask with each picture's placeholder as often as the picture has tokens, never learned.

    Raises BadData where there are not as many placeholders as pictures.
    """
    ids = np.asarray(tokens, np.int32)
    if vision is None:
        return ids, mask
    at = ids == vision.image_id
    if at.sum() != len(pictures):
        times = counted(at.sum(), "time")
        raise BadData(
            f"{counted(len(pictures), 'image')}, but {vision.image_token} is there {times} among the tokens: it "
            "is written in the text, or the chat template doesn't show images",
            where=where,
            fix=f"take {vision.image_token} out of answers and system turns, or use the model's own chat template",
        )
    counts = np.ones(len(ids), np.int64)
    counts[at] = [vision.count(picture.size) for picture in pictures]
    return np.repeat(ids, counts), np.repeat(mask & ~at, counts)


def borders(tokens: np.ndarray, pictures: Sequence[Picture], vision: Vision) -> list[tuple[int, int]]:
    """The (first, end) token of each picture in expanded tokens."""
    at = np.flatnonzero(tokens == vision.image_id)
    counts = np.array([vision.count(picture.size) for picture in pictures], np.int64)
    ends = np.cumsum(counts)
    return [(int(at[end - count]), int(at[end - 1]) + 1) for count, end in zip(counts, ends, strict=True)]


def with_paths(row: Mapping[str, Any], folder: Path, named: str | None) -> dict[str, Any]:
    """A row whose images' relative paths, in their column and in parts, have become absolute from `folder`."""
    return {
        name: _image(value, folder) if name in columns(named) else _within(value, folder)
        for name, value in row.items()
    }


def _image(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return located(value, folder) if value else value
    if isinstance(value, Mapping):
        return {key: _image(one, folder) if key in PART_KEYS else one for key, one in value.items()}
    return [_image(one, folder) for one in value] if isinstance(value, list | tuple) else value


def _within(value: Any, folder: Path) -> Any:
    """The same for images in the parts of turns."""
    if isinstance(value, Mapping):
        if value.get("type") in ("image", "image_url"):
            return _image(value, folder)
        return {key: _within(one, folder) for key, one in value.items()}
    return [_within(one, folder) for one in value] if isinstance(value, list) else value


def _images(parts: Sequence[Part] | None) -> list[Part]:
    return [part for part in parts or () if part["type"] == "image"]


def worded(content: Any) -> Any:
    """A turn's content as text, images left out; what isn't in parts as it is."""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content


def _found(pictures: tuple[Picture, ...]) -> Found:
    return {"pictures": pictures} if pictures else {}
