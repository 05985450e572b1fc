"""Packing of a list's videos into shards, re-encoded, on Apache Beam.

A shard is one element of the pipeline. A worker encodes the shard's videos, writes the shard
atomically, and writes a note: a file with the shard's manifest entry. The notes are merged into the
manifest at the end. So workers exchange no data, a shard with a note is not written again, and the
bytes of a shard depend only on its videos and the settings.
"""

import contextlib
import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.common.extras import pip_line
from mvit_jax.common.files import expanded, write_atomically
from mvit_jax.common.progress import Progress
from mvit_jax.data.formats.shards import (
    Manifest,
    Shard,
    encode_record,
    manifest_path,
    read_manifest,
)
from mvit_jax.data.formats.video_list import VideoList, read_class_names, read_video_list
from mvit_jax.data.making.transcoding import Encoding, encode
from mvit_jax.data.media.images import DecodeError, is_image

# About 100 MB for videos of ten seconds: large enough for any file system, and small enough that an
# interrupted run loses little. Small sets are split into more shards, so that all cores have work.
VIDEOS_A_SHARD = 256
MIN_SHARDS = 16


@dataclass(frozen=True)
class Job:
    """A shard to be packed.

    Attributes:
      folder: folder of the shard.
      file: file name of the shard.
      videos: id, path and label of each video; in multi-label data, a list of labels.
      encoding: settings of the video encoder.
    """

    folder: str
    file: str
    videos: Sequence[tuple[str, str, Any]]
    encoding: Encoding

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.file

    @property
    def note(self) -> Path:
        """File with the shard's manifest entry; it exists once the shard is finished."""
        return self.path.with_name(f".{self.file}.json")

    @property
    def progress(self) -> Path:
        """File that grows by one byte per video."""
        return self.path.with_name(f".{self.file}.progress")


def prepare(
    csv: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    prefix: str = "",
    separator: str | None = None,
    encoding: Encoding | None = None,
    shards: int | None = None,
    workers: int | None = None,
    beam_flags: Sequence[str] = (),
    multi_label: bool = False,
) -> Manifest:
    """Packs the videos of a list into shards, or resumes an interrupted run.

    The split is named after the list and keeps the order of the list; each shard is a contiguous
    part. Videos that cannot be packed are skipped and recorded with their reasons in the manifest.

    Args:
      csv: list of lines `path label`. The class names are in `labels.txt` beside it, which is
        copied to `out`.
      out: folder of the shards; all workers must see `out` and the videos under the same paths.
      prefix: folder of relative paths, itself relative to the folder of `csv`.
      separator: separator of path and label; None for white space.
      encoding: settings of the video encoder; None for the defaults.
      shards: number of shards; None for one per 256 videos, at least 16.
      workers: processes on this machine; None for one per core.
      beam_flags: flags of Apache Beam; a `--runner` replaces the processes on this machine.
      multi_label: True for lines with any number of labels.

    Returns:
      The manifest, new or from an earlier complete run.

    Raises:
      UserError: the list cannot be read, a value is out of range, `out` was prepared with other
        settings, no video can be packed, or a worker died.
    """
    encoding = encoding or Encoding()
    for name, value in (("shards", shards), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for location in (csv, out):
        if "://" in os.fspath(location):
            raise UserError(f"{location} is not on this machine: mount it, and give its local path")
    list_file = expanded(csv).absolute()
    videos = read_video_list(
        list_file.parent, list_file.name, prefix=prefix, separator=separator, max_missing=1.0,
        multi_label=multi_label,
    )  # fmt: skip
    if not (list_file.parent / "labels.txt").is_file():
        # The lists of one data set may differ in their number of classes.
        raise UserError(
            f"there is no labels.txt in {list_file.parent}: write the names of the classes there, "
            "one per line, label 0 first"
        )
    split = list_file.stem
    root = expanded(out).absolute()
    base = list_file.parent / expanded(prefix)
    jobs, settings = _plan(videos, split, root, base, encoding, shards)
    path = manifest_path(root, split)
    manifest = _open_manifest(
        path, Manifest(False, settings, videos.class_names, ()), list_file.parent
    )
    recorded = {shard.file: shard for shard in manifest.shards}
    open_jobs = [job for job in jobs if _finished(job, recorded) is None]
    if manifest.complete and not open_jobs:
        return manifest
    if open_jobs:
        for job in jobs:
            # Left by killed workers: unfinished shards, and notes that were being written.
            for pattern in (f".{job.file}.*.part", f".{job.note.name}.*"):
                for part in root.glob(pattern):
                    part.unlink(missing_ok=True)
            job.progress.unlink(missing_ok=True)
        run_jobs(open_jobs, jobs, split, workers or os.cpu_count() or 1, beam_flags)
    made = [_finished(job, recorded) for job in jobs]
    missing = [job.file for job, shard in zip(jobs, made, strict=True) if shard is None]
    if missing:
        raise UserError(
            f"{len(missing)} shards were not written, the first is {root / missing[0]}: check that "
            "all workers see this folder, and repeat the command"
        )
    manifest = replace(manifest, complete=True, shards=[shard for shard in made if shard])
    if not any(shard.ids for shard in manifest.shards):
        name, _, reason = manifest.shards[0].failed[0]
        for job in jobs:
            job.note.unlink(missing_ok=True)
        raise UserError(
            f"none of the {len(videos)} videos of {list_file} can be packed ({name}: {reason}): "
            "check the paths"
        )
    write_atomically(path, manifest.encoded())
    _sync(root)
    for job in jobs:
        job.note.unlink(missing_ok=True)
    return manifest


def _plan(
    videos: VideoList, split: str, root: Path, base: Path, encoding: Encoding, shards: int | None
) -> tuple[list[Job], dict[str, Any]]:
    """Returns the jobs and the settings; both depend only on the list and the arguments."""
    ids = [path.removeprefix(f"{base}/") for path in videos.paths]
    count = min(shards or max(MIN_SHARDS, -(-len(ids) // VIDEOS_A_SHARD)), len(ids))
    multi_label = videos.labels.ndim == 2
    labels = videos.labels.tolist()
    if multi_label:
        labels = [np.flatnonzero(row).tolist() for row in videos.labels]
    rows = list(zip(ids, videos.paths, labels, strict=True))
    bounds = [number * len(rows) // count for number in range(count + 1)]
    jobs = [
        Job(
            str(root),
            f"{split}-{number:05d}-of-{count:05d}.array_record",
            tuple(rows[bounds[number] : bounds[number + 1]]),
            encoding,
        )
        for number in range(count)
    ]
    digest = hashlib.sha256("".join(f"{row[0]} {row[2]}\n" for row in rows).encode()).hexdigest()
    settings = asdict(encoding) | {"shards": count, "videos": len(ids), "list": digest}
    return jobs, settings | ({"multi_label": True} if multi_label else {})


def _open_manifest(path: Path, new: Manifest, lists: Path) -> Manifest:
    """Returns the earlier manifest at `path`, or writes and returns `new` if there is none.

    Also copies labels.txt. Raises `UserError` if the earlier settings or classes differ.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be used as a folder ({error.strerror}): give another folder"
        ) from None
    names, copy = lists / "labels.txt", path.parent / "labels.txt"
    if names.is_file() and not copy.exists():
        write_atomically(copy, names.read_bytes())
    elif copy.is_file() and tuple(new.classes) != read_class_names(copy) and names.is_file():
        raise UserError(
            f"{copy} and {names} name different classes: give another folder, or correct one list"
        )
    if not path.exists():
        write_atomically(path, new.encoded())
        return new
    old = read_manifest(path)
    for key, value in new.settings.items():
        if old.settings.get(key) != value:
            difference = f"{key}={old.settings.get(key)}, not {key}={value}"
            raise UserError(
                f"{path} was written "
                + ("for another list of videos" if key == "list" else f"with {difference}")
                + ": repeat the earlier command, delete the split, or give another folder"
            )
    return old


def _finished(job: Job, recorded: dict[str, Shard]) -> Shard | None:
    """Returns a finished shard's entry, from `recorded` or its note; None if unfinished."""
    shard = recorded.get(job.file)
    if shard is None:
        try:
            shard = Shard(**json.loads(job.note.read_text()))
        except (OSError, ValueError, TypeError):
            return None
    try:
        return shard if job.path.stat().st_size == shard.size else None
    except OSError:
        return None


def pack(job: Job) -> None:
    """Packs one shard and writes its note; runs in a worker."""
    from array_record.python.array_record_module import ArrayRecordWriter

    part = job.path.with_name(f".{job.file}.{os.uname().nodename}-{os.getpid()}.part")
    # Videos are compressed already. Groups of one record make random access fast.
    writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    made: list[tuple[str, Any, int, float]] = []
    failed: list[tuple[str, Any, str]] = []
    with job.progress.open("ab", buffering=0) as progress:
        for name, path, label in job.videos:
            try:
                if is_image(path):
                    raise DecodeError(path, "it is an image, and shards hold videos")
                encoded = encode(path, job.encoding)
            except DecodeError as error:
                failed.append((name, label, error.reason))
            else:
                writer.write(encode_record(name, label, encoded.file, encoded.index))
                frames = len(encoded.index.sizes)
                made.append((name, label, frames, round(frames / encoded.index.fps, 3)))
            progress.write(b".")
    writer.close()
    with part.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = part.stat().st_size
    part.replace(job.path)
    _sync(job.path.parent)
    ids, labels, frames_of, seconds = zip(*made, strict=True) if made else ((), (), (), ())
    shard = Shard(job.file, size, digest, ids, labels, frames_of, seconds, failed)
    write_atomically(job.note, json.dumps(asdict(shard)))
    job.progress.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flushes a folder, so that renamed files survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DeadWorkerError(UserError):
    """A `UserError` for a worker process that died.

    Programs should then exit with `os._exit`. The interpreter's normal exit would block on Beam's
    threads, which block on workers that may still be busy.
    """


def run_jobs(
    jobs: Sequence[Job], every: Sequence[Job], title: str, workers: int, flags: Sequence[str]
) -> None:
    """Packs shards with Beam, and displays the progress over all shards of the split.

    Args:
      jobs: shards to be packed.
      every: all shards of the split.
      title: title of the progress display.
      workers: processes on this machine.
      flags: flags of Apache Beam.

    Raises:
      UserError: Beam is not installed.
      DeadWorkerError: a worker died.
    """
    logging.disable(logging.WARNING)  # importing Beam logs warnings about optional parts
    try:
        import apache_beam as beam
    except ImportError as error:
        raise UserError(
            f"Apache Beam, which packs videos, cannot be imported ({error}): " + pip_line("prepare")
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    runner, options = _runner(min(workers, len(jobs)), flags)
    with _progress(title, jobs, every), _dead_workers() as died:
        try:
            pipeline = beam.Pipeline(runner=runner, options=options)
            elements = pipeline | beam.Create(jobs) | beam.Reshuffle()
            _ = elements | beam.Map(pack)
            pipeline.run().wait_until_finish()
        except KeyboardInterrupt:
            if not died:
                raise
    if died:
        raise DeadWorkerError(_death_message(died[0]))


def _death_message(code: str) -> str:
    return (
        f"a worker died ({code}), perhaps out of memory: repeat the command with fewer --workers; "
        "finished shards are reused"
    )


def _runner(workers: int, flags: Sequence[str]) -> tuple[Any, Any]:
    """Returns Beam's runner and options: local processes unless the flags name a runner."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    if any(flag.split("=")[0] == "--runner" for flag in flags):
        return None, PipelineOptions(list(flags))
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    # Not --direct_running_mode=multi_processing, whose workers log each of their connections.
    worker = "import logging, sys; logging.disable(logging.WARNING); "
    worker += "from apache_beam.runners.worker.sdk_worker_main import main; main(sys.argv)"
    environment = None
    if workers > 1:
        environment = SubprocessSDKEnvironment.from_command_string(  # pyright: ignore
            f"exec {shlex.quote(sys.executable)} -c {shlex.quote(worker)}"
        )
    # Not Beam's default local runner Prism, a program that Beam would download.
    runner = FnApiRunner(default_environment=environment)
    return runner, PipelineOptions([f"--direct_num_workers={workers}", *flags])


@contextlib.contextmanager
def _dead_workers(patience: float = 20.0) -> Iterator[list[str]]:
    """Interrupts the main thread when a worker process dies; Beam would block forever.

    In about one of thirty such cases, Beam also blocks while shutting down. Then this process exits
    after `patience` seconds. The other workers exit when they lose the connection to this process.

    Yields:
      A list that receives the exit status of the first dead worker.
    """
    died: list[str] = []
    main = threading.get_ident()
    previous = threading.excepthook
    # Not SIGINT, which background jobs of shell scripts ignore. SIGURG without a handler has no
    # effect, so a late signal is harmless. Only the main thread may set handlers.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGURG, signal.default_int_handler) if in_main else None

    def exit_now() -> None:
        print(f"error: {_death_message(died[0])}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(patience, exit_now)
    timer.daemon = True

    def hook(args: threading.ExceptHookArgs) -> None:
        if "Worker subprocess exited" not in str(args.exc_value):
            previous(args)
        elif not died:
            died.append(str(args.exc_value).rpartition("with ")[2])
            timer.start()
            # A signal interrupts a blocking call of the main thread; `interrupt_main` does not.
            signal.pthread_kill(main, signal.SIGURG)

    threading.excepthook = hook
    try:
        yield died
    finally:
        threading.excepthook = previous
        timer.cancel()
        if in_main:
            # None stands for a handler set from C, which Python cannot restore.
            signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _progress(title: str, jobs: Sequence[Job], every: Sequence[Job]) -> Iterator[None]:
    """Displays the number of packed videos, read from the workers' files."""
    total = sum(len(job.videos) for job in every)
    before = total - sum(len(job.videos) for job in jobs)
    progress = Progress(title, total, before)
    ended = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.5)
            progress.update(before + sum(_count_packed(job) for job in jobs))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        progress.close()


def _count_packed(job: Job) -> int:
    """Counts the packed videos of a shard."""
    if job.note.exists():
        return len(job.videos)
    with contextlib.suppress(OSError):
        return job.progress.stat().st_size
    return 0
