"""The protocol of sources, in this and in other processes, and `open_source`."""

import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.config import KEYS
from mvit_jax.data.formats.frame_lists import FrameList, ListedFrames
from mvit_jax.data.formats.video_list import VideoList
from mvit_jax.data.making import moving_digits
from mvit_jax.data.media.images import Footage
from mvit_jax.data.source import SOURCES, Source, class_notes, fingerprint, open_source
from tests.data import frames
from tests.data.stored import stills, store
from tests.support.refusals import refused


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    video = moving_digits.video(0, "train", 0)
    in_folders = ("train/x/c.mp4", "train/y/d.mp4", "val/y/e.mp4", "val/y/f.mp4")
    for name in ("list/a.mp4", "list/b.mp4", *(f"folders/{name}" for name in in_folders)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(video)
    for name in ("a.mp4", "b.mp4"):
        (root / "labels/train").mkdir(parents=True, exist_ok=True)
        (root / "labels/train" / name).write_bytes(video)
    (root / "labels/train/labels.csv").write_text("a.mp4,x\nb.mp4,y;x\n")
    (root / "list/train.csv").write_text("a.mp4,1\nb.mp4,0\n")
    (root / "list/labels.txt").write_text("x\ny\n")
    for name in ("ssv2", "charades"):
        for video in ("11", "22"):
            frames.write(root / name / "rgb", video, 6)
        rows = [frames.row(v, i, "3" if i > 2 else "") for v in ("11", "22") for i in range(6)]
        (root / name / "train.csv").write_text(frames.text(*rows))
    template = {"Holding something": "0", "Other": "1"}
    videos = [{"id": "22", "template": "Other"}, {"id": "11", "template": "Holding [something]"}]
    for name, content in (("labels", template), ("train", videos)):
        file = root / f"ssv2/something-something-v2-{name}.json"
        file.write_text(json.dumps(content))
    levels = ({"image": np.full((4, 5, 3), 9 * i, np.uint8), "label": i} for i in range(2))
    store(root / "tfds", "levels", stills(), *levels)
    return root


SSV2 = {"source": "ssv2", "prefix": "rgb"}
CHARADES = {"source": "charades", "prefix": "rgb", "multi_label": True}
OPENED = {
    "list": ("list", "train.csv", {"separator": ","}),
    "folders": ("folders", "val.csv", {"source": "folders", "train_list": "train.csv"}),
    "ssv2": ("ssv2", "something-something-v2-train.json", SSV2),
    "ssv2 frames": ("ssv2", "train.csv", SSV2),
    "charades": ("charades", "train.csv", CHARADES),
    "labels": ("labels", "train.csv", {"source": "folders", "multi_label": True}),
    "synthetic": ("", "", {"source": "synthetic"}),
    "tfds": ("tfds", "train", {"tfds": "levels"}),
    "tfds read": ("tfds", "train", {"tfds": "levels"}),
}


def opened(root, kind, monkeypatch):
    if kind == "tfds read":  # as for a set that does not fit into memory
        monkeypatch.setattr("mvit_jax.data.formats.tfds.IN_MEMORY", 0)
    folder, name, options = OPENED[kind]
    return open_source(root / folder, name, **options)


def element(kind, source, index):
    """Returns the labels, shape and bytes of an element as comparable values."""
    with source.opened(index, 1 if kind.startswith("tfds") else 4) as video:
        numbers = np.array([0, video.num_frames - 1])
        clip = video.frames(numbers)
    label = np.asarray(source.label(index, numbers))
    return label.tolist(), np.asarray(source.label(index)).tolist(), clip.shape, clip.tobytes()


@pytest.mark.parametrize("kind", OPENED)
def test_sources_implement_the_protocol(root, kind, monkeypatch):
    source = opened(root, kind, monkeypatch)
    assert isinstance(source, Source) and len(source) >= 2
    assert isinstance(source.list_file, str) and isinstance(source.item(1), str)
    assert all(isinstance(name, str) for name in source.class_names)
    label: Any = source.label(1)
    if kind == "charades":
        assert label.shape == (157,) and np.flatnonzero(label).tolist() == [3]
        assert not np.any(source.label(1, np.array([0, 2])))
    elif kind == "labels":
        assert label.tolist() == [1, 1] and label.dtype == np.uint8
    else:
        assert isinstance(label, int) and 0 <= label < len(source.class_names)
    still = kind.startswith("tfds")
    with source.opened(1, 1 if still else 4) as video:
        assert (isinstance(video, Footage) and video.num_frames == 1) or not still
        clip = video.frames([video.num_frames - 1, 0])
        assert clip.ndim == 4 and clip.shape[0] == 2 and clip.shape[3] == 3
        assert clip.dtype == np.uint8
    # A pickled copy, as in a worker, gives the same elements to several threads in any order.
    copy = pickle.loads(pickle.dumps(source))
    expected = [element(kind, source, index) for index in (0, 1)]
    with ThreadPoolExecutor(4) as pool:
        elements = list(pool.map(lambda index: element(kind, copy, index), [1, 0] * 8))
    assert elements == expected[::-1] * 8
    assert (copy.item(0), copy.list_file, len(copy)) == (
        source.item(0), source.list_file, len(source),
    )  # fmt: skip


WORKER = """
import pickle, sys
from tests.data.test_source import element
sources = pickle.load(open(sys.argv[1], "rb"))
elements = {kind: [element(kind, source, i) for i in (1, 0)] for kind, source in sources.items()}
pickle.dump(elements, open(f"{sys.argv[1]}.spawned", "wb"))
"""


def test_elements_are_the_same_in_other_processes(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        sources = {kind: opened(root, kind, patch) for kind in OPENED}
    file = tmp_path / "sources"
    file.write_bytes(pickle.dumps(sources))
    subprocess.run([sys.executable, "-c", WORKER, str(file)], check=True, timeout=100)
    assert pickle.loads((tmp_path / "sources.spawned").read_bytes()) == {
        kind: [element(kind, source, i) for i in (1, 0)] for kind, source in sources.items()
    }


def test_arguments_reach_their_reader(root, tmp_path, monkeypatch):
    source = open_source(None, "", source="synthetic", multi_label=True)
    assert np.asarray(source.label(7)).sum() == 2
    source = opened(root, "folders", monkeypatch)
    assert source.label(0) == 1 and source.class_names == ("x", "y")
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 0\nc.mp4 0\n")
    (tmp_path / "labels.txt").write_text("x\n")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    assert len(open_source(str(tmp_path), "train.csv", max_missing=0.5)) == 3
    with pytest.raises(UserError, match="1 of the 3 listed files"):
        open_source(tmp_path, "train.csv")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"source": "lists"}, "data.source must be one of list, folders, shards, ssv2, "),
        (
            {"multi_label": True, "source": "ssv2"},
            "data.multi_label is on, but each video of the source ssv2 has",
        ),
        ({"multi_label": True, "tfds": "x"}, "each video of the source data.tfds=x has one label"),
        ({"source": "charades"}, "any number of labels: set data.multi_label=True"),
        ({"folder": None}, "data.folder is not set: pass --config.data.folder=DIR"),
        ({"list_name": ""}, "the name of the list is empty"),
        ({}, "there is no labels.txt in {0}: write the names of the classes there"),
        ({"folder": "{0}/gone"}, "`python -m mvit_jax.prepare moving_digits --out={0}/gone`"),
    ],
)
def test_invalid_sources_end_with_a_one_sentence_error(tmp_path, arguments, expected):
    arguments = {"folder": str(tmp_path), "list_name": "train.csv"} | arguments
    if arguments["folder"]:
        arguments["folder"] = arguments["folder"].format(tmp_path)
    with refused(expected.format(tmp_path)):
        open_source(arguments.pop("folder"), arguments.pop("list_name"), **arguments)


def test_the_config_key_lists_all_sources():
    for name in SOURCES:
        assert re.search(rf"\b{name}\b.*:", KEYS["data.source"].meaning)


def test_fingerprints_differ_when_hosts_have_different_splits(tmp_path):
    """Fingerprints ignore the location of the folder, but not missing or reordered lines."""

    def fingerprint_of(name, *lines, labels="a\nb\n"):
        folder = tmp_path / name
        (folder / "videos").mkdir(parents=True)
        for line in lines:
            (folder / "videos" / line.split()[0]).touch()
        (folder / "labels.txt").write_text(labels)
        (folder / "train.csv").write_text("".join(f"videos/{line}\n" for line in lines))
        return fingerprint(open_source(folder, "train.csv", max_missing=1.0))

    lines = ("one.mp4 0", "two.mp4 1", "three.mp4 1")
    first = fingerprint_of("local/here", *lines)
    assert (first["videos"], first["classes"]) == (3, 2)
    assert fingerprint_of("elsewhere", *lines) == first
    changed = (
        fingerprint_of("x", *lines[:2]),
        fingerprint_of("y", *lines[::-1]),
        fingerprint_of("z", *lines, labels="a\nc\n"),
    )
    assert all(other["names in order"] != first["names in order"] for other in changed)


def test_fingerprints_of_packed_videos_depend_on_their_ids_alone():
    def fingerprint_of(folder, *ids):
        items = [f"{i} of {folder}/train" for i in ids]
        videos = MagicMock(Source, list_file=f"{folder}/train", class_names=("a",))
        videos.item, videos.__len__.return_value = items.__getitem__, len(items)
        return fingerprint(videos)

    first = fingerprint_of("/a/b", "v1", "v2")
    assert first == fingerprint_of("/c", "v1", "v2") != fingerprint_of("/c", "v1", "v3")


def test_names_that_are_not_utf8_have_a_fingerprint(tmp_path):
    for name in ("train/a/caf\udce9.mp4", "train/a/two\nlines.mp4", "train/b/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    videos = open_source(tmp_path, "train", source="folders")
    before = fingerprint(videos)
    assert before["videos"] == 3
    (tmp_path / "train/a/caf\udce9.mp4").rename(tmp_path / "train/a/caf\udcea.mp4")
    after = fingerprint(open_source(tmp_path, "train", source="folders"))
    assert after["names in order"] != before["names in order"]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        ("abc", [0, 2, 1], []),
        ("abcd", [2, 0], ["2 of the 4 classes have no videos in the list, for example 'b'"]),
        ("aba", [0, 1, 2], ["1 classes of the list have the name of another class, for example"]),
    ],
)
def test_empty_classes_and_equal_names_are_noted(names, labels, expected):
    paths = tuple(map(str, labels))
    notes = class_notes(VideoList(paths, np.array(labels, np.int32), tuple(names), "the list"))
    assert len(notes) == len(expected)
    assert all(note.startswith(text) for note, text in zip(notes, expected, strict=True))


def test_classes_that_no_video_of_several_labels_has_are_noted():
    several = np.array([[0, 1, 1], [0, 0, 1]], np.uint8)
    index = FrameList("the list", ("x", "y"), np.arange(3))
    [note] = class_notes(ListedFrames(index, "/x", several, ("a", "b", "c")))
    assert note == "1 of the 3 classes have no videos in the list, for example 'a'"
