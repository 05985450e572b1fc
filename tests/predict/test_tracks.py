"""Tracks: overlaps by hand, and boxes that move."""

import numpy as np

from mvit_jax.predict.tracks import colours, link
from mvit_jax.training.evaluation.frame_map import overlaps


def test_overlaps_are_shares_of_the_union():
    a = np.array([(0, 0, 2, 2), (0, 0, 0, 2)], float)
    b = np.array([(1, 0, 3, 2), (0, 0, 2, 2), (5, 5, 6, 6)], float)
    np.testing.assert_allclose(overlaps(a, b), [(1 / 3, 1, 0), (0, 0, 0)])


def box(x, width=0.2):
    return (x, 0.1, x + width, 0.9)


def test_boxes_that_move_keep_their_tracks_in_any_order():
    left, right = [0.1, 0.15, 0.2], [0.6, 0.55, 0.5]
    frames = [np.array([box(a), box(b)]) for a, b in zip(left, right, strict=True)]
    frames[1] = frames[1][::-1]
    tracks = link([3.0, 4.0, 5.0], frames)
    assert [t.tolist() for t in tracks] == [[0, 1], [1, 0], [0, 1]]


def test_the_largest_overlap_is_linked_first_and_each_box_once():
    frames = [np.array([box(0.1), box(0.18)]), np.array([box(0.17)]), np.zeros((0, 4)),
              np.array([box(0.17)]), np.array([box(0.17), box(0.9, 0.1)])]  # fmt: skip
    tracks = [t.tolist() for t in link([0.5, 1.5, 2.5, 3.5, 4.5], frames)]
    assert tracks == [[0, 1], [1], [], [2], [2, 3]]
    # Not beyond a second, nor below the smallest overlap.
    assert [t.tolist() for t in link([0.0, 2.0], [frames[1], frames[1]])] == [[0], [1]]
    far = [np.array([box(0.1)]), np.array([box(0.25)])]
    assert [t.tolist() for t in link([0.0, 1.0], far)] == [[0], [1]]
    assert [t.tolist() for t in link([0.0, 1.0], far, min_iou=0.1)] == [[0], [0]]
    assert link([], []) == []


def test_a_track_keeps_its_colour_and_tracks_of_one_frame_differ():
    tracks = [np.array(x) for x in ([0, 1], [1, 2, 3], [4, 1], [5, 1], [1, 6])]
    chosen = colours(tracks, 3)
    assert chosen == {0: 0, 1: 1, 2: 2, 3: 0, 4: 2, 5: 0, 6: 2}
    for frame in tracks:
        assert len({chosen[track] for track in frame.tolist()}) == len(frame)
    assert set(colours([np.arange(7)], 3).values()) == {0, 1, 2}
