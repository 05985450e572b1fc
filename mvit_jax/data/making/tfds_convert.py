"""Sets that TFDS has prepared as tfrecord, copied into array_record to be read in any order.

TFDS's own `convert_format` (4.9.10) needs packages that TFDS does not bring, loses the names of
classes, and ends without the metadata when it writes to another folder. Both formats hold the same
records, so this copies them, without TensorFlow.
"""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.tfds import prepared


def convert(name: str, folder: str, out: str) -> None:
    """Writes `name` of TFDS's data folder `folder` into the data folder `out`, as array_record.

    The set gets its name when all of it is written; until then it is `incomplete.VERSION`, and
    shards that are whole are not written again.

    Args:
      name: "name", "name:version", "name/config" or "name/config:version" as TFDS has it.
      folder: TFDS's `data_dir` that holds it.
      out: another `data_dir`.

    Raises:
      UserError: no such set, one that is not prepared, or of another format; a shard is cut off;
        `out` has the set already, or cannot be written.
    """
    builder = prepared(name, folder)
    source, title = Path(builder.data_path), builder.info.full_name
    if builder.info.file_format.value != "tfrecord":
        raise UserError(
            f"{title} is prepared in {folder} as {builder.info.file_format.value}: only tfrecord "
            "can be converted"
        )
    target = Path(out).expanduser() / title
    if target.exists():
        raise UserError(f"{target} is there already: use it, or name another folder")
    partial = target.with_name(f"incomplete.{target.name}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()):
            if ".tfrecord" in file.name:
                _convert_shard(file, partial / file.name.replace(".tfrecord", ".array_record"))
            elif file.name != "dataset_info.json":
                shutil.copyfile(file, partial / file.name)
        info = json.loads((source / "dataset_info.json").read_text())
        info["fileFormat"] = "array_record"
        (partial / "dataset_info.json").write_text(json.dumps(info, indent=2))
        partial.rename(target)
    except OSError as error:
        where = error.filename or partial
        raise UserError(
            f"{title} cannot be copied to {out}: {where}: {str(error.strerror).lower()}"
        ) from None


def _convert_shard(file: Path, to: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    if to.exists():
        return
    writing = to.with_name(f"{to.name}.part")
    writer = ArrayRecordWriter(str(writing), "group_size:1")  # as TFDS writes them
    try:
        for record in _records(file):
            writer.write(record)
    finally:
        writer.close()
    writing.rename(to)


def _records(file: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length (8 bytes), its sum (4), the record, its sum (4)."""
    with file.open("rb") as content:
        while start := content.read(12):
            length = struct.unpack("<Q", start[:8])[0] if len(start) == 12 else 0
            record = content.read(length + 4)
            if len(start) < 12 or len(record) < length + 4:
                raise UserError(f"{file} is cut off: prepare the set anew")
            yield record[:-4]
