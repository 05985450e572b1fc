"""Overlays and sheets, and PNG, GIF and mp4 files read back by Pillow and PyAV."""

import io

import av
import numpy as np
from PIL import Image

from mvit_jax.analysis import render

GREY = np.full((4, 10, 14, 3), 128, np.uint8)


def squares():
    """Returns frames of a bright square that moves by 8 pixels a frame."""
    frames = np.full((6, 48, 64, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[16:32, 8 * t : 8 * t + 16] = (230, 200, 60)
    return frames


def test_an_overlay_is_brightest_where_the_map_is_highest():
    heat = np.zeros((4, 10, 14))
    heat[2, 3, 5] = 7.0
    heat[1, 8, 8] = 3.5
    light = render.overlay(GREY, heat).astype(int).sum(-1)
    assert np.unravel_index(light.argmax(), light.shape) == (2, 3, 5)
    assert light[2, 3, 5] > light[1, 8, 8] > light[0, 0, 0]
    none = render.overlay(GREY, np.zeros((4, 10, 14)))  # nothing to divide by
    assert (none == none[0, 0, 0]).all()


def test_an_overlay_shows_the_frame_below():
    frames = squares()
    for height in (0.0, 1.0):
        even = render.overlay(frames, np.full(frames.shape[:3], height)).astype(int).sum(-1)
        assert even[0, 20, 10] > even[0, 5, 5]


def test_a_contact_sheet_has_frames_in_rows():
    frames = squares()[:5]
    sheet = render.contact_sheet(frames, columns=3, gap=2)
    assert sheet.shape == (2 * 48 + 2, 3 * 64 + 4, 3)
    np.testing.assert_array_equal(sheet[50:, 66:130], frames[4])
    assert (sheet[:, 64:66] == 255).all() and (sheet[50:, 132:] == 255).all()
    large = render.enlarge(frames, 100)
    assert large.shape == (5, 144, 192, 3)
    np.testing.assert_array_equal(large[:, ::3, ::3], frames)
    assert render.enlarge(frames, 40) is frames


def test_to_uint8_restores_the_frames_of_a_normalised_clip():
    frames = squares()
    mean, std = (0.45, 0.4, 0.5), (0.225, 0.2, 0.25)
    clip = (frames / np.float32(255) - np.float32(mean)) / np.float32(std)
    np.testing.assert_array_equal(render.to_uint8(clip, mean, std), frames)


def test_png_gif_and_mp4_files_hold_the_frames(tmp_path):
    frames = squares()
    render.save_png(tmp_path / "a.png", frames[0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), frames[0])

    render.save_gif(tmp_path / "a.gif", frames, fps=5.0)
    with Image.open(tmp_path / "a.gif") as image:
        assert getattr(image, "n_frames") == 6 and image.info["duration"] == 200  # noqa: B009
        for t in range(6):
            image.seek(t)
            np.testing.assert_allclose(np.asarray(image.convert("RGB")), frames[t], atol=2)
    quick = Image.open(io.BytesIO(render.gif(frames, fps=1000.0)))
    assert quick.info["duration"] == 20  # what browsers show at the quickest

    render.save_mp4(tmp_path / "a.mp4", frames[:, :47, :63], fps=12.5)  # odd sides
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 12.5
    assert np.shape(decoded) == (6, 48, 64, 3)
    grey = [np.abs(a.mean(-1) - b.mean(-1)).mean() for a, b in zip(decoded, frames, strict=True)]
    assert max(grey) < 4
