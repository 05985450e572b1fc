"""Reading and writing of tensor files: PyTorch's two formats and safetensors.

Reading a file never executes code from it (see torch_pickle.py). The first bytes of a file
determine its format.
safetensors is specified at https://huggingface.co/docs/safetensors.
"""

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded
from mvit_jax.weights import state_dicts, torch_pickle, torch_zip
from mvit_jax.weights.torch_pickle import printable

# Exceptions that a malformed file causes in this package, zipfile or pickle.
_BROKEN = (
    *(zipfile.BadZipFile, struct.error, safetensors.SafetensorError, EOFError, NotImplementedError),
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
)


@dataclass(frozen=True)
class Tensors:
    """A state dict and its position in a checkpoint."""

    # Arrays by name in the file's order: contiguous, in native byte order, without shared memory.
    tensors: dict[str, np.ndarray]
    wrapper: str  # path to the state dict, such as "model_state", "state_dict.model" or ""
    dropped: tuple[str, ...]  # names of the other entries, such as "epoch"
    format: Literal["torch", "safetensors", "memory"]
    averaged: bool = False  # True for averaged parameters (EMA)
    alternatives: Mapping[str, str] = field(default_factory=dict)  # see `state_dicts.Selection`


def read_tensors(path: str | os.PathLike[str], **selection: Any) -> Tensors:
    """Reads the state dict in a PyTorch file (either format) or a safetensors file.

    Arrays have the dtypes of the file: bool, integers, floats or `ml_dtypes.bfloat16`.

    Args:
      path: the file.
      **selection: `weights` and `recognised` of `state_dicts.select`, which select one of several
        state dicts.

    Raises:
      UserError: the file is missing or damaged, has another format, refers to code, or has no state
        dict.
    """
    path = expanded(path)
    try:
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "is not a regular file"
            problem = kind if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}: give the path of a file of weights")
        with path.open("rb") as file:
            return _read(file, path, selection)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory: read it on a larger machine") from None
    except _BROKEN as error:
        raise UserError(
            f"{path} is cut off or damaged ({printable(error)}): download or copy it again"
        ) from None


def _read(file: io.BufferedReader, path: Path, selection: dict[str, Any]) -> Tensors:
    head = file.read(512)
    file.seek(0)
    length = int.from_bytes(head[:8], "little")
    # Checked before pickles: a safetensors file with a header of 640 bytes begins like a pickle.
    # safetensors limits headers to 100 MB.
    if head[8:9] == b"{" and length <= 100_000_000:
        tensors = _read_safetensors(path)
        return _selected(tensors, "safetensors", _is_array, str(path), lambda x: x, selection)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(torch_zip.open_zip(file, path), path, selection)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _read_torch(torch_zip.open_legacy(file, path), path, selection)
    begins = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not head:
        what = "is empty: download or copy it again"
    elif begins.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page, not a file of weights: download the file that the page links to"
    elif head.startswith(b"version https://git-lfs"):
        what = "is a pointer of git-lfs, not the file itself: run `git lfs pull`"
    else:
        what = f"is not a PyTorch or safetensors file (it begins with {head[:16]!r})"
    raise UserError(f"{path} {what}")


def _read_torch(saved: torch_zip.OpenedFile, path: Path, selection: dict[str, Any]) -> Tensors:
    kinds = torch_pickle.Tensor | torch_pickle.NumpyArray
    return _selected(
        saved.value, "torch", lambda x: isinstance(x, kinds), str(path),
        lambda tensors: torch_zip.arrays(tensors, saved, path), selection,
    )  # fmt: skip


def _selected(
    top: Any,
    form: Literal["torch", "safetensors", "memory"],
    is_tensor: Callable[[Any], bool],
    where: str,
    arrays: Callable[[dict[str, Any]], dict[str, np.ndarray]],
    selection: dict[str, Any],
) -> Tensors:
    """Returns the selected state dict of a checkpoint; `arrays` converts its tensors."""
    chosen = state_dicts.select(top, is_tensor, where, **selection)
    state = chosen.state
    return Tensors(
        arrays(state.tensors), state.path, chosen.dropped, form, state.averaged, chosen.alternatives
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    with safetensors.safe_open(path, framework="np", backend="pread") as file:
        for name in file.offset_keys():
            dtype = file.get_slice(name).get_dtype()
            if dtype not in ("BOOL", "F16", "BF16", "F32", "F64") and dtype[:1] not in ("I", "U"):
                raise UserError(
                    f"{path} holds {printable(name)} as {dtype}, which is not supported: convert "
                    "it to float32"
                )
            tensors[name] = torch_zip.true_bools(file.get_tensor(name))
    if not tensors:
        raise UserError(f"{path} holds no tensors: give another file")
    return tensors


def state_dict(mapping: Mapping[Any, Any], **selection: Any) -> Tensors:
    """Copies a state dict in memory and removes its wrapper as `read_tensors` does.

    Values may be NumPy arrays, JAX arrays or torch tensors.

    Raises:
      UserError: the mapping has no state dict, or a value is no dense numeric array.
    """

    def copies(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: _copy(name, value) for name, value in tensors.items()}

    return _selected(mapping, "memory", _is_array, "the state dict", copies, selection)


def _copy(name: str, value: Any) -> np.ndarray:
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":
                # NumPy cannot convert torch's bfloat16, whose bits are the upper half of float32.
                bits = np.asarray(value.float()).view(np.uint32) >> 16
                return bits.astype(np.uint16, order="C").view(ml_dtypes.bfloat16)
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{printable(name)} cannot be read as an array ({printable(error)}): give dense tensors"
        ) from None
    if array.dtype.kind not in "biuf" and array.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{printable(name)} has the dtype {array.dtype}: convert it to float32")
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def write_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    wrapper: str = "",
    extra: Mapping[str, str | int] | None = None,
) -> None:
    """Writes a PyTorch file atomically.

    `torch.load(path, weights_only=True)` reads the file as an OrderedDict of tensors. Equal inputs
    produce equal bytes.

    Args:
      path: the file to write.
      tensors: arrays by name.
      wrapper: if not empty, the file holds the dict `{wrapper: OrderedDict, **extra}` instead.
      extra: further entries beside `wrapper`.

    Raises:
      UserError: the file cannot be written (an existing file stays unchanged), a dtype is unknown
        to older versions of torch, or `extra` has no wrapper or repeats its name.
    """
    if extra and (not wrapper or wrapper in extra):
        raise UserError(
            f"entries beside the state dict ({', '.join(extra)}) require a wrapper with another "
            f"name than {wrapper!r}"
        )
    arrays = _writable(tensors)
    with _atomic(expanded(path)) as temporary:
        torch_zip.write(temporary, arrays, wrapper, extra or {})


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file atomically; raises `UserError` as `write_torch` does."""
    arrays = _writable(tensors)
    with _atomic(expanded(path)) as temporary:
        # safetensors 0.8.0 creates files that only the owner can read: restore the usual mode.
        temporary.touch()
        mode = temporary.stat().st_mode
        # Some readers require this metadata. "pt" means PyTorch's names and layout.
        safetensors.numpy.save_file(arrays, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)


def _writable(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value, order="C")
        if array.dtype.name not in torch_pickle.STORAGES.values():
            raise UserError(f"{name} has the dtype {array.dtype}: convert it to float32")
        arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return arrays


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` on success and is removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or printable(error)
        raise UserError(f"{path} cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
