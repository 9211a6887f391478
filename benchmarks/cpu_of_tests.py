"""CPU seconds of tests, those of their processes included: a plugin of pytest that lists files and tests at the end.

    JAX_COMPILATION_CACHE_DIR=$(mktemp -d) python -m pytest -p benchmarks.cpu_of_tests tests/test_train.py

Wall time says little where other programs run. What a file's first test pays for (imports, shared runs) stands there.
"""

import collections
import os

import pytest

SHOWN = 25
_PROPERTY = "cpu_seconds"
_seen = [0.0]  # at the end of the last phase


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Give the report of a phase what has been used since the one before."""
    report = yield
    used = sum(os.times()[:4])  # user and system, of this process and of the children that it waited for
    report.user_properties.append((_PROPERTY, used - _seen[0]))
    _seen[0] = used
    return report


def pytest_terminal_summary(terminalreporter):
    """Print both tables. The reports of xdist's workers have come here, too."""
    files, tests = collections.Counter(), collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            # A later phase repeats the figures of those before it.
            figures = [value for name, value in getattr(report, "user_properties", ()) if name == _PROPERTY]
            if figures:
                files[report.nodeid.partition("::")[0]] += figures[-1]
                tests[f"{report.nodeid} ({report.when})"] += figures[-1]
    terminalreporter.section(f"CPU seconds: {files.total():.0f}")
    for table in (files, tests):
        for name, seconds in table.most_common(SHOWN):
            terminalreporter.line(f"{seconds:8.1f}  {name}")
        terminalreporter.line("")
