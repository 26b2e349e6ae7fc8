"""From training on one's own file to a table of predictions: validation, own encoders, the report, and the CSV."""

import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mla_fast import cli_train, data
from mla_fast.checkpoint import read_checkpoint
from mla_fast.cli import main
from mla_fast.reference import entropy_fusion

N, NAMES = 96, np.array(["sad, very", "happy", "=angry"])


def arrays(seed=0):
    random = np.random.default_rng(seed)
    label = np.arange(N) % 3
    sound = random.normal(size=(N, 7)).astype(np.float32)
    sound[np.arange(N), label] += 2
    words = random.integers(1, 20, (N, 5))
    words[:, 0] = 20 + label
    return {"sound": sound, "words": words, "mood": NAMES[label], "speaker": np.arange(N) % 6}


def train(folder, *more, epochs=3):
    np.savez(folder / "file.npz", **arrays())
    command = [
        "train",
        "--data",
        folder / "file.npz",
        "--modalities",
        "sound,words",
        "--layout",
        "words=tokens",
        "--label",
        "mood",
    ]
    settings = [
        "--device",
        "cpu",
        "--batch-size",
        16,
        "--epochs",
        epochs,
        "--features",
        9,
        "--lr",
        0.1,
        "--output",
        folder / "run",
    ]
    return main([str(each) for each in (*command, *settings, *more)])


def predict(folder, file, *more, name="checkpoint.pt"):
    return main(["predict", str(folder / "run" / name), str(file), "--output", str(folder / "out.csv"), "--device", "cpu", *more])


def table(path):
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def expected(folder, found, present):
    """Probabilities and weights in float64, by the equations."""
    saved = read_checkpoint(folder / "run/checkpoint.pt")
    model = cli_train.build(saved["config"], torch.device("cpu")).model
    model.load_state_dict(saved["model"])
    model.double().eval()
    mean, deviation = (torch.tensor(part, dtype=torch.float64) for part in saved["config"]["statistics"]["sound"])
    inputs = {"sound": (torch.from_numpy(found["sound"]).double() - mean) / deviation, "words": torch.from_numpy(found["words"])}
    with torch.no_grad():
        logits = torch.stack([model({m: x})[m] for m, x in inputs.items()])
    fused = entropy_fusion(logits, torch.from_numpy(present))
    return fused[0].softmax(1).numpy(), fused[1].numpy()


def test_predictions_of_a_file_without_labels(tmp_path, capsys):
    assert train(tmp_path, "--test-where", "speaker=2,4") == 0
    new = {name: array for name, array in arrays(seed=1).items() if name in ("sound", "words")}
    present = np.random.default_rng(2).random((N, 2)) < 0.7
    present[:3] = [[True, True], [False, True], [False, False]]
    new["sound"][~present[:, 0]], new["words"][~present[:, 1]] = np.nan, 10**6
    np.savez(tmp_path / "new.npz", **new, present=present)
    assert predict(tmp_path, tmp_path / "new.npz") == 0
    said = capsys.readouterr().out
    nothing = int((~present.any(1)).sum())
    assert f"note: {nothing} rows have no prediction" in said and f"wrote {tmp_path / 'out.csv'}, {N} rows" in said
    header, rows = table(tmp_path / "out.csv")
    names = sorted(NAMES.tolist())
    assert header == ["row", "predicted", *(f"probability_{name}" for name in names), "weight_sound", "weight_words"]
    new["sound"][~present[:, 0]], new["words"][~present[:, 1]] = 0, 0
    p, weights = expected(tmp_path, new, present)
    for i, (row, here) in enumerate(zip(rows, present.any(1), strict=True)):
        assert row[0] == str(i) and row[1] == (names[p[i].argmax()] if here else "")
        assert here or row[1:] == ["", "", "", "", "0", "0"]
        if here:
            np.testing.assert_allclose(np.array(row[2:], dtype=float), [*p[i], *weights[i]], rtol=1e-4, atol=1e-5)


def test_what_the_file_lacks_is_absent_and_the_mask_may_name_it(tmp_path, capsys):
    assert train(tmp_path) == 0
    sound = arrays(seed=1)["sound"]
    present = np.ones((N, 2), dtype=bool)
    present[::2, 0] = False
    for more in (
        {},
        {"present": present},
        {"present": present[:, :1]},
        {"present": present[:, ::-1], "modalities": ["words", "sound"]},
    ):
        np.savez(tmp_path / "new.npz", sound=sound, target=np.zeros(3), **more)
        assert predict(tmp_path, tmp_path / "new.npz", "--overwrite") == 0
        assert "note: the file has no words; the prediction is without" in capsys.readouterr().out
        weights = np.array([row[-2:] for row in table(tmp_path / "out.csv")[1]], dtype=float)
        assert (weights == [[1, 0]] if not more else weights == np.stack([present[:, 0], 0 * present[:, 0]], 1)).all()


def test_what_predict_refuses(tmp_path, capsys):
    assert train(tmp_path, epochs=1) == 0
    new = arrays(seed=1)
    for changed, message in (
        ({"sound": np.zeros((N, 8))}, "'sound': expected samples [7], got [8]"),
        ({"words": new["words"] + 50}, "'words': expected tokens up to 22, as in training, got 7"),
        ({"sound": np.full((N, 7), np.nan)}, "'sound': expected finite values, row 0 has others"),
        ({"sound": np.zeros((N - 1, 7))}, "expected arrays of one length N"),
        ({"sound": np.float64(3)}, "expected arrays of one length N"),
        ({"sound": np.array([None] * N)}, "'sound': expected numbers or names, got Python objects"),
        ({"present": np.ones((N, 3), dtype=bool)}, "expected present to be bool [96, 2]"),
    ):
        np.savez(tmp_path / "new.npz", **{**new, **changed})
        assert predict(tmp_path, tmp_path / "new.npz") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
    np.savez(tmp_path / "new.npz", other=np.zeros(3))
    assert predict(tmp_path, tmp_path / "new.npz") == 2
    assert "expected at least one of the arrays sound, words, got other" in capsys.readouterr().err
    np.savez(tmp_path / "new.npz", sound=np.zeros((0, 7)))
    assert predict(tmp_path, tmp_path / "new.npz") == 2
    assert "N ≥ 1, got sound [0, 7]" in capsys.readouterr().err
    (tmp_path / "out.csv").write_text("mine")
    assert predict(tmp_path, tmp_path / "file.npz") == 2
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_text() == "mine"


def best_of(folder):
    metrics = json.loads((folder / "run/metrics.json").read_text())
    reached = [record["validation"]["accuracy"]["fused"] for record in metrics["history"]]
    return 1 + reached.index(max(reached)), metrics


@pytest.mark.parametrize("how", ["0.3", "speaker=1,5"])
def test_the_best_epoch_on_the_validation_part_is_kept_and_tested(tmp_path, capsys, how):
    assert train(tmp_path, "--validation", how, "--lr", "1.5", "--test-where", "speaker=2", epochs=7) == 0
    printed = capsys.readouterr().out
    epoch, metrics = best_of(tmp_path)
    samples = {"0.3": 24, "speaker=1,5": 32}[how]
    assert metrics["history"][0]["validation"]["samples"] == samples and metrics["epoch"] == epoch
    assert read_checkpoint(tmp_path / "run/best.pt")["epoch"] == epoch < 7  # at this rate the last epoch is not the best
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["epoch"] == 7
    assert f"the best of 7 epochs on the validation part was epoch {epoch}, with" in printed
    assert main(["eval", str(tmp_path / "run/best.pt"), "--device", "cpu"]) == 0
    again = capsys.readouterr().out.partition("test accuracy")[2]
    assert again.strip() and again.strip() in printed


def test_a_run_that_ended_between_its_checkpoint_and_the_best_goes_on(tmp_path, capsys):
    assert train(tmp_path, "--validation", "0.3") == 0
    assert best_of(tmp_path)[0] == 3
    (tmp_path / "run/best.pt").unlink()
    for epochs in (3, 5):
        assert train(tmp_path, "--validation", "0.3", "--resume", epochs=epochs) == 0
        assert read_checkpoint(tmp_path / "run/best.pt")["epoch"] == best_of(tmp_path)[0]


def test_patience_and_what_is_refused(tmp_path, capsys):
    assert train(tmp_path, "--validation", "0.3", "--patience", "2", "--lr", "1e-9", epochs=20) == 0
    assert len(best_of(tmp_path)[1]["history"]) == 3
    for more, message in (
        (["--patience", "2"], "validation: expected a loader, for patience to monitor"),
        (["--validation", "mood=3"], "--validation: where: no field 'mood'"),
        (["--validation", "0.001"], "--validation: test_fraction: expected to leave samples on both sides"),
    ):
        assert train(tmp_path, "--overwrite", *more) == 2
        assert message in capsys.readouterr().err
    for text in ("1.5", "x"):
        with pytest.raises(SystemExit):
            train(tmp_path, "--overwrite", "--validation", text)


def test_each_epoch_is_a_line(tmp_path, capsys):
    assert train(tmp_path, "--validation", "0.3") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    history = best_of(tmp_path)[1]["history"]
    for line, record in zip(lines, history, strict=True):
        losses = ", ".join(f"{m} {loss:.3f}" for m, loss in record["loss"].items())
        accuracy = 100 * record["validation"]["accuracy"]["fused"]
        assert line.startswith(f"epoch {record['epoch']}/3  loss {losses}; validation accuracy {accuracy:.1f} %  (")


class Own(nn.Linear):
    """An encoder of one's own, of another width than the package's."""

    def __init__(self):
        super().__init__(7, 11)


class Flat(Own):
    def forward(self, x):
        return super().forward(x).flatten()


def test_an_encoder_of_ones_own(tmp_path, capsys):
    assert train(tmp_path, "--encoder", f"sound={__name__}:Own", epochs=8) == 0
    saved = read_checkpoint(tmp_path / "run/checkpoint.pt")
    assert saved["model"]["encoders.sound.weight"].shape == (11, 7) and saved["model"]["head.weight"].shape == (3, 11)
    assert best_of_test(tmp_path) > 0.6
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run/checkpoint.pt"), "--device", "cpu"]) == 0
    assert predict(tmp_path, tmp_path / "file.npz") == 0
    assert len(table(tmp_path / "out.csv")[1]) == N


def best_of_test(folder):
    return json.loads((folder / "run/metrics.json").read_text())["test"]["accuracy"]["fused"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (f"smell={__name__}:Own", "--encoder: expected modalities among sound, words, got 'smell'"),
        (f"sound={__name__}:None_", "--encoder: expected sound=package.module:Encoder"),
        ("sound=not.there:Own", "--encoder: expected sound=package.module:Encoder"),
        ("sound=Own", "--encoder: expected sound=package.module:Encoder"),
        ("sound=torch.nn:Linear", "--encoder: expected sound=package.module:Encoder"),
        ("sound=builtins:dict", "--encoder: expected an nn.Module from 'builtins:dict', got dict"),
        (f"sound={__name__}:Flat", "--encoder: expected features [N, s] of sound, got [11] for one sample"),
        (f"words={__name__}:Own", "--encoder: expected words's to take torch.int64 [1, 5]"),
    ],
)
def test_encoders_that_do_not_fit_are_named(tmp_path, capsys, option, message):
    assert train(tmp_path, "--encoder", option) == 2
    assert message in capsys.readouterr().err


def test_an_encoder_beside_the_one_who_types(tmp_path, monkeypatch):
    (tmp_path / "my_encoder_of_sound.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(7, 5)\n")
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path, "--encoder", "sound=my_encoder_of_sound:make", epochs=1) == 0
    assert "" not in sys.path


def test_the_report_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    assert train(tmp_path, "--validation", "0.3", "--interaction", "4") == 0
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert not re.search(
        r"<script|<link|<img|(src|href)=.http|url\(http", re.sub(r"<metadata>.*?</metadata>", "", page, flags=re.DOTALL)
    )
    for text in ("training loss", "validation accuracy", "mean fusion weight", "=angry", "sad, very", "Settings"):
        assert text in page
    counts, weights = confusion(tmp_path)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    right = np.trace(np.array(counts)) / np.sum(counts)
    assert right == pytest.approx(metrics["test"]["accuracy"]["fused"]) and np.sum(counts) == metrics["test"]["samples"]
    assert sum(weights.values()) == pytest.approx(1)


def confusion(folder):
    from mla_fast import cli_data
    from mla_fast.cli_report import Answers

    saved = read_checkpoint(folder / "run/best.pt")
    trainer = cli_train.build(saved["config"], torch.device("cpu"))
    trainer.model.load_state_dict(saved["model"])
    dataset, _ = cli_data.read_for_evaluation(saved["config"])
    test = data.apply_statistics(cli_data.split(dataset, saved["config"])[1], saved["config"]["statistics"])
    parts = []
    for part in (slice(None, 9), slice(9, None)):
        parts.append(Answers(trainer.model.modalities))
        for inputs, *rest in data.loader(test.subset(part), 7):
            parts[-1].add(tuple(inputs), trainer.predict((inputs, *rest)), rest[0])
    found = parts[0].joined(parts[1]).joined(Answers(trainer.model.modalities))
    return found.counts.tolist(), found.weights()


def test_without_matplotlib_the_run_says_so_and_is_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(tmp_path, epochs=1) == 0
    assert 'no report.html: matplotlib.figure is missing (pip install "mla_fast[demo]")' in capsys.readouterr().out
    assert (tmp_path / "run/metrics.json").exists() and not (tmp_path / "run/report.html").exists()


def test_overwriting_removes_all_of_the_run(tmp_path):
    assert train(tmp_path, "--validation", "0.3", epochs=1) == 0
    assert train(tmp_path, "--overwrite", epochs=1) == 0
    assert not (tmp_path / "run/best.pt").exists()
