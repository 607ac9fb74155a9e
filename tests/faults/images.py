"""Images from outside: files made by hand and mutated ones, each a right RGB image or one line of refusal."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from vit_cifar.images import ImageError, open_image

ROWS, COLUMNS = np.mgrid[0:20, 0:30].astype(np.uint8)
PIXELS = np.stack([12 * ROWS, 8 * COLUMNS, 4 * (ROWS + COLUMNS)], axis=2)  # smooth: JPEG keeps it


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A block of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@cache
def cases() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Files by name, each with the RGB pixels that it must become; None where it must be refused."""
    picture = Image.fromarray(PIXELS)
    gray = PIXELS[..., 0]
    gray_rgb = np.stack([gray] * 3, axis=2)
    half_clear = np.where(COLUMNS < 15, 0, 255).astype(np.uint8)
    over_white = np.where(half_clear[..., None] == 0, 255, PIXELS).astype(np.uint8)
    turned, mirrored = Image.Exif(), Image.Exif()
    turned[0x0112], mirrored[0x0112] = 6, 2  # shown a quarter turn clockwise; shown left to right
    palette = Image.fromarray((COLUMNS % 2).astype(np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette_rgb = np.where(COLUMNS[..., None] % 2 == 0, 255, [200, 100, 50]).astype(np.uint8)
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    animation = {"save_all": True, "append_images": frames[1:], "duration": 100}
    red = np.asarray(frames[0])
    alpha = Image.fromarray(np.dstack([PIXELS, half_clear]))
    gray_alpha = Image.fromarray(np.dstack([gray, half_clear]), mode="LA")
    line = np.resize(PIXELS, (1, 5000, 3))
    return {
        "plain.png": (encoded(picture), PIXELS),
        "plain.bmp": (encoded(picture, "BMP"), PIXELS),
        "plain.ppm": (encoded(picture, "PPM"), PIXELS),
        "turned.jpg": (encoded(picture, "JPEG", quality=95, exif=turned), np.rot90(PIXELS, -1)),
        "mirrored.webp": (encoded(picture, "WEBP", lossless=True, exif=mirrored), PIXELS[:, ::-1]),
        "progressive.jpg": (encoded(picture, "JPEG", quality=95, progressive=True), PIXELS),
        "cmyk.jpg": (encoded(picture.convert("CMYK"), "JPEG", quality=95), PIXELS),
        "sixteen-bit.png": (encoded(Image.fromarray(gray * np.uint16(257))), gray_rgb),
        "sixteen-bit.tiff": (encoded(Image.fromarray(gray * np.uint16(257)), "TIFF"), gray_rgb),
        "float.tiff": (encoded(Image.fromarray(gray / np.float32(255)), "TIFF"), gray_rgb),
        "palette-with-transparency.png": (encoded(palette, transparency=0), palette_rgb),
        "alpha.png": (encoded(alpha), over_white),
        "gray-alpha.png": (encoded(gray_alpha), np.where(half_clear[..., None] == 0, 255, gray_rgb)),
        "one-bit.png": (encoded(Image.fromarray(half_clear).convert("1")), np.stack([half_clear] * 3, axis=2)),
        "animated.gif": (encoded(frames[0], "GIF", **animation), red),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **animation), red),
        "one-pixel.png": (encoded(picture.crop((0, 0, 1, 1))), PIXELS[:1, :1]),
        "line.png": (encoded(Image.fromarray(line)), line),
        "cut.png": (encoded(picture)[:-60], None),
        "cut.jpg": (encoded(picture, "JPEG")[:-60], None),
        "empty.png": (b"", None),
        "text.jpg": (b"just text", None),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", None),
        "bomb-of-169-megapixels.png": (bomb(13_000), None),
        "bomb-of-400-megapixels.png": (bomb(20_000), None),
    }


def hand_made() -> dict[str, bytes]:
    """25 files by name, readable ones and others."""
    return {name: content for name, (content, _) in cases().items()}


def mutations(count: int, seed: int = 0) -> Iterator[bytes]:
    """Readable files with bytes changed, a block inserted or doubled, or the end cut off."""
    rng = np.random.default_rng(seed)
    originals = [content for content, pixels in cases().values() if pixels is not None]
    for _ in range(count):
        content = bytearray(originals[rng.integers(len(originals))])
        start, end = sorted(rng.integers(len(content), size=2))
        match rng.integers(4):
            case 0:
                for _ in range(rng.integers(1, 6)):
                    content[rng.integers(len(content))] = rng.integers(256)
            case 1:
                content[start:start] = rng.bytes(int(rng.integers(1, 50)))
            case 2:
                content[start:start] = content[start:end]
            case 3:
                del content[end:]
        yield bytes(content)


def decode(mutated: int = 10_000) -> dict:
    """Opens every file; the figures."""
    start = _resident_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest memory so far
    seconds, decoded = [], 0
    for name, (content, expected) in cases().items():
        began = perf_counter()
        image = _opened(content)
        seconds.append(perf_counter() - began)
        assert (image is None) == (expected is None), name
        if image is not None:
            tolerance = 8 if name.endswith(".jpg") else 0  # of 255; JPEG is not exact
            pixels = np.asarray(image, dtype=int)
            assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= tolerance, name
    for content in mutations(mutated):
        began = perf_counter()
        decoded += _opened(content) is not None
        seconds.append(perf_counter() - began)
    highest, growth = (_resident_megabytes(kind) - start for kind in ("VmHWM", "VmRSS"))
    assert highest < 50, f"expected less than 50 MB more memory, got {highest:.0f}"
    return {
        "files": len(cases()),
        "mutations": mutated,
        "mutations_decoded": decoded,
        "mutations_refused": mutated - decoded,
        "slowest_seconds": round(max(seconds), 3),
        "highest_memory_growth_mb": round(highest, 1),
        "memory_growth_mb": round(growth, 1),
    }


def _opened(content: bytes) -> Image.Image | None:
    """The image; None where the file was refused as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damage that it can live with
        try:
            image = open_image(content)
        except ImageError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            return None
    assert image.mode == "RGB"
    return image


def _resident_megabytes(kind: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024
