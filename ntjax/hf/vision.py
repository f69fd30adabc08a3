"""What vision-language models make of pictures: pixels, and how many tokens stand for which of their features.

Pixels are those of transformers' image processors. All else follows from sizes, and nothing is decoded for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntjax.data.pictures import Picture
from ntjax.data.placeholders import borders
from ntjax.data.pooled import stepped
from ntjax.hf.files import replacing, to_json
from ntjax.hf.tokenizer import save_tokenizer
from ntjax.marks import NEWLINE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Size = tuple[int, int]  # (width, height)
Settings = dict[str, dict[str, Any]]  # JSON files by their names


@dataclass(frozen=True, eq=False)
class Processor:
    """What all families have in common; `images` is transformers' image processor, `settings` are the files of both.

    Each family is a `ntjax.data.pooled.Pooling`.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    images: Any
    image_id: int
    image_token: str

    def save(self, folder: Path) -> None:
        """Writes the tokenizer and what transformers' AutoProcessor reads beside it."""
        save_tokenizer(self.tokenizer, folder)
        with replacing(folder, "*processor_config.json") as create:
            for name, value in self.settings.items():
                create(name).write(to_json(value))

    def count(self, size: Size) -> int:
        """Tokens that a picture of (width, height) takes."""
        return len(self.index(size)[0])

    def shape(self, size: Size) -> tuple[int, int]:
        """(units, features of each of its units)."""
        raise NotImplementedError

    def index(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Of each of its tokens, its unit (or `NEWLINE`) and its feature in the unit."""
        raise NotImplementedError

    def units(self, picture: Picture) -> dict[str, np.ndarray]:
        """What the model is given of it: name -> [units, ...]."""
        raise NotImplementedError

    def blank(self, features: int) -> dict[str, np.ndarray]:
        """One unit with nothing in it and room for so many features: name -> [1, ...]."""
        raise NotImplementedError

    def places(self, tokens: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray | None:
        """None: a token has one position."""
        return None

    def _made(self, picture: Picture) -> Mapping[str, np.ndarray]:
        return self.images(images=[picture.image()], return_tensors="np")


@dataclass(frozen=True, eq=False)
class Llava(Processor):
    """LLaVA-1.5: a picture is one unit: `image` x `image` pixels, of which whole patches of `patch` are seen, behind a
    class token if `whole`."""

    image: int
    patch: int
    whole: bool = False

    @property
    def side(self) -> int:
        """Patches side by side."""
        return self.image // self.patch

    @property
    def features(self) -> int:
        """Of a unit."""
        return self.side**2 + self.whole

    def shape(self, size: Size) -> tuple[int, int]:
        return 1, self.features

    def index(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        feature = np.arange(self.features)
        return np.zeros_like(feature), feature

    def units(self, picture: Picture) -> dict[str, np.ndarray]:
        """`pixels` [units, 3, height, width] float32, without those behind the last whole patch."""
        pixels = self._made(picture)["pixel_values"]
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        if pixels.shape[-2:] != (self.image, self.image):
            return {"pixels": pixels}  # another model's, which is refused
        height = width = self.side * self.patch
        return {"pixels": pixels[..., :height, :width]}

    def blank(self, features: int) -> dict[str, np.ndarray]:
        return {"pixels": np.zeros((1, 3, *2 * (self.side * self.patch,)), np.float32)}


@dataclass(frozen=True, eq=False)
class LlavaNext(Llava):
    """LLaVA-NeXT: the first unit shows the whole picture, the others tiles of it, scaled to the one of the resolutions
    `grids` (height, width) that suits it best."""

    grids: tuple[tuple[int, int], ...] = ()

    def shape(self, size: Size) -> tuple[int, int]:
        rows, columns = self._tiles(size)
        return 1 + rows * columns, self.features

    def index(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """The whole picture's, then line after line of the tiles' patches, `NEWLINE` at the end of each, without the
        padding that makes the picture as wide as its tiles or as high."""
        side, (rows, columns) = self.side, self._tiles(size)
        tile = 1 + np.arange(rows * columns).reshape(rows, 1, columns, 1)
        feature = np.arange(side**2).reshape(1, side, 1, side)
        shape = rows, side, columns, side
        lines = [np.broadcast_to(x, shape).reshape(rows * side, columns * side) for x in (tile, feature)]
        margin = _margin(size, lines[0].shape)
        unit, feature = (x[margin] for x in lines)
        unit = np.pad(unit, ((0, 0), (0, 1)), constant_values=NEWLINE)
        feature = np.pad(feature, ((0, 0), (0, 1)))
        whole = super().index(size)
        return np.concatenate([whole[0], unit.ravel()]), np.concatenate([whole[1], feature.ravel()])

    def _tiles(self, size: Size) -> tuple[int, int]:
        """(rows, columns)."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size[::-1], self.grids)  # type: ignore[arg-type]
        return height // self.image, width // self.image


def _margin(size: Size, shape: tuple[int, int]) -> tuple[slice, slice]:
    """What of lines of patches (height, width) shows a picture (width, height) that was scaled to fit in.

    As transformers' `unpad_image`, to the order of its divisions.
    """
    (width, height), (rows, columns) = size, shape
    if width / height > columns / rows:
        space = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(space, rows - space), slice(None)
    space = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(space, columns - space)


@dataclass(frozen=True, eq=False)
class QwenVL(Processor):
    """Qwen2.5-VL: a picture is one unit of as many patches as it has room for; `merge` x `merge` of them are a feature.

    In windowed layers patches see those of `window` x `window` features.
    """

    patch: int
    merge: int
    channels: int  # numbers in a patch
    window: int

    def shape(self, size: Size) -> tuple[int, int]:
        """(1, features with some to spare, so that there are few shapes)."""
        return 1, stepped(self.count(size))

    def count(self, size: Size) -> int:
        rows, columns = self._grid(size)
        return rows * columns

    def index(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        feature = np.arange(self.count(size))
        return np.zeros_like(feature), feature

    def units(self, picture: Picture) -> dict[str, np.ndarray]:
        """`patches` [1, patches, channels] float32; `at` [1, patches, 2] int32, their rows and columns; `window`
        [1, patches] int32, the window they are in, counted from 1. Patches of a feature are neighbours."""
        made, grid = self._made(picture), self._grid(picture.size)
        assert made["image_grid_thw"].tolist() == [[1, *(self.merge * side for side in grid)]], picture.where
        window, at = _windows(*grid, self.window), _patches(*grid, self.merge)
        patches = {"patches": made["pixel_values"], "at": at, "window": np.repeat(window, self.merge**2)}
        return {name: array[None] for name, array in patches.items()}

    def blank(self, features: int) -> dict[str, np.ndarray]:
        shape = 1, features * self.merge**2
        patches, at = np.zeros((*shape, self.channels), np.float32), np.zeros((*shape, 2), np.int32)
        return {"patches": patches, "at": at, "window": np.zeros(shape, np.int32)}

    def places(self, tokens: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
        """[t, 3] int32: the time, height and width of each token of a document, as transformers' `get_rope_index`.

        A picture is one moment; the words after it go on from the largest number in it.
        """
        found = np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], 3, axis=1)
        for (first, end), picture in zip(borders(tokens, pictures, self), pictures, strict=True):
            rows, columns = self._grid(picture.size)
            start = int(found[first, 0])
            found[first:end, 0] = start
            found[first:end, 1:] = start + np.indices((rows, columns)).reshape(2, -1).T
            found[end:] += max(rows, columns) - (end - first)
        return found

    def _grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of features."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor, bounds = self.patch * self.merge, self.images.size
        height, width = smart_resize(size[1], size[0], factor, bounds.shortest_edge, bounds.longest_edge)
        return height // factor, width // factor


@lru_cache(maxsize=256)
def _windows(rows: int, columns: int, window: int) -> np.ndarray:
    """[features]: the window that each is in, counted from 1."""
    row, column = np.indices((rows, columns), np.int32) // window
    return (row * -(-columns // window) + column + 1).ravel()


@lru_cache(maxsize=256)
def _patches(rows: int, columns: int, merge: int) -> np.ndarray:
    """[patches, 2]: the row and column of each, feature by feature."""
    row, column = np.indices((rows * merge, columns * merge), np.int32)
    shape = rows, merge, columns, merge
    ordered = [x.reshape(shape).transpose(0, 2, 1, 3).ravel() for x in (row, column)]
    return np.stack(ordered, axis=-1)
