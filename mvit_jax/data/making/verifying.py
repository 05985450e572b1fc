"""Reading a data set end to end: what is broken in it, and whether its manifests tell the truth."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mvit_jax.common.errors import UserError
from mvit_jax.common.progress import shown
from mvit_jax.data.formats import shards
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.images import DecodeError
from mvit_jax.data.source import Source
from mvit_jax.data.video import why_broken


@dataclass(frozen=True)
class Report:
    """What was found in a split.

    Attributes:
      split: its name.
      videos: how many it lists.
      problems: what is wrong, a sentence each.
    """

    split: str
    videos: int
    problems: tuple[str, ...]


def check(
    folder: str | os.PathLike[str],
    split: str | None = None,
    *,
    prefix: str = "",
    separator: str | None = None,
    workers: int | None = None,
) -> list[Report]:
    """Decodes all of a data set of shards or of lists of files.

    Of shards it also compares number, size, digest and content with the manifest.

    Args:
      folder: holds manifests, or else lists, `*.csv`.
      split: name of one split; None for all.
      prefix: folder that relative paths of lists start at.
      separator: what stands between path and label in lists; None for white space.
      workers: threads that decode; None for one for each core.

    Raises:
      UserError: nothing to check there, or a list or manifest that cannot be read at all.
    """
    root = Path(folder).expanduser().absolute()
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
        videos = read_video_list(root, each, prefix=prefix, separator=separator, max_missing=2.0)
        title = each.removesuffix(".csv")
        reports.append(Report(title, len(videos), tuple(_broken(title, videos, threads))))
    return reports


def _check_shards(root: Path, split: str, threads: int) -> Report:
    path = shards.manifest_path(root, split)
    manifest = shards.read_manifest(path)
    videos = sum(len(shard.ids) for shard in manifest.shards)
    found = list(shards.problems(root, path, manifest))
    found += _files(root, path, manifest)
    if not found:  # else nothing can be opened, or each of its videos would be told
        opened = shards.read_shards(root, split)
        found += _broken(split, opened, threads)
        found += _lies(path, manifest, opened)
    return Report(split, videos, tuple(found))


def _files(root: Path, path: Path, manifest: shards.Manifest) -> Iterator[str]:
    """What is wrong with the bytes of shards whose size is right, or with their count."""
    for shard in manifest.shards:
        file = root / shard.file
        if not file.is_file() or file.stat().st_size != shard.size:
            continue  # told already
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != shard.sha256:
            yield (
                f"the shard {file} was changed or damaged after {path.name} was written: copy it "
                "again, or delete it and prepare the videos again, which makes it alone"
            )


def _lies(path: Path, manifest: shards.Manifest, opened: shards.ShardedVideos) -> Iterator[str]:
    """Where the manifest says something else of a video than its record."""
    index = 0
    for shard in manifest.shards:
        records = shards.count_records(path.parent / shard.file) if shard.ids else 0
        if records != len(shard.ids):
            yield (
                f"{path} says that {shard.file} has {len(shard.ids)} videos, and it has {records}: "
                "delete both and prepare the videos again"
            )
        for frames in shard.frames:
            try:
                with opened.opened(index, 1) as video:
                    if video.num_frames != frames:
                        yield (
                            f"{path} says that {opened.ids[index]} has {frames} frames, and it has "
                            f"{video.num_frames}: delete it and prepare the videos again"
                        )
            except DecodeError:
                pass  # told already
            index += 1


def _broken(title: str, videos: Source, threads: int) -> Iterator[str]:
    def why(index: int) -> str | None:
        reason = why_broken(videos.opened(index, 1))
        return reason and f"{videos.item(index)} cannot be decoded: {reason}"

    with ThreadPoolExecutor(threads) as pool:
        yield from filter(None, shown(title, pool.map(why, range(len(videos))), len(videos)))
