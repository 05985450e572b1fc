"""Reading and writing of the two file formats of `torch.save`, without torch.

torch >= 1.6 writes an uncompressed zip file with the entries NAME/data.pkl, NAME/byteorder,
NAME/data/0, ...

torch < 1.6, or later with `_use_new_zipfile_serialization=False`, writes the legacy format. It
begins with five pickles: a magic number, a version, system information, the saved value, and the
keys of the storages. Then come the storages, each preceded by its number of elements. Source:
torch/serialization.py.
"""

import io
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.weights import torch_pickle
from mvit_jax.weights.torch_pickle import DamagedFileError, printable

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
CHUNK = 16 * 2**20
# Tensors can share bytes. A file is rejected as malicious if the sum of its tensors' sizes exceeds
# the file's size by more than this factor.
MAX_SHARED = 16


@dataclass(frozen=True)
class OpenedFile:
    """An opened file: the unpickled value, and access to the storages, which are read later."""

    value: Any
    storage: Callable[[str], np.ndarray]  # reads the bytes of a storage by its key
    order: str  # byte order of the storages: "little" or "big"


def open_zip(file: io.BufferedReader, path: Path) -> OpenedFile:
    """Opens a file in the zip format of torch >= 1.6; `file` must stay open."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise DamagedFileError("two entries have the same name")
    pickled = [n for n in entries if n.count("/") <= 1 and n.split("/")[-1] == "data.pkl"]
    if len(pickled) != 1:
        raise UserError(f"{path} is a zip file, but was not written by torch.save")
    prefix = pickled[0].removesuffix("data.pkl")
    if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in entries):
        raise UserError(
            f"{path} is a TorchScript program: load it with torch.jit.load, and save its "
            "state_dict() with torch.save"
        )

    def entry(name: str) -> np.ndarray:
        if prefix + name not in entries:
            raise DamagedFileError(f"it has no {printable(name)}")
        return _entry(archive, entries[prefix + name], path)

    order = entry("byteorder").tobytes() if f"{prefix}byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise DamagedFileError(f"its byte order is {order[:16]!r}")
    if entries[pickled[0]].file_size > torch_pickle.LARGEST:
        raise DamagedFileError("its pickle is too large")
    value, _ = torch_pickle.load(io.BytesIO(entry("data.pkl").data), path)
    return OpenedFile(value, lambda key: entry(f"data/{key}"), order.decode())


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """Reads the bytes of one entry and verifies the checksum."""
    if entry.flag_bits & 1:
        raise UserError(f"{path} is encrypted: unpack it and save it again with torch.save")
    # torch does not compress, so no entry is larger than the file.
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise UserError(f"{path} is a compressed zip: load it with torch and save it again")
    if entry.file_size > path.stat().st_size:
        raise DamagedFileError(f"{printable(entry.filename)} is larger than the file")
    raw = np.empty(entry.file_size, np.uint8)
    with archive.open(entry) as stream:
        for start in range(0, len(raw), CHUNK):
            raw[start : start + CHUNK] = np.frombuffer(stream.read(CHUNK), np.uint8)
    return raw


def open_legacy(file: io.BufferedReader, path: Path) -> OpenedFile:
    """Opens a file in the legacy format of torch < 1.6; `file` must stay open."""
    total = path.stat().st_size
    beginning = io.BytesIO(file.read(torch_pickle.LARGEST))
    if torch_pickle.load(beginning, path)[0] != MAGIC:
        raise UserError(f"{path} is a pickle, but was not written by torch.save")
    if torch_pickle.load(beginning, path)[0] != PROTOCOL:
        raise DamagedFileError("unknown version of the format")
    # Skips the system information (byte order, sizes of types): storages are always little-endian.
    torch_pickle.load(beginning, path)
    value, storages = torch_pickle.load(beginning, path)
    keys, _ = torch_pickle.load(beginning, path)
    file.seek(beginning.tell())
    extents: dict[str, tuple[int, int]] = {}  # start and size in bytes
    for key in map(str, keys):
        numel = file.read(8)
        itemsize = np.dtype(storages[key].dtype or "uint8").itemsize
        start, nbytes = file.tell(), int.from_bytes(numel, "little") * itemsize
        if len(numel) < 8 or start + nbytes > total:
            raise DamagedFileError("its storages end too early")
        extents[key] = (start, nbytes)
        file.seek(start + nbytes)

    def storage(key: str) -> np.ndarray:
        if key not in extents:
            raise DamagedFileError(f"it has no storage {printable(key)}")
        start, nbytes = extents[key]
        file.seek(start)
        raw = np.empty(nbytes, np.uint8)
        if file.readinto(raw.data) < nbytes:
            raise DamagedFileError("its storages end too early")
        return raw

    return OpenedFile(value, storage, "little")


def arrays(
    tensors: Mapping[str, torch_pickle.Tensor | torch_pickle.NumpyArray],
    saved: OpenedFile,
    path: Path,
) -> dict[str, np.ndarray]:
    """Reads the tensors that `tensors` describes into separate arrays."""
    claimed = sum(tensor.nbytes for tensor in tensors.values())
    if claimed > MAX_SHARED * path.stat().st_size:
        raise DamagedFileError(
            f"its tensors take {claimed:,} bytes, over {MAX_SHARED} times the file"
        )
    result: dict[str, np.ndarray] = {}
    by_storage: dict[str, dict[str, torch_pickle.Tensor]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch_pickle.NumpyArray):
            dtype = tensor.values.dtype.newbyteorder("=")
            result[name] = true_bools(np.array(tensor.values, dtype, order="C"))
        else:
            by_storage.setdefault(tensor.storage.key, {})[name] = tensor
    for key, views in by_storage.items():
        raw = saved.storage(key)
        for name, tensor in views.items():
            if raw.nbytes < tensor.storage.nbytes:
                raise DamagedFileError(f"the storage of {printable(name)} is cut off")
            result[name] = _array(tensor, raw, saved.order, name, alone=len(views) == 1)
    return {name: result[name] for name in tensors}


def _array(
    tensor: torch_pickle.Tensor, raw: np.ndarray, order: str, name: str, alone: bool
) -> np.ndarray:
    dtype = np.dtype(tensor.dtype)
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride, strict=True))
    whole = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(f"u{dtype.itemsize}")
    if tensor.offset + last >= len(whole):
        raise DamagedFileError(f"{printable(name)} lies outside its storage")
    strides = [stride * dtype.itemsize for stride in tensor.stride]
    view = np.lib.stride_tricks.as_strided(whole[tensor.offset :], tensor.shape, strides)
    # A tensor that fills its whole storage, possibly several GB, is not copied.
    if not (alone and view.flags.c_contiguous and view.size == len(whole)):
        view = view.copy(order="C")
    if order != sys.byteorder:
        view = view.byteswap(inplace=True)
    return true_bools(view.view(dtype))


def true_bools(array: np.ndarray) -> np.ndarray:
    """Sets all nonzero bytes of a bool array to 1; NumPy is wrong with other values."""
    return np.asarray(array.view(np.uint8) != 0) if array.dtype == np.bool_ else array


def write(
    path: Path, tensors: Mapping[str, np.ndarray], wrapper: str, extra: Mapping[str, str | int]
) -> None:
    """Writes a file as `torch.save` does; arrays must be contiguous, with dtypes of `STORAGES`."""
    described = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "data.pkl", torch_pickle.dump(described, wrapper, extra))
        _add(archive, file, "byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            flat = array.reshape(-1).view(f"u{array.dtype.itemsize}")
            flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
            _add(archive, file, f"data/{key}", flat.view(np.uint8).data)
        _add(archive, file, "version", b"3\n")


def _add(
    archive: zipfile.ZipFile, file: io.BufferedWriter, name: str, data: bytes | memoryview
) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")
    # As in torch, the data of an entry begins at a multiple of 64 bytes, for memory mapping.
    start = file.tell() + 30 + len(entry.filename) + 4
    entry.extra = struct.pack("<2sH", b"FB", -start % 64) + bytes(-start % 64)
    archive.writestr(entry, data)
