"""AVA's files against plain loops over drawn lines, and against small files written by hand."""

import csv

import numpy as np
import pytest

from mvit_jax.data.formats.ava_tables import (
    read_class_list,
    read_excluded,
    read_key_frames,
    write_detections,
)
from mvit_jax.data.formats.frame_lists import read_frame_list
from tests.data import frames
from tests.support.refusals import refused

BOX = "0.100,0.200,0.500,0.900"


@pytest.fixture
def write(tmp_path):
    def write_file(name, *lines):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    return write_file


def as_dict(key_frames):
    """Returns (box, ids of its classes, score) of each box of each (video, second)."""
    names = [key_frames.videos[video] for video in key_frames.video]
    result = {}
    for index, key in enumerate(zip(names, key_frames.second.tolist(), strict=True)):
        rows = key_frames.rows(index)
        result[key] = [
            (tuple(box), {int(i) + 1 for i in np.flatnonzero(labels)}, float(score))
            for box, labels, score in zip(
                key_frames.box[rows], key_frames.labels[rows], key_frames.score[rows], strict=True
            )
        ]
    return result


def reference(label_files, box_files, min_score, videos):
    """Merges lines one by one; returns what `as_dict` does."""
    merged, order = {}, list(videos or [])
    for file, is_truth in [(f, True) for f in label_files] + [(f, False) for f in box_files]:
        with file.open(newline="") as text:
            for video, second, x1, y1, x2, y2, action, last in csv.reader(text):
                score = 1.0 if is_truth else float(last)
                if video not in order:
                    order.append(video)
                if not is_truth and score < min_score:
                    continue
                frame = merged.setdefault((video, int(second)), {})
                labels, scores = frame.setdefault((x1, y1, x2, y2), (set(), []))
                if action not in ("", "-1"):
                    labels.add(int(action))
                scores.append(score)
    return {
        key: [
            (tuple(map(float, texts)), labels, max(scores))
            for texts, (labels, scores) in merged[key].items()
        ]
        for key in sorted(merged, key=lambda key: (order.index(key[0]), key[1]))
    }


def draw(rng, names):
    """Returns lines of labels and of person boxes; some boxes are in both."""
    labels, persons = [], []
    for video in rng.permutation(names):
        for second in rng.permutation(np.arange(902, 912))[:6]:
            for person in range(rng.integers(0, 4)):
                low, high = np.sort(rng.integers(0, 11, (2, 2)) / 10, axis=0)
                numbers = [*low.tolist(), *high.tolist()]
                box = ",".join(f"{number:.{rng.integers(1, 4)}f}" for number in numbers)
                key = f"{video},{second:04d},{box}"
                actions = rng.choice(np.arange(1, 7), rng.integers(1, 4), replace=False)
                labels += [f"{key},{action},{person}" for action in actions]
                score = f"{rng.random():.1f}"
                if rng.random() < 0.5:
                    persons.append(f"{key},{rng.choice(actions)},{score}")
                if rng.random() < 0.3:
                    empty = rng.choice(["", "-1"])
                    persons.append(f"{video},{second},{box}0,{empty},{score}")  # another text
    without_person = {line.rpartition(",")[0]: line for line in labels}  # no label twice
    return [*rng.permutation(list(without_person.values()))], persons


@pytest.mark.parametrize("seed", range(20))
def test_drawn_files_are_merged_as_by_plain_loops(seed, write):
    rng = np.random.default_rng(seed)
    names = ["b", "a", "c d", "e"]
    labels, persons = draw(rng, names)
    files = [write("t0.csv", *labels[::2]), write("t1.csv", *labels[1::2])]
    boxes = [write("p.csv", *persons)]
    for videos in (None, ["e", "c d", "b", "a"]):
        for min_score in (0.0, 0.5, 1.0):
            result = read_key_frames(files, boxes, classes=6, min_score=min_score, videos=videos)
            expected = reference(files, boxes, min_score, videos)
            assert list(as_dict(result)) == list(expected)
            assert as_dict(result) == expected
            assert result.box.dtype == np.float64 and result.labels.dtype == np.uint8
            assert result.labels.shape == (len(result.box), 6)


def test_lines_of_a_box_merge_and_the_truth_comes_first(write):
    truth = write(
        "train.csv",
        f"zoo,0903,{BOX},80,1",
        "zoo,0902,0.1,0.2,0.3,0.4,12,0",
        "zoo,0902,0.100,0.2,0.3,0.4,12,0",  # another text, another box
        "zoo,0902,0.1,0.2,0.3,0.4,17,0",
        "ant,1798,0.000,0.000,1.000,1.000,1,0",
        "ant,1000",  # a key frame without boxes
    )
    persons = write(
        "boxes.csv",
        "zoo,0902,0.5,0.5,0.6,0.6,,0.9",
        "zoo,0902,0.1,0.2,0.3,0.4,59,0.95",  # a box of the truth, one more label
        "zoo,0904,0.5,0.5,0.6,0.6,3,0.899",  # below the score
        "zoo,0902,0.5,0.5,0.6,0.6,11,0.97",
    )
    result = read_key_frames([truth], [persons])
    assert result.videos == ("zoo", "ant") and len(result) == 4
    assert result.labels.shape == (5, 80)
    assert as_dict(result) == {
        ("zoo", 902): [
            ((0.1, 0.2, 0.3, 0.4), {12, 17, 59}, 1.0),
            ((0.1, 0.2, 0.3, 0.4), {12}, 1.0),
            ((0.5, 0.5, 0.6, 0.6), {11}, 0.97),
        ],
        ("zoo", 903): [((0.1, 0.2, 0.5, 0.9), {80}, 1.0)],
        ("ant", 1000): [],
        ("ant", 1798): [((0.0, 0.0, 1.0, 1.0), {1}, 1.0)],
    }
    assert next(iter(as_dict(read_key_frames([truth], videos=["ant", "zoo"])))) == ("ant", 1000)


def test_harmless_oddities_are_accepted(tmp_path, capsys):
    file = tmp_path / "odd.csv"
    lines = [
        f"\ufeffa,902,{BOX},1,0",
        f" a , 0902, {BOX.replace(',', ' , ')} ,2, 0",
        "",
        f'"a","0902",{BOX},"3","0"',
        f'"b, c",903,{BOX},4',  # no person
        "d,904,0.5,0.2,0.5,0.3,5,0",
        "  ",
    ]
    file.write_bytes("\r\n".join([*lines, ""]).encode())
    assert as_dict(read_key_frames([file])) == {
        ("a", 902): [((0.1, 0.2, 0.5, 0.9), {1, 2, 3}, 1.0)],
        ("b, c", 903): [((0.1, 0.2, 0.5, 0.9), {4}, 1.0)],
        ("d", 904): [((0.5, 0.2, 0.5, 0.3), {5}, 1.0)],
    }
    note = "note: boxes without width or height: 1, the first in {}, line 6\n"
    assert capsys.readouterr().err == note.format(file)


BROKEN = [
    ("a,0902,0.1,0.2,0.5,0.9", "6 columns instead of the 8"),
    ("a", "1 column instead of the 8"),
    (f"a,0902,{BOX},1,0,0", "9 columns instead of the 8"),
    (f"a,0901,{BOX},1,0", "the second 901 is not from 902 to 1798"),
    (f"a,1799,{BOX},1,0", "the second 1799 is not from 902 to 1798"),
    ("a,1799", "the second 1799 is not from 902 to 1798"),
    (f"a,902.5,{BOX},1,0", "the second '902.5' is not a whole number"),
    (f",0902,{BOX},1,0", "the name of the video is empty"),
    ("a,0902,0.1,zero,0.5,0.9,1,0", "y1 is 'zero', which is not a number"),
    ("a,0902,0.1,0.2,,0.9,1,0", "x2 is '', which is not a number"),
    ("a,0902,0.1,0.2,nan,0.9,1,0", "x2 is 'nan', which is not a number"),
    ("a,0902,0.1,0.2,0.5,inf,1,0", "y2 is 'inf', which is not a number"),
    ("a,0902,0.6,0.2,0.5,0.9,1,0", "x1 is greater than x2"),
    ("a,0902,0.1,0.95,0.5,0.9,1,0", "y1 is greater than y2"),
    ("a,0902,-0.1,0.2,0.5,0.9,1,0", "x1 is -0.1, not from 0 to 1 (divide pixels by the size"),
    ("a,0902,10,20,50,90,1,0", "x1 is 10, not from 0 to 1 (divide pixels by the size"),
    (f"a,0902,{BOX},81,0", "the action 81 is not from 1 to 80"),
    (f"a,0902,{BOX},0,0", "the action 0 is not from 1 to 80"),
    (f"a,0902,{BOX},,0", "the action '' is not a whole number"),
    (f"a,0902,{BOX},stand,0", "the action 'stand' is not a whole number"),
    (f"a,0902,{BOX},1,bob", "the person 'bob' is not a whole number"),
    (f"x,0902,{BOX},1,0", "the video 'x' is not in the frame list"),
    ("x,0902", "the video 'x' is not in the frame list"),
    (f'"a,0902,{BOX},1,0', "unexpected end of data"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_of_labels_is_named_with_its_reason(line, reason, write):
    file = write("t.csv", f"a,0902,{BOX},5,0", line)
    with refused(f"{file}, line 2: {reason}"):
        read_key_frames([file], videos=["a"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"a,0902,{BOX},1", "7 columns instead of the 8 of person boxes"),
        ("a,0902", "2 columns instead of the 8 of person boxes"),
        (f"a,0902,{BOX},1,high", "score is 'high', which is not a number"),
        (f"a,0902,{BOX},1,nan", "score is 'nan', which is not a number"),
        (f"a,0902,{BOX},1,17", "the score 17 is not from 0 to 1 (the last column of a label file"),
        (f"a,0902,{BOX},81,0.95", "the action 81 is not from 1 to 80"),
        (f"a,0902,{BOX},-2,0.95", "the action '-2' is not a whole number"),
        ("a,0902,0.6,0.2,0.5,0.9,1,0.1", "x1 is greater than x2"),  # below the score
        (f"a,0901,{BOX},1,0.1", "the second 901 is not"),
        (f"x,0902,{BOX},1,0.1", "the video 'x' is not in the frame list"),
    ],
)
def test_a_broken_line_of_person_boxes_is_named_with_its_reason(line, reason, write):
    file = write("p.csv", f"a,0902,{BOX},5,0.95", line)
    with refused(f"{file}, line 2: {reason}"):
        read_key_frames([], [file], videos=["a"])


def test_a_header_is_named_as_such(write):
    file = write("t.csv", "video,second,x1,y1,x2,y2,action,person", f"a,0902,{BOX},5,0")
    with refused(f"{file}, line 1: a header, which AVA's files do not have: remove the line"):
        read_key_frames([file])


def test_all_broken_lines_of_all_files_are_in_one_error(write):
    truth = write(
        "t.csv", f"a,0902,{BOX},5,0", f"a,0902,{BOX},99,0", f"a,0902,{BOX},6,0", f"a,1,{BOX},6,0"
    )
    more = write("u.csv", f"a,902,{BOX},6,1", f"a,902,{BOX},x,1")
    persons = write("p.csv", "", f"a,0902,{BOX},5,2")
    with refused(
        f"{truth}, line 2: the action 99 is not from 1 to 80; line 4: the second 1 is not from 902 "
        f"to 1798 (for other data set data.first_second); {more}, line 2: the action 'x' is not a "
        f"whole number; {persons}, line 2: the score 2 is not from 0 to 1"
    ):
        read_key_frames([truth, more], [persons])


def test_at_most_20_broken_lines_are_shown(write):
    lines = [f"a,0902,{BOX},{action},0" for action in range(81, 101)]
    with refused("line 1: the action 81 is not from 1 to 80; ", "line 20: the action 100 is not"):
        read_key_frames([write("t.csv", *lines)])
    file = write("t.csv", *lines, *["a,0902,x"] * 1500)
    with refused("line 20: the action 100 is not from 1 to 80; and 1,500 more"):
        read_key_frames([file])


def test_a_repeated_label_counts_twice_in_labels_alone(write, capfd):
    truth = write("t.csv", f"a,0902,{BOX},5,0", f"a,0902,{BOX},6,0", f"a,0902,{BOX},5,0")
    labels = read_key_frames([truth]).labels
    assert (labels[0, 4], labels[0, 5], labels.sum()) == (2, 1, 3)
    many = read_key_frames([write("u.csv", *[f"a,0902,{BOX},5,0"] * 300)])
    assert many.labels[0, 4] == 255
    assert f"repeat a label of a box: 1, the first in {truth}, line 3" in capfd.readouterr().err
    truth = write("t.csv", f"a,0902,{BOX},5,0")
    persons = write("p.csv", f"a,0902,{BOX},5,0.99", f"a,0902,{BOX},5,0.99")
    assert as_dict(read_key_frames([truth], [persons])) == {
        ("a", 902): [((0.1, 0.2, 0.5, 0.9), {5}, 1.0)]
    }


def test_own_data_has_its_own_seconds_and_classes(write):
    file = write("t.csv", f"a,0,{BOX},3,0", f"a,5,{BOX},1,0")
    result = read_key_frames([file], classes=3, seconds=range(6))
    assert result.second.tolist() == [0, 5] and result.labels.tolist() == [[0, 0, 1], [1, 0, 0]]
    with refused("line 2: the second 5 is not from 0 to 4"):
        read_key_frames([file], classes=3, seconds=range(5))


def test_the_videos_are_those_of_a_frame_list(write):
    videos, _ = read_frame_list(
        write("frames.csv", *frames.text(frames.row("b", 0), frames.row("a", 0)).splitlines())
    )
    file = write("t.csv", f"a,0902,{BOX},5,0", f"b,0902,{BOX},5,0")
    assert read_key_frames([file], videos=videos.videos).videos == ("b", "a")
    with refused(f"there is no box of the video c and 1 more of the frame list in {file}"):
        read_key_frames([file], videos=[*videos.videos, "c", "d"])
    # A key frame that is mentioned without boxes is enough.
    mentioned = write("u.csv", "c,0902")
    assert len(read_key_frames([file, mentioned], videos=["a", "b", "c"])) == 3


def test_files_that_cannot_be_read_or_have_no_boxes_are_errors(tmp_path, write):
    with refused(f"there is no file {tmp_path}/no.csv"):
        read_key_frames([tmp_path / "no.csv"])
    with refused(f"{tmp_path} cannot be read: is a directory"):
        read_key_frames([tmp_path])
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9,0902\n")
    with refused(f"{tmp_path}/latin.csv is not UTF-8 text"):
        read_key_frames([tmp_path / "latin.csv"])
    persons = write("p.csv", f"a,0902,{BOX},5,0.5")
    with refused(f"there are no boxes of score 0.9 or more in {persons}"):
        read_key_frames([], [persons])
    with refused("there are no boxes in"):
        read_key_frames([write("t.csv")])


def test_excluded_key_frames_are_pairs_of_video_and_second(write):
    file = write("excluded.csv", "a,0902", "a,902", "b,1010", "")
    assert read_excluded(file) == {("a", 902), ("b", 1010)}
    file = write("excluded.csv", "a,0902", "a,1,2", "a,x")
    reasons = ("3 columns instead of `video,second`", "the second 'x' is not a whole number")
    with refused(f"{file}, line 2: {reasons[0]}; line 3: {reasons[1]}"):
        read_excluded(file)


@pytest.mark.parametrize(
    "text",
    [
        'label {\n  name: "bend/bow (at the waist)"\n  label_id: 1\n'
        "  label_type: PERSON_MOVEMENT\n}\n"
        'label {\n  name: "answer phone"\n  label_id: 15\n  label_type: OBJECT_MANIPULATION\n}\n',
        'item {\r\n\tid: 15\r\n\tname: "answer phone"\r\n}\r\n'
        "item: { name:'bend/bow (at the waist)', id:1; } # the last",
        '# two items\nitem{name:"bend/bow (at the waist)" id:1}item{name:"answer phone" id:15}',
    ],
)
def test_class_lists_are_read_in_any_layout(text, tmp_path):
    (tmp_path / "list.pbtxt").write_bytes(text.encode())
    classes = read_class_list(tmp_path / "list.pbtxt")
    assert classes.names == {1: "bend/bow (at the waist)", 15: "answer phone"}
    assert list(classes.names) == [1, 15]
    assert classes.groups == {"pose": (1,), "object": (15,)}
    assert classes.count == 15 and classes.all_names()[13:] == ("action 14", "answer phone")


def test_groups_of_other_data_are_the_label_types(write):
    file = write(
        "list.pbtxt", 'x { name: "up" id: 3 label_type: MOTION }', 'x { name: "b" id: 70 }'
    )
    assert read_class_list(file).groups == {"motion": (3,), "person": (70,)}


def test_names_of_classes_may_hold_brackets_and_quotes(write):
    file = write("list.pbtxt", r'item { name: "say \"{hi}\" # 1" id: 3 }')
    assert read_class_list(file).names == {3: 'say "{hi}" # 1'}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no classes"),
        ("item {\n  name: 'a'\n}", "line 3: the item that ends here has no id"),
        ("item {\n  id: 1\n}", "line 3: the item that ends here has no name"),
        ("item { name: stand id: 1 }", "line 1: the name stand is not in quotes"),
        ("item { name: 'a' id: x }", "line 1: the id 'x' is not a whole number"),
        ("item { name: 'a' id: 0 }", "line 1: the id 0 is not from 1"),
        (
            "item { name: 'a' id: 1 }\nitem { name: 'b' id: 1 }\nstand 12",
            "line 2: the id 1 is that of 'a' already; line 3: 'stand' is not part of `item { name",
        ),
        ("item { item { name: 'a' id: 1 } }", "line 1: 'item {' is not part of"),
        ("name: 'a'", "line 1: \"name: 'a'\" is not part of"),
        ("item { name: 'a' id: 1", "ends within an item"),
    ],
)
def test_bad_class_lists_raise(text, sentence, write):
    file = write("list.pbtxt", text)
    with refused(file, sentence):
        read_class_list(file)


def test_detections_are_written_in_the_format_of_the_challenge(tmp_path):
    path = tmp_path / "detections.csv"
    box = np.array([[0.0, 0.12345, 0.5, 1.0], [0.25, 0.5, 0.7506, 0.75]])
    scores = np.array([[0.5, 0.00004], [1.0, 0.123456]], np.float32)
    write_detections(path, ["a", 'b, "c"'], np.array([902, 1798]), box, scores, [1, 80])
    assert path.read_text() == (
        "a,0902,0.000,0.123,0.500,1.000,1,0.5000\n"
        "a,0902,0.000,0.123,0.500,1.000,80,0.0000\n"
        '"b, ""c""",1798,0.250,0.500,0.751,0.750,1,1.0000\n'
        '"b, ""c""",1798,0.250,0.500,0.751,0.750,80,0.1235\n'
    )
    assert as_dict(read_key_frames([], [path], min_score=0.1)) == {
        ("a", 902): [((0.0, 0.123, 0.5, 1.0), {1}, 0.5)],
        ('b, "c"', 1798): [((0.25, 0.5, 0.751, 0.75), {1, 80}, 1.0)],
    }
    with refused("cannot be written"):
        write_detections(tmp_path / "no/d.csv", ["a"], np.array([902]), box[:1], scores[:1], [1, 2])
