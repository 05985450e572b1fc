"""Cases of a table that only the whole check runs, or the nightly tests."""

from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
nightly = partial(pytest.param, marks=pytest.mark.nightly)
