"""The one door for images from outside: a readable file becomes an upright RGB image, all others one kind of error."""

import re
import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # what Pillow reads without running other programs
SHORTER_SIDE = 512  # larger images are shrunk to at least this: the model sees 32
# A second and some 50 MB are enough for each file within these.
MAX_PIXELS = 50_000_000  # of a JPEG that can be decoded at reduced size, as cameras write them
MAX_DECODED_PIXELS = 13_000_000
MAX_SIDE = 65_535
MAX_READS = 250_000
MAX_SCANS = 1_000  # of a progressive JPEG; ten are usual
# What Pillow raises, depending on format and damage, where a file is not an image.
UNREADABLE = (
    *(OSError, ValueError, TypeError, SyntaxError, EOFError, ArithmeticError, LookupError, struct.error),
    *(AssertionError, RuntimeError, MemoryError, Image.DecompressionBombError),
)


class ImageError(UserError):
    """An image that cannot be read; the message is one line."""


def open_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """An image file as RGB: EXIF rotation applied, first frame of an animation, alpha over white, 16 bits scaled to 8.

    A large image is shrunk, to at least SHORTER_SIDE pixels along its shorter side.

    Raises:
        ImageError: not a readable image of one of FORMATS, or more pixels than its format allows (nothing is decoded
            then): MAX_PIXELS of a JPEG, MAX_DECODED_PIXELS of most others.
    """
    if isinstance(source, str | Path):
        try:
            with open(source, "rb") as file:
                return _decoded(file, str(source))
        except OSError as error:
            known = {FileNotFoundError: "no such file", IsADirectoryError: "a folder"}
            got = known.get(type(error), "one that cannot be opened")
            raise ImageError(f"{source}: expected an image file, got {got}") from error
    return _decoded(BytesIO(source) if isinstance(source, bytes) else source, "the upload")


def _decoded(file: BinaryIO, name: str) -> Image.Image:
    try:
        with Image.open(_LimitedReads(file), formats=FORMATS) as image:
            width, height = image.size
            if width * height > (limit := _most_pixels(image)) or max(image.size) > MAX_SIDE:
                raise ImageError(
                    f"{name}: expected at most {limit:,} pixels, {MAX_SIDE:,} a side, got {width} x {height}"
                )
            image.draft("RGB", (SHORTER_SIDE, SHORTER_SIDE))
            image.load()
            rgb = _to_small_rgb(image)
            rgb.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
            return ImageOps.exif_transpose(rgb)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got far more") from error
    except UNREADABLE as error:
        raise ImageError(
            f"{name}: expected an image ({', '.join(FORMATS)}), got something that cannot be read"
        ) from error


class _LimitedReads:
    """A file that can be read in MAX_READS steps: a million empty blocks would keep Pillow busy for seconds."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, MAX_READS

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError(f"expected at most {MAX_READS:,} reads")
        return self.file.read(size)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _most_pixels(image: Image.Image) -> int:
    """What a file may promise, by what its decoder does with it."""
    if image.format in ("JPEG", "MPO"):
        scans = _scans(image.fp, image.layers)
        if scans == 1 and not image.info.get("progressive") and min(image.size) >= 2 * SHORTER_SIDE:
            return MAX_PIXELS
        return MAX_DECODED_PIXELS * 30 // max(30, scans)  # progressive: all coefficients in memory, gone over each time
    if image.format == "WEBP" or image.mode == "LAB":  # a decoder that holds four copies; a slow conversion
        return MAX_DECODED_PIXELS // 4
    if image.format == "TIFF" and image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0) > MAX_DECODED_PIXELS:
        raise ValueError("a single tile of more pixels than an image may have")
    if any(tile.codec_name in Image.DECODERS for tile in image.tile):  # written in Python
        return MAX_DECODED_PIXELS // 25
    return MAX_DECODED_PIXELS


def _scans(file: BinaryIO, components: int) -> int:
    """How many times a JPEG goes over its picture; a scan of some components, which others have to follow, counts
    twice. Thumbnails lie inside of other segments, which are skipped."""
    file.seek(0)
    content, position, scans = file.read(), 2, 0
    marker = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # neither a stuffed byte nor a restart
    while (found := marker.search(content, position)) and found[1] != b"\xd9":
        if found[1] == b"\xda":
            scans += 1 if content[found.end() + 2 : found.end() + 3] == bytes([components]) else 2
        if scans > MAX_SCANS:
            raise ValueError(f"expected at most {MAX_SCANS} scans")
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def _to_small_rgb(image: Image.Image) -> Image.Image:
    """Band by band: a converted copy of a large image would need several times its memory."""
    factor = max(1, min(image.size) // SHORTER_SIDE)
    if image.mode == "F":  # what is white in it depends on all its pixels
        return to_rgb(image.reduce(factor))
    small = Image.new("RGB", (image.width // factor, image.height // factor))
    for top in range(0, small.height, 32):
        band = image.crop((0, factor * top, image.width, min(image.height, factor * (top + 32))))
        small.paste(to_rgb(band).reduce(factor), (0, top))
    return small


def to_rgb(image: Image.Image) -> Image.Image:
    """Of any of Pillow's modes: alpha over white, 16 bits scaled to 8, floats of 0..1 to 0..255."""
    if image.mode == "F":  # a float TIFF: 0..1 as a rule, or a little above where it was resized
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values = values * 255 if values.max(initial=0) <= 2 else values
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    elif image.mode.startswith("I"):  # 16 bits; Pillow itself would clip them to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:  # an alpha of 0 would reveal whatever colour lies under it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
