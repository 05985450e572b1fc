"""Packing videos into shards, reading shards, and errors of both."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.shards import manifest_path, read_manifest, read_shards
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.making import packing
from mvit_jax.data.making.transcoding import Encoding
from mvit_jax.data.making.verifying import check
from mvit_jax.data.media.video import DecodeError, Video, decode_failure
from mvit_jax.data.source import Source, open_source
from tests.data.bar_codes import numbers_of, write
from tests.data.making.test_moving_digits import contents
from tests.data.media.test_video import audio_only, cut, empty, text
from tests.support.refusals import refused


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A list of eleven files, of which six are videos."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write(folder / f"{number} a.mp4", 20 + number)
    write(folder / "4.avi", 12, codec="mpeg4")
    write(folder / "5.mp4", 1)
    empty(folder), text(folder), audio_only(folder), cut(folder)
    names = [*(f"{number} a.mp4" for number in range(4)), "empty.mp4", "4.avi", "text.mp4"]
    names += ["audio.mp4", "cut.mp4", "missing.mp4", "5.mp4"]
    lines = [f"{name} {index % 3}\n" for index, name in enumerate(names)]
    (folder / "train.csv").write_text("".join(lines))
    (folder / "labels.txt").write_text("walk\nrun\njump\n")
    return folder


@pytest.fixture(scope="module")
def packed(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "set"
    packing.prepare(videos / "train.csv", out, shards=4, workers=1)
    return out


@pytest.fixture
def copied(packed, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "set"))


GOOD = ["0 a.mp4", "1 a.mp4", "2 a.mp4", "3 a.mp4", "4.avi", "5.mp4"]


def test_shards_contain_the_videos_of_the_list(videos, packed):
    source = read_shards(packed, "train")
    assert isinstance(source, Source)
    assert source.ids == tuple(GOOD) and len(source) == 6
    assert [source.label(index) for index in range(6)] == [0, 1, 2, 0, 2, 1]
    assert source.class_names == ("walk", "run", "jump")
    assert (packed / "labels.txt").read_text() == (videos / "labels.txt").read_text()
    assert source.item(4).startswith("4.avi") and str(packed) in source.list_file
    for index, name in enumerate(GOOD):
        with source.opened(index, 16) as packed_video, Video(videos / name) as original:
            assert (packed_video.num_frames, packed_video.fps) == (
                original.num_frames,
                original.fps,
            )
            frames, expected = (
                v.frames(range(v.num_frames)).astype(int) for v in (packed_video, original)
            )
            assert numbers_of(frames) == list(range(packed_video.num_frames))
            assert np.abs(frames - expected).mean() < 4
        assert decode_failure(source.opened(index, 1)) is None
    assert len(read_shards(packed, "train.csv")) == 6
    assert open_source(packed, "train", source="shards").item(4) == source.item(4)


def test_the_manifest_records_decode_failures_with_reasons(packed):
    manifest = read_manifest(manifest_path(packed, "train"))
    failed = {name: reason for shard in manifest.shards for name, _, reason in shard.failed}
    assert list(failed) == ["empty.mp4", "text.mp4", "audio.mp4", "cut.mp4", "missing.mp4"]
    for name, reason in (("empty", "empty"), ("text", "not a video"), ("audio", "no video"),
                         ("cut", "with 50 of its 100"), ("missing", "no such file")):  # fmt: skip
        assert reason in failed[f"{name}.mp4"]
    content = json.loads(manifest_path(packed, "train").read_text())
    frames = 20 + 21 + 22 + 23 + 12 + 1
    assert content["totals"]["frames"] == frames
    assert content["totals"]["hours"] == pytest.approx(frames / 30 / 3600, abs=1e-4)
    assert (content["totals"]["listed"], content["totals"]["failed"]) == (11, 5)
    assert content["totals"]["bytes"] == sum(
        path.stat().st_size for path in packed.glob("*.array_record")
    )
    assert sorted(path.name for path in packed.iterdir()) == [
        "labels.txt",
        *(f"train-{number:05d}-of-00004.array_record" for number in range(4)),
        "train.manifest.json",
    ]


def test_a_source_can_be_pickled_and_shared_between_threads(packed):
    source = read_shards(packed, "train")
    with source.opened(1, 16) as video:
        expected = video.frames([3])
    copy = pickle.loads(pickle.dumps(source))

    def load(_):
        with copy.opened(1, 16) as video:
            return video.frames([3])

    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(frames, expected) for frames in pool.map(load, range(64)))
    assert len(pickle.dumps(source)) < 4000


@pytest.fixture
def jobs(monkeypatch):
    """The jobs of the shards that this process packs, without Beam."""
    jobs = []

    def run_jobs(batch, *_):
        jobs.extend(batch)
        for job in batch:
            packing.pack(job)

    monkeypatch.setattr(packing, "run_jobs", run_jobs)
    return jobs


def test_finished_shards_are_not_packed_again(videos, packed, copied, jobs):
    packing.prepare(videos / "train.csv", copied, shards=4)
    assert jobs == []
    third = copied / "train-00002-of-00004.array_record"
    third.unlink()
    packing.prepare(videos / "train.csv", copied, shards=4)
    assert [job.file for job in jobs] == [third.name]
    assert contents(copied) == contents(packed)


def test_an_interrupted_run_is_completed_by_the_next(videos, packed, jobs, tmp_path, monkeypatch):
    def interrupted(batch, *_):
        packing.pack(batch[1])
        (tmp_path / f".{batch[2].file}.somewhere-1.part").write_bytes(b"half a sh")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "run_jobs", interrupted)
        packing.prepare(videos / "train.csv", tmp_path, shards=4)
    with pytest.raises(UserError, match="is incomplete"):
        read_shards(tmp_path, "train")
    first = (tmp_path / "train-00001-of-00004.array_record").stat().st_ino
    packing.prepare(videos / "train.csv", tmp_path, shards=4)
    assert contents(tmp_path) == contents(packed)
    assert (tmp_path / "train-00001-of-00004.array_record").stat().st_ino == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 5}, "shards=4, not shards=5"),
        ({"encoding": Encoding(gop=4)}, "gop=16, not gop=4"),
        ({"encoding": Encoding(short_side=128)}, "short_side=256, not short_side=128"),
    ],
)
def test_changed_settings_are_rejected(change, message, videos, copied):
    with pytest.raises(UserError, match=message):
        packing.prepare(videos / "train.csv", copied, **{"shards": 4} | change)


def test_a_changed_list_or_changed_classes_are_rejected(videos, copied, tmp_path):
    lines = (videos / "train.csv").read_text().splitlines()
    other = tmp_path / "lists"
    other.mkdir()
    (other / "train.csv").write_text("\n".join([*lines[1:], lines[0]]))
    shutil.copy(videos / "labels.txt", other)
    with pytest.raises(UserError, match="another list"):
        packing.prepare(other / "train.csv", copied, prefix=str(videos), shards=4)
    (other / "train.csv").write_text("\n".join(lines))
    (other / "labels.txt").write_text("walk\nrun\nsit\n")
    with pytest.raises(UserError, match=r"name different classes"):
        packing.prepare(other / "train.csv", copied, prefix=str(videos), shards=4)


def test_ids_are_relative_to_the_prefix(videos, jobs, tmp_path):
    (tmp_path / "val.csv").write_text("5.mp4,1\n")
    (tmp_path / "labels.txt").write_text("sit\nrun\n")
    packing.prepare(tmp_path / "val.csv", tmp_path / "o", prefix=str(videos), separator=",")
    assert read_shards(tmp_path / "o", "val").ids == ("5.mp4",)
    assert read_shards(tmp_path / "o", "val").class_names == ("sit", "run")


def test_a_list_without_a_decodable_video_is_an_error(videos, jobs, tmp_path):
    (tmp_path / "train.csv").write_text(f"{videos}/text.mp4 0\n{videos}/empty.mp4 0\n")
    (tmp_path / "labels.txt").write_text("sit\n")
    with refused("none of the 2 videos of ", " not a video"):
        packing.prepare(tmp_path / "train.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("a.mp4\n", {}, "train.csv, line 1: "),
        # Without the file, each split would have the classes that occur in it.
        ("a.mp4 0\nb.mp4 1\n", {}, "there is no labels.txt in {0}: write the names of the classes"),
        ("a.mp4 1600000000\n", {}, "labels go up to 1600000000, too many for class numbers"),
        ("", {"out": "gs://bucket/out"}, "gs://bucket/out is not on this machine: mount it"),
        ("", {"workers": 0}, "workers=0"),
    ],
)
def test_invalid_input_raises_before_anything_is_written(tmp_path, lines, options, message):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "train.csv").write_text(lines)
    with refused(message.format(tmp_path)):
        packing.prepare(tmp_path / "train.csv", **{"out": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()


def rewrite(folder, change):
    path = manifest_path(folder, "train")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop(name):
    return lambda folder: (folder / name).unlink()


def shorten(folder):
    path = folder / "train-00001-of-00004.array_record"
    path.write_bytes(path.read_bytes()[:-5000])


DAMAGES = {
    "no manifest": (drop("train.manifest.json"), "there is no manifest"),
    "text": (lambda f: manifest_path(f, "train").write_text("{,"), "damaged"),
    "a list": (lambda f: manifest_path(f, "train").write_text("[]"), "damaged"),
    "no shards": (lambda f: rewrite(f, lambda c: c.pop("shards")), "damaged"),
    "another format": (lambda f: rewrite(f, lambda c: c.update(format=9)), "format 9"),
    "a shard missing": (drop("train-00003-of-00004.array_record"), "00003-of-00004.* is missing"),
    "a shard cut off": (shorten, "00001-of-00004.* bytes, but"),
    "a label too many": (
        lambda f: rewrite(f, lambda c: c["shards"][0]["labels"].append(1)), "differ in length"),
    "a label out of range": (
        lambda f: rewrite(f, lambda c: c["shards"][0]["labels"].__setitem__(0, 3)), "label 3"),
    "labels that are no numbers": (
        lambda f: rewrite(f, lambda c: c["shards"][0].update(labels=["a", "b"])), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_an_invalid_manifest_ends_with_a_one_sentence_error(name, copied):
    damage, message = DAMAGES[name]
    damage(copied)
    with pytest.raises(UserError, match=message) as caught:
        read_shards(copied, "train")
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_an_error(copied):
    with pytest.raises(UserError, match=r"one of its splits \(train\)"):
        read_shards(copied, "val")
    with pytest.raises(UserError, match="no manifest"):
        read_shards(copied / "nowhere", "val")


def test_a_record_that_differs_from_the_manifest_fails_to_decode(copied):
    def swap(content):
        for shard in content["shards"]:
            shard["labels"] = [(label + 1) % 3 for label in shard["labels"]]

    rewrite(copied, swap)
    source = read_shards(copied, "train")
    with pytest.raises(DecodeError, match="do not match") as caught:
        source.opened(0, 1).__enter__()
    assert "0 a.mp4" in caught.value.path
    assert "do not match" in check(copied)[0].problems[0]


def test_a_damaged_shard_affects_only_its_videos(copied):
    path = copied / "train-00000-of-00004.array_record"
    content = bytearray(path.read_bytes())
    content[100:3000] = bytes(2900)
    path.write_bytes(content)
    source = read_shards(copied, "train")
    reasons = [decode_failure(source.opened(index, 1)) for index in range(6)]
    assert "cannot be read" in str(reasons[0]) and reasons[3:] == [None] * 3
    (report,) = check(copied, "train")
    assert len(report.problems) == 1 and "changed or damaged" in report.problems[0]


def test_check_reports_no_problems_of_intact_shards(packed):
    (report,) = check(packed, workers=2)
    assert (report.split, report.videos, report.problems) == ("train", 6, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["shards"][0]["frames"].__setitem__(0, 99), "records 99 frames in 0 a.mp4"),
        (lambda c: c["shards"][0].update(sha256="0"), "changed or damaged"),
        (lambda c: c["shards"][1].update(ids=c["shards"][1]["ids"][:1], labels=[2], frames=[22],
                                         seconds=[1.0]), "of-00004.array_record, which has 2:"),
    ],
)  # fmt: skip
def test_check_reports_manifests_that_differ_from_the_shards(change, message, copied):
    rewrite(copied, change)
    (report,) = check(copied)
    assert message in report.problems[0]


def test_check_reads_lists_of_files(videos):
    (report,) = check(videos, "train")
    assert report.videos == 11 and len(report.problems) == 5
    assert "missing.mp4 cannot be decoded: there is no such file" in report.problems[-1]
    with pytest.raises(UserError, match="neither manifests"):
        check(videos / "..")


def test_an_image_in_a_list_of_videos_is_refused_everywhere(videos, tmp_path):
    """Packing, checking and training have one rule for it; a list of images has no problem."""
    for name in GOOD[:3]:
        shutil.copy(videos / name, tmp_path)
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.JPG")
    lines = [*(f"{name} 0" for name in GOOD[:3]), "0.JPG 1"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (tmp_path / "labels.txt").write_text("a\nb\n")
    [report] = check(tmp_path, "train")
    assert report.problems == (
        f"{tmp_path}/0.JPG is an image in a list of videos, which models of videos reject: remove "
        "it from the list",
    )
    listed = read_video_list(tmp_path, "train.csv")
    assert (
        decode_failure(listed.opened(3, 8))
        == "it is an image, but the model requires clips of 8 frames"
    )
    manifest = packing.prepare(tmp_path / "train.csv", tmp_path / "packed", shards=1, workers=1)
    [shard] = manifest.shards
    assert shard.ids == GOOD[:3]
    assert shard.failed == [["0.JPG", 1, "it is an image, and shards hold videos"]]

    (tmp_path / "train.csv").write_text("".join(f"{n}.JPG 1\n" for n in range(4)) + lines[0])
    assert check(tmp_path, "train")[0].problems == ()


def test_videos_with_several_labels_are_packed(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.mp4", 8)
    (tmp_path / "train.csv").write_text('0.mp4 2,0\n1.mp4 ""\n2.mp4 1\n')
    (tmp_path / "labels.txt").write_text("walk\nrun\njump\n")
    out = tmp_path / "set"
    packing.prepare(tmp_path / "train.csv", out, shards=1, workers=1, multi_label=True)
    source = open_source(out, "train", source="shards", multi_label=True)
    assert [source.label(i).tolist() for i in range(3)] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert decode_failure(source.opened(0, 1)) is None  # its record has the manifest's labels
    assert [report.problems for report in check(out)] == [()]
    assert check(tmp_path, "train", multi_label=True)[0].videos == 3
    with refused("have any number of labels each: set data.multi_label=True"):
        open_source(out, "train", source="shards")
    (tmp_path / "train.csv").write_text("0.mp4 2\n1.mp4 0\n2.mp4 1\n")
    with refused("was written for another list of videos"):
        packing.prepare(tmp_path / "train.csv", out, shards=1, workers=1)
