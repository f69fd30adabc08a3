"""Images that rows show.

An image is a path, base64 text, bytes or a Pillow image; of each only the header is read until its pixels are needed.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote_to_bytes

import numpy as np

from ntjax.errors import BadData

if TYPE_CHECKING:
    from PIL.Image import Image

# More than a camera gives. It is checked before pixels are: a file of 20 KB can ask for gigabytes of them, and
# Pillow only warns up to 179 megapixels.
MOST_PIXELS = 50_000_000
# What Qwen's processors refuse beyond; resized to what the other families look at, nothing would be left of it.
MOST_ASPECT = 200
# Pillow knows others too, among them such as run other programs (EPS) or have no pixels (WMF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# What an image is called inside of an object; the first that is there is taken.
KEYS = ("bytes", "base64", "image", "path", "url")

ORIENTATION = 0x0112  # the EXIF tag; its values' turns are below, by their names in Pillow
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
ASIDE = {TURNS[value] for value in (5, 6, 7, 8)}  # those that swap width and height
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MEND = "mend the image or leave out its row"
CLOSE = 10_000  # files of a folder among which a misspelt one is looked for


class Vision(Protocol):
    """What a vision-language model makes of images, as far as rows and batches must know it.

    A picture takes the place of its placeholder, a token that stands `count` times for it. It is encoded as units, each
    of which gives as many feature vectors.
    """

    @property
    def image_id(self) -> int:
        """The placeholder."""

    @property
    def image_token(self) -> str:
        """And its text."""

    def count(self, size: tuple[int, int]) -> int:
        """Tokens that a picture of (width, height) takes."""

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(units, features of each of its units)."""

    def index(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each of its `count` tokens: (its unit or the marker of a line's end, its feature in the unit)."""

    def units(self, picture: Picture) -> dict[str, np.ndarray]:
        """What the model is given of it: name -> [units, ...]."""

    def places(self, tokens: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray | None:
        """[t, 3], the (time, height, width) of each token of a document; None for a family that has one position."""


@dataclass(frozen=True)
class Picture:
    """An image that a row shows: a file's absolute path, or its bytes. Nothing is decoded until it is asked for.

    `size` is its (width, height) in pixels as it is meant to be seen, and `where` the place in the data.
    """

    source: str | bytes
    size: tuple[int, int]
    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> Picture:
        """From what rows hold: an absolute path, a data URI or base64 text, bytes, or a Pillow image; or an object
        that has one of those under one of `KEYS`.

        Raises BadData for what isn't there, is no image, or has a size that no model could make sense of.
        """
        source = _source(value, where)
        return cls(source, _size(source, where), where)

    @property
    def name(self) -> str:
        """For people: its path, else the place in the data."""
        return self.where if isinstance(self.source, bytes) else self.source

    def image(self) -> Image:
        """Its pixels in RGB, turned as EXIF says; of an animation, its beginning. BadData where they can't be read."""
        from PIL.Image import Transpose

        try:
            with _opened(self.source) as image:
                turn = _turn(image)
                found = _rgb(image)
        except Exception as error:  # decoders raise whatever they stumble over
            raise _unreadable(error, self.where) from error
        found = found.transpose(Transpose[turn]) if turn else found
        if found.size != self.size:
            raise BadData(
                f"the image was {_by(self.size)} pixels when the rows were read and is {_by(found.size)} now",
                where=self.where,
                fix="leave images as they are while a run lasts",
            )
        return found

    def digest(self) -> bytes:
        """16 bytes that change when the encoded image does."""
        if isinstance(self.source, bytes):
            return hashlib.blake2b(self.source, digest_size=16).digest()
        try:
            with open(self.source, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except OSError as error:
            raise _unreadable(error, self.where) from error


def located(text: str, folder: Path) -> str:
    """A relative path in a row as an absolute one, from the `folder` of its file; other text as it is."""
    if os.path.isabs(text) or SCHEME.match(text) or text.startswith("data:"):
        return text
    path = os.path.join(folder, text)
    return text if not os.path.isfile(path) and _from_base64(text) is not None else path


def counted(count: int, what: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _source(value: Any, where: str) -> str | bytes:
    """An absolute path of a file that is there, or an image's encoded bytes."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in KEYS if value.get(key) is not None), None)
    if isinstance(value, str):
        return _from_text(value, where)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if hasattr(value, "convert") and hasattr(value, "getexif"):
        return _encoded(value, where)
    shown = "null" if value is None else f"{str(value)[:60]!r}"
    raise BadData(f"{shown} isn't an image: a path, base64 text, or bytes", where=where)


def _from_text(text: str, where: str) -> str | bytes:
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        try:
            return base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body)
        except binascii.Error as error:
            raise BadData(f"not base64: {error}", where=where) from error
    text = text.removeprefix("file://")
    if SCHEME.match(text):
        raise BadData(
            f"{text[:80]} is a URL, and images are read from files",
            where=where,
            fix="download the images first and give their paths",
        )
    if os.path.isabs(text) and os.path.isfile(text):
        return text
    if (found := _from_base64(text)) is not None:
        return found
    if not os.path.isabs(text):
        raise BadData(
            f"no image is found by {text[:80]!r}: the row is in no file that it could lie beside",
            where=where,
            fix="give absolute paths, or the images themselves",
        )
    raise _absent(Path(text), where)


def _from_base64(text: str) -> bytes | None:
    """The image that a text without spaces may be; None if it is none."""
    try:
        found = base64.b64decode(text, validate=True)
        with _header(found):
            return found
    except Exception:  # no base64, or no image
        return None


def _absent(path: Path, where: str) -> BadData:
    folder = next(parent for parent in path.parents if parent.is_dir())
    name, *_ = path.relative_to(folder).parts
    close = difflib.get_close_matches(name, islice(os.listdir(folder), CLOSE), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return BadData(f"there is no {str(path.relative_to(folder))!r} in {folder}{hint}", where=where)


def _encoded(image: Image, where: str) -> bytes:
    """A Pillow image as PNG: what it is seen as, so that no more is to be said of it."""
    from PIL.Image import Transpose

    file = io.BytesIO()
    try:
        turn = _turn(image)
        found = _rgb(image)
        (found.transpose(Transpose[turn]) if turn else found).save(file, "PNG", compress_level=1)
    except Exception as error:
        raise _unreadable(error, where) from error
    return file.getvalue()


def _opened(source: str | bytes) -> Image:
    """The image, of which the header is read."""
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _header(source: str | bytes) -> Image:
    """The same without Pillow's warning of many pixels: `_size` is stricter.

    Filters of warnings belong to all threads, so this isn't for those that decode.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _opened(source)


def _size(source: str | bytes, where: str) -> tuple[int, int]:
    try:
        with _header(source) as image:
            width, height = image.size
            aside = _turn(image) in ASIDE
    except Exception as error:
        raise _unreadable(error, where) from error
    size = (height, width) if aside else (width, height)
    if width * height > MOST_PIXELS:
        most = f"{MOST_PIXELS // 10**6} megapixels"
        raise BadData(f"{_by(size)} pixels are more than {most}", where=where, fix="make the image smaller")
    if max(size) > MOST_ASPECT * min(size):
        raise BadData(
            f"{_by(size)} pixels: one side is more than {MOST_ASPECT} times the other",
            where=where,
            fix="crop or leave out the image",
        )
    return size


def _turn(image: Image) -> str | None:
    """How the image is to be turned to be seen right, without decoding it.

    Pillow itself turns TIFFs, and looks for a PNG's EXIF behind its pixels too: only what comes before them counts.
    """
    from PIL import Image

    return None if image.format == "TIFF" else TURNS.get(Image.Image.getexif(image).get(ORIENTATION, 1))


def _rgb(image: Image) -> Image:
    """8 bits of red, green and blue as transformers' processors convert to them: what is transparent is white.

    Unlike there, 16 bits of grey keep their upper 8, as Pillow has it for 16 bits of colour: its conversion takes
    whatever is above 255 for white. Floats have no such scale, and are refused.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _unreadable(error: Exception, where: str) -> BadData:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its text has an address in it
        return BadData(f"not an image, or none of {', '.join(FORMATS)}", where=where, fix=MEND)
    return BadData(f"the image can't be read: {error}", where=where, fix=MEND)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
