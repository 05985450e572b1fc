import pytest

from tests.support.stand_ins import stage


@pytest.fixture
def clone(tmp_path):
    """The files of a clone that scripts need, with stand-ins for the programs of clusters."""
    return stage(tmp_path)
