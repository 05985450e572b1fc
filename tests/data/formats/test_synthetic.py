"""Frames and labels of synthetic videos."""

import numpy as np
import pytest

from mvit_jax.data.formats.synthetic import Synthetic


def frames_of(source, index, indices):
    with source.opened(index, 4) as video:
        return video.frames(indices)


def test_frames_depend_on_the_video_and_the_frame_number_alone():
    source = Synthetic(videos=5, classes=3, num_frames=300, height=6, width=8)
    clip = frames_of(source, 2, [0, 1, 255, 256, 299])
    assert clip.shape == (5, 6, 8, 3) and clip.dtype == np.uint8
    assert np.array_equal(frames_of(source, 2, np.array([299, 1])), clip[[4, 1]])
    assert np.array_equal(clip[1].astype(int), (clip[0].astype(int) + 1) % 256)
    assert np.array_equal(clip[3], clip[0])
    assert not np.array_equal(frames_of(source, 3, [0]), clip[:1])
    with pytest.raises(IndexError):
        frames_of(source, 2, [300])


def test_noise_is_uniform():
    source = Synthetic(height=200, width=200)
    counts = np.bincount(frames_of(source, 0, [0]).ravel(), minlength=256)
    expected = 200 * 200 * 3 / 256
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_labels_cycle_through_the_classes():
    source = Synthetic(videos=7, classes=3)
    assert len(source) == 7 and source.class_names == ("0", "1", "2")
    assert [source.label(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    several = Synthetic(videos=7, classes=3, multi_label=True)
    labels = [np.asarray(several.label(i, np.arange(4))).tolist() for i in range(3)]
    assert labels == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert np.asarray(several.label(0)).dtype == np.uint8
