"""End-to-end checks of a data set: decode failures, wrong manifests, and key frames with boxes."""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded
from mvit_jax.common.progress import track
from mvit_jax.common.text import plural
from mvit_jax.data.formats import shards
from mvit_jax.data.formats.ava import KeyFrameClips, cut_of
from mvit_jax.data.formats.frame_lists import FRAME_RATE
from mvit_jax.data.formats.listing import frame_files
from mvit_jax.data.formats.video_list import VideoList, read_video_list
from mvit_jax.data.media.images import DecodeError, is_image
from mvit_jax.data.media.video import decode_failure
from mvit_jax.data.source import Source


@dataclass(frozen=True)
class Report:
    """Result of a split's check.

    Attributes:
      split: name of the split.
      videos: number of listed videos.
      problems: one sentence per problem.
      contents: the split's other contents in words, or "".
    """

    split: str
    videos: int
    problems: tuple[str, ...]
    contents: str = ""


def check(
    folder: str | os.PathLike[str],
    split: str | None = None,
    *,
    prefix: str = "",
    separator: str | None = None,
    workers: int | None = None,
    multi_label: bool = False,
) -> list[Report]:
    """Decodes every video and image of a data set, stored in shards or listed in files.

    In a list of mostly videos, an image is a problem: training rejects it, and shards cannot hold
    it. In a list of mostly images, for models of images, a video gives single frames.
    For shards, also compares the manifest with the size, digest and number of records of each shard
    and with the id, label and number of frames of each video.

    Args:
      folder: folder of manifests, or of lists (`*.csv`) if it has no manifests.
      split: name of a split; None for all.
      prefix: folder of the lists' relative paths, itself relative to `folder`.
      separator: separator of path and label in lists; None for white space.
      workers: decoding threads; None for one per core.
      multi_label: True for lists with any number of labels per line.

    Raises:
      UserError: `folder` has no data set, or a list or manifest cannot be read.
    """
    root = expanded(folder).absolute()
    if not root.is_dir():
        raise UserError(f"there is no data folder {root}: name the one to check")
    threads = workers or os.cpu_count() or 1
    name = split.removesuffix(".csv") if split else None
    packed = shards.splits(root)
    if packed:
        chosen = packed if name is None else [name]
        return [_check_shards(root, each, threads) for each in chosen]
    lists = sorted(path.name for path in root.glob("*.csv"))
    if not lists:
        raise UserError(f"{root} holds neither manifests of shards nor lists (*.csv) of files")
    reports = []
    for each in lists if name is None else [f"{name}.csv"]:
        videos = read_video_list(
            root, each, prefix=prefix, separator=separator, max_missing=2.0, multi_label=multi_label
        )
        title = each.removesuffix(".csv")
        problems = [*_images_among_videos(videos), *_decode_failures(title, videos, threads)]
        reports.append(Report(title, len(videos), tuple(problems)))
    return reports


def _images_among_videos(videos: VideoList) -> list[str]:
    """Returns a sentence for each image of a list of mostly videos."""
    pictures = [path for path in videos.paths if is_image(path)]
    if 2 * len(pictures) >= len(videos):
        return []
    return [
        f"{path} is an image in a list of videos, which models of videos reject: remove it from "
        "the list"
        for path in pictures
    ]


def _check_shards(root: Path, split: str, threads: int) -> Report:
    path = shards.manifest_path(root, split)
    manifest = shards.read_manifest(path)
    videos = sum(len(shard.ids) for shard in manifest.shards)
    problems = list(shards.problems(root, path, manifest))
    problems += _digest_mismatches(root, path, manifest)
    if not problems:  # otherwise opening fails, or each video would be reported
        opened = shards.read_shards(root, split)
        problems += _decode_failures(split, opened, threads)
        problems += _manifest_mismatches(path, manifest, opened)
    return Report(split, videos, tuple(problems))


def _digest_mismatches(root: Path, path: Path, manifest: shards.Manifest) -> Iterator[str]:
    """Yields a sentence for each shard of the right size whose digest is wrong."""
    for shard in manifest.shards:
        file = root / shard.file
        if not file.is_file() or file.stat().st_size != shard.size:
            continue  # reported by `shards.problems`
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != shard.sha256:
            yield (
                f"the shard {file} was changed or damaged after {path.name} was written: copy it "
                "again, or delete it and prepare the videos again, which writes only this shard"
            )


def _manifest_mismatches(
    path: Path, manifest: shards.Manifest, opened: shards.ShardedVideos
) -> Iterator[str]:
    """Yields a sentence for each mismatch of the manifest and the records."""
    index = 0
    for shard in manifest.shards:
        records = shards.count_records(path.parent / shard.file) if shard.ids else 0
        if records != len(shard.ids):
            yield (
                f"{path} records {len(shard.ids)} videos in {shard.file}, which has {records}: "
                "delete both and prepare the videos again"
            )
        for frames in shard.frames:
            try:
                with opened.opened(index, 1) as video:
                    if video.num_frames != frames:
                        yield (
                            f"{path} records {frames} frames in {opened.ids[index]}, which has "
                            f"{video.num_frames}: delete {path.name} and prepare the videos again"
                        )
            except DecodeError:
                pass  # reported by `_decode_failures`
            index += 1


def check_key_frames(split: str, clips: KeyFrameClips, workers: int | None = None) -> Report:
    """Decodes the key frames of a detection data set, and checks that the videos have them all.

    Args:
      split: name of the split.
      clips: the key frames. Their lists were checked when they were read.
      workers: decoding threads; None for one per core.
    """
    videos = len(clips.files)
    sides: list[int] = []

    def problems(video: int) -> list[str]:
        try:
            side, sentences = _check_key_frames(clips, video)
        except DecodeError as error:
            return [f"{clips.files[video]} cannot be decoded: {error.reason}"]
        sides.append(side)
        return sentences

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        of_videos = track(split, pool.map(problems, range(videos)), videos)
        sentences = [sentence for each in of_videos for sentence in each]
    contents = [
        f"{len(clips):,} key frames",
        f"{len(clips.key_frames.score):,} boxes, {clips.max_boxes} in a key frame at most",
    ]
    if sides:  # frames must have the resolution of the videos
        contents.append(f"short sides of {min(sides)} to {max(sides)} pixels")
    return Report(split, videos, tuple(sentences), ", ".join(contents))


def _check_key_frames(clips: KeyFrameClips, video: int) -> tuple[int, list[str]]:
    """Returns the short side of a video's frames, and the problems of its key frames.

    Raises:
      DecodeError: a key frame cannot be decoded, or differs from the first one in size.
    """
    path = clips.files[video]
    rows = np.flatnonzero(clips.key_frames.video == video)
    seconds = clips.key_frames.second[rows]
    problems = _missing_frames(path) if Path(path).is_dir() else []
    with clips.opened(int(rows[0]), 1) as footage:
        length = cut_of(footage, clips.first_second)[1]
        beyond = seconds[(seconds - clips.first_second) * round(FRAME_RATE) >= length]
        if len(beyond):
            problems.append(
                f"{path} has {length:,} frames at 30 per second from second {clips.first_second} "
                f"on, and ends before {plural(len(beyond), 'key frame')}, the first at second "
                f"{beyond[0]}"
            )
        indices = np.concatenate([clips.clip_indices(row, footage, 1, 1) for row in rows.tolist()])
        height, width = footage.frames(indices[:1]).shape[1:3]
        for start in range(0, len(indices), _STEP):  # beside the first, whose size they must have
            footage.frames(np.append(indices[:1], indices[start : start + _STEP]))
    return min(height, width), problems


_STEP = 32  # frames decoded at a time


def _missing_frames(folder: str) -> list[str]:
    """Returns a sentence if the numbers of a folder's frames have gaps."""
    matches = (re.search(r"(\d+)\D*$", name) for name in frame_files(folder))
    numbers = sorted({int(match[1]) for match in matches if match})
    if not numbers:
        return []
    first = min(numbers[0], 1)
    missing = numbers[-1] - first + 1 - len(numbers)
    if not missing:
        return []
    gap = next(i for i, number in enumerate(numbers, start=first) if i != number)
    return [
        f"{folder} lacks {plural(missing, 'frame')}, the first is number {gap}, so that later "
        "frames are read for earlier seconds: extract the video again"
    ]


def _decode_failures(title: str, videos: Source, threads: int) -> Iterator[str]:
    def problem(index: int) -> str | None:
        reason = decode_failure(videos.opened(index, 1))
        return reason and f"{videos.item(index)} cannot be decoded: {reason}"

    with ThreadPoolExecutor(threads) as pool:
        yield from filter(None, track(title, pool.map(problem, range(len(videos))), len(videos)))
