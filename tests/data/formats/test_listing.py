"""Files of class folders and frame folders: suffixes that decode, and files that are left out."""

import av
import numpy as np
import pytest
from PIL import Image

from mvit_jax.data.formats import listing
from mvit_jax.data.formats.class_folders import read_class_folders
from mvit_jax.data.formats.frame_lists import FrameFolders
from mvit_jax.data.making.splitting import write_lists
from mvit_jax.data.media.images import SUFFIXES, is_image, read_image
from mvit_jax.data.media.video import Video, decode_failure, opened
from tests.data import frames
from tests.support.refusals import refused

GREYS = (30, 90, 150, 210)


def stills():
    return [Image.new("RGB", (176, 144), (grey,) * 3) for grey in GREYS]


def write_video(path):
    """Writes four flat frames with FFmpeg's default codec for the suffix; False without a muxer."""
    # Suffixes of formats that FFmpeg writes under another suffix.
    alias = {".qt": ".mov", ".mpe": ".mpg", ".divx": ".avi", ".mod": ".vob", ".tod": ".m2ts"}
    alias |= {".m2p": ".vob", ".tp": ".ts", ".trp": ".ts", ".mk3d": ".mkv", ".ogm": ".ogv"}
    alias |= {".lrv": ".mp4", ".insv": ".mp4"}
    alias |= {".rmvb": ".rm", ".mj2": ".mov", ".265": ".hevc", ".h265": ".hevc", ".h264": ".264"}
    written = path.with_name("x" + alias.get(path.suffix, path.suffix))
    if path.suffix in (".gif", ".apng"):
        first, *rest = stills()
        kind = "GIF" if path.suffix == ".gif" else "PNG"
        first.save(path, kind, save_all=True, append_images=rest)
        return
    size, codec = (176, 144), None
    if path.suffix == ".dv":
        size, codec = (720, 576), "dvvideo"
    with av.open(str(written), "w") as container:
        codec = codec or {".hevc": "libx265"}.get(written.suffix)
        codec = codec or container.default_video_codec
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        for still in stills():
            frame = av.VideoFrame.from_image(still.resize(size))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    written.rename(path)


@pytest.mark.parametrize("suffix", listing.VIDEO_SUFFIXES)
def test_every_listed_suffix_of_videos_decodes(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_video(path)
    with opened(path, 4) as video:
        assert isinstance(video, Video) and video.num_frames == len(GREYS)
        shown = video.frames(range(4))[:, 70, 80].astype(int)
    assert np.abs(shown - np.array(GREYS)[:, None]).max() <= 8


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_listed_suffix_of_images_decodes(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    picture = Image.linear_gradient("L").resize((48, 32))
    picture = picture.convert("1") if suffix == ".pbm" else picture
    picture.save(path)
    assert is_image(path) and decode_failure(opened(path, 1)) is None
    difference = read_image(path)[0].astype(int) - np.asarray(picture.convert("RGB"))
    assert np.abs(difference).max() <= 12


def test_a_gif_of_one_frame_is_an_image(tmp_path):
    still, moving = tmp_path / "still.GIF", tmp_path / "moving.gif"
    first, *rest = stills()
    first.save(still)
    first.save(moving, save_all=True, append_images=rest)
    assert is_image(still) and not is_image(moving)
    assert np.all(read_image(still) == GREYS[0])
    assert decode_failure(opened(moving, 4)) is None
    assert (
        decode_failure(opened(still, 4))
        == "it is an image, but the model requires clips of 4 frames"
    )


def test_heic_is_neither_listed_nor_read_as_a_video(tmp_path):
    path = tmp_path / "a.HEIC"
    stills()[0].save(path, "AVIF")  # the same container, which FFmpeg decodes as a video
    path.write_bytes(path.read_bytes().replace(b"avif", b"heic"))
    assert decode_failure(opened(path, 1)) == (
        "there is no decoder of HEIC images: convert it to JPEG or PNG"
    )
    assert (
        decode_failure(opened(path, 4))
        == "it is an image, but the model requires clips of 4 frames"
    )


@pytest.mark.parametrize("kind", ["I", "F"])
def test_pixels_without_a_range_are_not_clipped(tmp_path, kind):
    Image.new(kind, (8, 8), 1).save(tmp_path / "a.tif")
    assert "32 bits without a stated range" in str(decode_failure(opened(tmp_path / "a.tif", 1)))


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def in_lists(root):
    write_lists(root, val=0.0, test=0.0)
    return {line.rsplit(" ", 1)[0] for line in (root / "train.csv").read_text().splitlines()}


def in_folders(root):
    paths = read_class_folders(root.parent, root.name, root.name).paths
    return {path.removeprefix(f"{root}/") for path in paths}


@pytest.mark.parametrize("read", [in_lists, in_folders])
def test_readers_of_class_folders_choose_the_same_files(tmp_path, capsys, read):
    root = tmp_path / "root"
    chosen = {"fish/a.MTS", "fish/b.tif", "bird/c.m2ts", "bird/d.gif", "bird/e.jfif"}
    fill(root, *chosen, "bird/f.heic", "bird/deeper/g.jpg", "fish/h.mp4.part")
    fill(root, "i.avi", "readme.md", "bird/folder.mp4/j.mp4")
    fill(root, "fish/._a.MTS", "fish/.k.jpg", ".ipynb_checkpoints/l.jpg", ".Trash-1000/m.mp4")
    assert read(root) == chosen
    assert capsys.readouterr().err == (
        f"note: {root} holds 4 files or folders that are neither videos nor images by their names, "
        f"for example {root}/bird/deeper, which are left out\n"
        f"note: {root} holds 1 videos or images beside the folders of classes, for example i.avi, "
        "which are left out\n"
    )


@pytest.mark.parametrize("read", [in_lists, in_folders])
def test_a_class_without_files_is_an_error(tmp_path, read):
    root = fill(tmp_path / "root", "cat/a.mp4", "dog/b.mp4", "fish/c.heic", "fish/deeper/d.jpg")
    with refused(f"{root}/fish holds neither videos", "but 2 other files, for example c.heic: put"):
        read(root)
    assert not (root / "labels.txt").exists()


@pytest.mark.parametrize("read", [in_lists, in_folders])
@pytest.mark.parametrize("name", ["caf\udce9", "two\nlines"])
def test_a_folder_whose_name_is_no_line_is_an_error(tmp_path, read, name):
    root = fill(tmp_path / "root", "cat/a.mp4", "dog/b.mp4", f"{name}/c.mp4")
    with refused("cannot name a class", ascii(name)[1:-1]):
        read(root)


@pytest.mark.parametrize("read", [in_lists, in_folders])
def test_the_folder_of_hidden_files_of_macos_is_no_class(tmp_path, capsys, read):
    root = fill(
        tmp_path / "root", "cat/a.LRV", "dog/b.insv", "__MACOSX/c.mp4", "__MACOSX/d/._e.mp4"
    )
    assert read(root) == {"cat/a.LRV", "dog/b.insv"}
    assert (
        f"holds 1 files or folders that are neither videos nor images by their names, for "
        f"example {root}/__MACOSX, which are left out" in capsys.readouterr().err
    )


@pytest.mark.parametrize("read", [in_lists, in_folders])
def test_files_in_two_classes_through_links_are_noted(tmp_path, capsys, read):
    root = fill(tmp_path / "root", "cat/a.mp4", "dog/b.mp4", "dog/c.mp4", "fish/d.mp4")
    fill(tmp_path, "store/e.mp4")
    (root / "hound").symlink_to("dog")
    (root / "fish/a.mp4").symlink_to("../cat/a.mp4")
    (root / "fish/e.mp4").symlink_to(tmp_path / "store/e.mp4")
    (root / "fish/f.mp4").symlink_to(tmp_path / "store/e.mp4")
    assert len(read(root)) == 9
    assert capsys.readouterr().err == (
        f"note: 3 files are in two classes through links, for example {root}/cat/a.mp4 and "
        f"{root}/fish/a.mp4: keep each file in one class\n"
    )


def test_other_files_among_frames_are_left_out_and_counted_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(listing, "_noted", [])
    for video in ("v", "w"):
        frames.write(tmp_path, video, 3)
        fill(tmp_path / video, f"._{video}_000001.png", ".DS_Store", "Thumbs.db", "notes.txt")
    folders = (str(tmp_path / "v"), str(tmp_path / "w"))
    videos = FrameFolders(folders, np.zeros(2, np.int32), ("a",), "list")
    for index, video in enumerate(("v", "w")):
        with videos.opened(index, 3) as opened_video:
            expected = np.stack([frames.pixels(video, i) for i in range(3)])
            assert np.array_equal(opened_video.frames(range(3)), expected)
    assert capsys.readouterr().err == (
        f"note: the folder of frames {tmp_path}/v holds 2 files that are no images by their names, "
        "for example Thumbs.db, which are left out (here and in others)\n"
    )
