"""Moving scenes: motions and relations, boxes, the imitated detector, and the written folder."""

import collections
import functools
import io
import itertools
import json
import shutil

import av
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats import ava_tables
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.making import moving_scenes, scene_drawing
from mvit_jax.data.making.moving_scenes import CLASSES, UNLISTED
from mvit_jax.training.evaluation.frame_map import Boxes, measure_frame_ap
from tests.data.making.test_moving_digits import contents

SPLITS = ("train", "val", "test")
SMALL = {"seed": 3, "train_videos": 7, "val_videos": 6, "test_videos": 6}
NAMES = {id: name for group in CLASSES.values() for name, id in group.items()}
KEY_FRAME = 90


@functools.cache
def scene(index):
    return moving_scenes.scene(0, "train", index)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "new" / "folder"
    moving_scenes.prepare(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """The tables of more videos, without the videos."""
    folder = tmp_path_factory.mktemp("tables")
    counts = {"train": 40, "val": 40, "test": 60}
    for name, content in moving_scenes.tables(0, counts).items():
        (folder / name).write_text(content)
    return folder


def key_frames(folder, split, **options):
    options = {"classes": 18, "min_score": 0.0, **options}
    return ava_tables.read_key_frames([folder / f"{split}.csv"], **options)


def overlap(one, other):
    """Returns the IoU of each box with each other box."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (one, other)]
    return shared / (areas[0][:, None] + areas[1] - shared)


# Motion


def shots(bodies):
    """Returns the shots of a scene, the frames between two jumps, as poses of each body."""
    poses = np.stack([body.poses for body in bodies])
    jumps = np.abs(np.diff(poses[..., :2], axis=1)).max((0, 2)) > 3
    cuts = [0, *(np.flatnonzero(jumps) + 1), poses.shape[1]]
    return [poses[:, start:end] for start, end in itertools.pairwise(cuts)]


def label_of(labels, kind):
    """Returns the name of an actor's label of a kind; None if it has none."""
    names = [name for name, id in CLASSES[kind].items() if id in labels]
    assert len(names) <= 1
    return names[0] if names else None


def motion_of(poses):
    """Returns the motion that the poses of an actor show in a shot."""
    x, y, angle, side = (poses[-1] - poses[0]).round(6)
    assert np.count_nonzero([x, y, angle, side]) <= 1
    names = {
        "sideways": x,
        "down": y > 0,
        "up": y < 0,
        "turning": angle,
        "growing": side > 0,
        "shrinking": side < 0,
    }
    return next((name for name, value in names.items() if value), "still")


@pytest.mark.parametrize("index", range(12))
def test_paths_show_the_labelled_motion_in_every_shot(index):
    drawn = scene(index)
    for poses in shots(drawn.picture.actors):
        if poses.shape[1] > 4:
            shown = [motion_of(each) for each in poses]
            assert shown == [label_of(labels, "MOTION") for labels in drawn.labels]


def relation_of(first, second):
    """Returns the relation of an actor to another in a shot, by its first and last poses."""
    line = (second - first)[:, :2].mean(0)
    along = np.abs(line).argmax()
    ahead = np.sign(line[along])
    moved, partner = ((poses[-1] - poses[0])[:2].round(6) for poses in (first, second))
    if not moved.any():
        return None
    if moved[along]:
        if moved[along] * partner[along] > 0:
            return "follows" if moved[along] * ahead > 0 else "leads"
        return "approaches" if moved[along] * ahead > 0 else "leaves"
    ratio = partner[1 - along] / moved[1 - along]
    if ratio <= 0:
        return "passes"
    if ratio == pytest.approx(1):
        return "accompanies"
    return "overtakes" if ratio < 1 else None


@pytest.mark.parametrize("index", range(24))
def test_paths_show_the_labelled_relation_in_every_shot(index):
    drawn = scene(index)
    for poses in shots(drawn.picture.actors):
        if poses.shape[1] > 4:
            shown = [relation_of(poses[0], poses[1]), relation_of(poses[1], poses[0])]
            assert shown == [label_of(labels, "RELATION") for labels in drawn.labels[:2]]
            assert shown[0] == scene_drawing.RELATIONS[drawn.relation]
    assert all(label_of(labels, "RELATION") is None for labels in drawn.labels[2:])


def test_a_frame_does_not_show_relations_or_motions():
    """A random forest on the poses of one frame is hardly better than chance."""
    features, relations, motions = [], [], []
    for index in range(360):
        drawn = scene(index)
        first, second = (
            actor.poses[KEY_FRAME] - [drawn.picture.width / 2, drawn.picture.height / 2, 0, 0]
            for actor in drawn.picture.actors[:2]
        )
        line = np.abs((second - first)[:2])
        features.append([*first[[0, 1, 3]], *second[[0, 1, 3]], *(second - first)[:2],
                         *np.sort(line), drawn.picture.width])  # fmt: skip
        relations.append(drawn.relation)
        motions.append(label_of(drawn.labels[0], "MOTION"))
    for labels in (np.array(relations), np.array(motions)):
        forest = RandomForestClassifier(50, min_samples_leaf=5, oob_score=True, random_state=0)
        forest.fit(features, labels)
        chance = max(collections.Counter(labels.tolist()).values()) / len(labels)
        assert forest.oob_score_ < chance + 0.07


def test_partners_stay_inside_the_frame_and_apart():
    overlaps, edges = [], 0
    for index in range(120):
        picture = scene(index).picture
        corners = np.stack([scene_drawing.box(a, KEY_FRAME, picture) for a in picture.actors])
        assert (corners >= 0).all() and (corners <= 1).all()
        overlaps.append(np.triu(overlap(corners, corners), 1).max())
        edges += (corners == 0).any() or (corners == 1).any()
    assert np.mean(np.array(overlaps) > 0.3) < 0.05 and edges < 6


# Pictures and boxes


@pytest.mark.parametrize("index", range(3))
def test_boxes_surround_the_painted_pixels(index):
    """Compares a black scene of one actor with its boxes."""
    picture = scene(index).picture
    for actor in picture.actors:
        body = scene_drawing.Body(actor.glyph, np.full(3, 255.0), actor.poses[[60, 90, 120]])
        bare = scene_drawing.Picture(
            picture.width, picture.height, np.zeros_like(picture.texture), np.full((3, 2), 44.0),
            (), (body,), np.zeros((3, 0, 2)), picture.paint,
        )  # fmt: skip
        for time, frame in enumerate(scene_drawing.render(bare)):
            ink = frame[..., 0] / 255
            size = np.array([picture.width, picture.height] * 2)
            left, top, right, bottom = (
                (scene_drawing.box(body, time, bare) * size).round().astype(int)
            )
            inside = ink[top:bottom, left:right]
            assert ink.sum() > 10 and ink.max() > 0.9
            assert np.count_nonzero(ink >= 0.26) == np.count_nonzero(inside >= 0.26)
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() > 0.24


def test_partners_have_one_colour_and_further_actors_have_others():
    for index in range(20):
        colours = [actor.colour for actor in scene(index).picture.actors]
        np.testing.assert_array_equal(colours[0], colours[1])
        assert all(np.abs(colour - colours[0]).max() > 10 for colour in colours[2:])


def test_files_are_wide_or_tall_and_long_enough_for_clips_of_the_last_key_frame():
    sizes = set()
    for index in range(12):
        picture = scene(index).picture
        sizes.add((picture.width, picture.height))
        assert 155 <= len(picture.drift) <= 170
        assert all(len(actor.poses) == len(picture.drift) for actor in picture.actors)
    assert sizes == {(176, 128), (128, 176)}
    picture = scene(0).picture
    frames = scene_drawing.render(picture)
    with av.open(io.BytesIO(moving_scenes.video(0, "train", 0))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (picture.width, picture.height)
        assert stream.average_rate == 30 and stream.frames == len(frames)
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(decoded.astype(int) - frames[0]).mean() < 8


# Tables


@pytest.mark.parametrize("split", SPLITS)
def test_tables_are_read_without_a_note(listed, split, capfd):
    evaluated = ava_tables.read_class_list(listed / "classes.pbtxt")
    assert evaluated.names == NAMES and evaluated.count == 18
    assert evaluated.groups == {
        kind.lower(): tuple(group.values()) for kind, group in CLASSES.items()
    }
    truth = key_frames(listed, split)
    ava_tables.read_key_frames(
        [listed / f"{split}.csv"], [listed / f"{split}_boxes.csv"], classes=18
    )
    assert set(truth.second.tolist()) == {902, 903, 904}
    assert len(truth) == 3 * len(truth.videos)
    used = {int(column) + 1 for column in np.flatnonzero(truth.labels.any(0))}
    assert used == {*NAMES, *UNLISTED.values()}
    excluded = ava_tables.read_excluded(listed / "excluded.csv")
    assert all(video.startswith(("val_", "test_")) for video, _ in excluded) and excluded
    assert capfd.readouterr().err == ""


def test_every_actor_has_one_motion_and_one_identity(listed):
    labels = key_frames(listed, "test").labels
    for kind in ("MOTION", "IDENTITY"):
        assert (labels[:, [id - 1 for id in CLASSES[kind].values()]].sum(1) == 1).all()
    relations = labels[:, [id - 1 for id in CLASSES["RELATION"].values()]].sum(1)
    assert set(relations.tolist()) == {0, 1}
    assert not (relations & labels[:, UNLISTED["alone"] - 1]).any()


def test_true_boxes_with_true_labels_have_a_map_of_1(listed):
    truth = key_frames(listed, "test")
    image = np.repeat(np.arange(len(truth)), np.diff(truth.starts))
    row, column = np.nonzero(truth.labels)
    pairs = Boxes(image[row], truth.box[row], column + 1)
    detections = Boxes(image[row], truth.box[row], column + 1, np.ones(len(row)))
    result = measure_frame_ap(pairs, detections, classes=[*NAMES])
    np.testing.assert_array_equal(result.per_class, 1.0)


@pytest.mark.parametrize("split", SPLITS)
def test_the_detector_misses_doubles_moves_and_invents_boxes(listed, split):
    truth = key_frames(listed, split)
    boxes = [line.split(",") for line in (listed / f"{split}_boxes.csv").read_text().splitlines()]
    by_frame = collections.defaultdict(dict)
    for video, second, *corners, action, score in boxes:
        place = by_frame[video, int(second)].setdefault(tuple(map(float, corners)), (set(), []))
        place[0].add(action)
        place[1].append(float(score))
    hits, false = [], []
    for index in range(len(truth)):
        key = truth.videos[truth.video[index]], int(truth.second[index])
        rows = truth.rows(index)
        detected = by_frame[key]
        corners = np.array([*detected]).reshape(-1, 4)
        best = overlap(truth.box[rows], corners)
        hits += (best > 0.7).sum(1).tolist()
        for (actions, scores), iou in zip(detected.values(), best.T, strict=True):
            if iou.max() <= 0.7:
                false.append(scores[0])
                assert actions == {""}
            else:
                assert iou.max() >= 0.9
                labels = np.flatnonzero(truth.labels[rows][iou.argmax()]) + 1
                expected = {str(label) for label in labels} if split == "train" else {""}
                assert actions == expected
    hits = np.array(hits)
    assert np.mean(hits == 0) == pytest.approx(0.1, abs=0.05)
    assert np.mean(hits == 2) == pytest.approx(0.09, abs=0.05)
    assert hits.max() == 2
    assert len(false) == pytest.approx(0.45 * len(truth), rel=0.3)
    assert 0 < np.mean(np.array(false) >= 0.9) < 0.25 and np.median(false) < 0.6


# The folder


def test_lists_of_clips_have_every_video_and_its_relation(prepared, capfd):
    for split in SPLITS:
        clips = read_video_list(prepared, f"clips_{split}.csv")
        assert clips.class_names == scene_drawing.RELATIONS
        count = SMALL[f"{split}_videos"]
        assert clips.labels.tolist() == [index % 6 for index in range(count)]
        assert key_frames(prepared, split).videos == tuple(
            f"{split}_{index:05d}" for index in range(count)
        )
    assert capfd.readouterr().err == ""
    record = {"name": "moving_scenes", "version": moving_scenes.VERSION, **SMALL}
    assert json.loads((prepared / "prepare.json").read_text()) == record
    assert len(contents(prepared)) == 7 + 6 + 6 + 12 + 1


def test_missing_files_are_written_and_others_are_not(prepared, tmp_path, capfd):
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    for name in ("videos/train_00005.mp4", "test_boxes.csv", "classes.pbtxt"):
        (folder / name).unlink()
    (folder / "videos" / ".train_00005.mp4.999").write_text("lef")
    moving_scenes.prepare(folder, **SMALL)
    assert contents(folder) == contents(prepared)
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    moving_scenes.prepare(prepared, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert capfd.readouterr().err == ""


def test_the_seed_determines_the_bytes_whatever_the_number_of_videos(prepared, listed):
    for split in SPLITS:
        file = prepared / "videos" / f"{split}_00004.mp4"
        assert file.read_bytes() == moving_scenes.video(3, split, 4)
    again = moving_scenes.tables(0, {"train": 2, "val": 2, "test": 2})
    for name, content in again.items():
        assert set(content.splitlines()) <= set((listed / name).read_text().splitlines())


def test_another_seed_and_other_splits_give_other_scenes():
    drawn = [moving_scenes.scene(seed, split, 0) for seed in (0, 1) for split in SPLITS]
    assert len({tuple(each.picture.actors[0].poses[0]) for each in drawn}) == 6
    shown = [actor.glyph.tobytes() for each in drawn[1:3] for actor in each.picture.actors]
    train = {digit.tobytes() for digit in moving_scenes.handwriting(0)["train"]}
    assert not train & set(shown)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("train_videos", 5, "train_videos=5 .* at least 6"), ("seed", -1, "seed=-1 must be")],
)
def test_invalid_values_are_an_error(tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        moving_scenes.prepare(tmp_path / "folder", **SMALL | {key: value})
    assert not (tmp_path / "folder").exists()
