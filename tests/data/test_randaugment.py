"""RandAugment against Pillow frame by frame, stored outputs of timm, and its distributions."""

import numpy as np
import pytest

from benchmarks.augmentation import plain
from mvit_jax.common.errors import UserError
from mvit_jax.data import randaugment
from mvit_jax.data.image_ops import Box
from mvit_jax.data.randaugment import OPERATIONS, Operation, RandAugment
from tests.reference import make_randaugment as timm

RECIPE = "rand-m7-n4-mstd0.5-inc1"


def frames(kind, time, height, width, rng):
    """Returns noise, noise of four levels, two plain halves, or a dark ramp, by `kind`."""
    noise = rng.integers(0, 256, (time, height, width, 3), dtype=np.uint8)
    if kind == "steps":
        return noise // 64 * 64
    if kind == "plain":
        clip = np.full_like(noise, rng.integers(256))
        clip[:, : height // 2] = rng.integers(256, size=3)
        return clip
    if kind == "ramp":
        return (np.indices(noise.shape).sum(0) % 97).astype(np.uint8)
    return noise


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(2, 23, 31), (1, 24, 18), (2, 1, 1), (1, 2, 9)])
def test_operations_equal_pillow(name, shape):
    rng = np.random.default_rng(len(name))
    for kind in ("noise", "steps", "plain", "ramp"):
        clip = frames(kind, *shape, rng)
        for magnitude in (0, 0.4, 2.5, 5, 6.83, 8, 9.7, 10):
            for sign in (1, -1):
                operations = (randaugment.operation(name, magnitude, sign),)
                result = randaugment.apply(clip, operations, fill=(7, 200, 99))
                expected = plain(clip, operations, (7, 200, 99))
                np.testing.assert_array_equal(result, expected, f"{kind} {operations}")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_timm(name):
    with np.load(timm.FILE) as stored:
        for magnitude in timm.MAGNITUDES:
            for sign in (1, -1):
                operations = (randaugment.operation(name, magnitude, sign),)
                result = randaugment.apply(timm.frames(), operations, fill=timm.FILL)
                expected = stored[timm.key(name, magnitude, sign)]
                np.testing.assert_array_equal(result, expected, f"{magnitude} {sign}")


def test_a_box_of_the_frames_equals_the_crop_of_augmented_frames():
    rng = np.random.default_rng(0)
    outside = 0
    for i in range(400):
        height, width = (int(side) for side in rng.integers(1, 50, 2))
        kind = ("noise", "steps", "plain", "ramp")[i % 4]
        clip = frames(kind, int(rng.integers(1, 4)), height, width, rng)
        box_height, box_width = int(rng.integers(height)) + 1, int(rng.integers(width)) + 1
        box = Box(
            int(rng.integers(height - box_height + 1)),
            int(rng.integers(width - box_width + 1)),
            box_height,
            box_width,
        )
        settings = RandAugment(int(rng.integers(11)), 6, float(rng.choice([0.0, 0.5])))
        operations = settings.draw(rng)
        before = clip.copy()
        result = randaugment.apply(clip, operations, fill=(3, 140, 255), box=box)
        expected = box.crop(plain(clip, operations, (3, 140, 255)), Box(0, 0, height, width))
        np.testing.assert_array_equal(
            result, expected, f"{kind} {operations} {box} of {clip.shape}"
        )
        np.testing.assert_array_equal(clip, before)
        outside += bool((expected == (3, 140, 255)).all(-1).all())
    assert outside > 0  # some boxes lie outside of the frame's content


def test_the_centre_pixel_of_a_rotated_frame_is_rounded_as_in_pillow():
    # The last bits of its coordinates decide how it is rounded.
    rng = np.random.default_rng(0)
    clip = frames("noise", 1, 25, 23, rng)
    whole, box = Box(0, 0, 25, 23), Box(3, 11, 22, 8)
    for degrees in np.linspace(-30, 30, 401):
        operations = (Operation("Rotate", float(degrees)),)
        result = randaugment.apply(clip, operations, box=box)
        np.testing.assert_array_equal(
            result, box.crop(plain(clip, operations), whole), str(degrees)
        )


def test_strings_are_parsed():
    assert randaugment.parse(RECIPE) == RandAugment(7, 4, 0.5)
    assert randaugment.parse("rand-m9-n6-mstd0.5-inc1") == RandAugment(9, 6, 0.5)
    assert randaugment.parse("rand-inc1-n3") == RandAugment(10, 3, 0.0)  # timm's m and mstd
    assert hash(randaugment.parse(RECIPE)) == hash(RandAugment(7, 4, 0.5))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must start with 'rand'"),
        ("augmix-m5-w4-d2", "must start with 'rand'"),
        ("rand-m7-n4-mstd0.5-inc1-tweights", "part 'tweights'.* is unknown"),
        ("rand-m7-p0.3-inc1", "part 'p0.3'.* is unknown"),
        ("rand-m7-mmax5-inc1", "part 'mmax5'.* is unknown"),
        ("rand-m7--inc1", "part ''.* is unknown"),
        ("rand-M7-inc1", "part 'M7'.* is unknown"),
        ("rand-m7-n4-m3-inc1", "part 'm3'.* must appear once"),
        ("rand-m7.5-inc1", "part 'm7.5'.* a number"),
        ("rand-m-inc1", "part 'm'.* a number"),
        ("rand-mstdinf-inc1", "part 'mstdinf'"),
        ("rand-m11-inc1", "part 'm11'.* out of range: m goes from 0 to 10"),
        ("rand-m7-n0-inc1", "part 'n0'.* out of range"),
        ("rand-m7-mstd101-inc1", "part 'mstd101'.* out of range"),
        ("rand-m7-n4-mstd0.5", "end it with -inc1"),
        ("rand-m7-n4-mstd0.5-inc0", "do not grow with the magnitude"),
    ],
)
def test_invalid_strings_raise_a_one_sentence_error(text, problem):
    with pytest.raises(UserError, match=problem) as caught:
        randaugment.parse(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(1)
    return [randaugment.parse(RECIPE).draw(rng) for _ in range(6000)]


def test_each_randaugment_layer_is_applied_half_of_the_time(draws):
    # Binomial(4, 1/2): chi-square of 4 degrees of freedom, 18.5 at a thousandth.
    counts = np.bincount([len(operations) for operations in draws], minlength=5)
    expected = len(draws) * np.array([1, 4, 6, 4, 1]) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 18.5


def test_operations_are_drawn_evenly_and_with_replacement(draws):
    names = [op.name for operations in draws for op in operations]
    counts = np.array([names.count(name) for name in OPERATIONS])
    expected = len(names) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # 14 degrees of freedom
    pairs = [
        operations[0].name == operations[1].name for operations in draws if len(operations) == 2
    ]
    assert np.mean(pairs) == pytest.approx(1 / 15, abs=0.02)


def test_magnitudes_are_normal_and_signs_are_balanced(draws):
    degrees = np.array([op.argument for d in draws for op in d if op.name == "Rotate"])
    assert np.mean(degrees > 0) == pytest.approx(0.5, abs=0.06)
    magnitudes = np.abs(degrees) / 3
    assert magnitudes.mean() == pytest.approx(7, abs=0.06)
    assert magnitudes.std() == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.abs(magnitudes - 7) < 0.5) == pytest.approx(0.683, abs=0.06)
    factors = np.array([op.argument for d in draws for op in d if op.name == "Color"])
    assert np.mean(factors > 1) == pytest.approx(0.5, abs=0.06)
    assert np.abs(factors - 1).mean() == pytest.approx(0.63, abs=0.006)


def test_magnitudes_are_clipped():
    rng = np.random.default_rng(0)
    for magnitude, bound in ((10, 10), (0, 0)):
        operations = [op for _ in range(500) for op in RandAugment(magnitude, 4, 0.5).draw(rng)]
        magnitudes = np.array([abs(op.argument) for op in operations if op.name == "ShearX"]) / 0.03
        assert magnitudes.min() >= 0 and magnitudes.max() <= 10 + 1e-9
        assert np.mean(np.isclose(magnitudes, bound)) == pytest.approx(0.5, abs=0.15)


def test_without_a_deviation_the_magnitude_is_exact():
    rng = np.random.default_rng(0)
    settings = RandAugment(7, 4, 0.0)
    operations = {op for _ in range(300) for op in settings.draw(rng)}
    assert Operation("Rotate", 21.0) in operations and Operation("Rotate", -21.0) in operations
    # 15 operations, of which 9 have a sign.
    assert len(operations) == 24


def test_an_unknown_operation_is_an_error():
    with pytest.raises(ValueError, match="no operation 'Cutout'"):
        randaugment.apply(np.zeros((1, 4, 4, 3), np.uint8), (Operation("Cutout", 1.0),))
