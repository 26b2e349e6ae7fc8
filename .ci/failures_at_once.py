"""A pytest plugin, ``-p failures_at_once``: writes each failure into $FAILURES as it happens, so that a run cut off keeps it."""

import os


def pytest_runtest_logreport(report):
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["FAILURES"], "a") as file:
            file.write(f"==> {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}\n\n")
