import pytest

from tests.support.stand_ins import stage


@pytest.fixture
def clone(tmp_path):
    """What scripts need of a clone, with stand-ins for the programs of clusters."""
    return stage(tmp_path)
