"""Images as rows give them: where they are looked for, how large they are, what their pixels are, what is refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ntjax.data.pictures import FORMATS, MOST_PIXELS, Picture, located
from ntjax.errors import BadData

WHERE = "d.jsonl:17 images[0]"
SIZE = (7, 5)


def drawn(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """An image in which no two pixels of a row are alike."""
    width, height = size
    steps = np.arange(width * height).reshape(height, width) * 7 % 256
    colours = np.stack([steps, steps[::-1], 255 - steps], axis=-1).astype(np.uint8)
    return Image.fromarray(colours).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(value: Any) -> Picture:
    return Picture.of(value, WHERE)


def refused(value: Any) -> str:
    with pytest.raises(BadData) as caught:
        picture(value)
    assert caught.value.where == WHERE
    return str(caught.value)


def pixels(value: Any) -> np.ndarray:
    image = picture(value).image()
    assert image.mode == "RGB"
    return np.asarray(image)


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says it is this large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + lines + chunk(b"IEND", b"")


def test_an_image_is_the_same_however_a_row_holds_it(tmp_path: Path) -> None:
    data = encoded(drawn())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    for value in [
        str(path),
        f"file://{path}",
        data,
        text,
        f"data:image/png;base64,{text}",
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": str(path)},
        {"url": f"data:image/png;base64,{text}"},
        Image.open(path),
    ]:
        assert picture(value).size == SIZE
        np.testing.assert_array_equal(pixels(value), np.asarray(drawn()))


def test_of_a_file_only_its_path_is_kept(tmp_path: Path) -> None:
    """A data set of files doesn't fill the memory."""
    path = tmp_path / "a.png"
    drawn().save(path)
    assert picture(str(path)).source == str(path)


def test_a_missing_file_names_the_folder_and_what_is_like_it(tmp_path: Path) -> None:
    (tmp_path / "cat_1.png").write_bytes(b"")
    said = refused(str(tmp_path / "cat_I.png"))
    assert f"there is no 'cat_I.png' in {tmp_path}; did you mean 'cat_1.png'?" in said
    said = refused(str(tmp_path / "none" / "cat.png"))
    assert f"there is no 'none/cat.png' in {tmp_path}" in said


def test_a_url_is_to_be_downloaded_first() -> None:
    said = refused("https://example.org/cat.png")
    assert "is a URL, and images are read from files" in said
    assert "fix: download the images first" in said


def test_a_relative_path_of_a_row_in_no_file_is_refused() -> None:
    assert "the row is in no file that it could lie beside" in refused("cat.png")


@pytest.mark.parametrize("value", [None, 3, {}, {"name": "a.png"}, ["a.png"]])
def test_other_things_are_no_images(value: Any) -> None:
    assert "isn't an image: a path, base64 text, or bytes" in refused(value)


def test_paths_start_from_the_folder_of_their_file(tmp_path: Path) -> None:
    assert located("a/b.png", tmp_path) == str(tmp_path / "a/b.png")
    text = base64.b64encode(encoded(drawn())).decode()
    for other in ("/x/a.png", "https://example.org/a.png", "data:image/png;base64,AAAA", text):
        assert located(other, tmp_path) == other


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_exif_says_and_so_is_their_size(orientation: int, kind: str) -> None:
    from PIL.ImageOps import exif_transpose

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(drawn(), kind, exif=exif)
    wanted = exif_transpose(Image.open(io.BytesIO(data)))
    assert picture(data).size == wanted.size == ((5, 7) if orientation > 4 else (7, 5))
    np.testing.assert_array_equal(pixels(data), np.asarray(wanted.convert("RGB")))


def test_an_image_that_code_gives_is_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(drawn(), "JPEG", exif=exif)))
    assert picture(image).size == (5, 7)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
    ],
)
def test_colours_are_those_of_transformers(mode: str, kind: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    image = drawn(mode) if mode != "CMYK" else drawn().convert("CMYK")
    if mode in ("LA", "RGBA"):
        image.putalpha(drawn("L"))
    data = encoded(image, kind)
    wanted = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
    np.testing.assert_array_equal(pixels(data), wanted)


def test_a_transparent_colour_of_a_palette_is_white() -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert pixels(encoded(image, transparency=1)).min() == 255
    assert pixels(encoded(image, transparency=0))[0, 0].tolist() == [0, 255, 0]


def test_16_bits_of_grey_keep_their_upper_8() -> None:
    """Pillow's conversion to RGB would make all of it white but the darkest 1/256."""
    grey = (np.arange(35, dtype=np.uint16) * 1800).reshape(5, 7)
    found = pixels(encoded(Image.fromarray(grey)))
    np.testing.assert_array_equal(found, np.repeat((grey >> 8)[..., None], 3, axis=-1))


def test_an_animation_is_its_beginning() -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_more_pixels_than_a_camera_gives_are_refused_by_the_header() -> None:
    assert "10000 x 5001 pixels are more than 50 megapixels" in refused(
        bomb(10_000, MOST_PIXELS // 10_000 + 1)
    )
    assert "15000 x 8000 pixels are more than" in refused(bomb(15_000, 8_000))  # Pillow warns
    assert "exceeds limit" in refused(bomb(50_000, 50_000))  # Pillow raises
    assert picture(bomb(10_000, MOST_PIXELS // 10_000)).size == (10_000, 5_000)


def test_a_line_is_no_image() -> None:
    assert "1 x 5000 pixels: one side is more than 200 times the other" in refused(
        encoded(drawn(size=(1, 5000)))
    )
    assert picture(encoded(drawn(size=(1, 200)))).size == (1, 200)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_that_was_cut_off_is_refused_where_its_row_is(kind: str) -> None:
    data = encoded(drawn(size=(64, 64)), kind)
    found = picture(data[: len(data) * 2 // 3])
    assert found.size == (64, 64)
    with pytest.raises(BadData, match="the image can't be read: .*truncated") as caught:
        found.image()
    assert caught.value.where == WHERE


@pytest.mark.parametrize(
    "data", [b"", b"<html>not found</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_image_is_refused_with_what_would_be(data: bytes) -> None:
    assert f"not an image, or none of {', '.join(FORMATS)}" in refused(data)


def test_pixels_that_are_floats_are_refused() -> None:
    data = encoded(Image.new("F", SIZE, 0.5), "TIFF")
    with pytest.raises(BadData, match="floating-point"):
        picture(data).image()


def test_an_image_that_changes_while_a_run_lasts_is_an_error(tmp_path: Path) -> None:
    """Its tokens were counted."""
    path = tmp_path / "a.png"
    drawn().save(path)
    found = picture(str(path))
    drawn(size=(9, 9)).save(path)
    with pytest.raises(BadData, match="was 7 x 5 pixels when the rows were read and is 9 x 9 now"):
        found.image()
    path.unlink()
    with pytest.raises(BadData, match="the image can't be read"):
        found.digest()


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    drawn().save(path)
    assert picture(str(path)).digest() == picture(path.read_bytes()).digest()
    assert picture(encoded(drawn("L"))).digest() != picture(encoded(drawn())).digest()
