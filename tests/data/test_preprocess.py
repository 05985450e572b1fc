"""Preprocessing of files and raw frames, against the formulas of the test protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mvit_jax
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline, sampling
from mvit_jax.data.formats.video_list import VideoList
from mvit_jax.data.media.video import DecodeError
from mvit_jax.data.preprocess import Preprocess
from mvit_jax.models.inference import normalise
from tests.data.bar_codes import write


@pytest.fixture(scope="module")
def grey_video(tmp_path_factory):
    """100 frames at 25 a second, each of one grey that encodes the frame's number."""
    frames = [np.full((32, 48, 3), 20 + 2 * number, np.uint8) for number in range(100)]
    path = tmp_path_factory.mktemp("grey") / "grey.mp4"
    return write(path, frames, codec="libx264rgb", rate=25, pix_fmt="rgb24", qp="0")


def numbers(clip, settings):
    """Returns the frame numbers in a normalised `[..., T, size, size, 3]`."""
    levels = (clip * np.array(settings.std) + np.array(settings.mean)) * 255
    assert levels.std(axis=(-3, -2, -1)).max() < 1
    return np.round((levels.mean(axis=(-3, -2, -1)) - 20) / 2).astype(int)


@pytest.mark.parametrize(
    ("variant", "frames", "stride"), [("mvit_b_16x4", 16, 4), ("mvit_b_32x3", 32, 3)]
)
@pytest.mark.parametrize(("total", "clips"), [(1, 2), (5, 2), (64, 3), (200, 1), (200, 3)])
def test_any_number_of_frames_is_sampled_by_the_test_protocol(
    variant, frames, stride, total, clips
):
    preprocess = mvit_jax.preprocess(variant, size=32)
    levels = (20 + 2 * np.arange(total) % 200).astype(np.uint8)
    raw = np.broadcast_to(levels[:, None, None, None], (total, 40, 50, 3))
    clip = preprocess(raw, fps=60.0, clips=clips)
    assert clip.shape == (clips, frames, 32, 32, 3) and clip.dtype == np.float32
    expected = sampling.view_indices(total, 60.0, frames=frames, stride=stride, clips=clips)
    assert np.array_equal(numbers(clip, preprocess.settings), expected % 100)


def test_views_equal_the_views_of_evaluation(grey_video):
    """The input equals the views of `load_views`, normalised on a device."""
    preprocess = mvit_jax.preprocess("mvit_b_16x4", size=24)
    expected = preprocess.settings
    settings = pipeline.ClipSettings(
        frames=16, stride=4, size=24, short_side=expected.short_side, interpolation="bilinear"
    )
    assert expected.short_side == 27
    videos = VideoList((str(grey_video),), np.zeros(1, np.int32), ("a",), "a list")
    views = pipeline.load_views(videos, 0, settings, clips=2, crops=3)
    clip = preprocess(grey_video, clips=2, crops=3)
    assert clip.shape == (6, 16, 24, 24, 3)
    on_device = normalise(jnp.asarray(views), expected.mean, expected.std, jnp.float32)
    np.testing.assert_allclose(clip, jax.device_get(on_device), atol=1e-6)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def reference_input(pixels, size, mean, std):
    """Returns ImageNet's evaluation input: Resize, CenterCrop and Normalize of torchvision."""
    short = int(size / 0.875)
    height, width = (int(short * side / min(pixels.shape[:2])) for side in pixels.shape[:2])
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return (np.asarray(image)[top : top + size, left : left + size] / 255 - mean) / std


@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (37, 37), (20, 33), (36, 50)])
def test_an_image_is_resized_and_cropped_as_for_imagenet(tmp_path, shape):
    pixels = noise(*shape, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    preprocess = mvit_jax.preprocess("mvit_b16", size=32)
    expected = reference_input(pixels, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), pixels, pixels[None]):
        image = preprocess(source)
        assert image.shape == (1, 32, 32, 3) and image.dtype == np.float32
        np.testing.assert_allclose(image[0], expected, atol=1e-6)
    assert preprocess(pixels, crops=3).shape == (3, 32, 32, 3)


def test_an_image_model_takes_the_middle_frame_of_a_video(grey_video):
    preprocess = mvit_jax.preprocess("mvit_b16", size=32)
    image = preprocess(grey_video)
    assert image.shape == (1, 32, 32, 3)
    # At 25 frames a second a frame at 30 spans 5/6 of one: floor((100 - 5/6) / 2) = 49.
    assert numbers(image, preprocess.settings).tolist() == [49]


def test_the_memory_layout_of_frames_does_not_change_the_input():
    raw = noise(6, 40, 33, 3)
    for variant in ("mvit_b_16x4", "mvit_b16"):
        preprocess = mvit_jax.preprocess(variant, size=32)
        flipped = raw[::-1, ::-1, :, ::-1]  # for example OpenCV's BGR
        original = raw.copy()
        np.testing.assert_array_equal(preprocess(flipped), preprocess(flipped.copy()))
        column_major = np.asfortranarray(raw)
        np.testing.assert_array_equal(preprocess(column_major), preprocess(raw))
        np.testing.assert_array_equal(raw, original)


def test_settings_can_be_read_and_changed():
    preprocess = mvit_jax.preprocess("mvit_b_16x4")
    assert "stride=4" in str(preprocess.settings) and "short_side=256" in str(preprocess.settings)
    changed = Preprocess(dataclasses.replace(preprocess.settings, stride=1, size=32, short_side=32))
    raw = np.broadcast_to(
        np.arange(20, 120, 2, dtype=np.uint8)[:, None, None, None], (50, 32, 32, 3)
    )
    assert numbers(changed(raw), changed.settings)[0].tolist() == list(range(17, 33))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (np.zeros((4, 40, 40, 3), np.float32), "dtype float32 are not supported: pass a path"),
        (np.zeros((3, 4, 40, 40), np.uint8), "shape [3, 4, 40, 40]"),
        (np.zeros((40, 40), np.uint8), "shape [40, 40]"),
        (np.zeros((0, 40, 40, 3), np.uint8), "shape [0, 40, 40, 3]"),
        (np.zeros((40, 40, 3), np.uint8), "one image, but the model requires clips of 16 frames"),
    ],
)
def test_errors_for_invalid_frames_describe_the_expected_input(source, sentence):
    with pytest.raises(UserError) as caught:
        mvit_jax.preprocess("mvit_b_16x4")(source)
    assert sentence in str(caught.value)
    assert "uint8 RGB frames from 0 to 255 as a NumPy array [T, H, W, 3]" in str(caught.value)


def test_other_invalid_arguments_raise(tmp_path):
    preprocess = mvit_jax.preprocess("mvit_b_16x4")
    raw = noise(4, 40, 40, 3)
    for wrong in ({"clips": 0}, {"crops": 2}, {"fps": 0.0}, {"fps": float("nan")}):
        with pytest.raises(UserError, match="clips must be at least 1, crops 1 or 3 and fps above"):
            preprocess(raw, **wrong)
    with pytest.raises(DecodeError, match="there is no such file"):
        preprocess(tmp_path / "gone.mp4")
    Image.fromarray(raw[0]).save(tmp_path / "a.png")
    with pytest.raises(DecodeError, match="is an image, but the model requires clips of 16"):
        preprocess(tmp_path / "a.png")
    with pytest.raises(UserError, match="did you mean 'mvit_b_16x4'"):
        mvit_jax.preprocess("mvit_b_16x5")
    with pytest.raises(UserError, match="did you mean 'frames'"):
        mvit_jax.preprocess("mvit_b_16x4", frame=3)
