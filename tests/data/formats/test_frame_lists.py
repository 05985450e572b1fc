"""Frame lists against a reference reader that splits the file line by line."""

import re

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.frame_lists import label_numbers, read_frame_list
from mvit_jax.data.media.images import DecodeError
from tests.data import frames
from tests.support.refusals import refused


def by_line(file):
    """Returns the paths and labels of each video, read line by line."""
    videos = {}
    for line in file.read_text().splitlines()[1:]:
        if line.strip():
            name, _, _, path, labels = line.split()
            videos.setdefault(name, []).append((path, labels.encode()))
    return videos


ROWS = [
    *(frames.row("a1", i, "3,4" if i > 1 else "") for i in range(4)),
    *(frames.row("a10", i) for i in range(3)),  # shares a prefix with another name
    "",
    frames.row("b", 0, "156").replace(" ", "\t"),
    "  " + frames.row("b", 1).replace(" ", "  "),
    frames.row("a", 0, "7"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_equal_the_lines_of_the_file(tmp_path, end):
    file = tmp_path / "train.csv"
    file.write_text(frames.text(*ROWS))
    expected = by_line(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", end.encode()))
    frame_list, texts = read_frame_list(file)
    assert frame_list.videos == tuple(expected) == ("a1", "a10", "b", "a")
    for index, name in enumerate(frame_list.videos):
        rows = frame_list.rows(index)
        assert list(zip(rows.paths, rows.labels, strict=True)) == expected[name]
        assert texts[index] == set(rows.labels)


def test_labels_are_parsed_as_quoted_numbers():
    assert [label_numbers(text) for text in (b'""', b'"4"', b'"4,17,0"', b"5")] == [
        [], [4], [4, 17, 0], [5],
    ]  # fmt: skip
    for wrong in (b'"4;5"', b"path.jpg", b'"4,"'):
        with pytest.raises(ValueError, match="invalid literal"):
            label_numbers(wrong)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no list {0}: it should hold a line for each frame, after the header `ori"),
        ("a.mp4 0\n", "{0}, line 1 should be the header `original_vido_id video_id frame_id path"),
        ("\xff\xfe\x00\x01", "line 1 should be the header"),
        (frames.text(""), "{0} lists no frames"),
        (
            frames.text(*(frames.row(v, 0) for v in "aba")),
            "line 4: the frames of a are not contiguous",
        ),
    ],
)
def test_invalid_lists_end_with_a_one_sentence_error(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "train.csv").write_text(content, "latin-1")
    with refused(expected.format(tmp_path / "train.csv")):
        read_frame_list(tmp_path / "train.csv")


@pytest.mark.parametrize("index", [0, 2, 3, 5])
@pytest.mark.parametrize("wrong", ["b", "b 0 1", "b 0 1 b/1.png 3, 4"])
def test_the_error_names_a_line_with_wrong_fields(tmp_path, index, wrong):
    rows = [frames.row(name, i) for name in "abc" for i in range(2)]
    rows[index] = wrong
    (tmp_path / "train.csv").write_text(frames.text(*rows))
    place = f"{tmp_path}/train.csv, line {index + 2}"
    message = f"{place}: {wrong!r} does not have the five fields of the header"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read_frame_list(tmp_path / "train.csv")


def test_the_last_line_may_lack_a_newline(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text(frames.text(frames.row("a", 0), frames.row("b", 0, "7")))
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    frame_list, texts = read_frame_list(file)
    assert frame_list.rows(1).labels == (b'"7"',) and texts == [{b'""'}, {b'"7"'}]


def test_a_changed_list_causes_decode_failures_of_its_videos(tmp_path):
    file = tmp_path / "train.csv"
    rows = [frames.row(name, i) for name in "abc" for i in range(2)]
    file.write_text(frames.text(*rows))
    frame_list, _ = read_frame_list(file)
    file.write_text(frames.text(*rows[:2], rows[2][:-3], *rows[3:]))
    assert len(frame_list.rows(0).paths) == 2
    with pytest.raises(DecodeError, match=r"^b cannot be decoded: .*has changed since it was"):
        frame_list.rows(1)
    file.write_text(frames.text(*rows[1:]))
    for index in range(3):
        with pytest.raises(DecodeError, match="has changed since it was first read"):
            frame_list.rows(index)
    file.unlink()
    with pytest.raises(DecodeError, match=r"its list .* cannot be read: no such file"):
        frame_list.rows(0)
