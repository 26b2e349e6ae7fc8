"""The paper's tables and figures on made trees, with small encoders and an epoch or two."""

import json
import math

import pytest
import torch
import trees
from helpers import make_inputs, make_model
from test_cli_paper import own, run
from torch import nn

from mla_fast import reference
from mla_fast.compare import published, study, study_report
from mla_fast.datasets import ClipFood101, KineticsSounds

pytest.importorskip("PIL")
pytest.importorskip("soundfile")
QUICK = ["--workers", "0", "--seeds", "0"]


def lines_of(path):
    """{(row, modality): [published, …]} of a table in Markdown."""
    rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    return {(row[0].strip(), row[1].strip()): [cell.strip() for cell in row[2:]] for row in rows[2:]}


@pytest.mark.filterwarnings("ignore:(?s).*is left out")
def test_table_1_of_crema_d_in_both_settings_and_again(tmp_path, capsys):
    root, output = trees.crema_d(tmp_path / "data"), tmp_path / "run"
    command = ["compare", "crema-d", root, "--study", "table-1", "--output", output, *own("audio", "image"), *QUICK]
    assert run(*command, "--epochs", 2, "--methods", "Concat,QMF,MLA") == 0
    table = lines_of(output / "table.md")
    assert table["MLA", "multi"][0] == "79.70" and table["QMF", "audio"][0] == "59.41" and table["Sum", "audio"][1:] == ["–", "–"]
    assert all(0 <= float(cell) <= 100 for name in ("audio", "image", "multi") for cell in table["QMF", name])
    found = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [(r["method"], r["setting"], r["chosen_on"]) for r in found] == [
        (name, setting, on)
        for setting, on, mla in (("paper", "validation", "MLA rls"), ("released", "test", "MLA none"))
        for name in ("Concat", "QMF", mla)
    ]
    text = (output / "table.md").read_text()
    assert "as released: no projection, best epoch on test" in text and "which flatters" in text
    before = (output / "runs.jsonl").read_bytes()
    assert run("compare", "crema-d", root, "--config", output / "run.toml") == 0
    assert (output / "runs.jsonl").read_bytes() == before
    capsys.readouterr()
    assert run(*command, "--epochs", 3) == 2 and "results of epochs 2, expected 3" in capsys.readouterr().err


def test_table_3_takes_both_fusions_from_one_run(tmp_path):
    root, output = trees.kinetics_sounds(tmp_path / "data", 6), tmp_path / "run"
    command = ["compare", "kinetics-sounds", root, "--study", "table-3", "--epochs", 1, "--output", output]
    assert run(*command, *own("audio", "image"), *QUICK) == 0
    found = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [(r["method"], r["setting"]) for r in found] == [("MLA none", "paper"), ("MLA rls", "paper"), ("MLA none", "released")]
    assert all({"fixed", "dynamic", "audio", "image"} == set(r["test"]) and r["epoch"] == 1 for r in found)
    table = lines_of(output / "table.md")
    assert [table[row, "multi"][0] for row in ("neither", "DF", "HGM", "HGM and DF")] == ["65.53", "66.34", "70.72", "71.35"]
    assert table["HGM", "multi"][2] == table["neither", "multi"][2]  # it never fires


def test_table_1_of_three_modalities_decodes_anew_as_released(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "words", "of"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    root, cache, output = trees.iemocap(tmp_path / "data"), tmp_path / "cache", tmp_path / "run"
    common = ["iemocap", root, "--tokenizer", tmp_path]
    assert run("prepare", *common, "--output", cache, "--workers", 0) == 0
    more = ["--cache", cache, "--output", output, "--epochs", 1, "--methods", "Late fusion,MLA", *own("audio", "image", "text")]
    assert run("compare", *common, "--study", "table-1", *more, *QUICK) == 0
    assert "note: the cache is of standardised filter banks" in capsys.readouterr().out
    table = lines_of(output / "table.md")
    assert [table["MLA", name][0] for name in ("audio", "image", "text", "multi")] == ["46.29", "37.63", "73.22", "78.92"]
    assert all("–" not in table["Late fusion", name] for name in ("audio", "image", "text", "multi"))


@pytest.mark.parametrize("npz", [False, True])
def test_table_4_of_features_that_clip_has_made(tmp_path, npz, capsys):
    root, output = trees.clip_food101(tmp_path / "data", npz), tmp_path / "run"
    assert run("train", "clip-food101", root, "--epochs", 5, "--lr", 0.1, "--workers", 0, "--output", output) == 0
    assert json.loads((output / "metrics.json").read_text())["test"]["accuracy"]["fused"] == 1
    command = ["compare", "clip-food101", root, "--study", "table-4", "--epochs", 5, "--lr", 0.1]
    assert run(*command, "--output", tmp_path / "study", *QUICK) == 0
    table = lines_of(tmp_path / "study/table.md")
    assert table["CLIP + MLA", "multi"] == ["93.47", "100.00", "100.00"] and table["CLIP", "image"][0] == "63.07"
    assert "absent" not in capsys.readouterr().err


def test_what_is_read_of_clips_features(tmp_path):
    data = ClipFood101(trees.clip_food101(tmp_path / "files"), "all")
    assert data.class_names == ["hot_dog", "ramen"] and len(data) == 16
    assert data.absent == {"text: not on disk": ["hot_dog_0"]}
    with pytest.warns(UserWarning, match=r"expected features \[16\], got \[15\]"):
        present = [data[[e.id for e in data.entries].index("ramen_5")][2].tolist() for _ in range(1)]
    assert present == [[False, False]]
    numbers = ClipFood101(trees.clip_food101(tmp_path / "npz", npz=True), "test")
    assert numbers.target.tolist() == [0, 1, 0, 1] and numbers[1][0]["text"].shape == (16,)
    for path in (tmp_path / "npz").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="expected train.npz or"):
        ClipFood101(tmp_path / "npz")


def test_figure_2_masks_one_modality_in_training_alone(tmp_path, monkeypatch):
    whole = published.STUDIES["figure-2"]
    monkeypatch.setitem(published.STUDIES, "figure-2", published.Study(whole.title, whole.rows[1:], whole.published, (0.0, 0.5)))
    root, output = trees.kinetics_sounds(tmp_path / "data", 6), tmp_path / "run"
    command = ["compare", "kinetics-sounds", root, "--study", "figure-2", "--settings", "paper", "--epochs", 1]
    assert run(*command, "--output", output, *own("audio", "image"), *QUICK) == 0
    table = lines_of(output / "table.md")
    assert set(table) == {
        (f"MLA{mask}", name)
        for mask in ("", ", audio 50 % masked", ", image 50 % masked")
        for name in ("audio", "image", "multi")
    }
    data = KineticsSounds(root)
    less = study.lacking(data, "audio", 0.5, seed=1)
    gone = [e.sources["audio"] is None for e in less.entries]
    expected = torch.rand(len(data), generator=torch.Generator().manual_seed(1)) < 0.5
    assert gone == expected.tolist() and 0 < sum(gone) < len(data) and all(e.sources["audio"] for e in data.entries)
    assert all(e.sources["audio"] for e in study.lacking(KineticsSounds(root, modalities=["audio"]), "audio", 1.0, 0).entries)


def test_figure_3_measures_the_gap(tmp_path):
    output = tmp_path / "run"
    arguments = ["--epochs", 1, "--settings", "paper", "--output", output, *own("text", "image"), *QUICK, "--tokenizer", tmp_path]
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ramen"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    assert run("compare", "food-101", trees.mmbt(tmp_path / "data"), "--study", "figure-3", *arguments) == 0
    table = lines_of(output / "table.md")
    assert all(0 <= float(table[row, "gap"][1]) <= 2 for row in ("Concat", "MLA"))


def test_the_gap_by_hand():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.encoders = {"a": nn.Identity(), "b": nn.Identity()}

    a, b = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[-1.0, 0.0], [torch.nan, 0.0]])
    present = torch.tensor([[True, True], [True, False]])
    gap = study.modality_gap(Model(), [({"a": a, "b": b}, torch.zeros(2), present)])
    assert math.isclose(gap, math.hypot(1.5, 0.5), rel_tol=1e-6)  # of (0.5, 0.5) and (−1, 0)


def test_accuracy_as_released():
    model, inputs, target = make_model(), make_inputs(7), torch.arange(7) % 3
    batches = [
        ({m: x[rows] for m, x in inputs.items()}, target[rows], torch.ones(len(target[rows]), 3, dtype=torch.bool))
        for rows in (slice(4), slice(4, 7))
    ]
    found = study.released_accuracy(model, batches)
    with torch.no_grad():
        logits = [torch.stack(list(model(x).values())) for x, *_ in batches]
    fused = torch.cat([reference.official_fusion(z)[0] for z in logits])
    fixed = torch.cat([(z * torch.tensor([0.35, 0.25, 0.40])[:, None, None]).sum(0) for z in logits])
    expected = dict(zip(inputs, torch.cat(logits, 1), strict=True)) | {"dynamic": fused, "fixed": fixed}
    assert found == {m: pytest.approx((z.argmax(1) == target).double().mean().item()) for m, z in expected.items()}


@pytest.mark.parametrize("chosen_on", ["validation", "test", "last epoch"])
def test_which_epoch_counts(chosen_on):
    class Scripted:
        validation, test = (0.2, 0.9, 0.9), (0.8, 0.3, 0.5)

        def train_epoch(self, epoch):
            self.epoch = epoch

        def accuracy(self, loader):
            return {"multi": getattr(self, loader)[self.epoch]}

    loaders = {"validation": "validation", "test": "test"}
    expected = {"validation": (2, 0.3), "test": (1, 0.8), "last epoch": (3, 0.5)}[chosen_on]
    epoch, test = study.train_and_test(Scripted(), 3, loaders, chosen_on)
    assert (epoch, test["multi"]) == expected


def test_what_is_refused(tmp_path, capsys):
    root = trees.kinetics_sounds(tmp_path / "data")
    for arguments, message in (
        (["--study", "table-4"], "--study: expected table-4 of clip-food101, got kinetics-sounds"),
        (["--study", "table-1", "--methods", "MLA,AGM"], "--methods: expected rows of the study, Sum, Concat, "),
    ):
        assert run("compare", "kinetics-sounds", root, *arguments, *QUICK, "--output", tmp_path / "run") == 2
        assert message in capsys.readouterr().err
    for arguments, message in (
        ([], "--study"),
        (["--study", "table-1", "--settings", "both"], "expected some of paper, released"),
    ):
        with pytest.raises(SystemExit):
            run("compare", "kinetics-sounds", root, *arguments)
        assert message in capsys.readouterr().err


def test_what_the_paper_prints_is_whole():
    for name, of in published.STUDIES.items():
        for dataset, rows in of.published.items():
            assert not rows or set(rows) == {row.label for row in of.rows}, (name, dataset)
            assert all("multi" in values and all(3 < value < 95 for value in values.values()) for values in rows.values())
    with pytest.raises(ValueError, match="--study: expected figure-3 of food-101, got mvsa"):
        published.find_study("figure-3", "mvsa")
    assert study_report.HEADS.keys() == set(study.SETTINGS)
