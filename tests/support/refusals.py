"""Mistakes of people, each of which gets one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mvit_jax.common.errors import UserError


@contextmanager
def refused(*parts: object, by: type[UserError] = UserError) -> Iterator[None]:
    """Expects an error of one line that holds these parts."""
    with pytest.raises(by) as caught:
        yield
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert str(part) in said, said
