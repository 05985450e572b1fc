"""Safe reading and writing of the pickles in PyTorch's files.

A pickle is a program that imports and calls functions by name. This reader is Python's unpickler
with a restricted opcode table. It imports nothing: a name becomes a `Global`, which is not
callable. For a call, the name is looked up in a table of functions of this module, which build only
plain containers and descriptions of tensors. Names outside the table raise an error.

Python's `pickletools` documents the opcodes. The functions that pickles call are defined in
torch/_utils.py and numpy/_core/multiarray.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers "bfloat16" with NumPy
import numpy as np

from mvit_jax.common.errors import UserError

# Largest pickle in bytes. Real pickles have at most a few hundred KB, as tensors are stored outside
# them. Each byte of a pickle can occupy 200 bytes of memory.
LARGEST = 16 * 2**20
# Most items that all calls together may copy: a pickle can copy one list many times.
MAX_COPIED = 2**24

STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_DTYPES = {f"torch.{name}": name for name in (*STORAGES.values(), "uint16", "uint32", "uint64")} | {
    "torch.half": "float16",
    "torch.float": "float32",
    "torch.double": "float64",
    "torch.long": "int64",
    "torch.int": "int32",
}


class DamagedFileError(ValueError):
    """A file that violates its format."""


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A name in a pickle, such as "torch.FloatStorage", that is never imported."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A block of bytes for tensors, as the pickle declares it."""

    key: str  # name in the file
    dtype: str | None  # None: untyped
    nbytes: int
    offset: int = 0  # start of a view of the storage, in elements


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage, not yet checked against the storage's size.

    Strides and offset count elements.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(eq=False, slots=True)
class NumpyDtype:
    """A numeric dtype; `build` sets the byte order that the pickle states."""

    code: str
    order: str = "<"

    def build(self, state: Any) -> None:
        self.order = state[1]
        _check(self.order in ("<", ">", "|", "="))

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


@dataclass(eq=False, slots=True)
class NumpyArray:
    """A NumPy array stored inside the pickle; `build` sets its values."""

    values: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = _frombuffer(raw, dtype, shape, "F" if fortran else "C").values


def load(stream: io.BytesIO, where: Path) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle from `stream`, and no bytes after it.

    Tensors and arrays become `Tensor` and `NumpyArray`. OrderedDict, Counter and defaultdict become
    dict. NumPy scalars become Python numbers, and torch's dtypes become `Global`.

    Args:
      stream: bytes that begin with the pickle at the current position.
      where: path of the file, for messages.

    Returns:
      The value and its storages by key.

    Raises:
      UserError: the pickle refers to a name outside the table, or has a forbidden opcode.
      DamagedFileError: the pickle is malformed. For some malformed pickles, Python's own
        exceptions, such as IndexError, KeyError and TypeError, are raised instead.
    """
    reader = _Reader(stream, where)
    try:
        return reader.load(), reader.storages
    except (EOFError, pickle.UnpicklingError) as error:
        raise DamagedFileError(str(error) or "its pickle ends too early") from None


# The base class is private, but the same in Python 3.11 to 3.13. The public class is implemented in
# C. Its opcode table cannot be replaced, and its memo grows to any index that a pickle states: five
# bytes can reserve 64 GiB.
class _Reader(pickle._Unpickler):
    """Python's unpickler with the opcode table `_OPCODES`; calls only functions in `_CALLS`."""

    stack: list[Any]  # an attribute of the base class

    def __init__(self, stream: io.BytesIO, where: Path):
        super().__init__(stream, encoding="latin1")
        self.stream, self.where = stream, where
        self.storages: dict[str, Storage] = {}
        self.copied = 0

    def find_class(self, module: str, name: str) -> Any:
        # The base class accepts a truncated name.
        _check(self.stream.tell() < len(self.stream.getbuffer()), "its pickle ends too early")
        name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if name not in _ALLOWED:
            raise UserError(
                f"{self.where} refers to {printable(name)}, which is neither a plain tensor nor a "
                "plain container: none of its code was run; if you trust the file, load it with "
                "torch and save only its state dict"
            )
        return Global(name)

    def persistent_load(self, pid: Any) -> Storage:
        storage = _storage(pid)
        self.storages[storage.key] = storage
        return storage

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def update(self, kind: type, items: Any) -> None:
        _check(type(self.stack[-1]) is kind)
        self.stack[-1].update(items)

    def call(self, keywords: Any = None) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        _check(type(function) is Global and type(args) is tuple and len(args) <= 64)
        _check(keywords is None or (type(keywords) is dict and not keywords))
        if function.name not in _CALLS:
            raise DamagedFileError(f"its pickle calls {function.name}, which is not supported")
        sized = (dict, list, tuple, set, frozenset, str, bytes)
        self.copied += sum(len(arg) for arg in args if isinstance(arg, sized))
        _check(self.copied <= MAX_COPIED, "its pickle copies too many items")
        self.push(_CALLS[function.name](*args))

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        # The base class implements the opcodes INST and OBJ with this method.
        self.stack += [klass, tuple(args)]
        self.call()

    def build(self) -> None:
        state = self.stack.pop()
        # The state of any other object holds attributes, such as a state dict's `_metadata`, and is
        # ignored.
        if isinstance(self.stack[-1], NumpyDtype | NumpyArray):
            self.stack[-1].build(state)

    def reject(self, opcode: str) -> None:
        # Such as EXT1 (names by number) and NEXT_BUFFER (buffers outside the file).
        raise UserError(
            f"{self.where} holds the pickle opcode {opcode}, which torch.save never writes: "
            "none of its code was run; save only its state dict, with torch.save"
        )


# Opcodes whose Python implementation calls and imports nothing, hashes nothing from the pickle and
# reserves no memory that the pickle only claims.
_HARMLESS = {
    *("STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_DICT", "EMPTY_SET"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    # These call only methods of `_Reader`.
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID", "INST", "OBJ"),
}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_ORIGINAL = pickle._Unpickler.dispatch
_OPCODES: dict[int, Callable[[Any], Any]] = {
    **dict.fromkeys(range(256), lambda _: _check(False, "its pickle has an unknown opcode")),
    **{code: lambda reader, name=name: reader.reject(name) for code, name in _NAMES.items()},
    **{code: _ORIGINAL[code] for code, name in _NAMES.items() if name in _HARMLESS},
    # The original FRAME reads ahead. BYTEARRAY8 reserves as many bytes as the file claims.
    pickle.PROTO[0]: lambda reader: reader.read(1),
    pickle.FRAME[0]: lambda reader: reader.read(8),
    pickle.BYTEARRAY8[0]: _ORIGINAL[pickle.BINBYTES8[0]],
    # The original implementations hash keys of any type.
    pickle.DICT[0]: lambda reader: reader.push(_paired(reader.pop_mark())),
    pickle.FROZENSET[0]: lambda reader: reader.push(_frozenset(reader.pop_mark())),
    pickle.SETITEM[0]: lambda reader: reader.update(
        dict, _paired([reader.stack.pop(-2), reader.stack.pop()])
    ),
    pickle.SETITEMS[0]: lambda reader: reader.update(dict, _paired(reader.pop_mark())),
    pickle.ADDITEMS[0]: lambda reader: reader.update(set, _frozenset(reader.pop_mark())),
    # The original implementations call any function.
    pickle.REDUCE[0]: _Reader.call,
    pickle.NEWOBJ[0]: _Reader.call,
    pickle.NEWOBJ_EX[0]: lambda reader: reader.call(reader.stack.pop()),
    pickle.BUILD[0]: _Reader.build,
}
_Reader.dispatch = _OPCODES


def _check(condition: bool, message: str = "its pickle is malformed") -> None:
    if not condition:
        raise DamagedFileError(message)


def printable(name: object) -> str:
    """Returns text from a file as at most 80 characters of printable ASCII, for messages."""
    text = ascii(str(name))[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


_PLAIN = (str, int, float, bool, bytes, type(None), Global)


def _key(key: Any) -> Any:
    # Hashing deeply nested tuples overflows the C stack. A long tuple or int is hashed anew at each
    # use as a key, while each use takes only a few bytes of a pickle.
    items = key if type(key) is tuple else (key,)
    flat = len(items) <= 64 and all(type(item) in _PLAIN for item in items)
    short = flat and all(type(item) is not int or item.bit_length() <= 4096 for item in items)
    _check(short, f"its pickle has a {type(key).__name__} as a key")
    return key


def _paired(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    return {_key(key): value for key, value in zip(keys, values, strict=True)}


def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(_key(item) for item in items)


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    if type(pairs) is dict:
        return dict(pairs)
    return {_key(key): value for key, value in pairs}


def _size(values: Any) -> tuple[int, ...]:
    _check(type(values) in (tuple, list) and len(values) <= 64)
    _check(all(type(value) is int and 0 <= value < 2**63 for value in values))
    return tuple(values)


def _storage(saved: Any) -> Storage:
    no_storage = "its pickle has a malformed reference to a storage"
    _check(type(saved) in (tuple, list) and len(saved) <= 6, no_storage)
    tag, kind, key, _, numel, *view = saved
    if tag != "storage" or not isinstance(kind, Global) or not isinstance(key, str | int):
        raise DamagedFileError(no_storage)
    (numel,) = _size([numel])
    if kind.name in _UNTYPED:
        return Storage(str(key), None, numel)
    dtype = STORAGES.get(kind.name.removeprefix("torch."))
    if dtype is None:
        raise DamagedFileError(f"its pickle uses {kind.name} as a storage")
    offset = 0
    if view and view[0] is not None:  # before torch 0.4: (key of the view, offset, length)
        _, offset, length = view[0]
        offset, length = _size([offset, length])
        _check(offset + length <= numel, "a tensor lies outside its storage")
    return Storage(str(key), dtype, numel * np.dtype(dtype).itemsize, offset)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise DamagedFileError("a tensor has no typed storage")
    return _view(storage, storage.dtype, offset, size, stride)


def _view(storage: Storage, dtype: str, offset: Any, size: Any, stride: Any) -> Tensor:
    size, stride, (offset,) = _size(size), _size(stride), _size([offset])
    _check(len(size) == len(stride))
    return Tensor(storage, dtype, storage.offset + offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, Global):
        raise DamagedFileError("a tensor without a storage or dtype")
    name = _DTYPES[dtype.name]
    _check(storage.dtype in (None, name))
    return _view(storage, name, offset, size, stride)


def _same(tensor: Any, *_: Any) -> Tensor:
    _check(type(tensor) is Tensor)
    return tensor


def _numpy_dtype(code: Any, *_: Any) -> NumpyDtype:
    numeric = type(code) is str and re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248])", code)
    _check(bool(numeric), f"NumPy's dtype {printable(code)} is not numeric")
    return NumpyDtype(code.lstrip("<>|="))


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    _check(type(raw) is bytes and type(dtype) is NumpyDtype and order in ("C", "F"))
    kind, shape = dtype.numpy(), _size(shape)
    _check(math.prod(shape) * kind.itemsize == len(raw), "a NumPy array has the wrong size")
    return NumpyArray(np.frombuffer(raw, kind).reshape(shape, order=order))


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    return _frombuffer(raw, dtype, (), "C").values.item()


def _encoded(text: Any, encoding: Any) -> bytes:
    # Protocol 2 stores bytes as latin1 text.
    _check(type(text) is str and encoding == "latin1")
    return text.encode("latin1")


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda _factory=None, *items: _dict(*items),
    "collections.deque": lambda items=(), _maxlen=None: list(items),
    "builtins.dict": _dict,
    "builtins.list": lambda items=(): list(items),
    "builtins.set": lambda items=(): set(_frozenset(items)),
    "builtins.frozenset": _frozenset,
    "builtins.bytes": lambda: b"",
    "_codecs.encode": _encoded,
    "torch.Size": lambda values: _size(values),
    "torch.device": lambda *parts: ":".join(
        str(part)[:16] for part in parts if type(part) in _PLAIN
    ),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch.nn.parameter.Parameter": _same,
    "numpy.dtype": _numpy_dtype,
    **{
        f"numpy.{core}.multiarray.{name}": call
        for core in ("core", "_core")
        for name, call in [("scalar", _numpy_scalar), ("_reconstruct", lambda *_: NumpyArray())]
    },
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
}
# Names that a pickle may refer to: functions, storage types, dtypes and defaultdict factories.
_ALLOWED = {
    *_CALLS,
    *(f"torch.{name}" for name in STORAGES),
    *_UNTYPED,
    *_DTYPES,
    "numpy.ndarray",
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "tuple")),
}


def dump(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], wrapper: str, extra: Mapping[str, str | int]
) -> bytes:
    """Returns the pickle that `torch.save` writes for an OrderedDict of contiguous CPU tensors.

    Args:
      tensors: (dtype, shape) by name. The storages have the keys "0", "1", ... in this order.
      wrapper: if not empty, the pickle holds `{wrapper: tensors, **extra}`.
      extra: further entries beside `wrapper`.

    Returns:
      The pickle in protocol 2, as in torch.
    """
    state = _ORDERED_DICT + b"("
    for key, (name, (dtype, shape)) in enumerate(tensors.items()):
        state += _plain(name) + _contiguous(str(key), dtype, shape)
    state += b"u"
    if wrapper:
        entries = b"".join(_plain(name) + _plain(value) for name, value in extra.items())
        state = b"}(" + _plain(wrapper) + state + entries + b"u"
    # Removes the memo entries that `_plain` writes, as they are never read.
    return pickletools.optimize(b"\x80\x02" + state + b".")


_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _contiguous(key: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    storage = next(name for name, stored in STORAGES.items() if stored == dtype)
    numel = math.prod(shape)
    # As in torch, a dimension of 0 counts as 1 in the strides.
    stride = tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
    where = b"(" + _plain("storage") + b"ctorch\n" + storage.encode() + b"\n"
    where += _plain(key) + _plain("cpu") + _plain(numel) + b"tQ"
    sizes = _plain(0) + _plain(shape) + _plain(stride)
    flags = b"\x89" + _ORDERED_DICT  # requires_grad, backward_hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + where + sizes + flags + b"tR"


def _plain(value: str | int | tuple[int, ...]) -> bytes:
    # Converted to a built-in type: a subclass, such as `np.str_`, is pickled with its class name.
    plain: Any = next(kind for kind in (bool, int, str, tuple) if isinstance(value, kind))
    return pickle.dumps(plain(value), 2)[2:-1]
