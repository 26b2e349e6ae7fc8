"""Settings in TOML: what a run writes is what --config reads, and options override it."""

import argparse
from pathlib import Path

import pytest

from mla_fast import cli, cli_config

REQUIRED = ["--data", "file.npz", "--modalities", "a.b,ä"]


def parse(*typed):
    return cli._parse(["train", *map(str, typed)])


def settings(arguments):
    return {name: value for name, value in vars(arguments).items() if name != "config"}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--lr", "1e-05", "--alpha", "1e30", "--weight-decay", "0", "--seed", "-7"],
        ["--layout", "a.b=tokens,ä=image", "--encoder", "ä=my.module:Encoder"],
        ["--label", 'a "quoted" \\ one', "--test-where", "speaker=2,4", "--validation", "speaker=1"],
        ["--label", "tab\tline\nnul\x01del\x7f", "--validation", "0.25", "--patience", "3"],
        ["--amp", "bf16", "--tensorboard", "--clip-norm", "0.5", "--workers", "2", "--projection", "window"],
    ],
)
def test_what_is_written_is_read_again(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    given = parse(*REQUIRED, *options)
    cli_config.write_options(given, tmp_path / "run.toml")
    monkeypatch.chdir("/")  # paths are absolute
    again = parse("--config", tmp_path / "run.toml")
    expected = settings(given) | {"data": tmp_path / "file.npz", "output": tmp_path / "runs/mla"}
    assert settings(again) == expected
    assert settings(parse(f"--conf={tmp_path / 'run.toml'}")) == expected  # as argparse abbreviates it
    assert parse("--config", tmp_path / "run.toml", "--lr", "0.5", "--no-tensorboard").lr == 0.5


def test_every_setting_of_a_run_is_in_its_file(tmp_path):
    cli_config.write_options(parse(*REQUIRED), tmp_path / "run.toml")
    written = {
        option.split("=")[0].removeprefix("--").removeprefix("no-") for option in cli_config.read_options(tmp_path / "run.toml")
    }
    given = {name.replace("_", "-") for name, value in vars(parse(*REQUIRED)).items() if value not in (None, {}, [], "")}
    assert written == given - set(cli_config.NO_SETTINGS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr 0.1", "expected settings in TOML, as lr = 0.1"),
        ("[head]\nnames = [[1]]", "head: expected text, a number"),
        ("day = 2026-01-01", "day: expected text, a number"),
        ('modalities = ["a,b"]', "modalities: expected entries without commas"),
        ('encoder = { a = "x,y" }', "encoder: expected entries without commas"),
    ],
)
def test_what_is_no_setting_is_refused_with_the_file(tmp_path, capsys, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"mla-fast train: error: {path}: {message}")


def test_a_file_that_is_not_there_or_no_text(tmp_path, capsys):
    assert cli.main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert cli.main(["train", "--config", str(tmp_path / "bytes.toml")]) == 2
    assert "expected settings in TOML" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["rate = 1", "lr = 'fast'", "epochs = 1.5", "projection = 'both'", "epochs = true"])
def test_settings_that_an_option_refuses_are_errors_that_name_the_file(tmp_path, capsys, line):
    path = tmp_path / "mine.toml"
    path.write_text(line)
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(path), *REQUIRED])
    said = capsys.readouterr().err
    assert line.split()[0] in said and str(path) in said


def test_commands_of_the_paper_and_of_comparison_read_it_too(tmp_path):
    for typed in (["paper", "mvsa", "folder"], ["compare", "--data", "digits", "--seeds", "0-2", "--missing", "0.1:0.5"]):
        given = cli._parse(typed)
        cli_config.write_options(given, tmp_path / "run.toml")
        what = typed if typed[0] == "paper" else ["compare"]
        again = cli._parse([*what, "--config", str(tmp_path / "run.toml")])
        expected = {n: v.resolve() if isinstance(v, Path) and n != "root" else v for n, v in settings(given).items()}
        assert settings(again) == expected
    assert isinstance(again, argparse.Namespace)
