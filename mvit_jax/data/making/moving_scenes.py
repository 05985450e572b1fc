"""Moving scenes: several handwritten digits in one video, in the file formats of AVA.

Each digit is an actor. Two actors of one warm colour are partners; a third one, in half of the
videos, has a cold colour. The labels of an actor, the same at all key frames of a video:

* a motion: up, down, sideways, still, growing, shrinking or turning.
* the relation to the partner, if it has one. In "approaches", "leaves" and "passes", the partner
  stays in place or moves likewise, and then has the same relation. Who is followed "leads". Who is
  overtaken has no relation.
* an identity: its numeral, from 0 to 4 or from 5 to 9.

Motions and relations are visible in time alone (`scene_drawing`), and left-right flips preserve
them. The identity is the control, which single frames show. Ground that drifts, a grey pattern that
moves (the distractor), a pillar in front, and cuts to new positions make the task harder.

Second 900 is the first frame, and the key frames are the seconds 902 to 904. A detector is
imitated: its boxes are slightly moved, some are missing, some come twice, some show no actor.

Each video has one relation, so the same files are a set for classification: `clips_train.csv` and
so on. No frame tells one relation from another.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from mvit_jax.data.making import scene_drawing
from mvit_jax.data.making.made_videos import (
    FRAME_RATE,
    HANDWRITING,
    encode,
    handwriting,
    numerals,
    open_folder,
    write_missing,
    write_videos,
)
from mvit_jax.data.making.scene_drawing import RELATIONS

# Recorded in `prepare.json`; increases whenever the same seed gives other files.
VERSION = 1

KEY_SECONDS = range(902, 905)
FIRST_SECOND = 900  # of frame 0

# Ids have gaps, as AVA's do.
CLASSES = {
    "MOTION": {"up": 1, "down": 2, "sideways": 4, "still": 5, "growing": 6, "shrinking": 7,
               "turning": 8},
    "RELATION": {"approaches": 9, "leaves": 11, "follows": 12, "leads": 13, "passes": 14,
                 "accompanies": 15, "overtakes": 16},
    "IDENTITY": {"0 to 4": 17, "5 to 9": 18},
}  # fmt: skip
"""Ids of the evaluated classes by type and name."""

UNLISTED = {"upright": 3, "alone": 10}
"""Ids of classes in the csv files that are not evaluated: boxes higher than wide; no partner."""

_IDS = {name: id for group in CLASSES.values() for name, id in group.items()}

# The detector.
MISSED = 0.1  # share of the actors
DOUBLED = 0.1  # share of the detected actors
_MOVED = 0.015  # largest shift of an edge, in shares of the box's side
_FALSE = 0.5  # share of the key frames with a false box


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scene:
    """A video and its labels.

    Attributes:
      picture: the bodies and their paths.
      relation: number of the relation in `RELATIONS`.
      labels: ids of the classes of each actor, ascending, without those of `UNLISTED`.
      alone: true for actors without a partner.
    """

    picture: scene_drawing.Picture
    relation: int
    labels: tuple[tuple[int, ...], ...]
    alone: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrueBox:
    """An actor at a key frame: x1, y1, x2, y2 in shares of the frame, and the ids of classes."""

    second: int
    person: int
    corners: Float64[np.ndarray, "4"]
    labels: tuple[int, ...]


def name_of(split: str, index: int) -> str:
    """Returns the name of a video."""
    return f"{split}_{index:05d}"


def scene(seed: int, split: str, index: int) -> Scene:
    """Draws a scene, whose relation is `index` modulo 6; it depends on the arguments alone."""
    rng = np.random.default_rng((seed, 4 + list(HANDWRITING).index(split), index))
    relation = index % len(RELATIONS)
    pair = scene_drawing.draw_pair(RELATIONS[relation], rng)
    singles = [scene_drawing.draw_role(rng) for _ in range(rng.integers(2))]
    distractors = [scene_drawing.draw_role(rng)]
    roles = [pair.first, pair.second, *singles]
    width, height = scene_drawing.SIZE if rng.integers(2) else scene_drawing.SIZE[::-1]
    shots = scene_drawing.draw_shots(int(rng.integers(*scene_drawing.LENGTHS, endpoint=True)), rng)
    poses = [
        np.concatenate(paths)
        for paths in zip(
            *(
                scene_drawing.draw_poses(pair, singles, distractors, phase, (width, height), rng)
                for phase in shots
            ),
            strict=True,
        )
    ]
    chosen = rng.choice(HANDWRITING[split], len(roles), replace=False)
    glyphs = [*handwriting(seed)[split][chosen]]
    glyphs += [scene_drawing.distractor_glyph(rng) for _ in distractors]
    colours = scene_drawing.draw_colours(len(singles), len(distractors), rng)
    bodies = [scene_drawing.Body(*parts) for parts in zip(glyphs, colours, poses, strict=True)]
    pillars = int(rng.integers(2))
    picture = scene_drawing.Picture(
        width, height, scene_drawing.draw_texture(rng),
        drift=np.concatenate([scene_drawing.draw_drift(len(shot), rng) for shot in shots]),
        distractors=tuple(bodies[len(roles) :]),
        actors=tuple(bodies[: len(roles)]),
        pillars=np.concatenate(
            [scene_drawing.draw_pillars(pillars, len(shot), width, rng) for shot in shots]
        ),
        paint=rng.uniform(20, 120, 3),
    )  # fmt: skip
    relations = [*_relations(pair), *("" for _ in singles)]
    groups = ["0 to 4" if numeral < 5 else "5 to 9" for numeral in numerals(seed)[split][chosen]]
    labels = tuple(
        tuple(sorted(_IDS[name] for name in (role.motion, relates, group) if name))
        for role, relates, group in zip(roles, relations, groups, strict=True)
    )
    return Scene(picture, relation, labels, (False, False, *(True for _ in singles)))


def _relations(pair: scene_drawing.Pair) -> tuple[str, str]:
    """Returns the relation of each partner to the other; empty for none."""
    second = {"follows": "leads", "accompanies": "accompanies", "overtakes": ""}
    return pair.relation, second.get(pair.relation, pair.relation if pair.mutual else "")


def video(seed: int, split: str, index: int) -> bytes:
    """Makes the mp4 file of a video, which depends on the arguments alone."""
    return encode(scene_drawing.render(scene(seed, split, index).picture))


def true_boxes(drawn: Scene) -> list[TrueBox]:
    """Returns the boxes of all actors at the key frames, by second, then by actor."""
    boxes = []
    for second in KEY_SECONDS:
        time = (second - FIRST_SECOND) * FRAME_RATE
        for person, actor in enumerate(drawn.picture.actors):
            corners = scene_drawing.box(actor, time, drawn.picture).round(3)
            size = (corners[2:] - corners[:2]) * (drawn.picture.width, drawn.picture.height)
            unlisted = [UNLISTED["upright"]] * bool(size[1] > size[0])
            unlisted += [UNLISTED["alone"]] * drawn.alone[person]
            labels = tuple(sorted((*drawn.labels[person], *unlisted)))
            boxes.append(TrueBox(second, person, corners, labels))
    return boxes


def detect(
    drawn: Scene, boxes: list[TrueBox], rng: np.random.Generator
) -> Iterator[tuple[int, Float64[np.ndarray, "4"], tuple[int, ...], float]]:
    """Imitates a detector; yields the second, corners, labels of the true box, and score of boxes.

    Second boxes of an actor have a lower score than the first. False boxes show distractors, or
    another part of the frame; they have no labels, and few of them a high score.
    """
    for truth in boxes:
        if rng.uniform() >= MISSED:
            score = rng.uniform(0.9, 1)
            yield truth.second, _moved(truth.corners, rng), truth.labels, score
            if rng.uniform() < DOUBLED:
                lower = score * rng.uniform(0.5, 0.95)
                yield truth.second, _moved(truth.corners, rng), truth.labels, lower
    for second in KEY_SECONDS:
        if rng.uniform() < _FALSE:
            corners = _false_box(drawn, second, rng)
            score = rng.uniform(0.9, 1) if rng.uniform() < 0.1 else rng.uniform(0.05, 0.6)
            if not any(_overlap(corners, each.corners) for each in boxes if each.second == second):
                yield second, corners, (), score


def _false_box(drawn: Scene, second: int, rng: np.random.Generator) -> Float64[np.ndarray, "4"]:
    """Draws the box of a distractor, or one anywhere in the frame."""
    if rng.uniform() < 0.5:
        time = (second - FIRST_SECOND) * FRAME_RATE
        return scene_drawing.box(drawn.picture.distractors[0], time, drawn.picture)
    size = rng.uniform(0.1, 0.3, 2)
    corner = rng.uniform(0, 1 - size)
    return np.concatenate([corner, corner + size])


def _overlap(one: Float64[np.ndarray, "4"], other: Float64[np.ndarray, "4"]) -> bool:
    """Returns True if the boxes share more than half of either."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    areas = [np.prod(box[2:] - box[:2]) for box in (one, other)]
    return bool(np.prod(np.maximum(sides, 0)) > min(areas) / 2)


def _moved(corners: Float64[np.ndarray, "4"], rng: np.random.Generator) -> Float64[np.ndarray, "4"]:
    sides = np.tile(corners[2:] - corners[:2], 2)
    return np.clip(corners + rng.uniform(-_MOVED, _MOVED, 4) * sides, 0, 1)


def prepare(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    train_videos: int = 1200,
    val_videos: int = 60,
    test_videos: int = 180,
) -> None:
    """Writes the data set into the folder `out`, or resumes an interrupted run.

    The folder has

    * `videos/SPLIT_00000.mp4` and so on, 30 frames per second;
    * `train.csv`, `val.csv` and `test.csv`: labels, as `ava_tables` describes them;
    * `train_boxes.csv` and so on: boxes of a detector. In `train_boxes.csv` those of actors have
      their labels;
    * `excluded.csv`: key frames of validation and test that the metric leaves out;
    * `classes.pbtxt`: the evaluated classes, with the types MOTION, RELATION and IDENTITY;
    * `clips_train.csv` and so on, with lines "path label", and `labels.txt`: the relation of each
      video;
    * `prepare.json`: the settings.

    The lists are written last, all files atomically. A video depends only on the seed, its split
    and its index.

    Raises:
      UserError: a split has fewer videos than relations, `seed` is negative, or `out` cannot be a
        folder, has other files, or was prepared with other settings.
    """
    counts = {"train": train_videos, "val": val_videos, "test": test_videos}
    folder = open_folder(out, "moving_scenes", VERSION, seed, counts, len(RELATIONS))
    paths = {
        folder / "videos" / f"{name_of(split, index)}.mp4": functools.partial(
            video, seed, split, index
        )
        for split, count in counts.items()
        for index in range(count)
    }
    write_videos("moving_scenes", paths, seed)
    if not all((folder / name).exists() for name in _TABLES):
        write_missing(folder, tables(seed, counts))


def tables(seed: int, counts: dict[str, int]) -> dict[str, str]:
    """Makes the csv files and the names of classes; returns the content of each file by name."""
    files = dict.fromkeys(_TABLES, "")
    for split, count in counts.items():
        for index in range(count):
            for file, lines in _rows(seed, split, index).items():
                files[file] += "".join(f"{line}\n" for line in lines)
    files["labels.txt"] = "".join(f"{name}\n" for name in RELATIONS)
    files["classes.pbtxt"] = "".join(
        f'label {{\n  name: "{name}"\n  label_id: {id}\n  label_type: {kind}\n}}\n'
        for kind, group in CLASSES.items()
        for name, id in group.items()
    )
    return files


_TABLES = (
    *(f"{split}.csv" for split in HANDWRITING),
    *(f"{split}_boxes.csv" for split in HANDWRITING),
    *(f"clips_{split}.csv" for split in HANDWRITING),
    "excluded.csv",
    "labels.txt",
    "classes.pbtxt",
)


def _rows(seed: int, split: str, index: int) -> dict[str, list[str]]:
    """Returns the lines about a video, by the name of their file."""
    name, drawn = name_of(split, index), scene(seed, split, index)
    rng = np.random.default_rng((seed, 7 + list(HANDWRITING).index(split), index))
    boxes = true_boxes(drawn)
    truth = [
        f"{_place(name, box.second, box.corners)},{label},{box.person}"
        for box in boxes
        for label in box.labels
    ]
    detected = [
        f"{_place(name, second, corners)},{label},{score:.4f}"
        for second, corners, labels, score in detect(drawn, boxes, rng)
        for label in (labels if split == "train" and labels else ("",))
    ]
    excluded = rng.uniform() < 0.1 and split != "train"
    return {
        f"{split}.csv": truth,
        f"{split}_boxes.csv": detected,
        f"clips_{split}.csv": [f"videos/{name}.mp4 {drawn.relation}"],
        "excluded.csv": [f"{name},{rng.choice(KEY_SECONDS):04d}"] * bool(excluded),
    }


def _place(name: str, second: int, corners: Float64[np.ndarray, "4"]) -> str:
    return f"{name},{second:04d}," + ",".join(f"{corner:.3f}" for corner in corners)
