"""Plain text that people read."""

import pytest

from mvit_jax.common import text


def test_numbers_stand_to_the_right_of_their_column_if_wanted():
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


@pytest.mark.parametrize("count, said", [(0, "0 chips"), (1, "1 chip"), (1024, "1,024 chips")])
def test_nouns_are_counted(count, said):
    assert text.plural(count, "chip") == said


def test_an_error_is_told_in_a_line():
    assert text.first_line(ValueError("\n one\ntwo")) == "one"
    assert text.first_line(ValueError()) == "ValueError"
