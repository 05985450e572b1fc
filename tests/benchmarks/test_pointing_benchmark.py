import numpy as np
import pytest

from benchmarks import pointing


def test_maps_that_follow_their_clip_are_told_from_one_map_for_all():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 2, 9, 9), bool)
    for mask in masks:
        y, x = rng.integers(0, 7, 2)
        mask[:, y : y + 3, x : x + 3] = True
    noise = rng.random(masks.shape) / 10
    hit, hit_other = pointing.hits(masks + noise, masks)
    assert hit == 1 and hit_other < 0.5
    share = masks.reshape(6, -1).astype(float)
    expected = np.corrcoef(share)[np.triu_indices(6, 1)].mean()
    assert pointing.correlation(masks.astype(float)) == pytest.approx(expected)
    same = np.broadcast_to(noise[0], masks.shape)
    assert pointing.correlation(same) == pytest.approx(1)
    one_empty = np.concatenate([same, 0 * same[:1]])
    assert pointing.correlation(one_empty) == pytest.approx(1)
    t, y, x = np.unravel_index(noise[0].argmax(), noise[0].shape)
    assert pointing.hits(same, masks) == pytest.approx((masks[:, t, y, x].mean(),) * 2)
