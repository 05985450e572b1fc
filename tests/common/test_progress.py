"""Progress output: lines in logs, a bar on a terminal."""

import io

from mvit_jax.common.progress import track


def test_logs_have_a_line_for_every_tenth_of_the_work(capfd):
    assert list(track("train", range(19), 20, 1)) == list(range(19))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "train: 2 of 20 videos" and lines[-1] == "train: 20 of 20 videos"
    assert len(lines) == 10


def test_a_terminal_shows_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(track("train", range(19), 20, 1)) == list(range(19))
    assert "20/20" in terminal.getvalue() and "\r" in terminal.getvalue()
