"""What tests/faults/images.py does not try: ways to name a file, further modes, large images, limits."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from tests.faults.images import bomb, chunk, encoded
from vit_cifar import images
from vit_cifar.images import MAX_DECODED_PIXELS, MAX_PIXELS, ImageError, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_rgb_is_kept_pixel_by_pixel_from_bytes_path_and_file(tmp_path):
    content = encoded(Image.fromarray(PIXELS))
    (tmp_path / "image.png").write_bytes(content)
    for source in (content, tmp_path / "image.png", str(tmp_path / "image.png"), io.BytesIO(content)):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("scale", [1, 255])
def test_float_tiff(scale):
    values = np.array([[0, 0.2], [0.6, 1]], dtype=np.float32) * scale
    image = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert image[..., 0].tolist() == [[0, 51], [153, 255]]


def test_a_float_tiff_that_was_resized_may_overshoot():
    values = np.array([[-0.001, 0.2], [0.6, 1.001]], dtype=np.float32)
    image = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert image[..., 0].tolist() == [[0, 51], [153, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_what_pillow_makes_of_them(mode):
    source = Image.fromarray(PIXELS).convert(mode)
    image = open_image(encoded(source, "TIFF"))
    assert np.array_equal(np.asarray(image), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F"])
def test_a_large_image_is_averaged_over_squares(mode):
    values = RNG.integers(0, 256, (512, 600, 4), dtype=np.uint8)
    if mode in ("I;16", "F"):
        values = values[..., 0] * (np.uint16(257) if mode == "I;16" else np.float32(0.9))
        small, large = Image.fromarray(values), Image.fromarray(values.repeat(3, 0).repeat(3, 1))
    else:
        small = Image.fromarray(values).convert(mode)
        large = small.resize((1800, 1536), Image.Resampling.NEAREST)
    transparency = {"transparency": 0} if mode == "P" else {}
    format = "TIFF" if mode == "F" else "PNG"
    expected = open_image(encoded(small, format, **transparency))
    assert np.array_equal(np.asarray(open_image(encoded(large, format, **transparency))), np.asarray(expected))


def test_what_is_white_in_a_large_float_tiff_depends_on_all_its_pixels():
    values = np.ones((1100, 1100), dtype=np.float32)
    values[550:] = 255
    image = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert (image[0] == 1).all() and (image[-1] == 255).all()


def test_a_large_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    large = Image.fromarray(PIXELS).resize((1800, 1200))
    upright = open_image(encoded(large.rotate(-90, expand=True)))
    assert upright.size == (600, 900)
    assert np.array_equal(np.asarray(open_image(encoded(large, exif=exif))), np.asarray(upright))


def test_bombs_are_refused_before_decoding():
    with pytest.raises(ImageError, match=f"expected at most {MAX_DECODED_PIXELS:,} pixels, .* got 4000 x 4000"):
        open_image(bomb(4_000))
    with pytest.raises(ImageError, match=f"expected at most {MAX_PIXELS:,} pixels, got far more"):
        open_image(bomb(20_000))
    with pytest.raises(ImageError, match="65536 x 1"):
        open_image(encoded(Image.new("L", (65_536, 1))))


def test_how_many_pixels_depends_on_the_decoder(monkeypatch):
    monkeypatch.setattr(images, "MAX_DECODED_PIXELS", 1_000_000)
    assert open_image(encoded(Image.new("RGB", (1200, 1200)), "JPEG")).size == (600, 600)  # decoded at half its size
    assert open_image(encoded(Image.new("L", (990, 990)), "JPEG", progressive=True)).size == (990, 990)
    thumbnail = encoded(Image.new("RGB", (1200, 1200)), "JPEG", comment=encoded(Image.new("L", (90, 90)), "JPEG"))
    assert open_image(thumbnail).size == (600, 600)
    whole = encoded(Image.new("RGB", (1200, 1200)), "JPEG")
    start = whole.index(b"\xff\xda")
    progressive = encoded(Image.new("RGB", (1200, 1200)), "JPEG", progressive=True)
    for content in (
        progressive,
        progressive[: progressive.index(b"\xff\xda", progressive.index(b"\xff\xda") + 2)] + b"\xff\xd9",  # one scan
        whole[:start] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + whole[start + 14 :],  # one scan, of one component of three
        encoded(Image.new("RGB", (2000, 1000)), "JPEG"),
        encoded(Image.new("RGB", (1200, 1200))),
        encoded(Image.new("RGB", (600, 600)), "WEBP"),
        b"P2 300 300 255 " + b"1 " * 90_000,  # numbers as text: read by a decoder in Python
    ):
        with pytest.raises(ImageError, match="expected at most [0-9,]+ pixels"):
            open_image(content)


def test_a_jpeg_of_many_scans_may_have_few_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_DECODED_PIXELS", 1_000_000)
    content = encoded(Image.new("L", (500, 500)), "JPEG", progressive=True)
    assert open_image(content).size == (500, 500)
    last = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="expected at most [0-9,]+ pixels"):
        open_image(content[:-2] + 200 * last + content[-2:])


def test_a_tile_larger_than_any_image_is_refused():
    size, kind, tile = {256: 10, 257: 10}, {258: 8, 259: 5, 262: 1, 277: 1}, {322: 30_000, 323: 20_000, 324: 8, 325: 9}
    tags = size | kind | tile
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with pytest.raises(ImageError) as refused:
        open_image(content)
    assert "a single tile" in str(refused.value.__cause__)


def test_a_file_of_countless_blocks_is_refused(monkeypatch):
    content = encoded(Image.fromarray(PIXELS))
    assert open_image(content)
    monkeypatch.setattr(images, "MAX_READS", 200)
    assert open_image(content)
    with pytest.raises(ImageError):
        open_image(content[:33] + 200 * chunk(b"abCd", b"") + content[33:])


@pytest.mark.parametrize(
    "content",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encoded(Image.new("RGB", (16, 16)), "ICO")],
    ids=["EPS", "ICO"],
)
def test_formats_that_run_programs_or_hold_icons_are_not_even_tried(content):
    with pytest.raises(ImageError) as refused:
        open_image(content)
    assert isinstance(refused.value.__cause__, UnidentifiedImageError)


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "nothing.png")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError):
        open_image(tmp_path)
