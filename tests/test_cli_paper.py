"""``mla-fast prepare SET ROOT`` and ``mla-fast train SET ROOT`` on made trees."""

import json

import numpy as np
import pytest
import torch
import trees
from torch import nn

from mla_fast.cli import main

pytest.importorskip("PIL")
pytest.importorskip("soundfile")
QUICK = ["--workers", "0", "--epochs", "1"]


class Flat(nn.Linear):
    """A small encoder of anything."""

    def __init__(self):
        super().__init__(256, 8)

    def forward(self, x):
        return super().forward(x.flatten(1)[:, :256].float())


def own(*modalities):
    return ["--encoder", ",".join(f"{m}={__name__}.Flat" for m in modalities)]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.filterwarnings("ignore:(?s).*is left out")
def test_crema_d_from_a_cache_and_again(tmp_path, capsys):
    root, cache, output = trees.crema_d(tmp_path / "data"), tmp_path / "cache", tmp_path / "run"
    assert run("prepare", "crema-d", root, "--output", cache, "--workers", 0) == 0
    printed = capsys.readouterr().out
    assert "CREMA-D all: 23 samples, 6 classes; left out, not a name of a clip: 1 (readme_sound)" in printed
    assert f"23 samples in {cache}, 42 arrays written now\n  silent: 1 (" in printed and "  not an image: 1 (" in printed
    paper = ["train", "crema-d", root, "--cache", cache, "--output", output, *own("audio", "image")]
    assert run(*paper, *QUICK) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    config = metrics["config"]
    assert {k: config[k] for k in ("lr", "momentum", "weight_decay", "batch_size", "decay_at", "projection")} == {
        "lr": 1e-3,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "batch_size": 64,
        "decay_at": 70,
        "projection": "rls",
    }
    assert metrics["history"][0]["validation"]["samples"] == 12 and metrics["test"]["samples"] == 6
    assert run(*paper, *QUICK) == 2 and "--resume continues that run" in capsys.readouterr().err
    assert run(*paper, *QUICK, "--resume", "--lr", 0.1) == 2
    assert "--resume: expected the saved run's lr, 0.001, got 0.1" in capsys.readouterr().err
    assert run(*paper, "--workers", 0, "--epochs", 2, "--resume") == 0
    assert len(json.loads((output / "metrics.json").read_text())["history"]) == 2


def test_settings_of_a_file_and_of_options(tmp_path, capsys):
    root, output = trees.kinetics_sounds(tmp_path / "data"), tmp_path / "run"
    path = tmp_path / "paper.toml"
    path.write_text('lr = 0.02\nbatch_size = 3\nmodalities = ["audio"]\nprojection = "window"')
    paper = ["train", "kinetics-sounds", root, "--config", path, "--output", output, "--overwrite", *own("audio")]
    assert run(*paper, "--batch-size", 2, "--target", "update", "--alpha", 0.5, *QUICK) == 0
    config = json.loads((output / "metrics.json").read_text())["config"]
    assert config["lr"] == 0.02 and config["batch_size"] == 2 and config["projection"] == "window"
    assert config["target"] == "update" and config["alpha"] == 0.5 and config["order"] == "update_first"
    assert run(*paper, "--as-released", *QUICK) == 0
    released = json.loads((output / "metrics.json").read_text())["config"]
    assert released["projection"] == "none" and released["batch_size"] == 3
    assert run("train", "kinetics-sounds", root, "--config", output / "run.toml", "--overwrite") == 0
    assert json.loads((output / "metrics.json").read_text())["config"] == released


@pytest.mark.parametrize("name", ["food-101", "mvsa", "iemocap"])
def test_texts_and_images(tmp_path, name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "words", "of", "pie"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    make = {"food-101": trees.mmbt, "mvsa": trees.mvsa, "iemocap": trees.iemocap}[name]
    modalities = ("audio", "image", "text") if name == "iemocap" else ("text", "image")
    arguments = ["--tokenizer", tmp_path, "--output", tmp_path / "run", *own(*modalities), *QUICK]
    assert run("train", name, make(tmp_path / "data"), *arguments) == 0
    history = json.loads((tmp_path / "run/metrics.json").read_text())["history"]
    assert set(history[0]["loss"]) == set(modalities) and history[0]["validation"]["samples"]


def test_train_with_the_data_set_behind_its_options(tmp_path, capsys):
    root, output = trees.kinetics_sounds(tmp_path / "data"), tmp_path / "run"
    assert run("train", *QUICK, "--output", output, *own("audio", "image"), "kinetics-sounds", root) == 0
    assert (output / "run.toml").read_text().startswith(f"# mla-fast train kinetics-sounds {root} --config run.toml\n")
    capsys.readouterr()
    assert run("train", "kinetics-sounds", tmp_path / "gone") == 2
    assert capsys.readouterr().err.startswith("mla-fast train: error: root: expected a folder")
    with pytest.raises(SystemExit):
        run("train", "Food101", root)
    assert "dataset: invalid choice: 'Food101' (choose from" in capsys.readouterr().err
    assert run("train", "--data", "mvsa") == 2  # a file of that name
    assert "--modalities: expected names of arrays" in capsys.readouterr().err


def test_the_papers_encoders(tmp_path, monkeypatch, capsys):
    """On the meta device, where they cost nothing."""
    from mla_fast import cli_paper
    from mla_fast.encoders import M3AE, CAVMAEAudio, ResNet18

    with torch.device("meta"):
        for dataset, modality, kind in (
            ("crema-d", "audio", ResNet18),
            ("kinetics-sounds", "image", ResNet18),
            ("mvsa", "text", M3AE),
            ("iemocap", "image", M3AE),
            ("iemocap", "audio", CAVMAEAudio),
        ):
            assert isinstance(cli_paper.make_encoder(dataset, modality, dict(cli_paper.PAPER)), kind)
        assert (
            "the encoder of text starts from random weights, the paper's from pretrained: --weights text=FILE"
            in capsys.readouterr().out
        )
        small = [cli_paper.make_encoder("iemocap", m, {**cli_paper.PAPER, "size": "small"}) for m in ("audio", "image", "text")]
        assert [encoder.out_features for encoder in small] == [384] * 3
        released = cli_paper.make_encoder("mvsa", "image", {**cli_paper.PAPER, "as_released": True})
    assert released.patch_order == "official" and released.blocks[0].gelu == "none"


def test_what_is_refused(tmp_path, capsys):
    root, output = trees.kinetics_sounds(tmp_path / "data"), tmp_path / "run"
    for arguments, message in (
        (["--encoder", "text=a.b"], "--encoder: expected modalities among audio, image, got 'text'"),
        (
            ["--encoder", "audio=json.Nothing"],
            "--encoder: expected audio=package.module:Encoder, which is called without arguments, got 'json.Nothing'",
        ),
        (["--split", "speaker"], "--split: expected none, kinetics-sounds has one split alone, got speaker"),
        (["--modalities", "text"], "modalities: expected among audio, image, got 'text'"),
        (["--resume"], "nothing to resume; leave out --resume to start a new run"),
        (["--cache", tmp_path], "cache: expected a folder written by mla-fast prepare"),
    ):
        assert run("train", "kinetics-sounds", root, "--output", output, *QUICK, *arguments) == 2
        assert message in capsys.readouterr().err
    np.save(root / "audio_spec/yt0_3.npy", np.zeros((3, 3)))
    with pytest.raises(SystemExit):
        run("train", "kinetics-sounds", root, "--weights", "audio")
    assert "expected MODALITY=VALUE" in capsys.readouterr().err
