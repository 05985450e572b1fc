"""Digests of tensors: two numbers each, by which what is read of a checkpoint is verified.

Orbax 0.12.8 notices damage to what it needs to find the tensors, not to their values: none of the
bits that were flipped in the files of these was noticed (2026-11-23).

A digest is two sums, modulo 2^32, of a tensor's bits in words, each word multiplied by an odd
number that depends on where it stands. Such sums may be taken in any order, so that they are the
same on every mesh; an odd factor has an inverse, so that one changed word always changes both sums;
that several changed words change neither has a chance of about 2^-64. They are computed where the
tensor lies. That is against damage, not against a forger.

For the 942 tensors of mvit_b_16x4's state under AdamW, 439 MB, they take 0.3 to 0.4 s on 2 cores,
which the steps wait for; and once, to compile, 4 s. The save itself keeps the steps waiting for 0.6
to 1.3 s, and is on disk after 2 to 4 s, or 16 to 24 s where others use it (2026-11-23).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

# The dtype's name, the shape, and the two sums; as JSON has them.
Digest = dict[str, Any]


def digests(tree: Any) -> dict[str, Digest]:
    """The digest of each array of a tree, by the path of its name.

    Arrays may lie on any mesh, also one of several processes, which then must all call this and
    all get the same. Each device works on what it holds: of copies, the first is taken.
    """
    arrays = by_path(tree)
    parts = [[_sent(shard, x) for shard in _shards(x)] for x in arrays.values()]  # not waited for
    totals = [np.reshape(pairs, (-1, 2)).sum(0, np.uint32) for pairs in jax.device_get(parts)]
    sums = np.reshape(totals, (-1, 2)).astype(np.uint32)
    elsewhere = np.array([not _is_here(x) for x in arrays.values()])
    if elsewhere.any():
        everywhere = np.asarray(multihost_utils.process_allgather(sums)).reshape(-1, *sums.shape)
        sums[elsewhere] = everywhere[:, elsewhere].sum(0, np.uint32)
    return {
        path: {"dtype": str(x.dtype), "shape": list(x.shape), "sums": pair.tolist()}
        for (path, x), pair in zip(arrays.items(), sums, strict=True)
    }


def first_mismatch(tree: Any, kept: Mapping[str, Digest]) -> str | None:
    """The path of the first array whose digest is not the one that was kept; or None.

    An array that was restored in another dtype than it was saved in cannot be compared.
    """
    for path, digest in digests(tree).items():
        before = kept.get(path)
        if before is None or (before["dtype"] == digest["dtype"] and before != digest):
            return path
    return None


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any tree, also of an optimiser's state, by the path of their names."""
    return {
        "/".join(_name(key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(key: Any) -> str:
    """Of one step of a path: Orbax's metadata has other kinds of nodes than the state."""
    for kind in ("key", "name", "idx"):
        if hasattr(key, kind):
            return str(getattr(key, kind))
    return str(key)


def _is_here(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _shards(x: Any) -> list[tuple[Any, tuple[slice, ...]]]:
    """The parts of an array that this process holds, and their places in it."""
    if not isinstance(x, jax.Array):
        return [(x, ())]
    return [(s.data, s.index) for s in x.addressable_shards if s.replica_id == 0]


def _sent(shard: tuple[Any, tuple[slice, ...]], whole: Any) -> UInt32[Array, "2"]:
    """The sums of one part. One program for each shape, not one for all tensors, which would take
    as long to compile as the model; and none that talks to other devices: so many collectives
    at a time got in each other's way between processes of CPUs."""
    part, index = shard
    starts = np.array([s.start or 0 for s in index] or [0] * whole.ndim, np.uint32)
    device = part.device if isinstance(part, jax.Array) else jax.local_devices()[0]
    with jax.set_mesh(Mesh([device], "one")):  # whatever mesh the caller is in
        return _sums(part, starts, tuple(whole.shape))


@functools.partial(jax.jit, static_argnames="whole")
def _sums(part: Any, starts: UInt32[Array, " axes"], whole: tuple[int, ...]) -> UInt32[Array, "2"]:
    """The two sums of a part of an array of any shape, of a dtype of 1, 2, 4 or 8 bytes; it starts
    at `starts` in an array of the shape `whole`."""
    words = _words(part)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, length in enumerate([*whole, *words.shape[len(whole) :]]):
        here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        if axis < len(whole):
            here += starts[axis]
        place = place * jnp.uint32(length) + here
    # Multiplied and folded, so that neighbours have factors that have nothing to do with each
    # other; the constants are those of common hash functions (Knuth's, MurmurHash's).
    mixed = place * jnp.uint32(2654435761)
    mixed ^= mixed >> 15
    first = mixed | 1
    mixed *= jnp.uint32(2246822519)
    mixed ^= mixed >> 13
    second = mixed | 1
    return jnp.stack([jnp.sum(words * w, dtype=jnp.uint32) for w in (first, second)])


def _words(x: Any) -> UInt32[Array, "..."]:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
