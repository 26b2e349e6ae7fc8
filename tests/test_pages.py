"""The pages that runs write, and the documentation, as a browser shows them at two widths."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import look
from test_compare_measures import make_runs
from test_compare_missing import runs as missing_runs

from mla_fast.cli import main
from mla_fast.compare import missing_report, report

ROOT = Path(__file__).parents[1]


def check(found, sections, pictures):
    """That nothing is cut or empty, and that pictures of the page are there to look at."""
    for page in found:
        assert page["sections"] == sections and not page["cut"], page
        assert [picture["of"] for picture in page["pictures"]] == pictures
        for picture in page["pictures"]:
            assert picture["loaded"] and picture["width"] > 200 and picture["height"] > 60, (page["width"], picture)
            assert 0 <= picture["left"] and picture["right"] <= page["width"]
        assert Path(page["picture"]).stat().st_size > 10_000
    assert len(found) == 2 and found[0]["width"] > found[1]["width"]


def test_the_page_of_a_comparison(tmp_path):
    names = ["MLA window", "A method of a long name", "Concat"]
    runs = [run for i, name in enumerate(names) for run in make_runs(name, [0.9 - 0.02 * i, 0.88, 0.91], seconds=1.0 + i)]
    report.write(runs, {"data": "x", "group": "speaker", "missing": [0.3], "trials": 2}, tmp_path)
    sections = ["findings", "ranking", "alone", "use", "missing", "cost", "confusion", "protocol"]
    check(look(tmp_path, [tmp_path / "report.html"]), sections, sections[1:-1])


def test_the_page_of_methods_for_missing_modalities(tmp_path):
    runs = [run for rate in (0.1, 0.5) for name in ("Late fusion", "IF-MMIN") for run in missing_runs(name, rate, [0.8, 0.7])]
    missing_report.write(runs, {"data": "x", "protocol": "cpm", "epochs": 20}, tmp_path)
    sections = ["findings", "by-rate", "accuracy", "macro-F1", "weighted-F1", "cost", "protocol"]
    check(look(tmp_path, [tmp_path / "report.html"]), sections, ["by-rate"])


def test_the_page_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label = np.arange(60) % 3
    np.savez("data.npz", sound=np.eye(3)[label], picture=np.eye(4)[label], label=np.array(["one", "two", "<three>"])[label])
    assert main(["train", "--data", "data.npz", "--modalities", "sound,picture", "--epochs", "2", "--output", "run"]) == 0
    sections = ["test", "curves", "share", "confusion", "settings"]
    check(look(tmp_path, ["run/report.html"]), sections, sections[1:-1])


@pytest.mark.exhaustive
def test_the_documentation(tmp_path):
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(site)], cwd=ROOT, check=True)
    pages = sorted(site.glob("**/*.html"))
    found = look(tmp_path, [page for page in pages if page.name != "404.html"])
    assert len(found) == 2 * (len(pages) - 1) > 16
    for page in found:
        assert not page["cut"] and all(picture["loaded"] for picture in page["pictures"]), page
        assert all(picture["right"] <= page["width"] + 1 for picture in page["pictures"]), page
