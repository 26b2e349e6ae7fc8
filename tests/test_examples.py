"""Every example runs and learns, and the README's diff is what changes between two of them."""

import difflib
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Imports an example as it is run, in a folder of its own."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def test_the_readmes_diff_is_what_changes():
    before, after = ((FOLDER / f"{name}.py").read_text().splitlines() for name in ("before", "after"))
    shown: list[str] = []
    for line in list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]:
        shown += ([" ⋮"] if shown else []) if line.startswith("@@") else [line.rstrip()]
    assert "\n".join(shown) == (ROOT / "README.md").read_text().split("```diff\n")[1].split("\n```")[0]


@pytest.mark.parametrize("name", ["before", "after"])
def test_before_and_after(example, name):
    import torch

    assert example(name).main(epochs=4, size=600) > 0.6
    assert set(torch.load("checkpoint.pt", weights_only=True)) == {"model", "optimizer"}
