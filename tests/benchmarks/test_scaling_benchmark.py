"""Meshes that benchmarks/scaling.py compiles, and its errors before compilation."""

import argparse

import pytest

from benchmarks import scaling
from mvit_jax.common.errors import UserError
from mvit_jax.podplan import accelerators

DEFAULTS = {
    "model": "mvit_b_16x4", "topologies": "v5e:2x2,v5e:4x4*2", "clips": "2", "fsdp": "1,16",
    "effort": -1.0, "json": None,
}  # fmt: skip


def cases(**changes):
    return scaling.cases_of(argparse.Namespace(**(DEFAULTS | changes)))


def test_valid_meshes_of_each_topology_are_compiled():
    small, large = accelerators.parse("v5e:2x2"), accelerators.parse("v5e:4x4", 2)
    assert cases() == [(small, 1, 2), (large, 1, 2), (large, 16, 2)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fsdp": "0"}, "--fsdp must be numbers like 2,4,16, not '0'"),
        ({"fsdp": "x"}, "--fsdp must be numbers like "),
        ({"fsdp": "1,3"}, "--fsdp=3 does not divide the chips of a slice"),
        ({"clips": "0"}, "--clips must be numbers like "),
        ({"topologies": "v5e:2x2,v5e:3x3"}, "no slice v5e:3x3"),
        ({"topologies": "v5e:2x2*x"}, "must be a topology like v5e:4x4"),
        ({"model": "mvit_x"}, "no variant 'mvit_x'"),
        ({"effort": float("nan")}, "--effort=nan must be from -1 to 1"),
        ({"json": "/nowhere/scaling.json"}, "cannot be written"),
    ],
)
def test_bad_flags_are_rejected_before_compilation(changes, message):
    with pytest.raises(UserError, match=message):
        cases(**changes)
