"""CPU seconds per test, of its process and of the processes that it started and waited for.

`pytest --cpu-seconds=FILE` appends a line `seconds<TAB>test` for each test as it ends, and prints
the files that took the most. Wall-clock durations are unreliable with two workers on two noisy
cores. A session-wide fixture is charged to the first test that uses it, the process behind
`commands.py` to the last test of its worker.
"""

import collections
import os
import pathlib

import pytest


def pytest_addoption(parser):
    parser.addoption("--cpu-seconds", metavar="FILE", help="write CPU seconds per test to FILE")


def pytest_configure(config):
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(Recorder(config.getoption("--cpu-seconds")))


def spent() -> float:
    return sum(os.times()[:4])


class Recorder:
    """Measures on the workers that run tests, writes on the process that collects reports."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.mark = spent()
        self.tests = collections.Counter()
        self.files = collections.Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        before, self.mark = self.mark, spent()
        report.cpu_seconds = self.mark - before
        return report

    def pytest_runtest_logreport(self, report):
        self.tests[report.nodeid] += report.cpu_seconds
        self.files[report.nodeid.split("::")[0]] += report.cpu_seconds
        if report.when == "teardown" and "PYTEST_XDIST_WORKER" not in os.environ:
            with self.path.open("a") as file:
                file.write(f"{self.tests[report.nodeid]:.2f}\t{report.nodeid}\n")

    def pytest_terminal_summary(self, terminalreporter):
        total = sum(self.tests.values())
        terminalreporter.section(f"{total:.0f} CPU seconds in {len(self.tests)} tests")
        for file, seconds in self.files.most_common(15):
            terminalreporter.write_line(f"{seconds:7.1f}  {file}")
