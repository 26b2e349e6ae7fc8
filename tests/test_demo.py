"""The demo: both experiments run, and what they find is written."""

import json
import sys

import pytest
import torch

from mla_fast import demo
from mla_fast.data import MultimodalDataset
from mla_fast.tables import markdown_table

METHODS = ["joint, sum", "joint, concat", "MLA rls", "MLA window", "MLA none"]


def test_quick_run_writes_results_and_plot(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    threads = torch.get_num_threads()
    results = demo.run(tmp_path / "deep" / "demo", quick=True, seed=5)
    written = tmp_path / "deep" / "demo"
    assert json.loads((written / "results.json").read_text()) == results
    assert (written / "demo.png").read_bytes().startswith(b"\x89PNG") and (written / "demo.png").stat().st_size > 10_000
    assert results["quick"] and results["seeds"] == [5] and list(results["digits"]) == METHODS
    for method, accuracy in results["digits"].items():
        assert set(accuracy) - {"fused"} == {"pixels", "fourier", "profile", "average"}
        assert ("fused" in accuracy) == method.startswith("MLA") and accuracy["average"] > 0.6
    assert results["competition"]["joint, sum"][0]["found"] < results["competition"]["MLA rls"][0]["found"]
    said = capsys.readouterr().out
    assert all(method in said for method in METHODS) and "tuned" in said and str(written / "demo.png") in said
    assert torch.get_num_threads() == threads


@pytest.mark.exhaustive
def test_full_run(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    results = demo.run(tmp_path)
    digits, competition = results["digits"], results["competition"]
    assert all(accuracy["average"] > 0.96 for accuracy in digits.values())
    # The weak views are what joint training leaves unlearned.
    for view in ("fourier", "profile"):
        assert min(digits[m][view] for m in METHODS[2:]) > max(digits[m][view] for m in METHODS[:2]) + 0.1
    assert len(competition["joint, sum"]) == 3
    assert max(run["found"] for run in competition["joint, sum"]) <= 0.65
    assert min(run["found"] for run in competition["MLA rls"]) >= 0.95


def test_goes_on_without_the_optional_packages(tmp_path, capsys, monkeypatch):
    for missing in ("sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(demo, "run_competition", lambda seeds, rounds: competition_results())
    results = demo.run(tmp_path, quick=True)
    assert results["digits"] == {} and results["competition"] and not (tmp_path / "demo.png").exists()
    said = capsys.readouterr().out
    assert said.count('pip install "mla_fast[demo]"') == 2 and "matplotlib is missing" in said


def competition_results():
    learned = {"found": 0.5, "accuracy": 0.8, "one_sufficient": 0.6}
    return {"joint, sum": [learned, {**learned, "found": 0.6}], "MLA rls": [dict.fromkeys(learned, 1.0)] * 2}


def test_plot_without_digits(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert demo.plot({"digits": {}, "competition": competition_results()}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_every_method_starts_from_the_same_encoders(monkeypatch):
    dataset = MultimodalDataset({"a": torch.randn(9, 4), "b": torch.randn(9, 3)}, torch.arange(9) % 3)
    drawn = []
    real = demo.encoder_for
    monkeypatch.setattr(demo, "encoder_for", lambda shape, s: drawn.append(real(shape, s)) or drawn[-1])
    accuracies = [demo.digits_accuracy(method, dataset, dataset, 0, seed=2) for method in METHODS]
    assert len(drawn) == 10 and len(accuracies) == 5
    weights = [[e[0].weight for e in drawn[i : i + 2]] for i in range(0, 10, 2)]
    assert all(torch.equal(w, first) for pair in weights for w, first in zip(pair, weights[0], strict=True))


def test_markdown_table():
    table = markdown_table(["method", "a"], [["x", "10.0"], ["longer name", "-"]])
    assert table.splitlines() == [
        "| method      |    a |",
        "|-------------|-----:|",
        "| x           | 10.0 |",
        "| longer name |    - |",
    ]


def test_competition_table_averages_over_seeds():
    joint = demo.competition_table(competition_results()).splitlines()[2]
    assert [cell.strip() for cell in joint.strip("|").split("|")] == ["joint, sum", "55", "60", "80"]
