"""Fuzzing of tensor files: each is read or refused; nothing is run, memory is bounded."""

import io
import itertools
import pickletools
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.weights.tensor_files import Tensors, read_tensors, write_safetensors, write_torch
from tests.reference.make_torch_files import FOLDER, expected
from tests.support import tiny
from tests.support.environment import of_process
from tests.weights.test_tensor_files import attacks, legacy, tensor, text, zipped

MEMORY = 2**30
SECONDS = 20  # for one file, on a loaded machine
# Audit events (docs.python.org/3/library/audit_events.html) that reading must not raise.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec")
FORBIDDEN += ("compile", "import", "pickle.find_class", "socket.connect", "os.remove", "os.mkdir")


def seeds(folder):
    """Returns valid files of each format, and files whose pickles would run code."""
    good = [path.read_bytes() for path in sorted(FOLDER.iterdir())]
    for write in (write_torch, write_safetensors):
        write(folder / "seed", expected())
        good.append((folder / "seed").read_bytes())
    bad = []
    for attack, _ in attacks(folder / "mark").values():
        value = b"}(" + text("a") + tensor() + text("x") + attack + b"u"
        for container in (zipped, legacy):
            bad.append(container(folder / "seed", value).read_bytes())
    (folder / "seed").unlink()
    return good, bad


def flipped(raw, draw, start=0, end=None):
    raw = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 4, 8])):
        index = draw.randrange(start, min(end or len(raw), len(raw)))
        raw[index] = draw.choice([0, 1, 0x28, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    return bytes(raw)


def operated(raw, draw):
    """Returns a pickle with opcodes removed, duplicated, exchanged or inserted."""
    offsets = [offset for _, _, offset in pickletools.genops(raw)] + [len(raw)]
    parts = [raw[a:b] for a, b in itertools.pairwise(offsets)]
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, source = draw.randrange(len(parts)), draw.randrange(len(parts))
        match draw.randrange(5):
            case 0:
                parts[at] = b""
            case 1:
                parts.insert(at, parts[source])
            case 2:
                parts[at], parts[source] = parts[source], parts[at]
            case 3:
                parts[at] = parts[source]
            case 4:
                opcode = draw.choice(pickletools.opcodes).code.encode("latin1")
                parts.insert(at, opcode + draw.choice([b"", draw.randbytes(4), b"\xff" * 8]))
    return b"".join(parts)


def repacked(raw, change):
    """Returns a zip with its pickle changed and valid checksums."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return packed.getvalue()


def mutated(raw, other, draw):
    kind = draw.choice(["flip", "cut", "splice", "header", "pickle", "opcodes", "opcodes"])
    if kind == "flip":
        return flipped(raw, draw)
    if kind == "cut":
        return raw[: draw.randrange(len(raw))]
    if kind == "splice":
        return raw[: draw.randrange(len(raw))] + other[draw.randrange(len(other)) :]
    if raw[:2] == b"PK":
        if kind == "header":  # the central directory, at the end
            return flipped(raw, draw, raw.index(b"PK\x01\x02"))
        change = operated if kind == "opcodes" else flipped
        return repacked(raw, lambda data: change(data, draw))
    if raw[:1] == b"\x80":
        if kind != "opcodes":
            return flipped(raw, draw, end=200 if kind == "header" else None)
        stream, offsets = io.BytesIO(raw), []
        for _ in range(4):  # the fourth has the tensors
            list(pickletools.genops(stream))
            offsets.append(stream.tell())
        start, end = offsets[2:]
        return raw[:start] + operated(raw[start:end], draw) + raw[end:]
    length = int.from_bytes(raw[:8], "little")
    header = flipped(raw[8 : 8 + length], draw) + draw.choice([b"", b" ", b"}"])
    claimed = draw.choice([len(header), length])
    return struct.pack("<Q", claimed) + header + raw[8 + length :]


def fuzz(folder, count, seed):
    draw = random.Random(seed)
    good, bad = seeds(folder)
    for number, raw in enumerate(good + bad):  # also triggers late imports
        (folder / "file").write_bytes(raw)
        try:
            assert isinstance(read_tensors(folder / "file"), Tensors) and number < len(good)
        except UserError:
            assert number >= len(good)
    for codec in ("raw_unicode_escape", "cp437", "utf-8", "ascii", "latin1"):
        "".encode(codec)  # Python imports codecs late, too
    files = []
    for _ in range(count):
        raw = draw.choice(good if draw.random() < 0.7 else bad)
        files.append(mutated(raw, draw.choice(good + bad), draw))

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    watching, events = True, []

    def watch(event, args):
        writes = event == "open" and isinstance(args[1], str) and "r" not in args[1]
        if watching and (event in FORBIDDEN or writes):
            events.append((event, str(args)[:200]))

    sys.addaudithook(watch)
    outcomes, slowest = Counter(), 0.0
    for number, raw in enumerate(files):
        watching = False
        (folder / "file").write_bytes(raw)
        watching = True
        began = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            read = read_tensors(folder / "file")
            outcome = "read"
            assert all(array.flags.c_contiguous for array in read.tensors.values())
            assert sum(array.nbytes for array in read.tensors.values()) <= 16 * len(raw)
        except UserError as error:
            outcome = "refused"
            assert "memory" not in str(error), (number, error)
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - began)
        outcomes[outcome] += 1
        assert not events, (number, events)
    watching = False
    assert not (folder / "mark").exists()
    print(dict(outcomes), f"slowest {slowest:.2f} s")
    # Both outcomes occur, or the fuzzing tests nothing.
    assert outcomes["read"] > count / 20 and outcomes["refused"] > count / 4


@pytest.mark.parametrize(
    ("count", "seed"),
    [
        pytest.param(1000, 1, marks=pytest.mark.slow),
        pytest.param(8000, 0, marks=pytest.mark.nightly),
    ],
)
def test_mutated_files_are_read_or_refused(count, seed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(tmp_path), str(count), str(seed)],
        cwd=tiny.ROOT, env=of_process(1), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
