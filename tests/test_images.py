import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_cifar.images import MAX_PIXELS, ImageError, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_rgb_is_kept_pixel_by_pixel_from_bytes_path_and_file(tmp_path):
    content = encoded(Image.fromarray(PIXELS))
    (tmp_path / "image.png").write_bytes(content)
    for source in (content, tmp_path / "image.png", str(tmp_path / "image.png"), io.BytesIO(content)):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PIXELS)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    content = encoded(Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(np.asarray(open_image(content)), np.rot90(PIXELS, -1))


def test_alpha_lies_over_white():
    alpha = np.zeros((20, 30, 1), dtype=np.uint8)
    alpha[:, 15:] = 255
    image = open_image(encoded(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2))))
    assert (np.asarray(image)[:, :15] == 255).all()  # the hidden colours stay hidden
    assert np.array_equal(np.asarray(image)[:, 15:], PIXELS[:, 15:])


def test_palette_with_transparency_lies_over_white():
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    image = np.asarray(open_image(encoded(palette, transparency=0)))
    assert image.tolist() == [[[255, 255, 255], [255, 0, 0]], [[0, 255, 0], [0, 0, 255]]]


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    image = np.asarray(open_image(encoded(Image.fromarray(values))))
    assert image[..., 0].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize("scale", [1, 255])
def test_float_tiff(scale):
    values = np.array([[0, 0.2], [0.6, 1]], dtype=np.float32) * scale
    image = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert image[..., 0].tolist() == [[0, 51], [153, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_what_pillow_makes_of_them(mode):
    source = Image.fromarray(PIXELS).convert(mode)
    image = open_image(encoded(source, "TIFF"))
    assert np.array_equal(np.asarray(image), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    red, _, blue = np.asarray(open_image(content))[0, 0]
    assert red > 200 and blue < 50


@pytest.mark.parametrize("size", [(1, 1), (5000, 1)])
def test_extreme_shapes(size):
    assert open_image(encoded(Image.new("RGB", size))).size == size


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [13_000, 20_000])
def test_bombs_are_refused_before_decoding(side):
    with pytest.raises(ImageError, match=f"expected at most {MAX_PIXELS:,} pixels"):
        open_image(bomb(side))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encoded(Image.fromarray(PIXELS))[:400],
        encoded(Image.fromarray(PIXELS), "JPEG")[:300],
    ],
)
def test_what_is_no_image_gives_one_line(content):
    with pytest.raises(ImageError) as refused:
        open_image(content)
    assert len(str(refused.value).splitlines()) == 1


def test_mutated_files_decode_or_give_the_one_kind_of_error():
    originals = [
        encoded(Image.fromarray(PIXELS)),
        encoded(Image.fromarray(PIXELS), "JPEG"),
        encoded(Image.fromarray(PIXELS), "WEBP"),
        encoded(Image.fromarray(PIXELS).convert("P"), "GIF"),
        encoded(Image.fromarray(PIXELS), "TIFF"),
        encoded(Image.fromarray(PIXELS), "BMP"),
    ]
    outcomes = {"image": 0, "error": 0}
    for _ in range(600):
        content = bytearray(originals[RNG.integers(len(originals))])
        for _ in range(RNG.integers(1, 6)):
            content[RNG.integers(len(content))] = RNG.integers(256)
        try:
            assert open_image(bytes(content)).mode == "RGB"
            outcomes["image"] += 1
        except ImageError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 50


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "nothing.png")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError):
        open_image(tmp_path)
