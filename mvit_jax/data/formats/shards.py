"""Videos packed into ArrayRecord shards: their format, and random access.

A split NAME consists of `NAME.manifest.json` and the shards `NAME-00000-of-00016.array_record` and
so on, with one record per video in the order of the packed list. A record is a msgpack map of "id"
(str), "label" (int; in multi-label data a list of ints), "video" (bytes of an mp4 file, H.264) and
the fields of `packets.Index`, which make parsing the container unnecessary. The manifest has the
names, labels and lengths of all videos, so a split is opened without reading the shards.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Int, Int32, UInt8

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.common.files import expanded
from mvit_jax.data.formats.video_list import multi_hot
from mvit_jax.data.media.images import DecodeError
from mvit_jax.data.media.packets import Index
from mvit_jax.data.media.video import Video

FORMAT = 1
"""Format version in manifests; increases when older shards become unreadable."""


@dataclass(frozen=True)
class Shard:
    """A shard's entry in the manifest; videos are in the order of the records.

    Attributes:
      file: file name of the shard.
      size: file size in bytes.
      sha256: digest of the file.
      ids: name of each video.
      labels: class of each video; in multi-label data, a list of them.
      frames: number of frames of each video.
      seconds: duration of each video.
      failed: id, label and reason of each listed video that could not be packed.
    """

    file: str
    size: int
    sha256: str
    ids: Sequence[str]
    labels: Sequence[Any]
    frames: Sequence[int]
    seconds: Sequence[float]
    failed: Sequence[Sequence[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Manifest:
    """The settings, classes and shards of a split.

    Attributes:
      complete: True if all shards were written.
      settings: settings with which the split was packed.
      classes: name of each class.
      shards: the shards in order; empty until all were written.
    """

    complete: bool
    settings: Mapping[str, Any]
    classes: Sequence[str]
    shards: Sequence[Shard]

    @property
    def multi_label(self) -> bool:
        """True if videos have any number of labels."""
        return bool(self.settings.get("multi_label"))

    def encoded(self) -> str:
        """Returns the manifest as JSON, one shard per line, with totals for human readers."""
        totals = {
            "listed": sum(len(shard.ids) + len(shard.failed) for shard in self.shards),
            "videos": sum(len(shard.ids) for shard in self.shards),
            "failed": sum(len(shard.failed) for shard in self.shards),
            "frames": sum(sum(shard.frames) for shard in self.shards),
            "hours": round(sum(sum(shard.seconds) for shard in self.shards) / 3600, 4),
            "bytes": sum(shard.size for shard in self.shards),
        }
        head = {
            "format": FORMAT,
            "complete": self.complete,
            "settings": dict(self.settings),
            "totals": totals,
            "classes": list(self.classes),
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        shards = ",\n".join(json.dumps(asdict(shard)) for shard in self.shards)
        return "{\n" + ",\n".join(lines) + ',\n"shards": [\n' + shards + "\n]\n}\n"


@dataclass(frozen=True, eq=False, repr=False)
class ShardedVideos:
    """Packed videos of one split; a `data.source.Source`.

    Attributes:
      ids: name of each video.
      labels: class of each video, in `range(len(class_names))`; for multi-label data, a multi-hot
        vector of each.
      class_names: name of each class.
      list_file: path of the manifest, for messages.
      records: record of each video by index. Each process opens a shard on the first use, from
        any thread.
    """

    ids: tuple[str, ...]
    labels: Int32[np.ndarray, " videos"] | UInt8[np.ndarray, "videos classes"]
    class_names: tuple[str, ...]
    list_file: str
    records: Any  # ArrayRecordDataSource, which has no usable type

    def __len__(self) -> int:
        return len(self.ids)

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> int | UInt8[np.ndarray, " classes"]:
        return int(self.labels[index]) if self.labels.ndim == 1 else self.labels[index].copy()

    def item(self, index: int) -> str:
        return f"{self.ids[index]} of {self.list_file}"

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[Video]:
        with self._video(index) as video:
            yield video

    def _video(self, index: int) -> Video:
        name = self.item(index)
        try:
            record = decode_record(self.records[index])
        except Exception as error:  # for damaged or missing files the reader raises RuntimeError
            reason = str(error).strip().split("\n")[0].partition(" [")[0]
            raise DecodeError(name, f"its record cannot be read ({reason})") from error
        entry = (record["id"], record["label"])
        label = self.label(index)
        listed = label if isinstance(label, int) else np.flatnonzero(label).tolist()
        if entry != (self.ids[index], listed):
            reason = "its record holds {} with the label {}".format(*entry)
            raise DecodeError(name, f"{reason}: the manifest and the shards do not match")
        return Video(record["video"], name, record["index"])


def encode_record(name: str, label: int | list[int], video: bytes, index: Index) -> bytes:
    """Encodes the record of a video."""
    fields_of = {"id": name, "label": label, "video": video} | asdict(index)
    return msgpack.packb(fields_of) or b""


def decode_record(record: bytes) -> dict[str, Any]:
    """Decodes a record to "id", "label", "video" and "index"; raises ValueError or KeyError."""
    values = msgpack.unpackb(record)
    index = Index(**{field.name: values[field.name] for field in fields(Index)})
    return {"id": values["id"], "label": values["label"], "video": values["video"], "index": index}


def read_shards(
    folder: str | os.PathLike[str], split: str, *, multi_label: bool | None = None
) -> ShardedVideos:
    """Opens a split that `python -m mvit_jax.prepare videos` wrote.

    Args:
      folder: folder of the manifest and the shards; `~` is the user's home.
      split: name of the split, or of the packed list (train.csv).
      multi_label: True or False requires data with any number of labels, or with one; None
        accepts both.

    Raises:
      UserError: the folder or split does not exist or is incomplete, or the manifest cannot be
        read, is inconsistent in itself, or does not match the shards.
    """
    from array_record.python import array_record_data_source as sources  # takes half a second

    root = expanded(folder).absolute()
    path = manifest_path(root, split)
    manifest = read_manifest(path)
    problem = next(problems(root, path, manifest), None)
    if problem:
        raise UserError(problem)
    if multi_label is not None and multi_label != manifest.multi_label:
        raise UserError(
            f"the videos of {path} have {'one label' if multi_label else 'any number of labels'} "
            f"each: set data.multi_label={not multi_label}"
        )
    shards = manifest.shards
    ids = tuple(name for shard in shards for name in shard.ids)
    listed = [label for shard in shards for label in shard.labels]
    classes = len(manifest.classes)
    labels = multi_hot(listed, classes) if manifest.multi_label else np.array(listed, np.int32)
    # Without the record counts, ArrayRecordDataSource would open each shard.
    parts: list[Any] = [
        SimpleNamespace(filename=str(root / file), skip=0, take=count, examples_in_shard=count)
        for file, count in ((shard.file, len(shard.ids)) for shard in shards)
        if count
    ]
    names = tuple(manifest.classes)
    return ShardedVideos(ids, labels, names, str(path), sources.ArrayRecordDataSource(parts))


def count_records(file: Path) -> int:
    """Counts the records of a shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    with contextlib.closing(ArrayRecordReader(str(file))) as reader:
        return reader.num_records()


def manifest_path(root: Path, split: str) -> Path:
    """Returns the path of a split's manifest."""
    return root / f"{split.removesuffix('.csv')}.manifest.json"


def splits(root: Path) -> list[str]:
    """Lists the splits that have a manifest."""
    return sorted(path.name.removesuffix(".manifest.json") for path in root.glob("*.manifest.json"))


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
      UserError: the manifest does not exist or is damaged.
    """
    if not path.is_file():
        names = ", ".join(splits(path.parent)) if path.parent.is_dir() else ""
        advice = f"name one of its splits ({names})" if names else "name the folder of the shards"
        raise MissingDataError(
            f"there is no manifest {path}: {advice}, or make it with `python -m mvit_jax.prepare "
            f"videos --csv={path.name.removesuffix('.manifest.json')}.csv --out={path.parent}`"
        )
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has format {content['format']}, but this version reads format {FORMAT}: "
                "prepare the videos again"
            )
        multi_label = bool(content["settings"].get("multi_label"))
        shards = [_shard(shard, multi_label) for shard in content["shards"]]
        return Manifest(
            bool(content["complete"]), dict(content["settings"]), list(content["classes"]), shards
        )
    except (ValueError, TypeError, KeyError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it and prepare the "
            "videos again"
        ) from None


def _shard(content: dict[str, Any], multi_label: bool) -> Shard:
    """Parses a shard of the manifest; raises TypeError or ValueError for wrong values."""
    kinds = {"ids": str, "labels": int, "frames": int, "seconds": (int, float), "failed": list}
    for name, kind in kinds.items():
        values = content[name]
        if name == "labels" and multi_label:
            values = [label for labels in values for label in labels]
        if not all(isinstance(value, kind) for value in values):
            raise TypeError(f"{name} of {content['file']} has values of the wrong type")
    if not isinstance(content["size"], int) or "/" in content["file"]:
        raise ValueError(f"{content['file']} has no size, or is in another folder")
    return Shard(**content)


def problems(root: Path, path: Path, manifest: Manifest) -> Iterator[str]:
    """Yields a sentence for each problem of a split that is detected without reading shards."""
    if not manifest.complete:
        yield f"the split of {path} is incomplete: repeat the interrupted command"
        return
    classes = len(manifest.classes)
    for shard in manifest.shards:
        lengths = {len(column) for column in (shard.ids, shard.labels, shard.frames, shard.seconds)}
        if len(lengths) != 1:
            yield f"{path} is inconsistent: the columns of {shard.file} differ in length"
        sets = shard.labels if manifest.multi_label else [[label] for label in shard.labels]
        wrong = [label for labels in sets for label in labels if not 0 <= label < classes]
        if wrong:
            yield (
                f"{path} is inconsistent: {shard.file} has the label {wrong[0]}, but there are "
                f"{classes} classes"
            )
    if not any(shard.ids for shard in manifest.shards):
        yield f"the split of {path} has no videos: its `failed` entries state the reasons"
    with os.scandir(root) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    for shard in manifest.shards:
        advice = "copy it again, or prepare the videos again, which writes only this shard"
        if shard.file not in sizes:
            yield f"the shard {root / shard.file}, which {path.name} lists, is missing: {advice}"
        elif sizes[shard.file] != shard.size:
            yield (
                f"the shard {root / shard.file} has {sizes[shard.file]:,} bytes, but {path.name} "
                f"records {shard.size:,}: {advice}"
            )
