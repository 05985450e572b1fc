"""Moving digits: the motion of each class, the handwriting of splits, and the written folder."""

import collections
import dataclasses
import io
import json

import av
import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from mvit_jax.common.errors import UserError
from mvit_jax.data.making import moving_digits
from tests.support.refusals import refused

CLASSES = tuple(moving_digits.CLASSES)
PER_CLASS = 40
SMALL = {"seed": 3, "train_videos": 16, "val_videos": 8, "test_videos": 9}
RECORD = {"name": "moving_digits", "version": moving_digits.VERSION, **SMALL}


def scene(label, seed):
    digits = moving_digits.handwriting(0)["train"]
    return moving_digits.draw(label, digits, np.random.default_rng((17, seed)))


@pytest.fixture(scope="module")
def scenes():
    """Scenes of each class, drawn from distinct seeds, with their frames."""
    drawn_scenes = {
        label: [scene(label, PER_CLASS * label + i) for i in range(PER_CLASS)]
        for label in range(len(CLASSES))
    }
    return {
        label: [(s, moving_digits.render(s)) for s in group]
        for label, group in drawn_scenes.items()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "new" / "folder"
    moving_digits.prepare(folder, **SMALL)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def decode(file):
    with av.open(file) as container:
        return np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)])


# Motion


def shift(before, after, axis):
    """Returns the displacement of `after` along `axis` of a torus, in whole pixels."""
    product = np.conj(np.fft.fft2(before)) * np.fft.fft2(after)
    correlation = np.fft.ifft2(product).real
    best = np.unravel_index(np.argmax(correlation), correlation.shape)[axis]
    size = before.shape[axis]
    return (best + size // 2) % size - size // 2


def turn(frames, later, centre):
    """Returns the clockwise rotation around `centre` from `frames` to `later`, in whole degrees."""
    spectra = []
    flags = cv2.INTER_LINEAR | cv2.WARP_FILL_OUTLIERS
    for group in (frames, later):
        polar = [cv2.warpPolar(frame, (32, 360), centre, 32, flags) for frame in group]
        polar = np.stack(polar) * np.sqrt(np.arange(32))  # areas grow with the radius
        spectra.append(np.fft.fft(polar, axis=1))
    correlation = np.fft.ifft((np.conj(spectra[0]) * spectra[1]).sum((0, 2))).real
    return (np.argmax(correlation) + 180) % 360 - 180


def velocity(axis, scene, frames):
    """Returns the median change over 4 frames: pixels, degrees, or log of the lit area."""
    if axis in "xy":
        # The background does not move: the median frame is subtracted.
        moving = frames.astype(np.float32) - np.median(frames, axis=0)
        steps = zip(moving[:-4:4], moving[4::4], strict=True)
        return np.median([shift(a, b, axis="yx".index(axis)) for a, b in steps])
    half = (scene.brightness + scene.background.mean()) / 2
    lit = np.clip(frames - np.float32(half), 0, None)
    if axis == "angle":
        middle = (frames.shape[1] - 1) / 2
        centre = (middle + scene.x, middle + scene.y)
        return turn(lit[:-4], lit[4:], centre)
    return np.median(np.diff(np.log((lit > 0).sum((1, 2))[::4])))


# Axis, sign, and the least and greatest change over 4 frames. The speeds are visible within a clip
# and slow enough for a stride of 4 to distinguish the two directions.
EXPECTED = {
    "left": ("x", -1, 2, 6),
    "right": ("x", 1, 2, 6),
    "up": ("y", -1, 2, 6),
    "down": ("y", 1, 2, 6),
    "clockwise": ("angle", 1, 9, 25),
    "counter_clockwise": ("angle", -1, 9, 25),
    # Areas grow with the square: ln(44/16) / 64 to / 41 a frame, doubled, times 4.
    "growing": ("side", 1, 0.08, 0.25),
    "shrinking": ("side", -1, 0.08, 0.25),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_frames_in_order_show_the_motion_of_the_class(scenes, name):
    axis, sign, low, high = EXPECTED[name]
    measured = [velocity(axis, *pair) for pair in scenes[CLASSES.index(name)][:20]]
    assert all(low <= sign * value <= high for value in measured), measured


@pytest.mark.parametrize("pair", range(4))
def test_the_initial_phase_covers_the_whole_cycle(pair):
    starts = [scene(2 * pair + i % 2, i).start for i in range(120)]
    counts, _ = np.histogram(starts, bins=4, range=(0, 1))
    assert counts.sum() == 120 and counts.min() >= 15


@pytest.mark.parametrize("pair", range(4))
def test_paired_classes_are_time_reversals_of_each_other(pair):
    for seed in range(5):
        forward = scene(2 * pair, seed)
        last = forward.start + forward.velocity * (len(forward.noise) - 1)
        backward = dataclasses.replace(
            forward, start=last, velocity=-forward.velocity, noise=forward.noise[::-1]
        )
        frames, reversed_frames = moving_digits.render(forward), moving_digits.render(backward)
        difference = np.abs(frames[::-1].astype(int) - reversed_frames)
        # Phases differ in their last bits. These may change a grey level by one, or move a digit
        # by 1/32 pixel, OpenCV's resolution.
        assert difference.mean() < 0.02
        assert difference.max() <= 12
        assert np.abs(frames.astype(int) - reversed_frames).mean() > 1


@pytest.mark.parametrize("pair", range(4))
def test_paired_classes_differ_in_the_sign_of_the_velocity_alone(pair):
    one, other = (dataclasses.asdict(scene(label, 5)) for label in (2 * pair, 2 * pair + 1))
    assert one.pop("velocity") == -other.pop("velocity") != 0
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def bare(name, length, **values):
    """Returns a scene of class `name` on black, without noise."""
    black = np.zeros((64, 64), np.float32)
    noise = np.zeros((length, 64, 64), np.float32)
    return dataclasses.replace(
        scene(CLASSES.index(name), 0), background=black, noise=noise, **values
    )


def test_a_digit_that_leaves_the_frame_enters_at_the_opposite_edge():
    frames = moving_digits.render(bare("right", 4, start=0.0, velocity=1 / 4))
    assert frames[0].max() > 90
    for quarter, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, np.roll(frames[0], 16 * quarter, axis=1))


@pytest.mark.parametrize(("name", "axis"), [("right", 1), ("down", 0)])
def test_digits_move_by_fractions_of_a_pixel(name, axis):
    frames = moving_digits.render(bare(name, 56, start=0.0, velocity=0.7 / 64)).astype(float)
    around = np.exp(2j * np.pi * np.arange(64) / 64)
    phase = np.angle(frames.sum(2 - axis) @ around)  # of the brightness on the torus
    steps = np.diff(np.unwrap(phase)) * 64 / (2 * np.pi)
    np.testing.assert_allclose(steps, 0.7, atol=0.1)


# Handwriting


def test_splits_partition_the_handwriting():
    images = collections.Counter((image / 16).tobytes() for image in load_digits().images)
    splits = {
        split: collections.Counter(digit.tobytes() for digit in digits)
        for split, digits in moving_digits.handwriting(0).items()
    }
    assert [splits[name].total() for name in ("train", "val", "test")] == [1297, 200, 300]
    assert splits["train"] + splits["val"] + splits["test"] == images
    assert max(images.values()) == 1  # so equal sums mean that no two splits share a digit


def test_another_seed_changes_the_split_of_the_handwriting():
    one, other = moving_digits.handwriting(0), moving_digits.handwriting(1)
    assert not np.array_equal(one["val"], other["val"])


@pytest.fixture
def drawn_scenes(monkeypatch):
    """A list that collects the scenes of videos, which are not rendered."""
    scenes = []
    monkeypatch.setattr(moving_digits, "render", scenes.append)
    monkeypatch.setattr(moving_digits, "encode", lambda _: b"")
    return scenes


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_videos_show_the_handwriting_of_their_split(drawn_scenes, split):
    for index in range(5):
        moving_digits.video(2, split, index)
    handwriting = {digit.tobytes() for digit in moving_digits.handwriting(2)[split]}
    assert len(drawn_scenes) == 5 and {s.digit.tobytes() for s in drawn_scenes} <= handwriting


def test_all_videos_differ(drawn_scenes):
    for seed in (0, 1):
        for split in ("train", "val", "test"):
            for index in (0, 8):
                moving_digits.video(seed, split, index)
    assert (
        len({s.start for s in drawn_scenes})
        == len({s.noise[:40].tobytes() for s in drawn_scenes})
        == 12
    )


# Files


def test_files_are_h264_of_64x64_at_30_frames_per_second_with_every_frame():
    for label in range(8):
        frames = moving_digits.render(scene(label, label))
        file = moving_digits.encode(frames)
        with av.open(io.BytesIO(file)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height) == (64, 64)
            assert stream.average_rate == 30
            assert stream.frames == len(frames)
        decoded = decode(io.BytesIO(file))
        assert decoded.shape == frames.shape
        # Encoding loses part of the noise; the standard deviation of the frames is above 30.
        assert np.abs(decoded.astype(int) - frames).mean() < 6


def test_videos_are_longer_than_the_span_of_a_clip(scenes):
    lengths = [len(frames) for group in scenes.values() for _, frames in group]
    assert min(lengths) >= 40 and max(lengths) <= 56
    assert len(set(lengths)) == 17


@pytest.mark.parametrize("label", range(0, 8, 2))
def test_reversed_frames_decode_to_the_reversed_video(label):
    """Every frame is intra-coded, so the encoding does not reveal the direction of time."""
    frames = moving_digits.render(scene(label, 1))
    forward = decode(io.BytesIO(moving_digits.encode(frames)))
    backward = decode(io.BytesIO(moving_digits.encode(frames[::-1])))
    np.testing.assert_array_equal(forward[::-1], backward)


# The folder


def test_lists_name_every_video_and_its_label(prepared):
    assert (prepared / "labels.txt").read_text().splitlines() == list(CLASSES)
    listed = set()
    for split in ("train", "val", "test"):
        lines = (prepared / f"{split}.csv").read_text().splitlines()
        assert len(lines) == SMALL[f"{split}_videos"]
        fields = [line.split(" ") for line in lines]
        assert [path for path, _ in fields] == [
            f"videos/{split}/{index:05d}.mp4" for index in range(len(lines))
        ]
        labels = collections.Counter(int(label) for _, label in fields)
        assert sorted(labels) == list(range(8))
        assert max(labels.values()) - min(labels.values()) <= 1
        listed |= {path for path, _ in fields}
    metadata = {"train.csv", "val.csv", "test.csv", "labels.txt", "prepare.json"}
    assert set(contents(prepared)) == listed | metadata
    assert json.loads((prepared / "prepare.json").read_text()) == RECORD


def test_listed_labels_match_the_motion_of_the_videos(prepared):
    """Checks the translations, whose class follows from the decoded frames."""
    checked = 0
    for line in (prepared / "train.csv").read_text().splitlines():
        path, label = line.split(" ")
        axis, sign, low, high = EXPECTED[CLASSES[int(label)]]
        if axis in "xy":
            frames = decode(str(prepared / path))
            assert low <= sign * velocity(axis, None, frames) <= high, line
            checked += 1
    assert checked == 8


def test_the_seed_determines_the_bytes(prepared, tmp_path):
    moving_digits.prepare(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(prepared)
    moving_digits.prepare(tmp_path / "other", **SMALL | {"seed": 4})
    files, other = contents(prepared), contents(tmp_path / "other")
    videos = [name for name in files if name.endswith(".mp4")]
    assert len({content for name in videos for content in (files[name], other[name])}) == 2 * 33


def test_a_video_does_not_depend_on_the_number_of_videos(prepared, tmp_path):
    moving_digits.prepare(tmp_path / "more", **SMALL | {"train_videos": 20, "val_videos": 12})
    files, more = contents(prepared), contents(tmp_path / "more")
    for name in files:
        if name.endswith(".mp4"):
            assert files[name] == more[name], name


def test_a_finished_folder_is_not_changed(prepared, capfd):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    moving_digits.prepare(prepared, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert capfd.readouterr().err == ""


def test_missing_files_are_written_and_existing_files_are_not(prepared, tmp_path):
    folder = tmp_path / "folder"
    moving_digits.prepare(folder, **SMALL)
    whole = (folder / "videos/train/00005.mp4").read_bytes()
    for name in ("videos/train/00005.mp4", "videos/test/00008.mp4", "test.csv", "labels.txt"):
        (folder / name).unlink()
    (folder / "videos/train/.00005.mp4.999").write_bytes(whole[: len(whole) // 2])
    (folder / ".labels.txt.999").write_text("lef")
    existing = folder / "videos/train/00004.mp4"
    before = existing.stat().st_mtime_ns
    moving_digits.prepare(folder, **SMALL)
    assert contents(folder) == contents(prepared)
    assert existing.stat().st_mtime_ns == before


def test_preparation_resumes_after_an_incomplete_record(tmp_path):
    (tmp_path / ".prepare.json.999").write_text('{"name": ')
    moving_digits.prepare(tmp_path, seed=0, train_videos=8, val_videos=8, test_videos=8)
    assert (tmp_path / "labels.txt").exists() and not (tmp_path / ".prepare.json.999").exists()


CHANGES = {"seed": 4, "train_videos": 17, "val_videos": 10, "test_videos": 16, "version": 0,
          "name": "other"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (json.dumps(RECORD | {key: value}), f"{key}={value}, not {key}={RECORD[key]}")
            for key, value in CHANGES.items()
        ),
        *((text, "prepare.json is not a record") for text in ("", "{", "[1, 2]", "3")),
    ],
)
def test_a_folder_with_a_different_record_is_an_error(tmp_path, text, message):
    (tmp_path / "prepare.json").write_text(text)
    with refused(tmp_path, message):
        moving_digits.prepare(tmp_path, **SMALL)
    assert set(contents(tmp_path)) == {"prepare.json"}


def test_a_folder_with_unrelated_files_is_an_error(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        moving_digits.prepare(tmp_path, **SMALL)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_the_folder_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be used as a folder"):
        moving_digits.prepare(tmp_path / name, **SMALL)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_videos", 7, "train_videos=7 .* at least 8"),
        ("val_videos", 0, "val_videos=0 .* at least 8"),
        ("test_videos", -1, "test_videos=-1 .* at least 8"),
        ("seed", -1, "seed=-1 must be at least 0"),
    ],
)
def test_invalid_values_are_an_error(tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        moving_digits.prepare(tmp_path / "folder", **SMALL | {key: value})
    assert not (tmp_path / "folder").exists()
