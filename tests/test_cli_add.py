"""``mla-fast train --add``, as a user types it: one modality after another, each from a file of its own."""

import json

import numpy as np
import pytest
from test_cli import main

from mla_fast.checkpoint import read_checkpoint

COMMON = ["--test-where", "speaker=2,4", "--device", "cpu", "--epochs", "4", "--batch-size", "16"]
PROTECTS = ["--target", "update", "--bias", "project"]


def write(path, names, classes=3, N=90, **more):
    random = np.random.default_rng(0)
    label = np.arange(N) % classes
    arrays = {}
    for name, width in names.items():
        arrays[name] = random.normal(size=(N, width)).astype(np.float32)
        arrays[name][np.arange(N), label] += 3
    np.savez(path, **arrays, **{"label": label, "speaker": np.arange(N) % 5} | more)
    return str(path)


@pytest.fixture
def old(tmp_path):
    data = write(tmp_path / "old.npz", {"image": 8})
    assert main(["train", "--data", data, "--modalities", "image", "--output", str(tmp_path / "old"), *COMMON, *PROTECTS]) == 0
    return tmp_path / "old" / "checkpoint.pt"


def add(name, start, data, output, *more):
    return main(["train", "--add", name, "--from", str(start), "--data", data, "--output", str(output), *COMMON, *more])


def test_two_additions_each_from_a_file(old, tmp_path, capsys):
    capsys.readouterr()
    assert add("sound", old, write(tmp_path / "new.npz", {"sound": 7}), tmp_path / "new") == 0
    printed = capsys.readouterr().out
    metrics, saved = (
        json.loads((tmp_path / "new" / "metrics.json").read_text()),
        read_checkpoint(tmp_path / "new" / "checkpoint.pt"),
    )
    assert saved["epoch"] == 8 and saved["added"] == ["sound"] and saved["additions"] == {"sound": 4}
    before = metrics["config"]["before"]["image"]
    assert before > 0.6 and f"image  {100 * before:6.1f} %  " in printed.partition("accuracy before and after sound was added")[2]
    assert metrics["test"]["accuracy"]["sound"] > 0.6  # the new file has no image
    image = {n: t for n, t in read_checkpoint(old)["model"].items() if n.startswith("encoders.image")}
    assert all((saved["model"][n] == t).all() for n, t in image.items())

    (tmp_path / "old.npz").unlink()  # the old data is gone
    both = write(tmp_path / "both.npz", {"touch": 9, "sound": 7, "image": 8})
    assert add("touch", tmp_path / "new" / "checkpoint.pt", both, tmp_path / "third") == 0
    printed = capsys.readouterr().out
    third = json.loads((tmp_path / "third" / "metrics.json").read_text())
    assert set(third["test"]["accuracy"]) == {"image", "sound", "touch", "average", "fused"}
    assert set(third["config"]["before"]) == {"image", "sound"}
    assert abs(third["test"]["accuracy"]["sound"] - third["config"]["before"]["sound"]) < 0.1
    assert main(["eval", str(tmp_path / "third" / "checkpoint.pt"), "--device", "cpu"]) == 0
    evaluated = capsys.readouterr().out
    assert f"sound had {100 * third['config']['before']['sound']:.1f} % before touch was added, " in evaluated
    assert f"fused        {100 * third['test']['accuracy']['fused']:6.1f} %" in evaluated
    assert main(["eval", str(tmp_path / "third" / "checkpoint.pt"), "--data", str(tmp_path / "new.npz"), "--device", "cpu"]) == 0


def test_half_of_the_classes_and_new_ones(old, tmp_path, capsys):
    data = write(tmp_path / "new.npz", {"sound": 7}, label=np.where(np.arange(90) % 3 == 0, 0, np.arange(90) % 3 + 2))
    assert add("sound", old, data, tmp_path / "new") == 0
    saved = read_checkpoint(tmp_path / "new" / "checkpoint.pt")
    assert saved["config"]["classes"] == 5 and saved["model"]["head.weight"].shape == (5, 64)
    assert {m: s.tolist() for m, s in saved["seen"].items()} == {
        "image": [True] * 3 + [False] * 2,
        "sound": [True, False, False, True, True],
    }
    assert main(["eval", str(tmp_path / "new" / "checkpoint.pt"), "--device", "cpu"]) == 0


def test_resuming_and_overwriting(old, tmp_path, capsys):
    data, more = write(tmp_path / "new.npz", {"sound": 7}), ["--epochs", "6"]
    assert add("sound", old, data, tmp_path / "new") == 0
    assert add("sound", old, data, tmp_path / "new") == 2 and "--resume continues" in capsys.readouterr().err
    assert add("sound", old, data, tmp_path / "new", "--resume") == 0 and "nothing left to train" in capsys.readouterr().out
    assert add("sound", old, data, tmp_path / "new", "--resume", *more) == 0
    assert "of 4 epochs: a tenth from epoch 8 on" in capsys.readouterr().out
    assert add("sound", old, data, tmp_path / "new", "--overwrite", *more) == 0
    assert read_checkpoint(tmp_path / "new" / "checkpoint.pt")["epoch"] == 10


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("--add: expected a modality beside image, got 'image'", ["--add", "image"]),
        ("no array 'smell'; there are: sound", ["--add", "smell"]),
        ("--modalities: expected none with --add", ["--modalities", "sound"]),
        ("--projection: expected none with --add: the projection goes on as 'rls', got 'window'", ["--projection", "window"]),
        ("--standardize: expected none with --add: the run before has feature, got none", ["--standardize", "none"]),
        ("--missing: expected none with --add", ["--missing", "0.2"]),
        ("--protocol: expected none with --add", ["--protocol", "cpm"]),
        ("--features: expected none with --add: the run before has 64, got 32", ["--features", "32"]),
    ],
)
def test_bad_input_is_named(message, change, old, tmp_path, capsys):
    capsys.readouterr()
    assert add("sound", old, write(tmp_path / "new.npz", {"sound": 7}), tmp_path / "new", *change) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_addition_goes_on_without_the_old_data_and_to_more_epochs(old, tmp_path, capsys):
    data = write(tmp_path / "new.npz", {"sound": 7}, present=(np.arange(90) % 4 > 0)[:, None])
    assert add("sound", old, data, tmp_path / "new", "--validation", "0.2") == 2
    assert "--validation: expected none with --add" in capsys.readouterr().err
    assert add("sound", old, data, tmp_path / "new") == 0  # rows without it are left out
    before = json.loads((tmp_path / "new" / "metrics.json").read_text())["config"]["before"]
    (tmp_path / "old.npz").unlink()
    assert add("sound", old, data, tmp_path / "new", "--resume", "--epochs", "6") == 0
    metrics = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert metrics["config"]["before"] == before and len(metrics["history"]) == 10
    again = tmp_path / "new" / "run.toml"
    assert main(["train", "--config", str(again), "--output", str(tmp_path / "again")]) == 0


def test_a_run_with_validation_can_be_added_to(tmp_path, capsys):
    data, run = write(tmp_path / "old.npz", {"image": 8}), ["--output", str(tmp_path / "old"), "--validation", "0.2"]
    assert main(["train", "--data", data, "--modalities", "image", *run, *COMMON, *PROTECTS]) == 0
    new = write(tmp_path / "new.npz", {"sound": 7})
    assert add("sound", tmp_path / "old" / "best.pt", new, tmp_path / "new") == 0
    assert (tmp_path / "new" / "report.html").exists()


def test_what_was_trained_on_is_not_tested_on_unsaid(old, tmp_path, capsys):
    data = write(tmp_path / "old.npz", {"image": 8, "sound": 7})
    assert add("sound", old, data, tmp_path / "new", "--seed", "1") == 2
    assert "--seed: expected 0 of the run before, whose data these are, got 1" in capsys.readouterr().err
    assert add("sound", old, write(tmp_path / "new.npz", {"sound": 7}), tmp_path / "new") == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "new" / "checkpoint.pt"), "--data", data, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "note: some of these rows were trained on, before" in printed and "before sound was added" not in printed


def test_half_of_a_pair_of_options(old, tmp_path, capsys):
    data = write(tmp_path / "new.npz", {"sound": 7})
    for more in (["--add", "sound"], ["--from", str(old)]):
        assert main(["train", "--data", data, "--output", str(tmp_path / "new"), *more]) == 2
        assert "--add: expected together with --from" in capsys.readouterr().err
    assert main(["train", "--data", data, "--output", str(tmp_path / "new")]) == 2
    assert "--modalities: expected names of arrays" in capsys.readouterr().err


def test_a_run_is_not_added_to_in_its_own_folder(old, tmp_path, capsys):
    assert add("sound", old, write(tmp_path / "new.npz", {"sound": 7}), old.parent, "--overwrite") == 2
    assert "--output: expected another folder than that of --from" in capsys.readouterr().err and old.exists()


def test_numbers_are_no_names(tmp_path, capsys):
    data = write(tmp_path / "old.npz", {"image": 8}, label=np.array(["cat", "dog", "eel"])[np.arange(90) % 3])
    assert main(["train", "--data", data, "--modalities", "image", "--output", str(tmp_path / "old"), *COMMON, *PROTECTS]) == 0
    assert add("sound", tmp_path / "old" / "checkpoint.pt", write(tmp_path / "new.npz", {"sound": 7}), tmp_path / "new") == 2
    assert "expected names as in the run before, cat, dog, eel, got numbers" in capsys.readouterr().err


def test_names_of_classes_are_matched(tmp_path, capsys):
    names = np.array(["cat", "dog", "eel"])
    data = write(tmp_path / "old.npz", {"image": 8}, label=names[np.arange(90) % 3])
    assert main(["train", "--data", data, "--modalities", "image", "--output", str(tmp_path / "old"), *COMMON, *PROTECTS]) == 0
    new = write(tmp_path / "new.npz", {"sound": 7}, label=np.array(["dog", "ant", "eel"])[np.arange(90) % 3])
    assert add("sound", tmp_path / "old" / "checkpoint.pt", new, tmp_path / "new") == 0
    saved = read_checkpoint(tmp_path / "new" / "checkpoint.pt")
    assert saved["config"]["class_names"] == ["cat", "dog", "eel", "ant"]
    assert saved["seen"]["sound"].tolist() == [False, True, True, True]
