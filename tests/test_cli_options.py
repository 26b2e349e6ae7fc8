"""Every option of every command: what it refuses, by its name, and that its help stands by itself."""

import argparse
from pathlib import Path

import pytest
import torch

from mla_fast import cli, cli_study
from mla_fast import cli_options as options

# What a type takes at its ends, and what it refuses beside text, NaN and infinity.
WHOLE, REAL = ("1.5", "1e3"), ("-1", "-0.1", "1e400")
NUMBERS = {
    options.positive: (("1", "64"), ("0", "-1", *WHOLE)),
    options.count: (("0", "8"), ("-1", *WHOLE)),
    options.seed: ((str(-(2**63)), str(2**63 - 1)), (str(2**63), str(-(2**63) - 1), *WHOLE)),
    options.above_zero: (("5e-324", "1e30"), ("0", *REAL)),
    options.at_least_zero: (("0", "1e30"), REAL),
    options.below_one: (("0", "0.999"), ("1", *REAL)),
    options.fraction: (("0.001", "0.999"), ("0", "1", *REAL)),
    options.held_out: (("0.001", "speaker=2,4"), ("0", "1", *REAL)),
    options.seeds: (("0", "0-2,7"), ("-1", "2-1", "0-", *WHOLE)),
    options.rates: (("0", "0.1:0.7", "0.2,0.5"), ("1", "0.7:0.1", "0.1:inf", "0.1:0.7:nan", *REAL)),
}
OTHERS = (None, str, Path, options.names, options.pairs, options.layouts, cli_study._settings)
PARSERS = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
ACTIONS = [(command, action) for command, parser in PARSERS.items() for action in parser._actions]
NUMERIC = [(command, action) for command, action in ACTIONS if action.type in NUMBERS]


def test_every_option_has_a_type_that_is_tested_here():
    for command, action in ACTIONS:
        assert action.type in NUMBERS or action.type in OTHERS, (command, action)
        if isinstance(action.default, (int, float)) and action.nargs != 0:
            assert action.type in NUMBERS, (command, action)
            assert action.type(str(action.default)) == action.default
    assert {"train", "paper", "study", "compare", "prepare", "features", "demo", "eval", "predict"} == {c for c, _ in NUMERIC}


@pytest.mark.parametrize(("command", "action"), [pytest.param(c, a, id=f"{c} {a.option_strings[0]}") for c, a in NUMERIC])
def test_numbers_that_make_no_sense_are_refused_by_the_options_name(command, action, capsys):
    good, bad = NUMBERS[action.type]
    for text in good:
        action.type(text)
    for text in (*bad, "abc", "", "nan", "inf", "-inf"):
        with pytest.raises(SystemExit, match="2"):
            PARSERS[command].parse_args([f"{action.option_strings[0]}={text}"])
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"error: argument {action.option_strings[0]}: expected " in said and repr(text) in said, said


def test_the_paper_takes_no_nonsense(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "crema-d", "folder", "--alpha", "-1"])
    assert "argument --alpha: expected a number above 0, got '-1'" in capsys.readouterr().err


def test_names_and_pairs_may_have_spaces_around_them():
    assert options.names(" audio, image ,,") == ["audio", "image"]
    for command in ("paper", "prepare", "study"):
        more = {"prepare": ["--output", "cache"], "study": ["--study", "table-1"]}.get(command, [])
        assert cli._parse([command, "crema-d", "folder", "--modalities", "audio, image", *more]).modalities == ["audio", "image"]
    assert options.pairs("audio = mine:A, text=a=b.npz") == {"audio": "mine:A", "text": "a=b.npz"}
    assert options.layouts("a.b=tokens, c=image") == {"a.b": "tokens", "c": "image"}


@pytest.mark.parametrize("text", ["", "audio", "audio=", "=a", "audio=a,", "audio=a,audio=b"])
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="^expected MODALITY=VALUE, several with commas between, got "):
        options.pairs(text)
    with pytest.raises(argparse.ArgumentTypeError, match="^expected NAME=LAYOUT with a layout of features, tokens, "):
        options.layouts(text.replace("=a", "=tokens").replace("=b", "=image"))


def test_every_help_is_a_phrase_that_stands_by_itself():
    for command, action in ACTIONS:
        said = action.help
        assert said and not said.startswith(("of ", "default:", "by ", "as ", "its ")), (command, action.option_strings)
        if isinstance(action.default, (int, float, Path)) and action.nargs != 0:
            assert "default: " in said, (command, action.option_strings)


@pytest.mark.parametrize("command", PARSERS)
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "--" in capsys.readouterr().out


def test_both_commands_of_a_run_refuse_to_resume_and_overwrite_it(capsys):
    for typed in (["train", "--data", "a.npz"], ["train", "mvsa", "folder"]):
        with pytest.raises(SystemExit):
            cli.main([*typed, "--resume", "--overwrite"])
        assert "not allowed with argument --resume" in capsys.readouterr().err


def test_what_device_and_amp_mean():
    assert options.device("cpu") == torch.device("cpu")
    assert options.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="^--device: expected auto or an available device, got 'moon'"):
        options.device("moon")
    assert options.autocast_dtype(None) is None and options.autocast_dtype("bf16") == torch.bfloat16
