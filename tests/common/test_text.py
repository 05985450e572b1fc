"""Tables, sections and nouns of plain-text output."""

import pytest

from mvit_jax.common import text


def test_numbers_in_tables_are_right_aligned_unless_disabled():
    rows = [("7", "1,200", "3 x 4"), ("long", "-5", "")]
    assert text.table(("name", "number", "mesh"), rows) == (
        "name  number  mesh\n"
        "----  ------  -----\n"
        "7      1,200  3 x 4\n"
        "long      -5"
    )  # fmt: skip
    assert text.table(("name", "n"), [("a", "1")], numbers_right=False).endswith("\na     1")
    assert text.table(("name", "n"), []) == "name  n\n----  -"


def test_a_section_is_aligned_and_indented():
    assert text.section("Data", [("a", "1"), ("long", "2")]) == "Data\n  a     1\n  long  2"


@pytest.mark.parametrize("count, expected", [(0, "0 chips"), (1, "1 chip"), (1024, "1,024 chips")])
def test_plurals_follow_the_count(count, expected):
    assert text.plural(count, "chip") == expected


def test_the_first_line_of_an_error_is_returned():
    assert text.first_line(ValueError("\n one\ntwo")) == "one"
    assert text.first_line(ValueError()) == "ValueError"


def test_printable_names_are_lines_of_utf8():
    assert text.printable("caf\udce9\n ä\r日.mp4") == "caf\\udce9\\n ä\\r日.mp4"
