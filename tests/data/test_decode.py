from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sparse_rcnn.data.decode import ImageError, decode_image, image_size


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)


def smooth(height: int = 40, width: int = 56) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 4, y * 6, 200 - x * 2], 2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "SGI", "PCX"])
def test_lossless_kinds_are_exact_from_path_bytes_and_pillow(tmp_path, rgb, kind):
    content = encoded(Image.fromarray(rgb), kind)
    path = tmp_path / "picture"
    path.write_bytes(content)
    for source in (path, str(path), content, Image.open(io.BytesIO(content))):
        pixels = decode_image(source)
        assert pixels.dtype == np.uint8 and pixels.flags.writeable and np.array_equal(pixels, rgb)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
def test_lossy_kinds_are_close(kind, options):
    pixels = decode_image(encoded(Image.fromarray(smooth()), kind, **options))
    assert np.abs(pixels.astype(int) - smooth()).mean() < 4


def test_grey_palette_and_one_bit():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode_image(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (0, 255, 0)]]
    assert decode_image(encoded(palette, "PNG")).tolist() == [[list(p) for p in row] for row in expected]
    transparent = encoded(palette, "PNG", transparency=bytes([0, 128, 255]))
    assert decode_image(transparent).tolist() == [[list(p) for p in row] for row in expected]
    bits = Image.fromarray(np.array([[True, False]]))
    assert decode_image(encoded(bits, "PNG")).tolist() == [[[255] * 3, [0] * 3]]


def test_transparency_is_dropped_not_blended(rgb):
    alpha = np.full((13, 17, 1), 7, np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(np.concatenate([rgb, alpha], 2)), "PNG")), rgb)
    grey = np.concatenate([rgb[..., :1], alpha], 2)
    assert np.array_equal(decode_image(encoded(Image.fromarray(grey, "LA"), "PNG"))[..., 2], rgb[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind):
    values = np.array([[0, 128, 129, 257 * 100, 257 * 100 + 129, 65535]], dtype=np.uint16)
    pixels = decode_image(encoded(Image.fromarray(values), kind))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 100, 101, 255]
    assert np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])


def test_floating_point_greys():
    unit = np.array([[0.0, 0.5, 1.0, -1.0, np.nan]], dtype=np.float32)
    assert decode_image(encoded(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0, 0]
    wide = np.array([[0.0, 0.5, 100.2, 300.0]], dtype=np.float32)
    assert decode_image(encoded(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_cmyk():
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    assert decode_image(encoded(cmyk, "TIFF"))[0].tolist() == [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    assert np.abs(decode_image(encoded(red, "JPEG", quality=95)).astype(int) - (250, 10, 10)).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(content) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(rgb, orientation):
    # How a camera stores an upright picture in each orientation (EXIF 2.3, table of tag 274).
    stored = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(decode_image(content), rgb)
    assert np.array_equal(decode_image(content, apply_exif=False), stored)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO", "BMP", "GIF", "PPM", "TGA"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_pixels(tmp_path, rgb, kind, orientation):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    path = tmp_path / "picture"
    path.write_bytes(encoded(Image.fromarray(rgb), kind, exif=exif.tobytes()))
    assert image_size(path) == decode_image(path).shape[:2]
    assert image_size(path, apply_exif=False) == decode_image(path, apply_exif=False).shape[:2]
    sideways = orientation in (6, 8) and kind in ("JPEG", "PNG", "TIFF", "WEBP", "MPO")
    assert image_size(path) == ((17, 13) if sideways else (13, 17))


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path, rgb, monkeypatch):
    exif = Image.Exif()
    exif[274] = 6
    plain, turned = (encoded(Image.fromarray(rgb), "PNG", exif=e) for e in (b"", exif.tobytes()))
    start = turned.index(b"eXIf") - 4
    chunk = turned[start : start + 12 + int.from_bytes(turned[start : start + 4], "big")]
    path = tmp_path / "late.png"
    path.write_bytes(plain[:-12] + chunk + plain[-12:])  # before IEND
    assert decode_image(path).shape[:2] == (17, 13) == image_size(path)
    # Without such a chunk nothing is decoded: the pixels may be missing.
    path.write_bytes(plain)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert image_size(path) == (13, 17)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty, 0 bytes"), (b"junk", "not an image"), (None, "no such file")]
)
def test_files_without_a_header_are_named(tmp_path, content, words):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=f"^{path}: {words}"):
        image_size(path)


def test_damaged_exif_does_not_cost_the_picture(rgb):
    content = encoded(Image.fromarray(rgb), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert np.array_equal(decode_image(content), rgb)
    exif = Image.Exif()
    exif[274] = 99
    assert np.array_equal(decode_image(encoded(Image.fromarray(rgb), "PNG", exif=exif)), rgb)


def test_one_pixel():
    assert decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]


def test_a_given_pillow_image_stays_as_it_is():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    image = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    assert (decode_image(image) == (0, 0, 255)).all() and image.tell() == 1


def named_error(path, words: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message


def test_bad_files_are_named(tmp_path, rgb):
    png, jpeg = encoded(Image.fromarray(rgb), "PNG"), encoded(Image.fromarray(smooth()), "JPEG")
    cases = {
        "empty.png": (b"", "0 bytes"),
        "text.jpg": (b"this is not a picture\n" * 20, "not an image"),
        "cut.png": (png[: len(png) // 2], "cannot decode"),
        "cut.jpg": (jpeg[: len(jpeg) - 40], "truncated"),
        "head.png": (png[:10], "not an image"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not an image"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        named_error(tmp_path / name, words)
    named_error(tmp_path / "missing.jpg", "no such file")
    named_error(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    named_error(tmp_path / "pipe", "not a regular file")  # and does not wait for a writer
    with pytest.raises(ImageError, match="^image bytes: "):
        decode_image(b"junk")


def test_a_path_with_a_null_byte_is_an_image_error():
    with pytest.raises(ImageError):
        decode_image("a\0b.jpg")


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="source: .* got list"):
        decode_image([1, 2])


def test_enormous_images_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.new("1", (40, 30)), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert decode_image(path).shape == (30, 40, 3)
    for limit in (1199, 700, 1):  # below: Pillow itself only warns until twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        named_error(path, "pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="40 x 30 pixels, more than the limit of 1000"):
        decode_image(path, max_pixels=1000)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    content = encoded(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    named_error(path, "pixels")


def mutations(count: int):
    """Damaged copies of small files of nine kinds: bytes changed, cut out, put in, or the end cut off."""
    rng = np.random.default_rng(1)
    image, exif = Image.fromarray(smooth()), Image.Exif()
    exif[274] = 6
    originals = [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "PNG", exif=exif),
        encoded(image.convert("P"), "PNG"),
        encoded(image, "GIF", save_all=True, append_images=[image.rotate(9)]),
        encoded(image, "TIFF", compression="tiff_lzw"),
        encoded(image, "WEBP"),
        encoded(image, "BMP"),
        encoded(Image.fromarray(smooth()[..., 0].astype(np.uint16) * 256), "PNG"),
        encoded(image, "JPEG2000"),
    ]
    for number in range(count):
        content = bytearray(originals[number % len(originals)])
        # Half of the damage goes to the header, where it hurts more.
        reach = len(content) if number % 2 else min(len(content), 80)
        for _ in range(rng.integers(1, 9)):
            at = int(rng.integers(reach))
            what = rng.integers(4)
            if what == 0:
                content[at : at + 1] = bytes([rng.integers(256)])
            elif what == 1:
                del content[at : at + int(rng.integers(1, 40))]
            elif what == 2:
                content[at:at] = rng.bytes(int(rng.integers(1, 40)))
            elif len(content) > 20:
                del content[int(rng.integers(20, len(content))) :]
        yield bytes(content)


def test_damaged_files_give_pixels_or_an_image_error(capfd):
    outcomes = {"pixels": 0, "error": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in mutations(240):
            try:
                pixels = decode_image(content, max_pixels=4_000_000)
            except ImageError:
                outcomes["error"] += 1
            else:
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
                outcomes["pixels"] += 1
    assert min(outcomes.values()) > 20
    assert capfd.readouterr() == ("", "")


def test_warnings_do_not_leak_and_filters_come_back():
    before = list(warnings.filters)
    content = encoded(Image.fromarray(smooth()), "JPEG")
    failures = []

    def work():
        for _ in range(30):
            if not np.array_equal(decode_image(content).shape, (40, 56, 3)):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and warnings.filters == before
