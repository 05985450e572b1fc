"""Scores of videos from their views, compared with plain loops; limits of decode failures."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from mvit_jax.common.errors import UserError
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.data.media.images import DecodeError, Frames
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import classification
from mvit_jax.training.evaluation.classification import Scores
from mvit_jax.training.evaluation.protocol import Protocol
from mvit_jax.training.run.metrics import BrokenDataError, Logbook

SETTINGS = ClipSettings(frames=2, stride=4, size=8, short_side=8)


class Memory:
    """Videos of three classes in memory: frame n of video i has the brightness 10 * i + n."""

    class_names, list_file = ("a", "b", "c"), "memory.csv"

    def __init__(self, count, broken=(), sets=None):
        self.count, self.broken, self.sets = count, broken, sets

    def __len__(self):
        return self.count

    def label(self, index, frames=None):
        return index % 3 if self.sets is None else self.sets[index]

    def item(self, index):
        return f"{index}.mp4"

    @contextlib.contextmanager
    def opened(self, index, clip_frames):
        if index in self.broken:
            raise DecodeError(self.item(index), "it is made so")
        numbers = np.arange(30, dtype=np.uint8) + 10 * index
        yield Frames(np.broadcast_to(numbers[:, None, None, None], (30, 8, 12, 3)))


def brightness(params, clip):
    """Returns three numbers that identify a view: its mean brightness b, 255 - b and 128."""
    mean = clip.astype(jnp.float32).mean((2, 3, 4, 5))
    return jnp.stack([mean, 255 - mean, jnp.full_like(mean, 128.0)], -1) / 255


def evaluate(videos, **kwargs):
    parts = {"mesh": sharding.make_mesh(devices=jax.devices()[:2]), "loader": LoaderOptions(0)}
    protocol = Protocol(**({"clips": (1, 3), "crops": 3, "batch": 4} | kwargs))
    return classification.score_videos(brightness, None, videos, SETTINGS, protocol, **parts)


@pytest.mark.parametrize("ensemble", ["mean", "max"])
def test_one_pass_scores_each_number_of_clips(ensemble):
    """By definition K clips start at k * floor(delta / (K - 1)), with frames 0 and 7 of 8."""
    one, three = evaluate(Memory(7), ensemble=ensemble)
    for scores, starts in ((one, [11]), (three, [0, 11, 22])):
        assert scores.tested.all() and scores.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
        for video in range(7):
            views = [10 * video + start + 3.5 for start in starts]
            view_scores = np.array([[b, 255 - b, 128] for b in views]) / 255
            expected = view_scores.mean(0) if ensemble == "mean" else view_scores.max(0)
            np.testing.assert_allclose(scores.probabilities[video], expected, atol=1e-6)
    differ = ensemble == "max"  # of evenly spread clips, the mean is the middle one's
    assert np.allclose(one.probabilities, three.probabilities, atol=1e-6) != differ


def test_decode_failures_are_excluded_up_to_a_limit():
    (scores,) = evaluate(Memory(10, broken=(2, 5)), clips=(2,), max_broken=0.2)
    assert np.flatnonzero(~scores.tested).tolist() == [2, 5]
    assert scores.metrics()["videos"] == 8
    assert scores.failures == ["2.mp4: it is made so", "5.mp4: it is made so"]
    with pytest.raises(
        UserError, match=r"2 of the 10 videos of memory\.csv .*max_broken=0\.1: .*2\.mp4"
    ):
        evaluate(Memory(10, broken=(2, 5)), clips=(2,), max_broken=0.1)


def test_multi_label_metrics_have_a_mean_average_precision():
    random = np.random.default_rng(0)
    sets = (random.random((40, 5)) < 0.3).astype(np.uint8)
    sets[:, 3] = 0  # a class that does not occur
    sets[4] = 0  # a video without a class
    probabilities = random.random((40, 5))
    tested = np.arange(40) != 7
    metrics = Scores(probabilities, sets, tested).metrics()
    columns = zip(sets[tested].T, probabilities[tested].T, strict=True)
    expected = [100 * average_precision_score(*column) for column in columns if column[0].any()]
    assert metrics["per_class"].pop(3) is None
    assert metrics["per_class"] == pytest.approx(expected)
    assert metrics["map"] == pytest.approx(np.mean(expected))
    assert "mean_class" not in metrics
    best = probabilities.argmax(1)
    right = [sets[i, best[i]] for i in np.flatnonzero(tested)]
    assert metrics["top1"] == pytest.approx(100 * np.mean(right))
    counted = sets[tested].T.astype(int) @ np.eye(5, dtype=int)[best[tested]]
    assert metrics["confusion"] == counted.tolist()


def test_multi_label_targets_survive_batching_and_padding():
    sets = np.random.default_rng(1).integers(0, 2, (5, 3), np.uint8)
    (scores,) = evaluate(Memory(5, broken=(1,), sets=sets), clips=(1,))
    tested = [0, 2, 3, 4]
    assert np.array_equal(scores.labels[tested], sets[tested])
    assert scores.hit[tested].tolist() == [bool(sets[i, scores.predicted[i]]) for i in tested]


def test_single_label_metrics_have_no_mean_average_precision():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1], [0.3, 0.3, 0.4]])
    tested = np.array([True] * 3 + [False])
    metrics = Scores(probabilities, np.array([0, 1, 0, 2]), tested).metrics()
    assert metrics["top1"] == pytest.approx(100 / 3)
    assert metrics["confusion"] == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert metrics["per_class"] == [50.0, 0.0, None]
    assert "map" not in metrics


def test_mean_class_accuracy_gives_each_class_with_videos_the_same_weight():
    random = np.random.default_rng(0)
    labels = np.where(random.random(200) < 0.9, 0, random.integers(1, 5, 200))
    probabilities = random.random((200, 6))  # class 5 has no videos
    probabilities[:, 0] += 0.3
    tested = (random.random(200) < 0.8) & (labels != 4)  # none of class 4 can be decoded
    metrics = Scores(probabilities, labels, tested).metrics()
    shares = []
    for label in range(4):
        rows = [i for i in range(200) if tested[i] and labels[i] == label]
        shares.append(sum(max(range(6), key=probabilities[i].__getitem__) == label for i in rows))
        shares[-1] /= len(rows)
    assert metrics["mean_class"] == pytest.approx(25 * sum(shares))
    assert metrics["mean_class"] < metrics["top1"] - 10  # the frequent class is predicted best


def metrics_of(broken, clips):
    numbers = {"loss": (1.0 * clips, clips), "accuracy": (0.0, clips), "broken": (broken, clips)}
    return {name: tuple(map(jnp.asarray, pair)) for name, pair in numbers.items()}


@pytest.mark.parametrize(("share", "ends_at"), [(0.2, 11), (0.0, 5), (0.5, None)])
def test_too_many_decode_failures_end_a_run(tmp_path, share, ends_at):
    """Steps of 25 clips; from the fifth step on eight of them are replaced.

    After n steps 8 (n - 4) of 25 n clips are replaced. Limits other than zero apply from 200 clips
    on.
    """
    log = Logbook(tmp_path, start=0, steps=20, batch=25, every=5, max_broken=share)
    seen = 0
    with contextlib.closing(log):
        try:
            for seen in range(1, 21):
                log.step(seen, metrics_of(8 if seen >= 5 else 0, 25), 1e-3)
                log.flush()
        except BrokenDataError as error:
            message = f"{8 * (seen - 4)} of {25 * seen} clips were replaced"
            assert message in str(error) and "data.max_broken" in str(error)
        else:
            seen = None
    assert seen == ends_at
