"""Crops and resizing against reference implementations pixel by pixel."""

import dataclasses

import numpy as np
import pytest

from benchmarks.augmentation import plain
from mvit_jax.common.errors import UserError
from mvit_jax.data import augmentation, randaugment
from mvit_jax.data.augmentation import Augmentation, augment
from mvit_jax.data.image_ops import Box


def noise(time, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (time, height, width, 3), dtype=np.uint8)


def positions(height, width, time=2):
    """Returns a clip whose pixels hold (frame, row, column), to locate crops."""
    grid = np.indices((time, height, width), dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(grid, 0, -1))


def bilinear(frame, height, width):
    """Resizes with half-pixel centres, without antialias, with repeated edges, in float64."""
    rows, columns = frame.shape[:2]
    out = np.empty((height, width, 3))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            v, u = y - top, x - left
            upper = (1 - u) * frame[top, left] + u * frame[top, right]
            lower = (1 - u) * frame[bottom, left] + u * frame[bottom, right]
            out[i, j] = (1 - v) * upper + v * lower
    return out


# Smaller, larger, exactly half (for which OpenCV changes its method), one axis only, equal.
@pytest.mark.parametrize("size", [(7, 11), (33, 45), (10, 13), (20, 9), (20, 26)])
def test_resize_is_bilinear_without_antialias(size):
    clip = noise(3, 20, 26)
    resized = augmentation.resize(clip, *size)
    assert resized.shape == (3, *size, 3)
    assert resized.dtype == np.uint8
    for frame, target in zip(clip, resized, strict=True):
        expected = bilinear(frame.astype(np.float64), *size)
        assert np.abs(target - expected).max() <= 1.0


def test_resize_accepts_array_views_and_any_number_of_frames():
    clip = noise(70, 12, 14)  # 210 channels if frames were merged
    window = clip[:, 2:9, 3:13]
    assert np.array_equal(
        augmentation.resize(window, 5, 6),
        np.stack([augmentation.resize(frame[None].copy(), 5, 6)[0] for frame in window]),
    )


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((34, 25), 20, (27, 20)),  # 27.2
        ((25, 34), 20, (20, 27)),
        ((24, 24), 30, (30, 30)),
        ((25, 34), 25, (25, 34)),
        ((256, 340), 224, (224, 297)),  # 297.5
    ],
)
def test_resize_short_side_rounds_the_long_side_down(shape, side, expected):
    clip = np.zeros((1, *shape, 3), np.uint8)
    assert augmentation.resize_short_side(clip, side).shape == (1, *expected, 3)


def test_three_crops_lie_along_the_longer_side():
    # The centre is rounded up: ceil((31 - 20) / 2) = 6.
    wide = augmentation.crop_views(positions(20, 31), 20, 3)
    assert wide.shape == (3, 2, 20, 20, 3)
    assert [tuple(view[0, 0, 0, 1:]) for view in wide] == [(0, 0), (0, 6), (0, 11)]
    tall = augmentation.crop_views(positions(31, 22), 20, 3)
    assert [tuple(view[0, 0, 0, 1:]) for view in tall] == [(0, 1), (6, 1), (11, 1)]
    for view in (*wide, *tall):  # squares, the same in all frames, nothing resized
        rows, columns = view[..., 1].astype(int), view[..., 2].astype(int)
        assert (rows == rows[0, 0, 0] + np.arange(20)[:, None]).all()
        assert (columns == columns[0, 0, 0] + np.arange(20)).all()
        assert (view[..., 0] == np.arange(2)[:, None, None]).all()


def test_one_crop_is_the_middle_of_three_crops():
    clip = positions(23, 31)
    one = augmentation.crop_views(clip, 20, 1)
    assert one.shape == (1, 2, 20, 20, 3)
    assert np.array_equal(one[0], augmentation.crop_views(clip, 20, 3)[1])


def test_crops_of_small_frames_or_of_unsupported_counts_raise():
    with pytest.raises(ValueError, match="19x30"):
        augmentation.crop_views(noise(1, 19, 30), 20, 1)
    with pytest.raises(ValueError, match="not 2"):
        augmentation.crop_views(noise(1, 20, 30), 20, 2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # No box of the requested area fits: the result is the largest box of the nearest aspect.
        ((20, 100), (0, 36, 20, 27)),  # 20 * 4/3 = 26.7
        ((100, 20), (36, 0, 27, 20)),  # 20 / 0.75 = 26.7
    ],
)
def test_a_box_that_never_fits_falls_back_to_the_centre(shape, expected):
    height, width = shape
    box = augmentation.random_box(
        height, width, np.random.default_rng(0), (1.0, 1.0), (0.75, 4 / 3)
    )
    assert box == expected


def reference_box(height, width, random):
    """Returns the random crop of PySlowFast, from uniform numbers of `random`."""
    for _ in range(10):
        area = height * width * (0.08 + 0.92 * random())
        aspect = 0.75 * (1.3333 / 0.75) ** random()
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            return int(random() * (height - h + 1)), int(random() * (width - w + 1)), h, w
    return None


@pytest.mark.parametrize("shape", [(256, 340), (340, 256), (240, 240)])
def test_random_boxes_have_the_distribution_of_the_reference(shape):
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    samples = np.array([augmentation.random_box(*shape, rng, (0.08, 1.0)) for _ in range(4000)])
    boxes = [reference_box(*shape, other.random) for _ in range(4000)]
    references = np.array([box for box in boxes if box is not None])
    assert len(references) > 3990
    for column in range(4):
        # Two samples' Kolmogorov-Smirnov distance: 0.0436 at a thousandth.
        values = np.sort(np.concatenate([samples[:, column], references[:, column]]))
        shares = [
            np.searchsorted(np.sort(x[:, column]), values, "right") / len(x)
            for x in (samples, references)
        ]
        assert np.abs(shares[0] - shares[1]).max() < 0.0436


VIDEO = randaugment.parse("rand-m7-n4-mstd0.5-inc1")
IMAGE = randaugment.parse("rand-m9-n6-mstd0.5-inc1")


def test_videos_are_augmented_before_cropping():
    settings = Augmentation(randaugment=VIDEO)
    clip = noise(3, 40, 60)
    changed = 0
    for seed in range(60):
        result = augment(clip, settings, 16, rng=np.random.default_rng(seed), image=False)
        rng = np.random.default_rng(seed)
        frames = plain(clip, VIDEO.draw(rng))
        box = augmentation.random_box(40, 60, rng, (0.08, 1.0))
        cropped = box.crop(frames, Box(0, 0, 40, 60))
        np.testing.assert_array_equal(result, augmentation.resize(cropped, 16, 16))
        changed += (frames != clip).any()
    assert 30 < changed < 60


def test_images_are_cropped_before_augmentation():
    fill = (124, 116, 104)
    settings = Augmentation(randaugment=IMAGE, fill=fill, interpolation="bicubic")
    clip = noise(1, 40, 60)
    for seed in range(60):
        result = augment(clip, settings, 16, rng=np.random.default_rng(seed), image=True)
        rng = np.random.default_rng(seed)
        operations = IMAGE.draw(rng)
        cut = augmentation.draw_cut(40, 60, settings, 16, rng, image=True)
        cropped = cut.apply(clip, "bicubic")
        np.testing.assert_array_equal(result, plain(cropped, operations, fill))


def test_frames_are_resized_before_other_augmentation():
    settings = Augmentation(crop_area=None, short_side=20, randaugment=VIDEO)
    clip = noise(2, 40, 60)
    for seed in range(20):
        result = augment(clip, settings, 20, rng=np.random.default_rng(seed), image=False)
        frames = plain(
            augmentation.resize_short_side(clip, 20), VIDEO.draw(np.random.default_rng(seed))
        )
        np.testing.assert_array_equal(result, frames[:, :, 5:25])


def test_without_augmentation_frames_are_resized_and_centre_cropped():
    clip = noise(2, 41, 60)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    for image in (False, True):
        result = augment(clip, Augmentation(crop_area=None), 16, rng=rng, image=image)
        resized = augmentation.resize_short_side(clip, 16)
        expected = augmentation.crop_views(resized, 16, 1, image=image)[0]
        np.testing.assert_array_equal(result, expected)
    assert rng.bit_generator.state == before


def test_jitter_draws_the_inverse_short_side_and_a_position():
    settings = Augmentation(crop_area=None, jitter=(64, 80))
    rng = np.random.default_rng(0)
    cuts = [augmentation.draw_cut(64, 73, settings, 56, rng) for _ in range(4000)]
    assert {cut.window[2:] for cut in cuts} == {(56, 56)}
    sides = np.array([cut.height for cut in cuts])
    squares = np.array([cut.window[:2] for cut in cuts])
    assert [cut.width for cut in cuts] == [73 * side // 64 for side in sides]
    assert sides.min() == 64 and sides.max() == 80
    # A side is drawn when 1 / u rounds to it.
    values = np.arange(64, 81)
    low, high = np.maximum(values - 0.5, 64), np.minimum(values + 0.5, 80)
    expected = len(sides) * (1 / low - 1 / high) / (1 / 64 - 1 / 80)
    counts = np.bincount(sides - 64)
    assert ((counts - expected) ** 2 / expected).sum() < 39.3  # 16 degrees of freedom
    # For each side, positions are uniform.
    room = np.stack([sides - 56, 73 * sides // 64 - 56], -1)
    assert ((squares / room) <= 1).all()
    assert np.mean(squares / room, 0) == pytest.approx(0.5, abs=0.02)
    assert (squares == 0).any(0).all() and (squares == room).any(0).all()
    few = sides == 64
    counts = np.bincount(squares[few, 0], minlength=9)
    assert ((counts - few.sum() / 9) ** 2 / (few.sum() / 9)).sum() < 26.1


def test_jitter_crops_all_frames_at_the_same_position():
    clip = noise(3, 40, 60)
    settings = Augmentation(crop_area=None, jitter=(30, 30), randaugment=VIDEO)
    rng = np.random.default_rng(3)
    result = augment(clip, settings, 20, rng=np.random.default_rng(3), image=False)
    frames = augmentation.resize_short_side(plain(clip, VIDEO.draw(rng)), 30)
    matches = [
        (top, left)
        for top in range(11)
        for left in range(26)
        if np.array_equal(result, frames[:, top : top + 20, left : left + 20])
    ]
    assert len(matches) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"jitter": (256, 320)}, "cannot both"),
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_area": (0.5, 0.2)}, "crop_area"),
        ({"crop_area": (0.5, 1.2)}, "crop_area"),
        ({"crop_area": None, "jitter": (320, 256)}, "jitter"),
        ({"crop_area": None, "jitter": (0, 256)}, "jitter"),
    ],
)
def test_invalid_bounds_are_rejected(changes, problem):
    with pytest.raises(UserError, match=problem):
        Augmentation(**changes)


def test_a_jitter_short_side_below_the_crop_size_is_rejected():
    settings = Augmentation(crop_area=None, jitter=(15, 30))
    with pytest.raises(UserError, match="squares of 16 pixels"):
        augment(noise(1, 40, 60), settings, 16, rng=np.random.default_rng(0), image=False)


def test_boxes_stay_on_the_pixels_that_they_surround():
    """A painted box is where the moved box says, after every cut."""
    rng = np.random.default_rng(0)
    for case in range(60):
        height, width = rng.integers(60, 90, 2).tolist()
        y1, y2 = np.sort(rng.choice(np.arange(5, height - 5), 2, replace=False))
        x1, x2 = np.sort(rng.choice(np.arange(5, width - 5), 2, replace=False))
        clip = np.zeros((1, height, width, 3), np.uint8)
        clip[:, y1:y2, x1:x2] = 255
        settings = [
            Augmentation(crop_area=(0.2, 1.0)),
            Augmentation(crop_area=None, jitter=(48, 100)),
            Augmentation(crop_area=None),
        ][case % 3]
        cut = augmentation.draw_cut(height, width, settings, 48, rng)
        if case % 6 == 5:
            cut = augmentation.whole_cut(height, width, 48)
        [moved] = cut.move(np.array([[x1, y1, x2, y2]], float))
        inside = cut.apply(clip)[0, :, :, 0] > 127
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows) == 0:  # outside of the cut, or thinner than a pixel
            assert min(moved[2] - moved[0], moved[3] - moved[1]) < 1.5
            continue
        painted = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(moved, np.minimum(painted, np.tile(inside.shape[::-1], 2) - 1),
                                   atol=2)  # fmt: skip


def test_boxes_are_moved_as_by_the_reference_code():
    """Values by hand: 1920x1080 to a short side of 300 is 533x300, so the factor is 533 / 1920."""
    cut = augmentation.whole_cut(1080, 1920, 300)
    assert (cut.height, cut.width) == (300, 533)
    box, factor = np.array([[100.0, 200.0, 400.0, 1000.0]]), 533 / 1920
    np.testing.assert_allclose(cut.move(box), box * factor, rtol=1e-12)
    square = dataclasses.replace(cut, window=Box(50, 60, 224, 224))
    expected = [[0, 200 * factor - 50, 400 * factor - 60, 223]]
    np.testing.assert_allclose(square.move(box), expected, rtol=1e-12)
    outside = square.move(np.array([[0.0, 0.0, 100.0, 100.0]]))
    np.testing.assert_array_equal(outside, [[0, 0, 0, 0]])
    tall = augmentation.whole_cut(1920, 1080, 300)
    np.testing.assert_allclose(tall.move(box), box * factor, rtol=1e-12)
