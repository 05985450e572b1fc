"""TPU slices and roofline bounds against figures worked by hand."""

import math
import re

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.podplan import accelerators
from mvit_jax.podplan.hlo.cost import Collective, Counts, Operation


@pytest.mark.parametrize(
    "text, name, chips, hosts",
    [
        ("v5e:16x16", "v5e:16x16", 256, 64),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("V5LITEPOD-8", "v5e:2x4", 8, 2),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v6e-16", "v6e:4x4", 16, 4),
        ("v4-8", "v4:2x2x1", 4, 1),  # counts cores, two a chip
        ("v4-1024", "v4:8x8x8", 512, 128),  # and not 4x8x16
        ("v4:4x8x16", "v4:4x8x16", 512, 128),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v5p:16x16x24", "v5p:16x16x24", 6144, 1536),
    ],
)
def test_slices_are_parsed_by_shape_and_by_accelerator(text, name, chips, hosts):
    topology = accelerators.parse(text)
    assert (topology.name, topology.chips, topology.hosts) == (name, chips, hosts)


def test_chips_and_hosts_of_several_slices_are_summed():
    topology = accelerators.parse("v5e:16x16", 4)
    assert (topology.chips, topology.chips_per_slice, topology.hosts) == (1024, 256, 256)
    assert str(topology) == "4 slices of v5e:16x16"


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5e:16x32", r"no slice v5e:16x32: v5e has 1x1 \(1\), 2x2 \(4\), .*16x16 \(256\)"),
        ("v5e:4x2", "no slice v5e:4x2"),  # sides rise
        ("v5e-12", "no slice v5e-12"),
        ("v4:4x4x6", r"no slice v4:4x4x6: v4 has 2x2x1 \(8\).*4x4x4 \(128\)"),
        ("v4:16x16x20", "no slice"),
        ("v5p:16x20x28", "no slice .* and others of multiples of 4 up to 16x20x28 and 6144 chips"),
        ("v4-7", "no slice v4-7"),
        ("v7x:2x2", r"no topology 'v7x:2x2': give a kind of chip \(v4, v5e, v5p, v6e\)"),
        ("16x16", "no topology"),
        ("v5e", "no topology"),
        ("v5e:4x4;rm", "no topology"),
    ],
)
def test_unknown_slices_are_refused_with_the_valid_ones(text, message):
    with pytest.raises(UserError, match=message):
        accelerators.parse(text)


def test_zero_slices_are_refused():
    with pytest.raises(UserError, match="--slices=0 must be at least 1"):
        accelerators.parse("v5e:4x4", 0)


@pytest.mark.parametrize("kind", accelerators.CHIPS)
def test_every_listed_slice_is_accepted(kind):
    for shape in accelerators.shapes(kind):
        name = f"{kind}:{'x'.join(map(str, shape))}"
        assert accelerators.parse(name).shape == shape
        assert math.prod(shape) <= accelerators.CHIPS[kind].max_chips
    with pytest.raises(UserError) as error:
        accelerators.parse(f"{kind}:3x3")
    # Names in the message are valid arguments.
    for word in re.findall(r"(\d+x[\dx]+) \(", str(error.value)):
        accelerators.parse(f"{kind}:{word}")


def collective(kind, size, devices, *, trips=1, between_slices=False):
    return Collective(kind, "", trips, size, devices, between_slices)


@pytest.mark.parametrize(
    "operation, expected",
    [
        (collective("all-reduce", 800, 4), 1200),  # 600 to scatter the sum, 600 to gather it
        (collective("all-gather", 800, 4), 600),
        (collective("reduce-scatter", 800, 4), 600),
        (collective("all-to-all", 800, 8), 700),
        (collective("collective-permute", 800, 4), 800),
        (collective("all-reduce", 800, 1), 0),
        (collective("all-reduce", 800, 2, between_slices=True), 800),
    ],
)
def test_collectives_move_the_expected_bytes_per_chip(operation, expected):
    assert accelerators.bytes_sent(operation) == expected


def test_the_longest_bound_limits_a_step():
    """v5e: 197 TFLOP/s, 819 GB/s of HBM, 200 GB/s each way within a slice, 3.125 GB/s between."""
    work = Operation("dot", "dot", "matrix", "", 2, int(98.5e9), 0, 0, 0, int(81.9e9), int(98.5e9))
    collectives = (
        collective("all-gather", 400_000_000, 2, trips=3),  # 3 x 0.2 GB
        collective("all-reduce", 3_125_000, 2, between_slices=True),  # 3.125 MB
    )
    chip = accelerators.CHIPS["v5e"]
    bounds = accelerators.roofline_bounds(Counts((work,), collectives, ()), chip)
    assert bounds.compute == pytest.approx(2e-3)
    assert bounds.memory == pytest.approx(0.2)
    assert bounds.ici == pytest.approx(3e-3)
    assert bounds.dcn == pytest.approx(1e-3)
    assert (bounds.longest, bounds.bound) == (bounds.memory, "memory")
    rows = accelerators.sum_by_kind(collectives, chip)
    assert rows[0][:3] == ("all-gather", 2, 1_200_000_000)
    assert rows[1][:3] == ("all-reduce between slices", 2, 3_125_000)
