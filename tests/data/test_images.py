"""Images of every kind of colour, sizes and crops as Pillow makes them, and broken files."""

import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from mvit_jax.data import augmentation, pipeline
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.formats.video_list import VideoList, read_video_list
from mvit_jax.data.images import is_image, read_image
from mvit_jax.data.video import DecodeError, opened, why_broken


def picture(height=30, width=41, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "PNG"])
def test_lossless_files_give_their_very_pixels(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", picture(), lossless=True)  # of WebP
    assert is_image(path) and is_image(str(path))
    clip = read_image(path)
    assert clip.dtype == np.uint8 and clip.shape == (1, 30, 41, 3)
    np.testing.assert_array_equal(clip[0], picture())


def test_names_tell_images_from_videos():
    assert all(is_image(name) for name in ("a.jpg", "b.JPEG", "/c.mp4/d.Png", "e.bmp", "f.webp"))
    assert not any(is_image(name) for name in ("a.mp4", "b.gif", "jpg", "c.jpg.avi", "png/d"))


def test_every_kind_of_colour_becomes_rgb(tmp_path):
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
    inks[..., 0], inks[..., 3] = 100, 51  # cyan takes away red, black a fifth of all
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "inks.jpg", quality=100)
    inked = read_image(tmp_path / "inks.jpg").astype(int)
    assert np.abs(inked - np.array([124, 204, 204])).max() <= 3


def test_the_orientation_of_a_camera_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = save(tmp_path / "a.png", picture(), exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    np.testing.assert_array_equal(read_image(path)[0], picture())


def test_what_is_no_image_is_told_with_its_path(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(picture(200, 300)).save(whole, "JPEG")
    contents = {
        "empty.jpg": (b"", "the file is empty"),
        "text.png": (b"this is text", "it is not an image"),
        "cut.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "damaged or cut off"),
        "folder.png": (None, "directory"),
        "gone.png": (None, "there is no such file"),
    }
    (tmp_path / "folder.png").mkdir()
    for name, (data, reason) in contents.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(DecodeError) as caught:
            read_image(path)
        error = pickle.loads(pickle.dumps(caught.value))
        assert error.path == str(path) and reason in error.reason, error
        assert str(error) == f"{path} cannot be decoded: {error.reason}"
        assert "\n" not in str(error)
        assert why_broken(opened(path, 1)) == error.reason


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((60, 60, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="more than 2,000 pixels"):
        read_image(path)


def resized(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def one(path):
    """A list of one file."""
    return VideoList((str(path),), np.zeros(1, np.int32), ("a",), "a list")


@pytest.mark.parametrize(
    ("shape", "side"),
    [((30, 41), 20), ((41, 30), 20), ((33, 33), 17), ((20, 27), 20), ((9, 14), 20), ((20, 29), 16)],
)
def test_views_of_images_are_torchvisions(tmp_path, shape, side):
    """Resize(side, bicubic) and CenterCrop(16), written out."""
    pixels = picture(*shape)
    path = save(tmp_path / "a.png", pixels)
    settings = pipeline.ClipSettings(
        frames=1, stride=1, size=16, short_side=side, interpolation="bicubic"
    )
    height, width = shape
    short, long = sorted(shape)
    sides = (side, int(side * long / short))
    if short != side:
        pixels = resized(pixels, *(sides if height <= width else sides[::-1]))
    top, left = (round((n - 16) / 2.0) for n in pixels.shape[:2])
    views = pipeline.load_views(one(path), 0, settings, clips=1, crops=1)
    assert views.shape == (1, 1, 16, 16, 3)
    np.testing.assert_array_equal(views[0, 0], pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize(("margin", "image", "video"), [(1, 0, 1), (3, 2, 2), (5, 2, 3), (6, 3, 3)])
def test_centres_of_images_and_videos_differ_at_odd_margins(margin, image, video):
    columns = np.broadcast_to(
        np.arange(8 + margin, dtype=np.uint8)[None, None, :, None], (1, 8, 8 + margin, 3)
    )
    assert augmentation.crop_views(columns, 8, 1, image=True)[0, 0, 0, 0, 0] == image
    assert augmentation.crop_views(columns, 8, 1)[0, 0, 0, 0, 0] == video


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_on_images_resizes_the_box_alone(tmp_path, interpolation):
    path = save(tmp_path / "a.png", picture(50, 60))
    settings = pipeline.ClipSettings(
        frames=1,
        stride=1,
        size=16,
        short_side=16,
        augmentation=Augmentation(crop_area=(0.2, 1.0), interpolation=interpolation),
    )
    for seed in range(4):
        (clip,), _ = pipeline.load_train_clips(one(path), 0, settings, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        rng.uniform()  # the start of the clip
        top, left, height, width = augmentation.random_box(50, 60, rng, (0.2, 1.0), (0.75, 1.3333))
        box = picture(50, 60)[top : top + height, left : left + width]
        same = np.array_equal(clip[0], resized(box, 16, 16))
        assert same == (interpolation == "bicubic")


@pytest.fixture
def image_list(tmp_path):
    """Images of odd sizes, the third of which is cut off; each has a level of its own."""
    for index, (height, width) in enumerate([(40, 30), (30, 47), (64, 64), (25, 25)]):
        pixels = np.full((height, width, 3), 20 + 50 * index, np.uint8)
        save(tmp_path / f"{index}.jpg", pixels, quality=95)
    cut = tmp_path / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "list.csv").write_text("".join(f"{i}.jpg {i}\n" for i in range(4)))
    return read_video_list(tmp_path, "list.csv")


SETTINGS = pipeline.ClipSettings(
    frames=1, stride=1, size=16, short_side=18, interpolation="bicubic"
)


def test_a_list_of_images_is_tested_like_one_of_videos(image_list):
    batches = list(pipeline.test_batches(image_list, SETTINGS, clips=2, crops=3, batch=3))
    assert [batch["clip"].shape for batch in batches] == [(3, 6, 1, 16, 16, 3)] * 2
    valid = np.concatenate([batch["valid"] for batch in batches])
    clips = np.concatenate([batch["clip"] for batch in batches])
    assert valid.tolist() == [True, True, False, True, False, False]
    for index in (0, 1, 3):
        assert np.abs(clips[index].astype(int) - (20 + 50 * index)).max() <= 3
    assert "cut off" in str(why_broken(image_list.opened(2, 1)))
    assert why_broken(image_list.opened(0, 1)) is None


def test_a_broken_image_is_replaced_in_training(image_list):
    (batch,) = pipeline.train_batches(image_list, SETTINGS, seed=0, batch=4, steps=1)
    assert sorted(batch["broken"]) == [-1, -1, -1, 2]
    assert 2 not in batch["label"]
    for clip, label in zip(batch["clip"], batch["label"], strict=True):
        assert np.abs(clip.astype(int) - (20 + 50 * int(label))).max() <= 3


def test_an_image_does_not_do_for_a_clip_of_several_frames(image_list):
    settings = pipeline.ClipSettings(frames=4, stride=1, size=16, short_side=18)
    reason = "it is an image, and the model takes clips of 4 frames"
    for load in (
        lambda: pipeline.load_views(image_list, 0, settings, clips=1, crops=1),
        lambda: pipeline.load_train_clips(image_list, 0, settings, np.random.default_rng(0)),
    ):
        with pytest.raises(DecodeError, match=reason):
            load()
    # Evaluation names the reason.
    (batch,) = pipeline.test_batches(image_list, settings, clips=1, crops=1, batch=4)
    assert not batch["valid"].any()
    assert why_broken(image_list.opened(0, settings.frames)) == reason


def test_bicubic_is_the_same_for_windows_and_copies():
    clip = np.stack([picture(seed=seed) for seed in range(3)])
    for rows, columns in itertools.product((slice(2, 20), slice(None, None, -1)), repeat=2):
        window = clip[:, rows, columns]
        for frame, target in zip(window, augmentation.resize(window, 8, 9, "bicubic"), strict=True):
            np.testing.assert_array_equal(target, resized(frame.copy(), 8, 9))


@pytest.mark.parametrize("kind", ["444", "422", "420", "progressive", "grey", "turned", "flipped"])
@pytest.mark.parametrize("shape", [(37, 53), (64, 80), (200, 301)])
def test_jpegs_have_pillows_values(kind, shape, tmp_path):
    """Whatever decodes them: published accuracies were measured with Pillow's pixels."""
    rng = np.random.default_rng(0)
    pixels = np.clip(picture(*shape).astype(int) + rng.normal(size=(*shape, 3)) * 9, 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    options = {"quality": 88}
    if kind in ("444", "422", "420"):
        options["subsampling"] = {"444": 0, "422": 1, "420": 2}[kind]
    if kind == "progressive":
        options["progressive"] = True
    if kind == "grey":
        image = image.convert("L")
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    path = tmp_path / "a.jpg"
    image.save(path, **options)
    if kind == "flipped":  # some bits in the middle, which decoders go over
        data = bytearray(path.read_bytes())
        for place in rng.integers(len(data) // 2, len(data) - 2, 3):
            data[place] ^= 4
        path.write_bytes(data)
    with Image.open(path) as opened_:
        expected = np.asarray(opened_.convert("RGB"))
    assert np.array_equal(read_image(path)[0], expected)
