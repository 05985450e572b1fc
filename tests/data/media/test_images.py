"""Decoding of images: colour modes, sizes and crops against Pillow, and decode failures."""

import itertools

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mvit_jax.data import augmentation, pipeline
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.formats.video_list import VideoList
from mvit_jax.data.media.images import is_image, read_image
from mvit_jax.data.media.video import DecodeError, decode_failure, opened
from tests.support import commands
from tests.support.refusals import refused


def picture(height=30, width=41, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "PNG"])
def test_lossless_files_decode_to_their_exact_pixels(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", picture(), lossless=True)  # of WebP
    assert is_image(path) and is_image(str(path))
    clip = read_image(path)
    assert clip.dtype == np.uint8 and clip.shape == (1, 30, 41, 3)
    np.testing.assert_array_equal(clip[0], picture())


def test_images_are_recognised_by_file_suffix():
    assert all(is_image(name) for name in ("a.jpg", "b.JPEG", "/c.mp4/d.Png", "e.bmp", "f.webp"))
    assert not any(is_image(name) for name in ("a.mp4", "b.gif", "jpg", "c.jpg.avi", "png/d"))


def test_every_colour_mode_becomes_rgb(tmp_path):
    grey = picture()[..., 0]
    three = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(read_image(save(tmp_path / "grey.png", grey))[0], three)
    # 16 bits: the high byte, white is 65,535.
    deep = grey.astype(np.uint16) * 256 + picture(seed=1)[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "deep.png", deep))[0], three)
    alpha = np.dstack([picture(), grey])
    np.testing.assert_array_equal(read_image(save(tmp_path / "alpha.png", alpha))[0], picture())
    one_bit = Image.fromarray(grey > 127)
    one_bit.save(tmp_path / "one_bit.png")
    expected = np.where(three > 127, 255, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "one_bit.png")[0], expected)
    colours = np.array([[200, 10, 20], [0, 99, 255]], np.uint8)
    palette = Image.fromarray((grey > 127).astype(np.uint8), mode="P")
    palette.putpalette(colours.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    expected = colours[(grey > 127).astype(int)]
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png")[0], expected)
    # Four inks of a JPEG: 255 - value each, dimmed by black.
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0], inks[..., 3] = 100, 51  # cyan absorbs red, black a fifth of all colours
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "inks.jpg", quality=100)
    inked = read_image(tmp_path / "inks.jpg").astype(int)
    assert np.abs(inked - np.array([124, 204, 204])).max() <= 3


TURNED = Image.Exif()
TURNED[0x0112] = 6  # a rotation by 90 degrees


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are invalid
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_photos_are_turned_upright(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / name, picture(), exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(read_image(path)[0], expected)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_photos_are_turned_once(orientation, compression, tmp_path):
    """Pillow itself turns them as it loads their pixels."""
    turns = (
        lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.swapaxes(0, 1),
        lambda x: np.rot90(x, -1), lambda x: np.rot90(x, 2).swapaxes(0, 1), np.rot90,
    )  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.tif", picture(), exif=exif, compression=compression)
    np.testing.assert_array_equal(read_image(path)[0], turns[orientation - 1](picture()))
    deep = picture()[..., 0].astype(np.uint16) * 256
    path = save(tmp_path / "deep.tif", deep, exif=exif, compression=compression)
    grey = np.stack([picture()[..., 0]] * 3, axis=-1)
    np.testing.assert_array_equal(read_image(path)[0], turns[orientation - 1](grey))


WHOLE = cv2.imencode(".jpg", picture(200, 300))[1].tobytes()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "the file is empty"),
        ("text.png", b"this is text", "it is not an image"),
        ("cut.jpg", WHOLE[: len(WHOLE) // 2], "it is damaged or cut off"),
        ("folder.png", None, "is a directory"),
        ("gone.png", None, "there is no such file"),
    ],
)
def test_invalid_images_raise_with_path_and_reason(tmp_path, name, content, reason):
    (tmp_path / "folder.png").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(f"{tmp_path / name} cannot be decoded: {reason}", by=DecodeError):
        read_image(tmp_path / name)
    assert reason in str(decode_failure(opened(tmp_path / name, 1)))


def test_an_image_with_too_many_pixels_is_rejected(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((60, 60, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="more than 2,000 pixels"):
        read_image(path)


def resized(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("margin", "image", "video"), [(1, 0, 1), (3, 2, 2), (5, 2, 3), (6, 3, 3)])
def test_centre_crops_of_images_and_videos_differ_at_odd_margins(margin, image, video):
    columns = np.broadcast_to(
        np.arange(8 + margin, dtype=np.uint8)[None, None, :, None], (1, 8, 8 + margin, 3)
    )
    assert augmentation.crop_views(columns, 8, 1, image=True)[0, 0, 0, 0, 0] == image
    assert augmentation.crop_views(columns, 8, 1)[0, 0, 0, 0, 0] == video


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_on_images_resizes_the_cropped_box_alone(tmp_path, interpolation):
    path = save(tmp_path / "a.png", picture(50, 60))
    images = VideoList((str(path),), np.zeros(1, np.int32), ("a",), "a list")
    augmentations = Augmentation(crop_area=(0.2, 1.0), interpolation=interpolation)
    settings = pipeline.ClipSettings(1, 1, 16, 16, augmentation=augmentations)
    for seed in range(4):
        (clip,), _ = pipeline.load_train_clips(images, 0, settings, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        rng.uniform()  # the start of the clip
        top, left, height, width = augmentation.random_box(50, 60, rng, (0.2, 1.0), (0.75, 1.3333))
        box = picture(50, 60)[top : top + height, left : left + width]
        same = np.array_equal(clip[0], resized(box, 16, 16))
        assert same == (interpolation == "bicubic")


def test_bicubic_resize_accepts_array_views():
    clip = np.stack([picture(seed=seed) for seed in range(3)])
    for rows, columns in itertools.product((slice(2, 20), slice(None, None, -1)), repeat=2):
        window = clip[:, rows, columns]
        for frame, target in zip(window, augmentation.resize(window, 8, 9, "bicubic"), strict=True):
            np.testing.assert_array_equal(target, resized(frame.copy(), 8, 9))


OPTIONS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "progressive": {"progressive": True},
    "turned": {"exif": TURNED},
}


@pytest.mark.parametrize("kind", [*OPTIONS, "grey", "flipped"])
@pytest.mark.parametrize("shape", [(37, 53), (64, 80), (200, 301)])
def test_jpegs_decode_to_the_pixels_of_pillow(kind, shape, tmp_path):
    """Published accuracies were measured with the pixels that Pillow decodes."""
    rng = np.random.default_rng(0)
    pixels = np.clip(picture(*shape).astype(int) + rng.normal(size=(*shape, 3)) * 9, 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8)).convert("L" if kind == "grey" else "RGB")
    path = tmp_path / "a.jpg"
    image.save(path, quality=88, **OPTIONS.get(kind, {}))
    if kind == "flipped":  # flipped bits in the middle, which decoders tolerate
        data = bytearray(path.read_bytes())
        for index in rng.integers(len(data) // 2, len(data) - 2, 3):
            data[index] ^= 4
        path.write_bytes(data)
    with Image.open(path) as expected:
        upright = ImageOps.exif_transpose(expected).convert("RGB")
    assert np.array_equal(read_image(path)[0], upright)


def test_harmless_warnings_of_pillow_are_not_printed(tmp_path):
    """They would reach stderr without the file's name: large images, and palettes."""
    path = tmp_path / "a.png"
    picture_ = Image.new("P", (40, 40))
    picture_.save(path, transparency=bytes([0, 128, 255]))
    code = (
        "import sys; from PIL import Image; from mvit_jax.data.media.images import read_image; "
        "Image.MAX_IMAGE_PIXELS = 1000; sys.stderr = sys.stdout; read_image(sys.argv[1])"
    )
    assert commands.printed(code, path, fork=True) == ""
