"""Key frames of AVA: the frames of their clips, their boxes, and folders that lack files."""

from pathlib import Path

import numpy as np
import pytest

from mvit_jax.common.errors import MissingDataError
from mvit_jax.data.formats.ava import clip_indices, read_ava
from mvit_jax.data.media import packets
from mvit_jax.data.media.images import Frames
from mvit_jax.data.media.video import Video
from mvit_jax.data.source import fingerprint
from tests.data.bar_codes import numbers_of, write
from tests.support.ava_folder import write_ava
from tests.support.refusals import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_ava(tmp_path_factory.mktemp("ava"))


def opened(folder, train=True, **options):
    boxes = {"boxes": "boxes.csv", "class_list": "classes.pbtxt"}
    return read_ava(folder, "train.csv", train=train, **(boxes | options))


def test_clips_have_the_strides_of_the_reference_code():
    """Values of the original at second 902, frame 60: 28, 32, ..., 60, ..., 88."""
    footage = Frames(np.zeros((27_030, 1, 1, 3), np.uint8))
    indices = clip_indices(footage, 60, 16, 4, 900)
    assert indices.tolist() == list(range(28, 92, 4)) and indices[8] == 60
    assert clip_indices(footage, 60, 64, 3, 900).tolist() == [
        max(60 - 96 + 3 * k, 0) for k in range(64)
    ]
    assert clip_indices(footage, 27_020, 4, 16, 900).tolist() == [26988, 27004, 27020, 27029]


@pytest.mark.parametrize("rate", [24, 25, 30])
def test_frames_of_a_file_are_those_shown_at_30_per_second(rate, tmp_path):
    """Frame i is the picture shown at i / 30 s: of 25 pictures a second, every fifth repeats."""
    with Video(str(write(tmp_path / "v.mkv", 4 * rate, rate=rate))) as video:
        indices = clip_indices(video, 60, 30, 2)
        expected = [min(rate * i // 30, 4 * rate - 1) for i in range(30, 90, 2)]
        assert indices.tolist() == expected
        assert numbers_of(video.frames(indices)) == expected
        assert clip_indices(video, 119, 4, 1).tolist()[-1] == 4 * rate - 1


class Film(Video):
    """A film of 30 minutes at 25 frames per second, without a file."""

    num_frames, fps = 45_000, 25.0
    seconds = np.arange(45_000) / 25

    def __init__(self):
        pass


def test_clips_of_a_whole_film_begin_at_minute_15():
    film = Film()
    at_902 = clip_indices(film, 60, 16, 4, 900)
    assert at_902.tolist() == [(902 * 25 * 30 + 25 * (4 * k - 32)) // 30 for k in range(16)]
    # Frames before the cut repeat its first frame, as if the minutes were cut out.
    assert clip_indices(film, 10, 4, 10, 900).tolist()[:2] == [900 * 25, 900 * 25]
    assert clip_indices(film, 60, 16, 4, 0)[8] == 50  # own data that begin at second 0


def test_a_file_is_read_whole_once(folder, tmp_path, monkeypatch):
    """The clips of later key frames equal those of the first reading."""
    path = write(tmp_path / "v.mp4", 130)
    (tmp_path / "train.csv").write_text("v,902,0,0,1,1,1,0\nv,903,0,0,1,1,1,0\n")
    (tmp_path / "classes.pbtxt").write_text('x { name: "a" id: 1 }')
    clips = opened(tmp_path, boxes=None, prefix=".")
    read = []
    original = packets.read_packets
    monkeypatch.setattr(packets, "read_packets", lambda *a: read.append(a[2]) or original(*a))
    for index in (0, 1, 0):
        with clips.opened(index, 4) as video:
            indices = clips.clip_indices(index, video, 4, 8)
            assert numbers_of(video.frames(indices)) == indices.tolist()
    assert read == [str(path)]


def test_folders_of_frames_equal_videos(folder, tmp_path):
    stored = opened(write_ava(tmp_path, frames=True))
    for clips in (stored, opened(folder)):
        assert len(clips) == 8 and clips.max_boxes == 3 and clips.class_names[1] == "action 2"
        with clips.opened(2, 4) as footage:
            indices = clips.clip_indices(2, footage, 8, 4)
            assert indices.tolist() == list(range(44, 76, 4))
            assert footage.frames(indices).shape == (8, 64, 48, 3)
    assert stored.files[0] == str(tmp_path / "frames/v0")
    with stored.opened(2, 4) as footage:
        assert footage.paths[44].endswith("/v1/v1_000045.png") and footage.num_frames == 125


def test_training_boxes_are_labelled_and_detected_ones(folder):
    clips = opened(folder)
    box, labels = clips.boxes(1)  # second 903 has a detection without label
    assert box.shape == (3, 4) and labels.sum(1).tolist() == [1, 1, 0]
    np.testing.assert_array_equal(clips.label(1), labels.max(0))
    tested = opened(folder, train=False, min_score=0.94)
    assert tested.boxes(1).box.shape == (2, 4)
    assert len(tested.truth.box) == 16 and tested.item(1).endswith("v0.mp4 at second 903")
    labelled = opened(folder, boxes=None, train=False)
    np.testing.assert_array_equal(labelled.key_frames.box, tested.key_frames.box)


def test_hosts_with_other_labels_have_another_fingerprint(folder):
    clips, labelled = opened(folder), opened(folder, boxes=None)
    ours, theirs = fingerprint(clips), fingerprint(labelled)
    assert ours["names in order"] == theirs["names in order"] and ours != theirs
    assert ours == fingerprint(opened(folder))


def test_a_subset_has_the_boxes_of_its_key_frames(folder):
    clips = opened(folder)
    part = clips.subset(np.array([5, 1]))
    assert len(part) == 2 and part.max_boxes == 3
    for index, original in enumerate((5, 1)):
        np.testing.assert_array_equal(part.boxes(index).box, clips.boxes(original).box)
        assert part.item(index) == clips.item(original)


def test_missing_files_are_named(folder, tmp_path, capfd):
    with pytest.raises(MissingDataError, match=r"there is no list .*nothing\.csv"):
        read_ava(folder, "nothing.csv", boxes=None, class_list="classes.pbtxt", train=True)
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "videos").mkdir()
    for number in range(3):
        (tmp_path / f"videos/v{number}.mp4").symlink_to(folder / f"videos/v{number}.mp4")
    with refused("1 of the 4 videos of", "for example v3: add them, or remove their lines"):
        opened(tmp_path)
    clips = opened(tmp_path, max_missing=0.3)
    assert "for example v3" in capfd.readouterr().err
    assert len(clips) == 8 and clips.frame_size(3) is None and clips.frame_size(1) == (64, 48)
