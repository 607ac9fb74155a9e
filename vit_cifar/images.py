"""The one door for images from outside: a readable file becomes an upright RGB image, all others one kind of error."""

import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # what Pillow reads without running other programs
MAX_PIXELS = 50_000_000
# What Pillow raises, depending on format and damage, where a file is not an image.
UNREADABLE = (
    *(OSError, ValueError, TypeError, SyntaxError, EOFError, ArithmeticError, LookupError, struct.error),
    Image.DecompressionBombError,
)


class ImageError(UserError):
    """An image that cannot be read; the message is one line."""


def open_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """An image file as RGB: EXIF rotation applied, first frame of an animation, alpha over white, 16 bits scaled to 8.

    A large JPEG is decoded at reduced size, at least 512 pixels along its shorter side: the model sees 32.

    Raises:
        ImageError: not a readable image of one of FORMATS, or more than MAX_PIXELS pixels (nothing is decoded then).
    """
    name = str(source) if isinstance(source, str | Path) else "the upload"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}")
            image.draft("RGB", (512, 512))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ImageError(f"{name}: expected an image file, got no such file") from error
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, got far more") from error
    except UNREADABLE as error:
        raise ImageError(
            f"{name}: expected an image ({', '.join(FORMATS)}), got something that cannot be read"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":  # a float TIFF: 0..1 as a rule
        values = np.nan_to_num(np.asarray(image))
        values = values * 255 if values.max(initial=0) <= 1 else values
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    elif image.mode.startswith("I"):  # 16 bits; Pillow itself would clip them to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:  # an alpha of 0 would reveal whatever colour lies under it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
