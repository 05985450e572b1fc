"""Videos of a list, encoded anew and packed into shards, on Apache Beam.

A shard is one element of the pipeline: a worker encodes its videos, writes it under another name,
renames it, and leaves a note beside it with what it holds. The notes make the manifest at the end.
So nothing is passed between workers, a shard that is there with its note is not made again, and its
bytes depend on nothing but its videos and the settings.
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

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import write_whole
from mvit_jax.common.progress import Progress
from mvit_jax.data.formats.shards import (
    Manifest,
    Shard,
    encode_record,
    manifest_path,
    read_manifest,
)
from mvit_jax.data.formats.video_list import VideoList, read_class_names, read_video_list
from mvit_jax.data.images import DecodeError
from mvit_jax.data.making.transcoding import Encoding, encode

# Some 100 MB of videos of ten seconds: large enough for any file system, and small enough that
# little is lost when a run ends early. Small sets have more shards, so that all cores have some.
VIDEOS_A_SHARD = 256
LEAST_SHARDS = 16


@dataclass(frozen=True)
class Job:
    """One shard to make.

    Attributes:
      folder: where to.
      file: its name there.
      videos: id, path and label of each.
      encoding: how they are encoded.
    """

    folder: str
    file: str
    videos: Sequence[tuple[str, str, int]]
    encoding: Encoding

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.file

    @property
    def note(self) -> Path:
        """The file that says what the shard holds; the shard is finished when it is there."""
        return self.path.with_name(f".{self.file}.json")

    @property
    def progress(self) -> Path:
        """A file that grows by one byte with every video."""
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
) -> Manifest:
    """Packs the videos of a list into shards, or what an interrupted run has left to be packed.

    The split is named after the list. Videos keep its order, and each shard takes a contiguous part
    of it. What cannot be packed is left out, and stands with its reason in the manifest.

    Args:
      csv: the list of lines `path label`; class names are in `labels.txt` beside it, which is
        copied.
      out: folder of the shards; all workers must see it, and the videos, under the same paths.
      prefix: folder that relative paths start at.
      separator: what stands between path and label; None for white space.
      encoding: how; None for the defaults.
      shards: how many; None for one for every 256 videos, and at least 16.
      workers: processes on this machine; None for one for each core.
      beam_flags: flags of Apache Beam; where they name a runner, that one does the work.

    Returns:
      The manifest that was written, or found where all was done.

    Raises:
      UserError: a list that cannot be read, values out of range, an `out` that was prepared with
        other ones, no video that can be packed, or a worker that died.
    """
    encoding = encoding or Encoding()
    for name, value in (("shards", shards), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} should be a whole number from 1 on")
    for place in (csv, out):
        if "://" in os.fspath(place):
            raise UserError(f"{place} is not on this machine: mount it, and give its path there")
    list_file = Path(csv).expanduser().absolute()
    videos = read_video_list(
        list_file.parent, list_file.name, prefix=prefix, separator=separator, max_missing=1.0
    )
    if not (list_file.parent / "labels.txt").is_file():
        # Counted from one list, the number of classes could differ from another's.
        raise UserError(
            f"there is no labels.txt in {list_file.parent}: write the names of the classes there, "
            "one a line, label 0 first"
        )
    split = list_file.stem
    root = Path(out).expanduser().absolute()
    base = list_file.parent / Path(prefix).expanduser()
    jobs, settings = _plan(videos, split, root, base, encoding, shards)
    path = manifest_path(root, split)
    manifest = _claim(path, Manifest(False, settings, videos.class_names, ()), list_file.parent)
    known = {shard.file: shard for shard in manifest.shards}
    open_jobs = [job for job in jobs if _finished(job, known) is None]
    if manifest.complete and not open_jobs:
        return manifest
    if open_jobs:
        for job in jobs:  # what killed workers left of shards
            for left in root.glob(f".{job.file}.*.part"):
                left.unlink(missing_ok=True)
            job.progress.unlink(missing_ok=True)
        run_jobs(open_jobs, jobs, split, workers or os.cpu_count() or 1, beam_flags)
    made = [_finished(job, known) for job in jobs]
    missing = [job.file for job, shard in zip(jobs, made, strict=True) if shard is None]
    if missing:
        raise UserError(
            f"{len(missing)} shards were not written, the first of them {root / missing[0]}: see "
            "that all workers see this folder, and give the same command again"
        )
    manifest = replace(manifest, complete=True, shards=[shard for shard in made if shard])
    if not any(shard.ids for shard in manifest.shards):
        name, _, reason = manifest.shards[0].failed[0]
        for job in jobs:
            job.note.unlink(missing_ok=True)
        raise UserError(
            f"none of the {len(videos)} videos of {list_file} can be packed, {name} because "
            f"{reason}: check the paths"
        )
    write_whole(path, manifest.encoded())
    _sync(root)
    for job in jobs:
        job.note.unlink(missing_ok=True)
    return manifest


def _plan(
    videos: VideoList, split: str, root: Path, base: Path, encoding: Encoding, shards: int | None
) -> tuple[list[Job], dict[str, Any]]:
    """What each shard holds, a function of the list and the settings alone; and the settings."""
    ids = [path.removeprefix(f"{base}/") for path in videos.paths]
    count = min(shards or max(LEAST_SHARDS, -(-len(ids) // VIDEOS_A_SHARD)), len(ids))
    rows = list(zip(ids, videos.paths, videos.labels.tolist(), strict=True))
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
    return jobs, asdict(encoding) | {"shards": count, "videos": len(ids), "list": digest}


def _claim(path: Path, wanted: Manifest, lists: Path) -> Manifest:
    """Makes this split's beginning in the folder, or gives that of an earlier run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be used as a folder ({error.strerror}): give another one"
        ) from None
    names, copy = lists / "labels.txt", path.parent / "labels.txt"
    if names.is_file() and not copy.exists():
        write_whole(copy, names.read_bytes())
    elif copy.is_file() and tuple(wanted.classes) != read_class_names(copy) and names.is_file():
        raise UserError(
            f"{copy} names other classes than {names}: give another folder, or make them the same"
        )
    if not path.exists():
        write_whole(path, wanted.encoded())
        return wanted
    found = read_manifest(path)
    for key, value in wanted.settings.items():
        if found.settings.get(key) != value:
            what = f"{key}={found.settings.get(key)}, not {key}={value}"
            raise UserError(
                f"{path} is of "
                + ("another list of videos" if key == "list" else f"a run with {what}")
                + ": ask for the same again, delete the split, or give another folder"
            )
    return found


def _finished(job: Job, known: dict[str, Shard]) -> Shard | None:
    """What a finished shard holds, None if it is still to be made."""
    shard = known.get(job.file)
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
    """Makes one shard and its note; runs in a worker."""
    from array_record.python.array_record_module import ArrayRecordWriter

    part = job.path.with_name(f".{job.file}.{os.uname().nodename}-{os.getpid()}.part")
    # Videos are compressed already. Records of their own are quick to read in any order.
    writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    made: list[tuple[str, int, int, float]] = []
    failed: list[tuple[str, int, str]] = []
    with job.progress.open("ab", buffering=0) as progress:
        for name, path, label in job.videos:
            try:
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
    write_whole(job.note, json.dumps(asdict(shard)))
    job.progress.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Sees that names of files outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DeadWorkerError(UserError):
    """A process that packs died. A program does best to end by `os._exit`: Python's own end would
    wait for Beam's threads, and these for workers that may still be busy."""


def run_jobs(
    jobs: Sequence[Job], every: Sequence[Job], title: str, workers: int, flags: Sequence[str]
) -> None:
    """Has Beam make shards, and shows progress among `every` one of the split.

    Raises:
      UserError: Beam is not installed.
      DeadWorkerError: a worker died.
    """
    logging.disable(logging.WARNING)  # on being imported it complains of what nobody needs here
    try:
        import apache_beam as beam
    except ImportError as error:
        raise UserError(
            f"Apache Beam, which packs videos, cannot be imported ({error}): "
            "pip install 'mvit_jax[prepare]'"
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
        raise DeadWorkerError(_of_death(died[0]))


def _of_death(code: str) -> str:
    return (
        f"a worker died ({code}), perhaps for want of memory: give the same command again, "
        "with fewer --workers; finished shards are kept"
    )


def _runner(workers: int, flags: Sequence[str]) -> tuple[Any, Any]:
    """Beam's runner and options: processes of this machine where flags name no other runner."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    if any(flag.split("=")[0] == "--runner" for flag in flags):
        return None, PipelineOptions(list(flags))
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    # Not --direct_running_mode=multi_processing, whose workers tell of every connection they make.
    worker = "import logging, sys; logging.disable(logging.WARNING); "
    worker += "from apache_beam.runners.worker.sdk_worker_main import main; main(sys.argv)"
    environment = None
    if workers > 1:
        environment = SubprocessSDKEnvironment.from_command_string(  # pyright: ignore
            f"exec {shlex.quote(sys.executable)} -c {shlex.quote(worker)}"
        )
    # By name, the local runner would be Prism, a program that Beam downloads.
    runner = FnApiRunner(default_environment=environment)
    return runner, PipelineOptions([f"--direct_num_workers={workers}", *flags])


@contextlib.contextmanager
def _dead_workers(patience: float = 20.0) -> Iterator[list[str]]:
    """Interrupts the main thread when a worker process dies, for which Beam would wait for ever.

    Beam may also wait for it on its way out (once in some thirty deaths): after `patience` seconds
    the process ends without it. The other workers follow when they lose their connection to it.
    """
    died: list[str] = []
    main = threading.get_ident()
    previous = threading.excepthook
    # Not SIGINT, which the background jobs of a shell script ignore. SIGURG does nothing where it
    # has no handler, so one that comes late does no harm. Only the main thread may set handlers.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGURG, signal.default_int_handler) if in_main else None

    def give_up() -> None:
        print(f"error: {_of_death(died[0])}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(patience, give_up)
    timer.daemon = True

    def hook(args: threading.ExceptHookArgs) -> None:
        if "Worker subprocess exited" not in str(args.exc_value):
            previous(args)
        elif not died:
            died.append(str(args.exc_value).rpartition("with ")[2])
            timer.start()
            # A true signal, to that thread: `_thread.interrupt_main` would not end a wait in it.
            signal.pthread_kill(main, signal.SIGURG)

    threading.excepthook = hook
    try:
        yield died
    finally:
        threading.excepthook = previous
        timer.cancel()
        if in_main:
            # None stands for a handler of a C library, which cannot be set from here.
            signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _progress(title: str, jobs: Sequence[Job], every: Sequence[Job]) -> Iterator[None]:
    """Tells how many videos are done, by what the workers leave on the disk."""
    total = sum(len(job.videos) for job in every)
    before = total - sum(len(job.videos) for job in jobs)
    progress = Progress(title, total, before)
    ended = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(0.5)
            progress.update(before + sum(_done(job) for job in jobs))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        progress.close()


def _done(job: Job) -> int:
    """How many of a shard's videos are done."""
    if job.note.exists():
        return len(job.videos)
    with contextlib.suppress(OSError):
        return job.progress.stat().st_size
    return 0
