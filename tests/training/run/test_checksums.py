import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import checksums


def by_definition(x: np.ndarray) -> list[int]:
    """Returns the sums word by word, in Python's integers."""
    size = {1: 1, 2: 2}.get(x.dtype.itemsize, 4)
    words = np.frombuffer(x.tobytes(), f"<u{size}").tolist()
    first = second = 0
    for index, word in enumerate(words):
        mixed = index * 2654435761 % 2**32
        mixed ^= mixed >> 15
        first += word * (mixed | 1)
        mixed = mixed * 2246822519 % 2**32
        mixed ^= mixed >> 13
        second += word * (mixed | 1)
    return [first % 2**32, second % 2**32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float64"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3, 4)])
def test_digests_equal_the_sums_in_python_integers(dtype, shape):
    values = np.random.default_rng(0).normal(0, 50, shape)
    with jax.enable_x64(True):
        x = np.asarray(jnp.asarray(values).astype(dtype))
        (digest,) = checksums.digests({"x": x}).values()
    assert digest == {"dtype": dtype, "shape": list(shape), "sums": by_definition(x)}


def test_digests_do_not_depend_on_the_mesh(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 16)
    random = np.random.default_rng(1)
    tree = {"a": random.normal(size=(24, 16)).astype(np.float32), "b": np.float32(3).reshape(())}
    plain = checksums.digests(tree)
    for data, fsdp in ((8, 1), (2, 4), (1, 8)):
        mesh = sharding.make_mesh(data, fsdp, jax.devices())
        placed = jax.device_put(tree, sharding.state_shardings(mesh, tree))
        assert checksums.digests(placed) == plain
        with jax.set_mesh(mesh):
            assert checksums.digests(placed) == checksums.digests(tree) == plain
        if fsdp > 1:
            assert not placed["a"].sharding.is_fully_replicated


def test_digests_detect_flipped_bits_and_exchanged_values():
    x = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    saved = checksums.digests({"x": x})
    assert checksums.first_mismatch({"x": x}, saved) is None
    for index in range(x.size):
        for bit in range(0, 32, 5):
            other = x.copy()
            other.view(np.uint32).flat[index] ^= np.uint32(1 << bit)
            assert checksums.first_mismatch({"x": other}, saved) == "x"
    for index in range(x.size - 1):
        other = x.copy()
        other.flat[[index, index + 1]] = other.flat[[index + 1, index]]
        assert checksums.first_mismatch({"x": other}, saved) == "x"
    assert checksums.first_mismatch({"x": np.negative(np.zeros(3, np.float32))}, {}) == "x"


def test_tensors_restored_in_another_dtype_are_not_compared():
    x = np.arange(6, dtype=np.float32)
    saved = checksums.digests({"x": x})
    assert checksums.first_mismatch({"x": x.astype(np.float16)}, saved) is None
