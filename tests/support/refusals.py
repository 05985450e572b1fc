"""Errors of one sentence for mistakes of users."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mvit_jax.common.errors import UserError


@contextmanager
def refused(*parts: object, by: type[UserError] = UserError) -> Iterator[None]:
    """Expects an error of one line that holds these parts."""
    with pytest.raises(by) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
