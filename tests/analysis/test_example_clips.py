import base64
import io

import jax
import numpy as np
import pytest
from PIL import Image

from mvit_jax.analysis import attention_maps, example_clips
from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.training import build
from mvit_jax.training.evaluation.classification import Scores
from tests.support import tiny


def scores(labels, classes: int, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    labels = np.asarray(labels, np.int32)
    tested = random.random(len(labels)) < 0.8
    return Scores(random.dirichlet(np.ones(classes), len(labels)), labels, tested)


def test_examples_are_the_first_tested_videos_of_each_class():
    labels = np.random.default_rng(1).integers(0, 5, 200)
    s = scores(labels, 5)
    chosen = example_clips.examples(s)
    assert len(chosen) == 15  # three of each of five classes
    for label in range(5):
        of_class = [i for i in range(200) if labels[i] == label and s.tested[i]]
        assert [i for i in chosen if labels[i] == label] == of_class[:3]


def test_examples_of_many_classes_are_spread_over_the_classes():
    s = scores(np.repeat(np.arange(400), 3), 400)
    shown = [int(s.labels[i]) for i in example_clips.examples(s)]
    assert len(set(shown)) == len(shown) == 16
    assert shown[0] <= 3 and shown[-1] >= 396
    assert max(np.diff(shown)) < 2 * 400 / 16


def test_mistakes_are_the_most_confident_wrong_predictions():
    s = scores(np.random.default_rng(2).integers(0, 4, 60), 4)
    wrong = np.flatnonzero(s.tested & (s.probabilities.argmax(1) != s.labels))
    assert len(wrong) > 8
    assert example_clips.mistakes(s) == sorted(wrong, key=lambda i: -s.probabilities[i].max())[:8]


def test_short_clips_show_all_frames_and_long_clips_evenly_spaced_ones():
    for frames in (1, 4, 8):
        assert example_clips.frame_indices(frames) == list(range(frames))
    shown = example_clips.frame_indices(40)
    assert len(shown) == 8 and shown[0] == 0 and shown[-1] == 39
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1


@pytest.fixture(scope="module")
def material(digits):
    config = tiny.config(digits)
    videos = read_video_list(digits, "test.csv")
    settings = build.settings(config, 8)
    params = jax.jit(settings.model.init)(jax.random.key(0))
    return videos, settings.clips, params, settings.model, settings.step


def pixels(picture: str) -> np.ndarray:
    kind, _, data = picture.partition(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(float)


def test_a_sheet_shows_the_clips_and_their_grad_cam(material):
    videos, settings, *model = material
    probabilities = np.full((10, 8), 0.05)
    probabilities[np.arange(10), videos.labels] = 0.65
    wrong = int((videos.labels[3] + 1) % 8)
    probabilities[3] = np.eye(8)[wrong]
    s = Scores(probabilities, videos.labels, np.ones(10, bool))
    made = example_clips.make(s, videos, settings, *model)
    assert made["wrong"] == len(made["mistakes"]) == 1 and made["no_grad_cam"] is None
    mistake = made["mistakes"][0]
    assert mistake["predicted"] == wrong and mistake["truth"] == videos.labels[3]
    assert mistake["probability"] == 1.0 and mistake["video"] == "videos/test/00003.mp4"
    assert len(made["examples"]) == 10  # of each class up to two: of six there is but one
    (picture,) = mistake["pictures"]
    image = pixels(picture)
    assert image.shape == (2 * 32 + 1, 4 * 32 + 3, 3)
    # Above the frames themselves, nearly grey as the data are; below in the colours of the map.
    clip = example_clips.pipeline.load_views(videos, 3, settings, clips=1, crops=1)[0]
    assert np.abs(image[:32, :32] - clip[0]).mean() < 6
    above, below = (np.ptp(part, axis=-1).mean() for part in (image[:32], image[-32:]))
    assert below > 4 * above


def test_where_grad_cam_fails_frames_are_shown_alone(material, monkeypatch):
    videos, settings, *model = material

    def silent(*args, **kwargs):
        raise UserError("this block has other grids\nand more")

    monkeypatch.setattr(attention_maps, "grad_cam", silent)
    s = Scores(np.eye(8)[videos.labels], videos.labels, np.ones(10, bool))
    made = example_clips.make(s, videos, settings, *model)
    assert made["no_grad_cam"] == "this block has other grids"
    assert made["mistakes"] == []  # all is right
    assert all(pixels(e["pictures"][0]).shape == (32, 131, 3) for e in made["examples"])
