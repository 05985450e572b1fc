"""Folders of frames against the arrays that were written to them."""

import numpy as np
import pytest
from PIL import Image

from mvit_jax.data.formats.frame_lists import FrameFolders
from mvit_jax.data.making import moving_digits
from mvit_jax.data.media import video as decoding
from mvit_jax.data.media.images import DecodeError, Footage
from mvit_jax.data.media.video import decode_failure
from tests.data import frames


def source(*folders):
    labels = np.zeros(len(folders), np.int32)
    return FrameFolders(tuple(map(str, folders)), labels, ("a",), "list")


def test_frames_have_the_pixels_of_the_files(tmp_path):
    frames.write(tmp_path, "v7", 12)
    with source(tmp_path / "v7").opened(0, 4) as video:
        assert isinstance(video, Footage)
        assert (video.num_frames, video.fps) == (12, 30.0)
        indices = [3, 3, 0, 11]
        images = video.frames(indices)
        assert images.dtype == np.uint8
        assert np.array_equal(images, np.stack([frames.pixels("v7", i) for i in indices]))
        assert np.array_equal(video.frames(np.array([5]))[0], frames.pixels("v7", 5))
        for outside in ([-1], [12]):
            with pytest.raises(IndexError, match="out of range for 12 frames"):
                video.frames(outside)


@pytest.mark.parametrize("name", ["{number}.png", "img_{number}.png", "{video}-{number:05d}.png"])
def test_frames_are_ordered_by_their_numbers(tmp_path, name):
    frames.write(tmp_path, "v", 12, name)  # 1, 10, 11, 12, 2, ... in alphabetical order
    (tmp_path / "v" / "notes.txt").touch()
    with source(tmp_path / "v").opened(0, 4) as video:
        images = video.frames(range(video.num_frames))
    assert np.array_equal(images, np.stack([frames.pixels("v", i) for i in range(12)]))


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
def test_a_video_file_may_replace_its_folder_of_frames(tmp_path, suffix):
    (tmp_path / f"77{suffix}").write_bytes(moving_digits.video(0, "train", 0))
    with (
        source(tmp_path / "77").opened(0, 4) as video,
        decoding.Video(tmp_path / f"77{suffix}") as expected,
    ):
        assert video.num_frames == expected.num_frames >= 40
        assert np.array_equal(video.frames([5, 30]), expected.frames([5, 30]))


def test_invalid_folders_fail_to_decode_with_the_reason(tmp_path):
    for name in ("empty", "sizes", "damaged"):
        frames.write(tmp_path, name, 0 if name == "empty" else 3)
    Image.new("RGB", (8, 9)).save(tmp_path / "sizes/sizes_000002.png")
    (tmp_path / "damaged/damaged_000003.png").write_bytes(b"")
    (tmp_path / "file").touch()
    reasons = {
        "gone": "there is neither this folder of frames nor a video gone.webm or gone.mp4 "
        "(data.prefix is prepended to the paths in lists)",
        "empty": "the folder holds no images",
        "sizes": "its frames differ in size: sizes_000001.png has 8x6 pixels, sizes_000002.png 8x9",
        "damaged": "frame damaged_000003.png: the file is empty",
        "file": "not a directory",
    }
    videos = source(*(tmp_path / name for name in reasons))
    for index, (name, reason) in enumerate(reasons.items()):
        assert decode_failure(videos.opened(index, 4)) == reason
        assert videos.item(index) == str(tmp_path / name)
    with videos.opened(3, 4) as video:  # the frames before the damaged one can be decoded
        assert video.frames([0, 1]).shape == (2, 6, 8, 3)
        with pytest.raises(DecodeError, match="damaged cannot be decoded: frame damaged"):
            video.frames([0, 2])
