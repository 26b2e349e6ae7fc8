"""The command line, as a user types it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from mla_fast import cli_eval, cli_train, ops, threads
from mla_fast.cli import main
from mla_fast.data import PROTOCOLS


@pytest.fixture
def archive(tmp_path):
    """Two modalities that show the class, of different shapes, and a field to split by."""
    random = np.random.default_rng(0)
    label = np.arange(90) % 3
    image = random.integers(0, 60, (90, 10, 12)).astype(np.uint8)
    image[np.arange(90), label * 3] += 150
    sound = random.normal(size=(90, 7)).astype(np.float32)
    sound[np.arange(90), label] += 3
    path = tmp_path / "file.npz"
    np.savez(path, image=image, sound=sound, label=label, speaker=np.arange(90) % 5)
    return path


def train(archive, output, *more):
    command = ["train", "--data", str(archive), "--modalities", "sound,image", "--test-where", "speaker=2,4", "--device", "cpu"]
    return main([*command, "--epochs", "4", "--seed", "0", "--batch-size", "16", "--output", str(output), *more])


def test_train_then_eval(archive, tmp_path, capsys):
    assert train(archive, tmp_path / "run", "--projection", "window", "--target", "update") == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["samples"] == 36 and len(metrics["history"]) == 4
    assert set(metrics["test"]["accuracy"]) == {"sound", "image", "average", "fused"}
    assert metrics["test"]["accuracy"]["fused"] > 0.6
    assert f"{100 * metrics['test']['accuracy']['fused']:5.1f} %" in printed
    evaluation = ["eval", str(tmp_path / "run" / "checkpoint.pt"), "--device", "cpu"]  # where it was trained
    assert main(evaluation) == 0
    assert capsys.readouterr().out.partition("test accuracy")[1:] == printed.rpartition("wrote")[0].partition("test accuracy")[1:]
    assert main([*evaluation, "--all"]) == 0
    assert "90 samples" in capsys.readouterr().out


def test_a_run_repeats_to_the_last_bit_and_resuming_a_finished_one_adds_nothing(archive, tmp_path):
    for name, more in (("one", []), ("two", []), ("two", ["--resume"])):
        assert train(archive, tmp_path / name, *more) == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert one["epoch"] == two["epoch"] == 4 and one["history"] == two["history"]
    P, Q = (saved["optimizer"]["mla"]["layers"][0]["tensors"]["P"] for saved in (one, two))
    assert torch.equal(P, Q)
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])


def test_random_split(archive, tmp_path):
    arguments = ["train", "--data", str(archive), "--modalities", "sound", "--epochs", "1", "--test-fraction", "0.5"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["samples"] == 45


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--modalities", "sound,smell"], "smell"),
        (["--modalities", ""], "modalit"),
        (["--label", "sound"], "sound"),
        (["--test-where", "speaker"], "where"),
        (["--test-where", "speaker=9"], "speaker"),
        (["--test-where", "mood=1"], "mood"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--device", "abacus"], "abacus"),
        (["--backend", "triton"], "triton"),
    ],
)
def test_bad_input_is_one_line_on_stderr(archive, tmp_path, capsys, arguments, message, monkeypatch):
    monkeypatch.setitem(ops.MISSING, "triton", "there is no GPU")
    status = train(archive, tmp_path / "run", *arguments)
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err and len(captured.err.splitlines()) == 1


def test_eval_of_foreign_files(archive, tmp_path, capsys):
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(2)}, foreign)
    for path in (foreign, archive, tmp_path / "missing.pt"):
        assert main(["eval", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "array,values,message",
    [
        ("sound", np.zeros((90, 0)), "'sound': expected [N] or [N, F] as features, with at least one value, got [90, 0]"),
        ("sound", np.zeros((90, 2, 2, 2, 2)), "'sound': expected [N], [N, F], [N, H, W] or [N, C, H, W], got [90, 2, 2, 2, 2]"),
        ("label", np.full(90, 2), "'label': expected at least two classes, got 2 alone"),
        ("label", np.arange(90) // 2 * 2**40, f"'label': expected classes numbered from 0, got 45 of them up to {44 * 2**40}"),
        ("label", np.arange(90), "'label': expected classes that samples have in common"),
        ("label", np.arange(90) + 2**40, "'label': expected classes that samples have in common"),
    ],
)
def test_arrays_that_nothing_can_be_learned_from_are_named(archive, tmp_path, capsys, array, values, message):
    np.savez(archive, **{**np.load(archive), array: values})
    assert train(archive, tmp_path / "run", "--epochs", "1") == 2
    assert message in capsys.readouterr().err


def test_eval_names_an_array_of_another_shape(archive, tmp_path, capsys):
    assert train(archive, tmp_path / "run", "--epochs", "1") == 0
    other = tmp_path / "other.npz"
    np.savez(other, **{**np.load(archive), "sound": np.zeros((90, 8))})
    assert main(["eval", str(tmp_path / "run" / "checkpoint.pt"), "--data", str(other)]) == 2
    assert "other.npz: 'sound': expected samples [7], got [8]" in capsys.readouterr().err


def test_interrupting_is_one_line_on_stderr(archive, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mla_fast.trainer.Trainer.fit", interrupted)
    assert train(archive, tmp_path) == 130
    assert capsys.readouterr().err == "mla-fast train: interrupted\n"


@pytest.mark.parametrize("option", ["--epochs=0", "--lr=-1", "--alpha=0", "--alpha=x", "--projection=both"])
def test_bad_options_are_refused(archive, tmp_path, option):
    with pytest.raises(SystemExit):
        train(archive, tmp_path, option)


def test_env_says_which_backends_run(capsys):
    assert main(["env"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for line in ("python", "torch", "backend reference active", "backend cpp", "backend triton"):
        assert line in printed


def test_module_runs_like_the_command():
    done = subprocess.run([sys.executable, "-m", "mla_fast", "env"], capture_output=True, text=True)
    assert done.returncode == 0 and "backend" in done.stdout


def test_resume_refuses_another_run(archive, tmp_path, capsys):
    assert train(archive, tmp_path / "run", "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err
    train(archive, tmp_path / "run")
    for other in (["--lr", "0.5"], ["--projection", "window"], ["--epochs", "3"]):
        capsys.readouterr()
        assert train(archive, tmp_path / "run", "--resume", *other) == 2
        assert other[0].strip("-") in capsys.readouterr().err or other[0] == "--projection"
    assert train(archive, tmp_path / "run", "--resume") == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_metrics_of_a_run_that_diverged_are_still_json(archive, tmp_path, capsys):
    assert train(archive, tmp_path / "run", "--lr", "1e30") == 0
    assert "steps were skipped" in capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=refuse)


def test_eval_on_other_data_takes_all_of_it(archive, tmp_path, capsys, monkeypatch):
    train(archive, tmp_path / "run")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "run")  # the checkpoint knows its data wherever it is read
    other = archive.with_name("other.npz")
    shutil.copy(archive, other)
    assert main(["eval", "checkpoint.pt", "--data", str(other)]) == 0
    assert "90 samples" in capsys.readouterr().out
    assert main(["eval", "checkpoint.pt", "--data", str(archive)]) == 0  # the data it was trained on: what was held out of it
    assert "36 samples" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", "checkpoint.pt", "--all", "--test-where", "speaker=0"])
    assert main(["eval", "checkpoint.pt", "--test-where", "speaker=0"]) == 0
    assert "trained on" in capsys.readouterr().out
    speakers = ",".join(map(str, np.unique(np.load(archive)["speaker"])))
    assert main(["eval", "checkpoint.pt", "--data", str(other), "--test-where", f"speaker={speakers}"]) == 0
    assert "90 samples" in (said := capsys.readouterr().out) and "units" not in said
    arrays = dict(np.load(archive))
    np.savez(other, **{**arrays, "sound": 255 * (arrays["sound"] - arrays["sound"].min())})
    assert main(["eval", "checkpoint.pt", "--data", str(other)]) == 0
    assert "of 'sound' has a mean" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [None, "independent", "cpm"])
def test_training_with_missing_modalities(protocol, archive, tmp_path, capsys):
    assert train(archive, tmp_path, "--missing", "0.6", *([] if protocol is None else ["--protocol", protocol])) == 0
    trained = json.loads((tmp_path / "metrics.json").read_text())
    assert trained["config"]["missing"] == 0.6 and trained["config"]["protocol"] == (protocol or "independent")
    present = PROTOCOLS[protocol or "independent"](90, 2, 0.6, trained["config"]["seed"])
    away = f"{100 * (~present).double().mean().item():.1f} % of 180 entries ({protocol or 'independent'} protocol)"
    assert away in capsys.readouterr().out and ("50.0 %" in away) == (protocol == "cpm")
    assert main(["eval", str(tmp_path / "checkpoint.pt"), "--device", "cpu"]) == 0
    assert f"{100 * trained['test']['accuracy']['fused']:.1f}" in capsys.readouterr().out
    assert f'protocol = "{protocol or "independent"}"' in (tmp_path / "run.toml").read_text()
    shutil.copy(archive, tmp_path / "other.npz")  # other data are taken as they are
    assert main(["eval", str(tmp_path / "checkpoint.pt"), "--device", "cpu", "--data", str(tmp_path / "other.npz")]) == 0
    assert "taken away" not in (printed := capsys.readouterr().out) and "on 90 samples" in printed
    arrays = dict(np.load(archive))
    present = np.ones((90, 2), bool)
    present[:3], present[3:9, 0] = False, False
    np.savez(tmp_path / "lacking.npz", **arrays, present=present)
    assert train(tmp_path / "lacking.npz", tmp_path / "lacking", "--missing", "0.3") == 0
    assert "note: 3 of 90 rows have none of these modalities" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train(archive, tmp_path / "bad", "--missing", "1.0")
    assert "argument --missing: expected a number in [0, 1), got '1.0'" in capsys.readouterr().err
    assert train(archive, tmp_path / "bad", "--protocol", "cpm") != 0
    assert "--protocol: expected --missing beside it, as 0.3, got cpm alone" in capsys.readouterr().err


def test_settings_of_the_training_loop(archive, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    more = ["--amp", "bf16", "--accumulate", "2", "--clip-norm", "0.5", "--checkpoint-every", "2", "--tensorboard"]
    assert train(archive, tmp_path / "run", *more) == 0
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["optimizer"]["mla"]["layers"][0]["step"] == 4 * 2 * 2  # epochs, modalities, half of 4 batches
    assert saved["config"] | {"amp": "bf16", "accumulate": 2, "clip_norm": 0.5} == saved["config"]
    assert main(["eval", str(tmp_path / "run" / "checkpoint.pt")]) == 0


def test_threads_are_measured_said_and_kept(archive, tmp_path, capsys, monkeypatch):
    chosen, used = 2, []
    monkeypatch.setattr(threads, "_seconds", lambda model, inputs, count: {1: 0.01, 2: 0.02 if chosen == 1 else 0.001}[count])
    fit = cli_train.Trainer.fit
    monkeypatch.setattr(cli_train.Trainer, "fit", lambda *a, **k: used.append(torch.get_num_threads()) or fit(*a, **k))
    torch.set_num_threads(2)
    assert train(archive, tmp_path / "run") == 0
    said = "threads: 2, since a batch takes 10.0 ms with 1 and 1.0 ms with 2; --threads chooses\n"
    assert said in capsys.readouterr().out
    assert "threads = 2\n" in (tmp_path / "run" / "run.toml").read_text()
    chosen = 1
    for more in (["--resume", "--epochs", "5"], ["--resume", "--epochs", "6", "--threads", "1"], ["--resume", "--epochs", "7"]):
        assert train(archive, tmp_path / "run", *more) == 0
        assert "threads:" not in capsys.readouterr().out
    assert train(archive, tmp_path / "other") == 0
    assert "threads: 1, since" in capsys.readouterr().out
    assert used == [2, 2, 1, 1, 1] and torch.get_num_threads() == 2
    evaluate, alone = ["eval", str(tmp_path / "run" / "checkpoint.pt"), "--device", "cpu"], []
    tested = cli_eval.evaluate_model
    monkeypatch.setattr(cli_eval, "evaluate_model", lambda *a, **k: alone.append(torch.get_num_threads()) or tested(*a, **k))
    assert main(evaluate) == main([*evaluate, "--threads", "2"]) == 0
    assert alone == [1, 2]


def test_amp_in_eval_and_predict(archive, tmp_path, capsys):
    assert train(archive, tmp_path / "run") == 0
    checkpoint, tables = str(tmp_path / "run" / "checkpoint.pt"), []
    for name, more in (("float.csv", []), ("bf16.csv", ["--amp", "bf16"])):
        assert main(["eval", checkpoint, "--device", "cpu", *more]) == 0
        assert main(["predict", checkpoint, str(archive), "--device", "cpu", "--output", str(tmp_path / name), *more]) == 0
        rows = (tmp_path / name).read_text().splitlines()[1:]
        tables.append(np.array([[float(cell) for cell in row.split(",")] for row in rows]))
    assert not np.array_equal(*tables)
    np.testing.assert_allclose(tables[1][:, 2:], tables[0][:, 2:], atol=0.05)


def test_class_weights_and_label_smoothing(archive, tmp_path):
    options = ["--class-weights", "balanced", "--label-smoothing", "0.1"]
    assert train(archive, tmp_path / "run", *options) == 0
    assert train(archive, tmp_path / "run", *options, "--resume", "--epochs", "5") == 0
    config = json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]
    where = ~np.isin(np.arange(90) % 5, (2, 4))
    counts = np.bincount((np.arange(90) % 3)[where])
    assert config["class_weights"] == pytest.approx((54 / (3 * counts)).tolist())
    saved, plain = (tmp_path / name / "checkpoint.pt" for name in ("run", "plain"))
    assert train(archive, tmp_path / "plain") == 0
    losses = [torch.load(path, weights_only=True)["history"][3]["loss"]["sound"] for path in (saved, plain)]
    assert losses[0] > losses[1]  # what a smoothed label costs, however sure the model is
    assert main(["eval", str(saved), "--device", "cpu"]) == 0


def test_a_class_that_is_not_in_training_has_a_weight():
    from mla_fast.cli_train import balanced

    assert balanced(torch.tensor([0, 0, 0, 2]), 4) == pytest.approx([4 / 6, 1.0, 2.0, 1.0])
