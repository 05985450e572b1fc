"""Crops and sizes against definitions written out pixel by pixel."""

import math

import numpy as np
import pytest

from mvit_jax.data import augmentation


def noise(time, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (time, height, width, 3), dtype=np.uint8)


def positions(height, width, time=2):
    """Every pixel holds (frame, row, column), so a crop tells where it was cut."""
    grid = np.indices((time, height, width), dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(grid, 0, -1))


def bilinear(frame, height, width):
    """Half-pixel centres, no antialias, edges repeated; in float64."""
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


# Smaller, larger, half exactly (where OpenCV changes its method), one axis only, the same.
@pytest.mark.parametrize("size", [(7, 11), (33, 45), (10, 13), (20, 9), (20, 26)])
def test_resize_is_bilinear_without_antialias(size):
    clip = noise(3, 20, 26)
    resized = augmentation.resize(clip, *size)
    assert resized.shape == (3, *size, 3)
    assert resized.dtype == np.uint8
    for frame, target in zip(clip, resized, strict=True):
        expected = bilinear(frame.astype(np.float64), *size)
        assert np.abs(target - expected).max() <= 1.0


def test_resize_takes_a_window_of_a_clip_and_any_number_of_frames():
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
def test_resize_short_side_rounds_the_long_one_down(shape, side, expected):
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


def test_one_crop_is_the_middle_one_of_three():
    clip = positions(23, 31)
    one = augmentation.crop_views(clip, 20, 1)
    assert one.shape == (1, 2, 20, 20, 3)
    assert np.array_equal(one[0], augmentation.crop_views(clip, 20, 3)[1])


def test_crops_need_large_enough_frames_and_a_known_number():
    with pytest.raises(ValueError, match="19x30"):
        augmentation.crop_views(noise(1, 19, 30), 20, 1)
    with pytest.raises(ValueError, match="not 2"):
        augmentation.crop_views(noise(1, 20, 30), 20, 2)


def test_random_boxes_keep_the_bounds_of_area_and_aspect():
    height, width = 200, 300
    rng = np.random.default_rng(0)
    boxes = [
        augmentation._random_box(height, width, rng, (0.08, 1.0), (0.75, 4 / 3))
        for _ in range(4000)
    ]
    top, left, box_height, box_width = np.array(boxes).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    area, aspect = box_height * box_width / (height * width), box_width / box_height
    assert area.min() > 0.075 and area.max() <= 1.0
    assert aspect.min() > 0.735 and aspect.max() < 1.36
    # Where every draw fits (an area to 0.3 of these frames does), areas are uniform and aspects
    # log-uniform; offsets reach both ends.
    small = area < 0.3
    assert np.mean(area[small] < 0.19) == pytest.approx(0.5, abs=0.05)
    assert np.mean(aspect[small] < 1) == pytest.approx(0.5, abs=0.05)
    assert np.mean(aspect[small] < 0.75**0.5) == pytest.approx(0.25, abs=0.05)
    room = (height - box_height)[small]
    assert np.mean(top[small] / room) == pytest.approx(0.5, abs=0.03)
    assert (top[small] == 0).any() and (top[small] == room).any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # No box with the asked area fits into these: the largest of the nearest aspect does.
        ((20, 100), (0, 36, 20, 27)),  # 20 * 4/3 = 26.7
        ((100, 20), (36, 0, 27, 20)),  # 20 / 0.75 = 26.7
    ],
)
def test_a_box_that_never_fits_falls_back_to_the_centre(shape, expected):
    height, width = shape
    box = augmentation._random_box(
        height, width, np.random.default_rng(0), (1.0, 1.0), (0.75, 4 / 3)
    )
    assert box == expected


def test_random_resized_crop_is_the_box_resized_in_all_frames():
    clip = noise(4, 40, 60)
    for seed in range(20):
        crop = augmentation.random_resized_crop(clip, 16, rng=np.random.default_rng(seed))
        top, left, height, width = augmentation._random_box(
            40, 60, np.random.default_rng(seed), (0.08, 1.0), (0.75, 1.3333)
        )
        assert crop.shape == (4, 16, 16, 3)
        for frame, target in zip(clip, crop, strict=True):
            box = frame[top : top + height, left : left + width].astype(np.float64)
            assert np.abs(target - bilinear(box, 16, 16)).max() <= 1.0


def test_random_resized_crop_depends_on_the_generator_alone():
    clip = positions(40, 60)
    crops = [
        augmentation.random_resized_crop(clip, 16, rng=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


def test_whole_frame_without_aspect_change_is_kept():
    clip = noise(2, 24, 24)
    crop = augmentation.random_resized_crop(
        clip, 24, rng=np.random.default_rng(0), area=(1.0, 1.0), aspect=(1.0, 1.0)
    )
    assert np.array_equal(crop, clip)
    assert math.isclose(crop.mean(), clip.mean())
