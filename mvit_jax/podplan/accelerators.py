"""Cloud TPUs: what a chip can do, which slices exist, and the least time that a program takes.

Peaks are those of the "key specifications" in docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e
(read 2026-11-23). Every time here is a bound: links, memory and units are taken as busy all the
time, and as working side by side.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import by
from mvit_jax.podplan.hlo.cost import Collective, Counts

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, which JAX sees as one device.

    Attributes:
      flops: bfloat16 FLOP/s.
      bandwidth: bytes/s of its memory (HBM).
      memory: bytes of it that the compiler gives a program; it names them when one does not fit.
      links: bytes/s that it sends to other chips of its slice, over all its links, and as much that
        it receives; half of the "bidirectional" bandwidth of the specifications.
      outside: bytes/s, likewise, to other slices: its share of its host's network.
      cores: what accelerator names count for each chip ("v4-8" are 4 chips).
      host_cpus: vCPUs of a machine of 4 chips, the kind that larger slices are made of.
      largest: sides and chips of the largest slice.
    """

    flops: float
    bandwidth: float
    memory: float
    links: float
    outside: float
    cores: int
    host_cpus: int
    largest: tuple[int, ...]
    most: int


# Memory: by the compiler's own message. Between slices: 50 Gbit/s a chip (v5p's page), 6.4 Tbit/s
# for 256 chips (v5e's), four times that for v6e, whose hosts have four times v5e's network; v4, of
# which its page says nothing, is taken as v5p. Links of v4: six, of 50 GB/s each way. vCPUs: of the
# machine types ct4p-hightpu-4t, ct5lp-hightpu-4t, ct5p-hightpu-4t and ct6e-standard-4t.
CHIPS = {
    "v4": Chip(275e12, 1.2e12, 30.75 * GIB, 300e9, 6.25e9, 2, 240, (16, 16, 16), 4096),
    "v5e": Chip(197e12, 0.819e12, 15.75 * GIB, 200e9, 3.125e9, 1, 112, (16, 16), 256),
    "v5p": Chip(459e12, 2.765e12, 95.74 * GIB, 600e9, 6.25e9, 2, 208, (16, 20, 28), 6144),
    "v6e": Chip(918e12, 1.638e12, 31.25 * GIB, 400e9, 12.5e9, 1, 180, (16, 16), 256),
}
CHIPS_PER_HOST = 4
_ALIASES = {"v5litepod": "v5e"}
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # less than a cube of 4 x 4 x 4


@dataclass(frozen=True)
class Topology:
    """Slices of one shape, each a mesh or torus of chips; several talk over the network."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slices * self.chips_per_slice

    @property
    def hosts(self) -> int:
        """Machines; "2x4" also comes as one of 8 chips."""
        return self.slices * math.ceil(self.chips_per_slice / CHIPS_PER_HOST)

    @property
    def name(self) -> str:
        """What the compiler calls a slice: "v5e:16x16"."""
        return f"{self.kind}:{by(self.shape)}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def shapes(kind: str) -> tuple[tuple[int, ...], ...]:
    """The slices of a kind of chip that can be had, smallest first.

    Flat ones are a fixed list. Those of three dimensions are parts of a cube of 4 x 4 x 4, or cubes
    put together: sides are multiples of 4, in rising order.
    """
    chip = CHIPS[kind]
    if len(chip.largest) == 2:
        return _FLAT
    a, b, c = (range(4, side + 1, 4) for side in chip.largest)
    cubes = [(x, y, z) for x in a for y in b for z in c if x <= y <= z and x * y * z <= chip.most]
    return (*_SMALL, *sorted(cubes, key=lambda shape: (math.prod(shape), shape)))


def parse(text: str, slices: int = 1) -> Topology:
    """The topology "v5e:16x16", or by its accelerator's name "v5e-256", "v4-8" (8 cores, 4 chips).

    Raises:
      UserError: there is no such slice; says which there are.
    """
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1")
    found = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
    kind = _ALIASES.get(found.group(1), found.group(1)) if found else ""
    if not found or kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise UserError(
            f"there is no topology {text!r}: give a kind of chip ({known}) and a shape, like "
            "v5e:4x4 or v5p:4x4x8, or an accelerator, like v5e-16 or v4-32"
        )
    known = shapes(kind)
    if found.group(3):
        shape = tuple(map(int, found.group(3).split("x")))
        fitting = [shape] if shape in known else []
    else:
        cores = CHIPS[kind].cores
        fitting = [shape for shape in known if math.prod(shape) * cores == int(found.group(2))]
    if not fitting:
        raise UserError(f"there is no slice {text}: {_listed(kind)}")
    return Topology(kind, min(fitting, key=max), slices)  # the most cubic has the shortest ways


def _listed(kind: str) -> str:
    """Which slices there are, in words."""
    chip, known = CHIPS[kind], shapes(kind)
    names = [f"{by(s)} ({math.prod(s) * chip.cores})" for s in known]
    counted = "cores, as accelerators count" if chip.cores > 1 else "chips"
    if len(names) > 24:
        largest = f"{by(chip.largest)} and {chip.most} chips"
        names = [*names[:24], f"and others of multiples of 4 up to {largest}"]
    several = "; more chips are several slices (--slices)"
    return f"{kind} has {', '.join(names)}, with {counted} in brackets{several}"


@dataclass(frozen=True)
class Roofs:
    """The least seconds that each part of a chip needs for a program; the longest bounds it."""

    compute: float
    memory: float
    links: float
    outside: float

    @property
    def longest(self) -> float:
        return max(self.compute, self.memory, self.links, self.outside)

    @property
    def bound(self) -> str:
        """Which of them is the longest, in words."""
        return max(ROOFS, key=lambda name: getattr(self, name))


ROOFS = {
    "compute": "arithmetic",
    "memory": "memory (HBM)",
    "links": "links between chips (ICI)",
    "outside": "network between slices (DCN)",
}


def roofs(counts: Counts, chip: Chip) -> Roofs:
    inside = [c for c in counts.collectives if not c.between_slices]
    return Roofs(
        compute=(counts.flops + counts.kernel_flops) / chip.flops,
        memory=counts.hbm_bytes / chip.bandwidth,
        links=math.fsum(seconds(c, chip) for c in inside),
        outside=math.fsum(seconds(c, chip) for c in counts.collectives if c.between_slices),
    )


def seconds(collective: Collective, chip: Chip) -> float:
    """The least time that a chip's links, or its share of the network, need for all runs."""
    rate = chip.outside if collective.between_slices else chip.links
    return collective.trips * moved(collective) / rate


def moved(collective: Collective) -> int | float:
    """Bytes that a chip must receive, and must send, in one run: of n chips each lacks (n - 1) / n
    of what is gathered, and a sum over all is scattered first and then gathered."""
    if collective.kind == "collective-permute":
        return collective.bytes
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * collective.bytes * (collective.devices - 1) / collective.devices


def by_kind(collectives: Iterable[Collective], chip: Chip) -> list[tuple[str, int, int, float]]:
    """What passes between chips in a step: kind, among how many, bytes of a chip, seconds."""
    groups: dict[tuple[str, int], list[float]] = {}
    for c in collectives:
        where = " between slices" if c.between_slices else ""
        total = groups.setdefault((c.kind + where, c.devices), [0, 0])
        total[0] += c.trips * c.bytes
        total[1] += seconds(c, chip)
    rows = [(*key, int(size), time) for key, (size, time) in groups.items()]
    return sorted(rows, key=lambda row: -row[3])
