"""Progress as logs have it; `test_prepare.py` has a terminal."""

from mvit_jax.common.progress import shown


def test_logs_get_a_line_for_every_tenth(capfd):
    assert list(shown("train", range(19), 20, 1)) == list(range(19))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "train: 2 of 20 videos" and lines[-1] == "train: 20 of 20 videos"
    assert len(lines) == 10
