"""Cloud TPUs: peak rates of chips, available slices, and roofline bounds of programs.

Peak rates are from the "key specifications" in docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e
(read 2026-11-23). Every time here is a lower bound: compute units, memory and links are assumed to
work at their peak rates, and concurrently.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import join_sizes
from mvit_jax.podplan.hlo.cost import Collective, Counts

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU chip, which is one device in JAX.

    Attributes:
      flops: bfloat16 FLOP/s.
      bandwidth: bytes/s of the memory (HBM).
      memory: bytes of HBM available to a program, as in the compiler's out-of-memory message.
      ici: bytes/s to other chips of the slice (ICI), over all links, in each direction. This is
        half of the specifications' "bidirectional" bandwidth.
      dcn: bytes/s to other slices (DCN), in each direction: the chip's share of the host's
        network.
      cores: cores per chip in accelerator names ("v4-8" has 4 chips).
      host_cpus: vCPUs of a host with 4 chips, as in larger slices.
      max_shape: upper limits of a slice's sides.
      max_chips: chips of the largest slice.
    """

    flops: float
    bandwidth: float
    memory: float
    ici: float
    dcn: float
    cores: int
    host_cpus: int
    max_shape: tuple[int, ...]
    max_chips: int


# Memory is from the compiler's out-of-memory message. Rates between slices: v5p has 50 Gbit/s per
# chip and v5e 6.4 Tbit/s per 256 chips, according to their pages. v6e has four times v5e's rate, as
# v6e's hosts have four times the network. v4's page has no rate, so v5p's is assumed. v4 has six
# links of 50 GB/s in each direction. The vCPUs are those of the machine types ct4p-hightpu-4t,
# ct5lp-hightpu-4t, ct5p-hightpu-4t and ct6e-standard-4t.
CHIPS = {
    "v4": Chip(275e12, 1.2e12, 30.75 * GIB, 300e9, 6.25e9, 2, 240, (16, 16, 16), 4096),
    "v5e": Chip(197e12, 0.819e12, 15.75 * GIB, 200e9, 3.125e9, 1, 112, (16, 16), 256),
    "v5p": Chip(459e12, 2.765e12, 95.74 * GIB, 600e9, 6.25e9, 2, 208, (16, 20, 28), 6144),
    "v6e": Chip(918e12, 1.638e12, 31.25 * GIB, 400e9, 12.5e9, 1, 180, (16, 16), 256),
}
CHIPS_PER_HOST = 4
_ALIASES = {"v5litepod": "v5e"}
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # smaller than a cube of 4 x 4 x 4


@dataclass(frozen=True)
class Topology:
    """One or more slices of the same shape; several slices communicate over the network."""

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
        """Number of hosts, at 4 chips each; "2x4" also exists as one host of 8 chips."""
        return self.slices * math.ceil(self.chips_per_slice / CHIPS_PER_HOST)

    @property
    def name(self) -> str:
        """The compiler's name of a slice: "v5e:16x16"."""
        return f"{self.kind}:{join_sizes(self.shape)}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def shapes(kind: str) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of the available slices of a kind of chip, smallest first.

    Two-dimensional shapes are a fixed list. Three-dimensional shapes are parts of a 4 x 4 x 4 cube,
    or combine such cubes: the sides are then multiples of 4, in ascending order.
    """
    chip = CHIPS[kind]
    if len(chip.max_shape) == 2:
        return _FLAT
    a, b, c = (range(4, side + 1, 4) for side in chip.max_shape)
    cubes = [
        (x, y, z) for x in a for y in b for z in c if x <= y <= z and x * y * z <= chip.max_chips
    ]
    return (*_SMALL, *sorted(cubes, key=lambda shape: (math.prod(shape), shape)))


def parse(text: str, slices: int = 1) -> Topology:
    """Parses a topology, "v5e:16x16", or an accelerator name, "v5e-256" or "v4-8" (8 cores).

    Raises:
      UserError: no such slice exists; the message lists the available ones.
    """
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1")
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text.strip().lower())
    kind = _ALIASES.get(match.group(1), match.group(1)) if match else ""
    if not match or kind not in CHIPS:
        kinds = ", ".join(CHIPS)
        raise UserError(
            f"there is no topology {text!r}: give a kind of chip ({kinds}) and a shape, like "
            "v5e:4x4 or v5p:4x4x8, or an accelerator, like v5e-16 or v4-32"
        )
    available = shapes(kind)
    if match.group(3):
        shape = tuple(map(int, match.group(3).split("x")))
        fitting = [shape] if shape in available else []
    else:
        cores = CHIPS[kind].cores
        fitting = [shape for shape in available if math.prod(shape) * cores == int(match.group(2))]
    if not fitting:
        raise UserError(f"there is no slice {text}: {_list_slices(kind)}")
    return Topology(kind, min(fitting, key=max), slices)  # the most cubic has the shortest paths


def _list_slices(kind: str) -> str:
    """Returns a sentence that lists the slices of a kind of chip."""
    chip = CHIPS[kind]
    names = [f"{join_sizes(s)} ({math.prod(s) * chip.cores})" for s in shapes(kind)]
    counted = "cores, as in accelerator names," if chip.cores > 1 else "chips"
    if len(names) > 24:
        largest = f"{join_sizes(chip.max_shape)} and {chip.max_chips} chips"
        names = [*names[:24], f"and others of multiples of 4 up to {largest}"]
    several = "; more chips are several slices (--slices)"
    return f"{kind} has {', '.join(names)}, with {counted} in brackets{several}"


@dataclass(frozen=True)
class RooflineBounds:
    """Lower bounds of a program's time in seconds, one per resource; the longest one applies."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def longest(self) -> float:
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """Name of the resource with the longest bound."""
        return max(RESOURCES, key=lambda name: getattr(self, name))


RESOURCES = {
    "compute": "arithmetic",
    "memory": "memory (HBM)",
    "ici": "links between chips (ICI)",
    "dcn": "network between slices (DCN)",
}


def roofline_bounds(counts: Counts, chip: Chip) -> RooflineBounds:
    inside = [c for c in counts.collectives if not c.between_slices]
    return RooflineBounds(
        compute=(counts.flops + counts.kernel_flops) / chip.flops,
        memory=counts.hbm_bytes / chip.bandwidth,
        ici=math.fsum(collective_seconds(c, chip) for c in inside),
        dcn=math.fsum(collective_seconds(c, chip) for c in counts.collectives if c.between_slices),
    )


def collective_seconds(collective: Collective, chip: Chip) -> float:
    """Returns the lower bound of a collective's time over all trips, at the rate of ICI or DCN."""
    rate = chip.dcn if collective.between_slices else chip.ici
    return collective.trips * bytes_sent(collective) / rate


def bytes_sent(collective: Collective) -> int | float:
    """Returns the bytes that each chip must send, and receive, in one run of a collective.

    In an all-gather over n chips each chip receives (n - 1) / n of the result. An all-reduce is a
    reduce-scatter followed by an all-gather.
    """
    if collective.kind == "collective-permute":
        return collective.bytes
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * collective.bytes * (collective.devices - 1) / collective.devices


def sum_by_kind(collectives: Iterable[Collective], chip: Chip) -> list[tuple[str, int, int, float]]:
    """Sums collectives by kind and group size.

    Returns:
      Rows of kind, devices per group, bytes per chip, and lower bound in seconds; longest first.
    """
    groups: dict[tuple[str, int], list[float]] = {}
    for c in collectives:
        scope = " between slices" if c.between_slices else ""
        total = groups.setdefault((c.kind + scope, c.devices), [0, 0])
        total[0] += c.trips * c.bytes
        total[1] += collective_seconds(c, chip)
    rows = [(*key, int(size), time) for key, (size, time) in groups.items()]
    return sorted(rows, key=lambda row: -row[3])
