"""The command line's data: how arrays are read and labels named, what is said of it, and what becomes of an output folder."""

import json

import numpy as np
import pytest
import torch

from mla_fast.checkpoint import read_checkpoint, write_checkpoint
from mla_fast.cli import main

N = 90
CLASS = np.arange(N) % 3
NAMES = np.array(["cat", "dog", "emu"])


def views(seed=0):
    """Four modalities that show the class, each of another layout and under a name of its own."""
    random = np.random.default_rng(seed)
    columns = random.normal(size=(N, 5))
    columns[:, :3] += 4 * np.eye(3)[CLASS]
    columns[:, 3] = 1.5
    columns[:, 4] *= 1e4
    tokens = random.integers(1, 40, (N, 6))
    tokens[:, 0] = 40 + CLASS
    sequence = random.normal(size=(N, 8, 3)) + 3 * np.eye(3)[CLASS][:, None]
    images = random.integers(0, 60, (N, 10, 9, 6)).astype(np.uint8)
    images[..., 0] += (60 * CLASS.astype(np.uint8))[:, None, None]
    return {"type": np.asfortranarray(columns), "a.b": tokens, "steps": sequence, "values": images}


LAYOUT = ["--layout", "a.b=tokens,steps=sequence,values=channels_last"]


def save(path, **arrays):
    np.savez(path, **{"label": CLASS, "speaker": np.array([b"s0", b"s1", b"s2", b"s3", b"s4"])[np.arange(N) % 5]} | arrays)
    return path


def train(path, output, modalities, *more, epochs=1):
    command = ["train", "--data", str(path), "--modalities", modalities, "--test-where", "speaker=s1", "--device", "cpu"]
    return main([*command, "--features", "16", "--batch-size", "16", "--epochs", str(epochs), "--output", str(output), *more])


def evaluate(run, *more):
    return main(["eval", str(run / "checkpoint.pt"), "--device", "cpu", *map(str, more)])


def result(printed):
    """The table of accuracies."""
    return printed.partition("test accuracy")[2].partition("wrote")[0]


def test_every_layout_under_any_name(tmp_path, capsys):
    path = save(tmp_path / "file.npz", **views(), label=NAMES.astype("S")[CLASS])
    assert train(path, tmp_path / "run", "type,a.b,steps,values", *LAYOUT, epochs=8) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines() if line.startswith("  ")}
    for name, line in {
        "type": "float64 [90, 5] features, standardised feature by feature",
        "a.b": "int64 [90, 6] tokens below 43 (otherwise: --layout a.b=features)",
        "steps": "float64 [90, 8, 3] sequence, standardised feature by feature (otherwise: --layout steps=image)",
        "values": "uint8 [90, 10, 9, 6] channels last / 255, standardised channel by channel (otherwise: --layout values=image)",
        "label": "|S3 [90] 3 classes: cat, dog, emu",
    }.items():
        assert f"  {name} " in printed and line in " ".join(printed.split()), lines
    assert "note: 1 of 5 features of 'type' have one value in training: 3" in printed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["config"]["class_names"] == NAMES.tolist() and metrics["config"]["vocabulary"] == {"a.b": 43}
    assert set(metrics["test"]["accuracy"]) == {"type", "a.b", "steps", "values", "average", "fused"}
    assert metrics["test"]["accuracy"]["fused"] > 0.9 and metrics["test"]["accuracy"]["type"] > 0.9
    assert evaluate(tmp_path / "run") == 0
    assert result(capsys.readouterr().out) == result(printed)


@pytest.mark.parametrize(
    ("modalities", "more", "message"),
    [
        ("a.b", [], "'a.b': torch.int64 [90, 6] may be tokens [N, T] (--layout a.b=tokens) or features"),
        ("values", [], "'values': torch.float32 [90, 10, 9, 6] may be images [N, H, W, C] (--layout values=channels_last)"),
        ("type", ["--layout", "type=tokens"], "'type': expected integers as tokens, got torch.float64"),
        ("type", ["--layout", "a.b=tokens"], "layout: expected modalities among type, got a.b"),
        ("type", ["--label", "steps"], "'steps': expected [N] or [N, 1] with at least one sample, got [90, 8, 3]"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_choice(tmp_path, capsys, modalities, more, message):
    path = save(tmp_path / "file.npz", **views())
    assert train(path, tmp_path / "run", modalities, *more) == 2
    captured = capsys.readouterr()
    assert f"file.npz: {message}" in captured.err and len(captured.err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_layout_that_is_none_is_refused(tmp_path, capsys):
    for text in ("type", "type=text", "=tokens"):
        with pytest.raises(SystemExit):
            train(tmp_path / "file.npz", tmp_path, "type", "--layout", text)
        assert "expected NAME=LAYOUT with a layout of features, tokens, sequence" in capsys.readouterr().err


def test_features_of_unlike_scale_and_times_a_second_apart_are_learned(tmp_path):
    random = np.random.default_rng(0)
    tabular = np.eye(3)[CLASS] + 0.2 * random.normal(size=(N, 3))
    wide = np.column_stack([tabular, 1e5 * random.normal(size=N)])
    seconds = 1_700_000_000 + CLASS
    path = save(tmp_path / "file.npz", wide=wide, time=seconds, exact=seconds.astype(np.float64), ns=(seconds * 10**9 + CLASS))
    accuracy = {}
    for per in ("feature", "array"):
        assert train(path, tmp_path / per, "wide,time,exact,ns", "--standardize", per, epochs=20) == 0
        accuracy[per] = json.loads((tmp_path / per / "metrics.json").read_text())["test"]["accuracy"]
        assert all(accuracy[per][name] == 1 for name in ("time", "exact", "ns"))
    assert accuracy["feature"]["wide"] > 0.9 > 0.6 > accuracy["array"]["wide"]


def test_labels_of_other_data_are_those_that_were_trained_on(tmp_path, capsys):
    """By name where they have names, and by number where the other data lacks the first class."""
    sound = views()["type"]
    for labels in (NAMES[CLASS], CLASS, CLASS + 1.0):
        path = save(tmp_path / "file.npz", sound=sound, label=labels)
        assert train(path, tmp_path / "run", "sound", "--overwrite", epochs=8) == 0
        some = CLASS > 0
        other = tmp_path / "other.npz"
        np.savez(other, sound=sound[some], label=labels[some][:, None])
        capsys.readouterr()
        assert evaluate(tmp_path / "run", "--data", other) == 0
        printed = capsys.readouterr().out
        assert float(result(printed).split("fused")[1].split()[0]) > 90 and "3 classes" in printed
        unknown = np.where(CLASS[some] == 1, labels[some][0], np.array(["9"]).astype(labels.dtype))
        np.savez(other, sound=sound[some], label=unknown)
        assert evaluate(tmp_path / "run", "--data", other) == 2
        assert "other.npz: 'label': expected the classes" in (error := capsys.readouterr().err) and error.rstrip().endswith(
            "got 9"
        )


def test_the_mask_is_read_by_the_names_of_its_columns(tmp_path):
    """Bytes as strings: exactly the same rows are trained on."""
    arrays = {name: views()[name] for name in ("type", "steps")}
    present = np.random.default_rng(1).random((N, 2)) < 0.6
    present[0], present[1] = (True, False), (False, True)
    runs = []
    for i, names in enumerate((np.array([b"steps", b"type"]), np.array(["steps", "type"]), None)):
        columns = {"present": present} if names is not None else {"present": present[:, ::-1]}
        columns |= {} if names is None else {"modalities": names}
        path = save(tmp_path / f"{i}.npz", **arrays, **columns)
        assert train(path, tmp_path / str(i), "type,steps", "--layout", "steps=sequence") == 0
        runs.append(read_checkpoint(tmp_path / str(i) / "checkpoint.pt")["model"])
    assert all(torch.equal(runs[0][name], run[name]) for run in runs for name in run)


def test_other_data_must_fit_what_was_trained_on(tmp_path, capsys):
    arrays = views()
    path = save(tmp_path / "file.npz", **arrays)
    assert train(path, tmp_path / "run", "a.b,steps", "--layout", "a.b=tokens,steps=sequence") == 0
    shorter = {"a.b": arrays["a.b"][:, :4], "steps": arrays["steps"][:, :5]}
    assert evaluate(tmp_path / "run", "--data", save(tmp_path / "shorter.npz", **shorter)) == 0
    for changed, message in (
        ({"a.b": arrays["a.b"] + 1}, "'a.b': expected tokens up to 42, as in training, got 43"),
        ({"a.b": arrays["a.b"] - 1000}, "'a.b': expected tokens from 0 (padding)"),
        ({"a.b": arrays["a.b"] + 0.5}, "'a.b': expected integers as tokens, got torch.float64"),
        ({"steps": arrays["steps"][..., :2]}, "'steps': expected samples [8, 3], got [8, 2]"),
    ):
        other = save(tmp_path / "other.npz", **{**arrays, **changed})
        assert evaluate(tmp_path / "run", "--data", other) == 2
        assert f"other.npz: {message}" in capsys.readouterr().err


def test_a_feature_in_other_units_is_noted(tmp_path, capsys):
    arrays = views()
    assert train(save(tmp_path / "file.npz", **arrays), tmp_path / "run", "type,steps", "--layout", "steps=sequence") == 0
    other = arrays["type"].copy()
    other[:, 2] += 300
    capsys.readouterr()
    assert evaluate(tmp_path / "run", "--data", save(tmp_path / "other.npz", **{**arrays, "type": other})) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: feature")]
    assert len(notes) == 1 and notes[0].startswith("note: feature 2 of 'type' has a mean")


def test_checkpoints_of_older_versions_are_evaluated(tmp_path, capsys):
    """They name neither layouts nor classes, and have one mean and deviation for each array."""
    path = save(tmp_path / "file.npz", **views())
    modalities, layouts = "type,a.b,steps", ["--layout", "a.b=features", "--standardize", "array"]
    assert train(path, tmp_path / "run", modalities, *layouts) == 0
    printed = result(capsys.readouterr().out)
    saved = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    config = {k: v for k, v in saved["config"].items() if k not in ("layouts", "vocabulary", "standardize", "class_names")}
    config["statistics"] = {name: values[:2] for name, values in config["statistics"].items()}
    config["statistics"]["a.b"][0] += saved["config"]["statistics"]["a.b"][2]  # no integer that the mean is relative to
    saved |= {"config": config}
    write_checkpoint(tmp_path / "run" / "checkpoint.pt", {k: v for k, v in saved.items() if k not in ("format", "version")})
    assert evaluate(tmp_path / "run") == 0
    assert result(capsys.readouterr().out) == printed


def test_a_run_is_not_overwritten_unasked(tmp_path, capsys):
    path, run = save(tmp_path / "file.npz", **views()), tmp_path / "run"
    assert train(path, run, "type", epochs=2) == 0
    before = (run / "checkpoint.pt").read_bytes()
    assert train(path, run, "type", "--seed", "1") == 2
    error = capsys.readouterr().err
    assert "has checkpoint.pt and metrics.json of another run; --resume continues" in error and "--overwrite begins anew" in error
    assert (run / "checkpoint.pt").read_bytes() == before
    (run / "events.out.tfevents.1").write_text("")
    assert train(path, run, "type", "--seed", "1", "--overwrite", "--label", "steps") == 2  # and nothing is deleted
    assert (run / "checkpoint.pt").read_bytes() == before
    assert train(path, run, "type", "--seed", "1", "--overwrite") == 0
    assert read_checkpoint(run / "checkpoint.pt")["epoch"] == 1 and not (run / "events.out.tfevents.1").exists()
    (run / "checkpoint.pt").unlink()
    capsys.readouterr()
    assert train(path, run, "type") == 2 and "has metrics.json of another run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(path, run, "type", "--resume", "--overwrite")


def test_a_finished_run_goes_on_to_more_epochs(tmp_path, capsys):
    path, run = save(tmp_path / "file.npz", **views()), tmp_path / "run"
    assert train(path, run, "type", epochs=4) == 0
    first = read_checkpoint(run / "checkpoint.pt")
    capsys.readouterr()
    assert train(path, run, "type", "--resume", epochs=6) == 0
    printed = capsys.readouterr().out
    assert "continuing after 4 epochs" in printed and "as in that run of 4 epochs: a tenth from epoch 4 on" in printed
    second = read_checkpoint(run / "checkpoint.pt")
    assert second["epoch"] == len(second["history"]) == 6 and second["history"][:4] == first["history"]
    assert second["config"] == {**first["config"], "epochs": 6}
    assert second["scheduler"]["milestones"] == first["scheduler"]["milestones"]
    assert second["optimizer"]["param_groups"][0]["lr"] == first["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.003)
    assert json.loads((run / "metrics.json").read_text())["config"]["epochs"] == 6
    assert train(path, run, "type", "--resume", epochs=6) == 0 and "nothing left to train" in capsys.readouterr().out
    assert train(path, run, "type", "--resume", epochs=5) == 2
    assert "--epochs: expected at least the 6 epochs that are done, got 5" in capsys.readouterr().err
    arrays = views()
    save(path, **{**arrays, "type": arrays["type"] + 1})
    assert train(path, run, "type", "--resume", epochs=7) == 2
    assert "--resume: expected the data of the saved run, got others in" in capsys.readouterr().err
