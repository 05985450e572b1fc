"""Parameters of slow and nightly cases."""

from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
nightly = partial(pytest.param, marks=pytest.mark.nightly)
