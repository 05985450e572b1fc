"""Predictions and Grad-CAM of a loaded model, against `apply` on each clip."""

import functools
import io
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image

from mvit_jax.analysis import attention_maps, token_geometry
from mvit_jax.common.errors import UserError
from mvit_jax.data import augmentation
from mvit_jax.data.media.video import Video
from mvit_jax.predict import figures
from mvit_jax.predict.predictor import Predictor, class_names
from mvit_jax.training import run_folder
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.predict import small
from tests.support import tiny


@pytest.fixture(scope="module")
def run(digits):
    return small.shared_run(digits)[0]


@pytest.fixture(scope="module")
def predictor(digits):
    return small.shared_run(digits)[1]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """Twelve times the span of a clip, which is 16 frames: half of it dark, then bright."""
    frames = small.textured(192, height=32)
    frames[96:] += 50
    return small.write_video(tmp_path_factory.mktemp("videos") / "long.mp4", frames)


@pytest.fixture(scope="module")
def prediction(predictor, long_video):
    calls = []
    prediction = predictor.predict(long_video, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(8, 23), (16, 23), (23, 23)]
    return prediction


def normalised(clip):
    return ((clip / 255 - 0.45) / 0.225).astype(np.float32)


def test_window_probabilities_are_those_of_their_clips(run, predictor, long_video, prediction):
    params, model = run_folder.read_params(run)
    with Video(long_video) as video:
        frames = video.frames(range(192))
    crop = augmentation.crop_views(augmentation.resize_short_side(frames, 32), 32, 1)[0]
    apply = jax.jit(model.apply)
    starts = range(0, 177, 8)
    clips = np.stack([[crop[start + i * 15 // 3] for i in range(4)] for start in starts])
    expected = np.stack([jax.nn.softmax(apply(params, normalised(c[None]))[0])[0] for c in clips])
    assert np.std(expected, axis=0).max() > 1e-3  # or any order of windows would do
    line = prediction.timeline
    np.testing.assert_allclose(line.probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(line.starts, np.asarray(starts) / 30)
    np.testing.assert_allclose(prediction.probabilities, expected.mean(0), atol=1e-6)
    assert prediction.clips == 23 and prediction.seconds == pytest.approx(6.4)
    # Frames of eight windows from the first to the last are kept for pictures.
    np.testing.assert_array_equal(prediction.shown[[0, -1]], clips[[0, -1]])
    assert prediction.shown.shape == (8, 4, 32, 32, 3)
    np.testing.assert_allclose(prediction.times[-1], np.asarray([176, 181, 186, 191]) / 30)


def test_segments_change_at_the_change_of_the_video(predictor, long_video, monkeypatch):
    """A model that separates dark from bright stands in for a trained one."""

    def brightness(clips):
        light = np.asarray(clips, np.float64).mean((1, 2, 3, 4))
        bright = (light - middle) / 5
        rows = [np.zeros(len(light)), bright, *np.full((6, len(light)), -1e3)]
        return jax.numpy.asarray(np.stack(rows, axis=1))

    with Video(long_video) as video:
        middle = np.median(video.frames(range(192)))
    monkeypatch.setattr(predictor, "_logits", brightness)
    segments = predictor.predict(long_video).timeline.segments()
    assert [segment.label for segment in segments] == [0, 1]
    span = 16 / 30
    assert abs(segments[0].end - 96 / 30) <= span / 2
    assert segments[1].end == pytest.approx(6.4)


def test_short_videos_and_a_set_number_of_clips_have_no_timeline(
    run, digits, predictor, long_video
):
    path = digits / (digits / "test.csv").read_text().split()[0]
    assert predictor.predict(path).timeline is None
    two_clips = Predictor(run, clips=2, crops=3)  # on all devices
    prediction = two_clips.predict(long_video)
    assert prediction.timeline is None and prediction.clips == 2
    assert prediction.shown.shape == (1, 4, 32, 32, 3)


def test_three_crops_are_averaged_in_windows(run, predictor, long_video):
    three = small.predictor_of(run, crops=3)
    line = three.predict(long_video).timeline
    params, model = run_folder.read_params(run)
    with Video(long_video) as video:
        clip = augmentation.resize_short_side(video.frames([0, 5, 10, 15]), 32)
    crops = augmentation.crop_views(clip, 32, 3)
    logits, _ = jax.jit(model.apply)(params, normalised(crops))
    expected = np.asarray(jax.nn.softmax(logits)).mean(0)
    np.testing.assert_allclose(line.probabilities[0], expected, atol=1e-6)


def test_plain_weights_predict_as_their_own_parameters(run, predictor, long_video):
    """The run's averaged weights are 1.5 times the plain ones."""
    plain = small.predictor_of(run, weights="plain").predict(long_video)
    params, model = run_folder.read_params(run, weights="plain")
    averaged, _ = run_folder.read_params(run, weights="ema")
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(averaged), strict=True):
        np.testing.assert_allclose(1.5 * one, other, rtol=1e-6)
    logits, _ = jax.jit(model.apply)(params, normalised(plain.shown[0][None]))
    expected = np.asarray(jax.nn.softmax(logits))[0]
    np.testing.assert_allclose(plain.timeline.probabilities[0], expected, atol=1e-6)
    difference = plain.probabilities - predictor.predict(long_video).probabilities
    assert np.abs(difference).max() > 1e-3


@pytest.mark.slow
def test_grad_cam_is_of_each_shown_clip(run, predictor, prediction):
    assert predictor._fine_block == 0  # the finest grid is 4 x 4
    result = predictor.grad_cam(prediction.shown[:2])
    params, model = run_folder.read_params(run)
    compute = jax.jit(functools.partial(attention_maps.grad_cam, model, block=0))
    maps = np.asarray(compute(params, normalised(prediction.shown[:2])))
    pixels = token_geometry.to_pixels(maps, (4, 32, 32), model.config)
    np.testing.assert_allclose(result, pixels, atol=1e-4)


def test_the_picture_shows_frames_classes_and_the_timeline(predictor, prediction):
    drawn = functools.partial(
        figures.picture, "$ and _ in a name.mp4", prediction.probabilities, predictor.names,
        prediction.shown, prediction.times,
    )  # fmt: skip
    heat = predictor.grad_cam(prediction.shown)
    sizes, line = [], prediction.timeline
    for content in (drawn(), drawn(timeline=line), drawn(timeline=line, grad_cam=heat)):
        image = Image.open(io.BytesIO(content))
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 300
        sizes.append(image.height)
    assert sizes[0] + 200 < sizes[1] and sizes[1] + 150 < sizes[2]
    # Each colour of a class on top is in the timeline.
    top = {segment.label for segment in prediction.timeline.segments()}
    alone = Image.open(io.BytesIO(figures.timeline_picture(prediction.timeline, predictor.names)))
    colours = {colour for _, colour in alone.convert("RGB").getcolors(2**24)}
    for code in figures.COLOURS[: len(top)]:
        assert tuple(bytes.fromhex(code[1:])) in colours


def test_a_file_whose_name_is_not_utf8_has_a_picture():
    name, shown = "caf\udce9\n.mp4", np.zeros((1, 4, 8, 8, 3), np.uint8)
    drawn = figures.picture(name, np.array([0.25, 0.75]), ("a", "b"), shown, np.zeros((1, 4)))
    assert Image.open(io.BytesIO(drawn)).format == "PNG"


def test_the_animation_shows_the_clip_beside_its_map(predictor, prediction):
    heat = predictor.grad_cam(prediction.shown[:2])
    frames = figures.animate(prediction.shown[:2], heat)
    assert frames.shape == (8, 224, 2 * 224, 3)
    seen = frames[:, ::7, :224:7]
    np.testing.assert_array_equal(seen, prediction.shown[:2].reshape(8, 32, 32, 3))
    assert figures.animation_fps(prediction.shown, 4) == 7.5


@pytest.mark.slow
def test_an_image_model_predicts_one_window_a_second(digits, tmp_path):
    config = tiny.config(digits, **small.IMAGES)
    workdir.record_config(config, tmp_path)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(small.fresh(config, 0), 1)
    predictor = small.predictor_of(tmp_path)
    path = small.write_video(tmp_path / "a.mp4", small.textured(60, height=40), rate=10)
    prediction = predictor.predict(path)
    assert prediction.timeline.starts.tolist() == [0, 1, 2, 3, 4, 5]
    with Video(path) as video:
        Image.fromarray(video.frames([25])[0]).save(tmp_path / "b.png")
    still = predictor.predict(tmp_path / "b.png")
    assert still.timeline is None and still.seconds == 0
    np.testing.assert_allclose(prediction.timeline.probabilities[2], still.probabilities, atol=1e-6)
    np.testing.assert_array_equal(prediction.shown[2], still.shown[0])
    assert predictor.grad_cam(still.shown).shape == (1, 1, 32, 32)
    assert figures.animation_fps(still.shown, 4) == 2


def test_class_names_come_from_the_run_or_from_the_data(digits, tmp_path):
    config = tiny.config(digits)
    names = tuple((digits / "labels.txt").read_text().split())
    assert class_names(config, tmp_path, 8) == names
    (tmp_path / "labels.txt").write_text("one thing\nanother\n")
    assert class_names(config, tmp_path, 2) == ("one thing", "another")
    with pytest.raises(UserError, match=r"labels.txt names 2 classes, and the model has 8"):
        class_names(config, tmp_path, 8)
    config.data.folder = None
    (tmp_path / "labels.txt").unlink()
    assert class_names(config, tmp_path, 3) == ("class 0", "class 1", "class 2")


def test_a_weights_file_instead_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "k400.pyth").write_bytes(b"")
    with pytest.raises(UserError, match="is a file: make a folder of it first"):
        Predictor(tmp_path / "k400.pyth")
