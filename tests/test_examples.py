"""Every example runs and learns, and the README's diff is what changes between two of them."""

import difflib
import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
from helpers import exhaustive
from test_readme import torchrun

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


@pytest.mark.parametrize(
    ("name", "needs", "times"),
    [
        ("plain_loop", "torch", {}),
        ("missing_modalities", "torch", {}),
        ("huggingface_trainer", "transformers", {}),
        ("lightning_manual", "lightning", {}),
        ("lightning_automatic", "lightning", {}),
        ("accelerate_loop", "accelerate", {}),
        ("fabric_loop", "lightning_fabric", {}),
        ("text_and_image", "transformers", {"epochs": 3, "size": 200}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*num_workers:UserWarning")
def test_an_example_learns(example, name, needs, times):
    pytest.importorskip(needs)
    if needs == "accelerate":  # what Hugging Face's Trainer has left in this process would be taken over
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    assert example(name).main(**{"epochs": 3, "size": 450} | times) > 0.5  # of ten classes, or four


def test_adding_a_modality(example, capsys):
    found = example("add_modality").main()
    before, after = found["before"]["image"], found["after"]
    assert before - after["image"] < 0.03 and after["sound"] > 0.4 and after["fused"] > before + 0.03
    assert capsys.readouterr().out.startswith(f"image alone  {before:.1%} before, ")


def on_two_ranks(name):
    sys.path.insert(0, str(FOLDER))
    assert importlib.import_module(name).main(epochs=3, size=450) > 0.5


@pytest.mark.parametrize("name", ["data_parallel", *exhaustive("fully_sharded")])
def test_examples_of_several_processes(tmp_path, name):
    pytest.importorskip("sklearn")
    torchrun(functools.partial(on_two_ranks, name), tmp_path)


def test_each_example_is_tested_and_named():
    tested = Path(__file__).read_text()
    for path in FOLDER.glob("*.py"):
        assert path.stem in ("halves", "before", "after") or f'"{path.stem}"' in tested
        assert path.name in (FOLDER / "README.md").read_text()
    assert len((FOLDER / "after.py").read_text().splitlines()) < 70


def test_the_notebook(example):
    cells = json.loads((FOLDER / "quickstart.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["found"]["accuracy"]["fused"] > 0.8
