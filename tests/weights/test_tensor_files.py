"""Tensor files: reading and writing of torch's and safetensors' formats, and malicious files."""

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mvit_jax.common.errors import UserError
from mvit_jax.weights import torch_pickle
from mvit_jax.weights.tensor_files import read_tensors, state_dict, write_safetensors, write_torch
from tests.reference.make_torch_files import FOLDER, GRID, expected

DTYPES = [*torch_pickle.STORAGES.values()]
FLOATS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def storage(kind=b"FloatStorage", key="0", size=b"K\x02"):
    """Returns the opcodes of a storage of two float32."""
    head = b"(" + text("storage") + b"ctorch\n" + kind + b"\n"
    return head + text(key) + text("cpu") + size + b"tQ"


STORAGE = storage()


def tensor(saved=STORAGE, offset=b"K\x00", size=b"K\x02\x85", stride=b"K\x01\x85"):
    """Returns the opcodes of a tensor of two float32 in storage 0."""
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + saved + offset + size + stride + hooks + b"tR"


A = b"}" + text("a") + tensor() + b"s"  # a mapping with one tensor


def zipped(path, value, entries=None, prefix="any/", **options):
    """Writes a file as torch does, with `value` as opcodes and eight bytes in storage 0."""
    entries = {"data/0": np.array([1, 2], "<f4").tobytes()} if entries is None else entries
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": b"\x80\x02" + value + b".", **entries}.items():
            archive.writestr(prefix + name, data, **options)
    return path


def legacy(path, value):
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    end = [pickle.dumps(["0"], 2), struct.pack("<q2f", 2, 1, 2)]
    path.write_bytes(b"".join([*head, b"\x80\x02" + value + b".", *end]))
    return path


def same(array, values):
    assert isinstance(array, np.ndarray)
    assert array.flags.c_contiguous and array.dtype.isnative
    assert array.dtype == values.dtype and array.shape == values.shape
    assert array.tobytes() == values.tobytes()


# Reading of torch's files


@pytest.mark.parametrize("name", ["plain.pt", "plain_legacy.pt", "plain_legacy_protocol4.pt"])
def test_every_kind_of_torch_tensor_is_read(name):
    read = read_tensors(FOLDER / name)
    assert (read.wrapper, read.dropped, read.format) == ("", (), "torch")
    arrays = expected()
    assert list(read.tensors) == list(arrays)
    # Eighths to 2 are exact in bfloat16: the first half of float32's bits.
    arrays["bfloat16"] = (GRID.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
    for key in arrays:
        same(read.tensors[key], arrays[key])
    read.tensors["float"][:] = 0
    assert read.tensors["tied"].any(), "arrays share memory"


def test_a_dtype_without_a_storage_class_is_read():
    same(read_tensors(FOLDER / "untyped_legacy.pt").tensors["odd"], np.arange(3, dtype=np.uint16))


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint_legacy", "checkpoint_protocol5"])
def test_the_state_dict_of_a_checkpoint_is_read(name):
    read = read_tensors(FOLDER / f"{name}.pyth")
    assert read.wrapper == "model_state"
    assert {"epoch", "cfg", "best", "matrix", "milestones", "kinds"} <= set(read.dropped)
    weight = "weight" if name.endswith("5") else "0.weight"
    same(read.tensors[weight], np.arange(6, dtype=np.float32).reshape(3, 2))
    if weight == "0.weight":
        assert list(read.tensors)[-1] == "1.num_batches_tracked"
        same(read.tensors["1.num_batches_tracked"], np.array(1))
        assert "optimizer_state" in read.dropped


def test_other_values_of_a_checkpoint_are_read_as_plain_values():
    with zipfile.ZipFile(FOLDER / "checkpoint.pyth") as archive:
        raw = archive.read("checkpoint/data.pkl")
    value, storages = torch_pickle.load(io.BytesIO(raw), FOLDER)
    assert (value["epoch"], value["best"], value["milestones"]) == (3, 0.75, {1, 2})
    np.testing.assert_array_equal(value["matrix"].values, np.eye(2, dtype=np.int32))
    assert value["optimizer_state"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert [*value["kinds"][1:]] == [(1, 2), "cpu", None, -(2**40), b"\xff"]
    assert set(storages) == {str(i) for i in range(len(storages))}


# Writing


def filled(rng):
    """Yields random bits in every dtype, NaNs included, and special shapes."""
    for dtype in DTYPES:
        width = np.dtype(dtype).itemsize
        bits = rng.integers(0, 2 if dtype == "bool" else 256, 15 * width, dtype=np.uint8)
        yield f"{dtype}.filled", bits.view(dtype).reshape(3, 5)
        yield f"{dtype}.scalar", bits.view(dtype)[0].reshape(())
        yield f"{dtype}.empty", np.empty((2, 0, 3), dtype)
        yield f"{dtype}.turned", bits.view(dtype).reshape(3, 5).T
    yield "swapped", np.arange(3, dtype=">f4")


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_every_dtype_is_restored_bit_for_bit(tmp_path, write):
    tensors = dict(filled(np.random.default_rng(0)))
    write(tmp_path / "x", tensors)
    read = read_tensors(tmp_path / "x")
    assert set(read.tensors) == set(tensors)
    assert read.format == ("torch" if write is write_torch else "safetensors")
    if write is write_torch:
        assert list(read.tensors) == list(tensors)
    for name, values in tensors.items():
        same(read.tensors[name], values.astype(values.dtype.newbyteorder("=")))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / "other").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


class Independent(pickle.Unpickler):
    """Python's unpickler with naive versions of torch's three names."""

    def __init__(self, archive):
        super().__init__(io.BytesIO(archive.read("archive/data.pkl")))
        self.archive = archive

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        assert module == "torch"
        return {"FloatStorage": "<f4", "LongStorage": "<i8", "BoolStorage": "?"}[name]

    def persistent_load(self, saved):
        kind, dtype, key, location, numel = saved
        assert (kind, location) == ("storage", "cpu")
        storage = np.frombuffer(self.archive.read(f"archive/data/{key}"), dtype)
        assert storage.size == numel
        return storage

    @staticmethod
    def rebuild(storage, offset, size, stride, grad, hooks):
        assert grad is False and hooks == OrderedDict() and offset == 0
        # torch.empty(2, 0, 3).stride() is (3, 3, 1), as if no dimension were empty.
        assert stride == np.empty([max(n, 1) for n in size], np.int8).strides
        return storage.reshape(size)


def test_a_written_pickle_is_read_equally_by_python(tmp_path):
    tensors = {
        **FLOATS,
        "ä.scalar": np.array(-5),
        np.str_("empty"): np.empty((2, 0, 3), np.float32),
        "long": np.arange(70_000) % 3 == 0,
    }
    extra = {"epoch": 300, "cfg": "x: 1", "large": 2**40, "below": -3, "on": True, "zero": 0}
    write_torch(tmp_path / "x", tensors, wrapper="model_state", extra=extra)
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.testzip() is None
        value = Independent(archive).load()
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        raw = (tmp_path / "x").read_bytes()
        for entry in archive.infolist():
            name, padding = struct.unpack_from("<2H", raw, entry.header_offset + 26)
            assert (entry.header_offset + 30 + name + padding) % 64 == 0
    assert list(value) == ["model_state", *extra] and type(value["model_state"]) is OrderedDict
    assert {name: value[name] for name in extra} == extra and value["on"] is True
    assert list(value["model_state"]) == list(tensors)
    for name, values in tensors.items():
        same(value["model_state"][name], values)
    read = read_tensors(tmp_path / "x")
    assert (read.wrapper, read.dropped) == ("model_state", tuple(extra))


def test_equal_tensors_are_written_as_equal_bytes(tmp_path):
    write_torch(tmp_path / "x", FLOATS)
    write_torch(tmp_path / "y", FLOATS)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_unreadable_dtypes_and_ambiguous_names_are_not_written(tmp_path):
    for write in (write_torch, write_safetensors):
        for dtype in ("complex64", "uint16", "U3", object):
            with pytest.raises(UserError, match=r"a has the dtype .*: convert"):
                write(tmp_path / "x", {"a": np.zeros(2, dtype)})
    for options in ({"wrapper": "model", "extra": {"model": 1}}, {"extra": {"epoch": 1}}):
        with pytest.raises(UserError, match="another name"):
            write_torch(tmp_path / "x", FLOATS, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("failure", ["replace", "write", "interrupt"])
def test_files_are_written_atomically(tmp_path, monkeypatch, write, before, failure):
    path = tmp_path / "x"
    if before:
        path.write_bytes(before)

    def fail(*_, **__):
        (tmp_path / f".x.{os.getpid()}").write_bytes(b"half")
        error = OSError(28, "No space left on device")
        raise KeyboardInterrupt if failure == "interrupt" else error

    if failure == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
        monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if failure == "interrupt" else UserError) as caught:
        write(path, FLOATS)
    if failure != "interrupt":
        assert str(caught.value) == f"{path} cannot be written (No space left on device)"
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if before else [])
    assert not before or path.read_bytes() == before


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_writing_to_a_missing_folder_is_an_error(tmp_path, write):
    with pytest.raises(UserError, match=r"cannot be written .*No such file or directory"):
        write(tmp_path / "none" / "x", FLOATS)


# Malicious pickles


def attacks(marker):
    """Returns pickles that create `marker` when Python unpickles them, and the functions called."""
    command, code = text(f"touch {marker}"), text(f"open({str(marker)!r}, 'w')")
    module = os.system.__module__
    system, target = f"{module}\nsystem\n".encode(), f"{module}.system"
    glob = b"c" + system
    partial = b"cfunctools\npartial\ncbuiltins\nprint\n\x85R"
    state = b"(" + glob + command + b"\x85}Nt"
    return {
        "REDUCE": (glob + command + b"\x85R", target),
        "exec": (b"cbuiltins\nexec\n" + code + b"\x85R", "builtins.exec"),
        "python2": (b"c__builtin__\neval\n" + code + b"\x85R", "builtins.eval"),
        "Popen": (
            b"csubprocess\ncheck_call\n(" + text("touch") + text(str(marker)) + b"l\x85R",
            "subprocess.check_call",
        ),
        "INST": (b"(" + command + b"i" + system, target),
        "OBJ": (b"(" + b"cbuiltins\neval\n" + code + b"o", "builtins.eval"),
        "STACK_GLOBAL": (text(module) + text("system") + b"\x93" + command + b"\x85R", target),
        "BUILD": (partial + state + b"b)R", "functools.partial"),
        "attribute": (
            text("os") + text("path.os.system") + b"\x93" + command + b"\x85R",
            "os.path.os.system",
        ),
        "factory": (b"ccollections\ndefaultdict\n" + glob + command + b"\x85R\x85R", target),
    }


@pytest.mark.parametrize("form", attacks("x"))
@pytest.mark.parametrize("container", [zipped, legacy])
def test_no_code_in_a_file_is_run(tmp_path, form, container):
    marker = tmp_path / "mark"
    attack, target = attacks(marker)[form]
    # Python's unpickler runs the attack (OBJ calls only classes).
    if form != "OBJ":
        try:
            # Protocol 2 maps Python 2's names, protocol 4 allows dotted ones.
            pickle.loads((b"\x80\x02" if form == "python2" else b"\x80\x04") + attack + b".")
        except TypeError:
            assert form == "factory"
        assert marker.exists()
        marker.unlink()
    value = b"}(" + text("model_state") + b"}(" + text("a") + tensor() + b"u" + text("x")
    path = container(tmp_path / "file", value + attack + b"u")
    message = re.escape(f"{path} refers to {target}, which is neither a plain tensor nor a plain")
    with pytest.raises(UserError, match=message):
        read_tensors(path)
    assert not marker.exists()


def test_the_files_around_the_attacks_are_valid(tmp_path):
    value = b"}(" + text("model_state") + b"}(" + text("a") + tensor() + b"u" + text("x") + b"Nu"
    for container in (zipped, legacy):
        read = read_tensors(container(tmp_path / "file", value))
        assert (read.wrapper, read.dropped) == ("model_state", ("x",))
        same(read.tensors["a"], np.array([1, 2], np.float32))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("argparse", "Namespace"),
        ("yacs.config", "CfgNode"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "ComplexFloatStorage"),
        ("builtins", "bytearray"),
    ],
)
def test_unknown_globals_are_refused_by_name(tmp_path, module, name):
    value = b"}" + text("args") + f"c{module}\n{name}\n".encode() + b")Rs"
    with pytest.raises(UserError, match=rf"refers to {module}\.{name}, which"):
        read_tensors(zipped(tmp_path / "x", value))


def test_extension_opcodes_are_refused(tmp_path):
    for opcode in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"):
        with pytest.raises(UserError, match="opcode EXT"):
            read_tensors(zipped(tmp_path / "x", b"}" + text("a") + opcode + b")Rs"))


# Malformed files

MANY = struct.pack("<q", 2**62)
MALFORMED = {
    "outside": tensor(size=b"K\x03\x85"),
    "far outside": tensor(offset=b"\x8a\x08" + MANY),
    "negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "negative stride": tensor(stride=b"J\xff\xff\xff\xff\x85"),
    "huge": tensor(size=b"\x8a\x08" + MANY + b"\x85", stride=b"K\x00\x85"),
    "huge and empty": tensor(size=b"K\x00\x8a\x08" + MANY + b"\x86", stride=b"K\x00K\x01\x86"),
    "expanded": tensor(size=b"J\x00\x00\x01\x00\x85", stride=b"K\x00\x85"),
    "too few strides": tensor(size=b"K\x01K\x02\x86"),
    "size as text": tensor(size=text("ab")),
    "no storage": tensor(b"N"),
    "another key": tensor(storage(key="9")),
    "a larger storage": tensor(storage(size=b"\x8a\x08" + MANY)),
    "identified by text": tensor(text("storage") + b"Q"),
    "identified in a line": tensor(b"P0\n"),
    "of a wrong type": tensor(storage(b"Size")),
    "calls a tensor": tensor() + b")R",
    "calls a storage": b"ctorch\nFloatStorage\n)R",
    "memo that is not there": b"j\xff\xff\xff\x7f",
    "underflow": b"000000",
    "mark that is not there": b"ttt",
    "unknown opcode": b"\xff",
    "text past the end": b"X\xff\xff\xff\xff",
    "bytes past the end": b"\x8e" + MANY,
    "number past the end": b"\x8b\xff\xff\xff\x7f",
    "deep key": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "deep list as key": b"}" + b"]" + b"\x85" * 100_000 + b"Ns",
    "odd number of items": b"}(Nu",
    "endless copies": b"](" + b"N" * 5000 + b"eq\x00" + (
        b"0ccollections\ndeque\nh\x00\x85R" * 5000
    ),
    "endless copies of bytes": b"\x96\x88\x13" + bytes(6 + 5000) + b"q\x00" + (
        b"0cbuiltins\nlist\nh\x00\x85R" * 5000
    ),
    "many arguments": b"cnumpy.core.multiarray\n_reconstruct\n(" + b"N" * 65 + b"tR",
    "many parts of a storage": storage(size=b"K\x02" + b"N" * 66),
    "long key": b"}(" + b"N" * 65 + b"tNs",
    "large key": b"}\x8b\x02\x02\x00\x00" + b"\x7f" * 514 + b"Ns",
}  # fmt: skip


MESSAGES = {
    "outside": "lies outside its storage",
    "expanded": "its tensors take 262,144 bytes",
    "deep key": "its pickle has a tuple as a key",
    "deep list as key": "its pickle has a tuple as a key",
    "endless copies": "copies too many items",
    "endless copies of bytes": "copies too many items",
    "many arguments": "is malformed",
    "many parts of a storage": "malformed reference to a storage",
    "long key": "its pickle has a tuple as a key",
    "large key": "its pickle has a int as a key",
}


@pytest.mark.parametrize(
    ("container", "name"),
    [(zipped, name) for name in MALFORMED]
    + [(legacy, name) for name in MALFORMED if not name.startswith("deep")],  # a second each
)
def test_malformed_pickles_are_refused_in_one_sentence(tmp_path, container, name):
    path = container(tmp_path / "x", b"}" + text("a") + MALFORMED[name] + b"s")
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        read_tensors(path)
    assert MESSAGES.get(name, "") in str(caught.value)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400


def test_a_large_memo_index_and_deep_nesting_are_read(tmp_path):
    value = b"}r\xff\xff\xff\xff" + text("a") + tensor() + b"s"
    deep = b"0" + b"]" * 100_000 + b"a" * 99_999 + b"0j\xff\xff\xff\xff"
    read = read_tensors(zipped(tmp_path / "x", value + deep))
    same(read.tensors["a"], np.array([1, 2], np.float32))


def test_many_tensors_of_one_storage_are_refused(tmp_path):
    many = b"J\x00\x00\x02\x00"
    value = tensor(storage(size=many), size=many + b"\x85") + b"q\x000}("
    value += b"".join(text(f"{i}") + b"h\x00" for i in range(2000)) + b"u"
    with pytest.raises(UserError, match="its tensors take 1,048,576,000 bytes"):
        read_tensors(zipped(tmp_path / "x", value, {"data/0": bytes(2**19)}))


def test_a_truncated_file_is_refused(tmp_path):
    write_torch(tmp_path / "zip", FLOATS)
    write_safetensors(tmp_path / "safetensors", FLOATS)
    (tmp_path / "legacy").write_bytes((FOLDER / "plain_legacy.pt").read_bytes())
    for kind in ("zip", "safetensors", "legacy"):
        raw = (tmp_path / kind).read_bytes()
        for length in [*range(0, 64), *range(64, len(raw), 13), *range(len(raw) - 40, len(raw))]:
            (tmp_path / "cut").write_bytes(raw[:length])
            message = "cut off or damaged" if length > 64 else None
            with pytest.raises(UserError, match=message):
                read_tensors(tmp_path / "cut")


def test_a_wrong_checksum_is_refused(tmp_path):
    path = zipped(tmp_path / "x", A)
    raw = path.read_bytes()
    data = np.array([1, 2], "<f4").tobytes()
    assert raw.count(data) == 1
    path.write_bytes(raw.replace(data, data[:-1] + b"\x41"))
    with pytest.raises(UserError, match=r"damaged \(Bad CRC-32"):
        read_tensors(path)


def test_the_byte_order_of_the_file_is_used(tmp_path):
    entries = {"data/0": np.array([1, 2], ">f4").tobytes(), "byteorder": b"big"}
    read = read_tensors(zipped(tmp_path / "x", A, entries))
    same(read.tensors["a"], np.array([1, 2], np.float32))
    with pytest.raises(UserError, match="its byte order is b'middle'"):
        read_tensors(zipped(tmp_path / "x", A, entries | {"byteorder": b"middle"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": {}}, "damaged .it has no data/0"),
        ({"entries": {"data/0": b"1234567"}}, "the storage of a is cut off"),
        ({"entries": {"data/0": b"12345678", "code/x.py": b""}}, "is a TorchScript program"),
        ({"entries": {"data/0": b"12345678", "constants.pkl": b""}}, "is a TorchScript program"),
        ({"prefix": "a/b/c/"}, "but was not written by torch.save"),
        ({"compress_type": zipfile.ZIP_DEFLATED}, "is a compressed zip"),
    ],
)
def test_other_zips_are_refused_with_the_reason(tmp_path, options, message):
    path = zipped(tmp_path / "x", A, **options)
    with pytest.raises(UserError, match=message):
        read_tensors(path)


def test_encrypted_and_ambiguous_zips_are_refused(tmp_path):
    path = zipped(tmp_path / "x", A)
    raw = path.read_bytes()
    start = raw.index(b"PK\x01\x02")
    path.write_bytes(raw[: start + 8] + b"\x01" + raw[start + 9 :])
    with pytest.raises(UserError, match="is encrypted"):
        read_tensors(path)
    path.write_bytes(raw.replace(b"data/0", b"data.p").replace(b"data.pkl", b"data.p/x"))
    with pytest.raises(UserError, match=r"but was not written by torch.save"):
        read_tensors(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        archive.writestr("a/data.pkl", b"2")
    with pytest.raises(UserError, match="two entries have the same name"):
        read_tensors(path)


FLOAT8 = b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'  # nothing computes with it


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>", "is a web page"),
        (b"<HTML><body>404", "is a web page"),
        (b"<?xml version='1.0'?><Error>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of git-lfs"),
        (
            b"\x1f\x8b\x08gzip",
            r"is not a PyTorch or safetensors file \(it begins with b'\\x1f\\x8b",
        ),
        (pickle.dumps({"a": 1}), "is a pickle, but was not written by torch.save"),
        (pickle.dumps(np.ones(2)), "is a pickle, but was not written by torch.save"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (struct.pack("<Q", 50) + b'{"a":', "cut off or damaged"),
        (b"PK\x03\x04" + bytes(500), "cut off or damaged"),
        (struct.pack("<Q", len(FLOAT8)) + FLOAT8 + b"\x00", "holds a as F8_E4M3"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, raw, message):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "x")


def test_a_safetensors_header_that_looks_like_a_pickle_is_read(tmp_path):
    write_safetensors(tmp_path / "x", {"a" * (640 - 88): np.ones(1, np.float32)})
    raw = (tmp_path / "x").read_bytes()
    header = raw[8:-4].rstrip()
    (tmp_path / "x").write_bytes(struct.pack("<Q", 640) + header.ljust(640) + raw[-4:])
    assert (tmp_path / "x").read_bytes()[:2] == b"\x80\x02"
    assert len(read_tensors(tmp_path / "x").tensors) == 1


def test_paths_without_a_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (".", "is a folder"),
        ("none", "does not exist"),
        ("pipe", "not a regular"),
    ):
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / name)


# The state dict in a container

ONE, TWO = np.ones(1), np.full(2, 2.0)


@pytest.mark.parametrize(
    ("container", "wrapper", "dropped"),
    [
        ({"a": ONE}, "", ()),
        ({"model": ONE}, "", ()),
        ({"epoch": 1, "state_dict": {"a": ONE}}, "state_dict", ("epoch",)),
        (
            {"model": {"a": TWO}, "model_state": {"a": ONE}, "model_ema": {"a": TWO}},
            "model_state",
            ("model", "model_ema"),
        ),
        ({"model_state": {}, "model": {"a": ONE}}, "model", ("model_state",)),
        ({"step": ONE, "model": {"a": ONE}}, "model", ("step",)),
        (
            {"state_dict": {"module": {"a": ONE}, "n": 1}, "b": 2},
            "state_dict.module",
            ("b", "state_dict.n"),
        ),
    ],
)
def test_the_state_dict_is_unwrapped(container, wrapper, dropped):
    result = state_dict(container, weights="plain")
    assert (result.wrapper, result.dropped) == (wrapper, dropped)
    ((_, array),) = result.tensors.items()
    same(array, ONE)


def nested(depth):
    return {"a": nested(depth - 1) if depth else ONE}


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({}, "has no state dict, it is empty"),
        ({"model_state": {}}, "has no state dict, it holds only 'model_state'"),
        ({"epoch": 3}, "has no state dict, it holds only 'epoch'"),
        ({str(i): 0 for i in range(9)}, "only '0', '1', '2', '3', '4', '5', '6', '7', ...:"),
        ({"a": ONE, "n": 3, "s": "x"}, "entries other than named tensors: 'n', 's'"),
        ({0: ONE, "b": ONE}, "entries other than named tensors: 0"),
        (
            {"epoch": 1, "model_state": {"a": ONE, "n": None}},
            "entries other than named tensors: 'n'",
        ),
        (nested(9), "has no state dict, it holds only 'a'"),
        ({"a": np.float64(3)}, "has no state dict, it holds only 'a'"),
        ({"a": np.array(["x"])}, "a has the dtype <U1"),
        ({"a": np.array([1j])}, "a has the dtype complex128"),
    ],
)
def test_other_mappings_are_refused_with_the_reason(container, message):
    with pytest.raises(UserError, match=message):
        state_dict(container)


@pytest.mark.parametrize(
    "value", [b"K\x01", b"](" + tensor() + b"e", tensor(), b"}K\x00" + tensor() + b"s"]
)
def test_files_without_a_state_dict_are_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"save a state_dict|entries other than named tensors: 0"):
        read_tensors(zipped(tmp_path / "x", value))


class FakeTensor:
    """A stand-in for torch's tensors; NumPy refuses those with gradients or in bfloat16."""

    def __init__(self, values, dtype="torch.float32", grad=True):
        self.values, self.dtype, self.grad = values, dtype, grad
        self.shape = values.shape

    def detach(self):
        return FakeTensor(self.values, self.dtype, grad=False)

    def cpu(self):
        return self

    def float(self):
        return FakeTensor(self.values.astype(np.float32), grad=self.grad)

    def __array__(self, dtype=None, copy=None):
        if self.grad or self.dtype not in ("torch.float32", "torch.int64"):
            raise TypeError(f"Got unsupported ScalarType {self.dtype}")
        return self.values


def test_arrays_of_all_libraries_are_read():
    halves = np.array([1.5, -2, np.inf], ml_dtypes.bfloat16)
    read = state_dict(
        {
            "jax": jnp.arange(3, dtype=jnp.bfloat16),
            "swapped": np.arange(3, dtype=">i4"),
            "turned": FLOATS["a"].T,
            "torch": FakeTensor(FLOATS["a"]),
            "torch.bfloat16": FakeTensor(halves, "torch.bfloat16"),
            "torch.scalar": FakeTensor(np.array(4), "torch.int64"),
        }
    )
    assert read.format == "memory"
    same(read.tensors["jax"], np.array([0, 1, 2], ml_dtypes.bfloat16))
    same(read.tensors["swapped"], np.arange(3, dtype=np.int32))
    same(read.tensors["turned"], FLOATS["a"].T.copy())
    same(read.tensors["torch"], FLOATS["a"])
    same(read.tensors["torch.bfloat16"], halves)
    same(read.tensors["torch.scalar"], np.array(4))
    assert not np.shares_memory(read.tensors["torch"], FLOATS["a"])
    with pytest.raises(UserError, match=r"q cannot be read as an array .*unsupported ScalarType"):
        state_dict({"q": FakeTensor(FLOATS["a"], "torch.qint8")})
