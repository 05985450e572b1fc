"""The contact sheet of the first training batch."""

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from mvit_jax.analysis import contact_sheet
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.training import build, step
from tests.support import commands, tiny
from tests.support.ava_folder import COLOURS, FLAGS, write_ava


def test_the_sheet_shows_the_batch_of_the_first_step(digits, tmp_path, monkeypatch):
    """Without random augmentation on the device, the pixels of the files."""
    calls, draw = [], contact_sheet._figure
    monkeypatch.setattr(contact_sheet, "_figure", lambda *a: calls.append(a) or draw(*a))
    config = tiny.config(digits, **{"augment.label_smoothing": 0.0, "data.repeats": 2})
    path = contact_sheet.draw(config, tmp_path / "sheet.png")
    videos = build.videos(config, "train")
    model = build.model_config(config, len(videos.class_names))
    (batch,) = pipeline.train_batches(
        videos, build.settings(config, model.num_classes).clips, seed=0, batch=8, steps=1, repeats=2
    )
    [(clips, targets, names, boxes, _)] = calls
    assert boxes is None
    np.testing.assert_allclose(clips, batch["clip"] / 255, atol=1e-5)
    assert targets.argmax(1).tolist() == batch["label"].tolist()
    assert names == videos.class_names
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 8 * 100 and picture[..., :3].std() > 0.05


def test_titles_have_the_soft_targets_of_classes():
    names = ("left", "right", "up")
    assert contact_sheet._label(np.array([0.05, 0.9, 0.05]), names) == "right"
    assert contact_sheet._label(np.array([0.63, 0.33, 0.03]), names) == "left 0.63, right 0.33"
    assert contact_sheet._label(np.array([1.0, 0.0, 1.0]), names) == "left 1.00, up 1.00"
    assert contact_sheet._label(np.array([0.3, 0.7]), names) == "right 0.70, left 0.30"
    assert contact_sheet._label(np.array([0.0, 1.0]), names) == "right"


@pytest.mark.parametrize("classes", [2, 3])
def test_cutmix_shows_both_classes_with_their_shares_of_the_pixels(classes):
    """Clips of all 0 and all 1: the mean of a mixed clip is its share of the second class."""
    recipe = build.settings(
        tiny.config("", **{"augment.cutmix": 1.0, "augment.mixup_group_size": 2}), classes
    ).step
    clip = np.stack([np.full((2, 32, 32, 3), value, np.uint8) for value in (0, 255) * 4])
    batch = {"clip": jnp.asarray(clip), "label": jnp.asarray([0, 1] * 4)}
    clips, targets = step.augment(batch, jax.random.key(0), recipe)
    pixels = np.asarray(clips) * recipe.std + recipe.mean
    shares = contact_sheet._without_smoothing(np.asarray(targets), recipe.label_smoothing)
    mixed = 0
    for pixel, share in zip(pixels, shares, strict=True):
        second = float(pixel.mean())
        np.testing.assert_allclose(share[:2], [1 - second, second], atol=1e-4)
        if 0.01 < second < 0.99:
            mixed += 1
            parts = sorted([(1 - second, "left"), (second, "right")], reverse=True)
            label = contact_sheet._label(share, ("left", "right", "up"))
            assert label == ", ".join(f"{name} {value:.2f}" for value, name in parts)
    assert mixed >= 2


def test_boxes_are_drawn_where_the_persons_are(tmp_path, monkeypatch):
    """Clips of persons in one colour: each box has that of its first class, also when flipped."""
    calls, draw = [], contact_sheet._figure
    monkeypatch.setattr(contact_sheet, "_figure", lambda *a: calls.append(a) or draw(*a))
    write_ava(tmp_path, videos=2)
    config = tiny.config(tmp_path, **FLAGS, batch=4)
    contact_sheet.draw(config, tmp_path / "sheet.png")
    [(clips, targets, names, boxes, _)] = calls
    assert len(clips) == 4 and names == ("red", "action 2", "blue", "green")
    for clip, labels, corners in zip(clips, targets, boxes, strict=True):
        for label, (x1, y1, x2, y2) in zip(labels, corners.round().astype(int), strict=True):
            pixels = clip[2, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
            if label.any() and pixels.size:
                expected = np.array(COLOURS[label.argmax() + 1]) / 255
                np.testing.assert_allclose(pixels.mean((0, 1)), expected, atol=0.15)
    text = contact_sheet._labels(np.array([[1, 0, 0, 1], [0] * 4]), names)
    assert text == "1 red, green; 2 no label"


def test_missing_folders_are_errors(digits, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        contact_sheet.draw(tiny.config(digits), tmp_path / "missing" / "sheet.png")
    with pytest.raises(UserError, match="there is no data folder"):
        contact_sheet.draw(tiny.config(tmp_path / "nothing"), tmp_path / "sheet.png")


def test_the_contact_sheet_flag_draws_without_training(digits, tmp_path):
    flags = [*tiny.FLAGS, f"--config.data.folder={digits}", f"--contact_sheet={tmp_path / 'a.png'}"]
    done = commands.run("train", "--config=configs/moving_digits.py", *flags)
    assert done == (0, f"wrote {tmp_path / 'a.png'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
