"""Every command in the README and the documentation: there is such a one, with such options, and something runs it."""

import argparse
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.throughput import roofline
from mla_fast import cli
from mla_fast.cli_config import tomllib

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "bench/README.md", "examples/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = ("mla-fast", "make", "python", "pip", "torchrun", ".ci/run")
SHELL = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(rf"`((?:{'|'.join(map(re.escape, PROGRAMS))}) [^`]+)`")
MAKEFILE = (ROOT / "Makefile").read_text()
RUN = "test_the_readmes_commands_run_in_the_order_in_which_they_stand"

# What runs a command, by how it begins: the longest that fits. A file of tests, with the test's name where one is enough, or .ci.
RUN_BY = {
    "make demo": "tests/test_demo.py",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    "make docs": ".ci/run",
    "make test-all": ".ci/run",  # its two parts
    "make kernels-check": ".ci/run",
    "make wheel": ".ci/wheel",
    "make bench": "tests/test_bench.py",
    "make report": "tests/test_report.py",
    "make accuracy": "tests/test_accuracy.py",
    "make missing": "tests/test_compare_missing.py",
    "make gpu-check": ".ci/gpu-check",
    "python -m venv": ".ci/run",
    "pip install torch": ".ci/run",
    "pip install --no-build-isolation -e": "Makefile",
    "pip install -e": "Makefile",
    "mla-fast env": "tests/test_cli.py",
    "mla-fast train": f"tests/test_commands.py::{RUN}",
    "mla-fast train crema-d": "tests/test_cli_paper.py",
    "mla-fast train iemocap": "tests/test_cli_paper.py",
    "mla-fast train clip-food101": "tests/test_cli_study.py",
    "mla-fast compare crema-d": "tests/test_cli_study.py",
    "mla-fast predict": f"tests/test_commands.py::{RUN}",
    "mla-fast eval": f"tests/test_commands.py::{RUN}",
    "mla-fast compare": "tests/test_commands.py::test_the_readmes_comparisons_run",
    "mla-fast prepare": "tests/test_cli_paper.py",
    "mla-fast features": "tests/test_iemocap_features.py",
    "python -m bench.throughput": "tests/test_bench.py",
    "python -m bench.throughput.roofline": "tests/test_commands.py::test_the_roofline_is_printed",
    "python -m bench.throughput.launches": ".ci/gpu-check",
    "python -m bench.throughput.large_head": ".ci/gpu-check",
    "python -m bench.accuracy": "tests/test_accuracy.py",
    "python -m bench.accuracy.balanced": "tests/test_compare_protocol.py",
    "python -m bench.accuracy.studies": "tests/test_studies.py",
    "python -m bench.make_avdigits": "tests/test_make_avdigits.py",
    "python plain_loop.py": "tests/test_examples.py",
    "torchrun --nproc-per-node 2 data_parallel.py": "tests/test_examples.py",
    "torchrun --nproc-per-node 4 -m mla_fast train": "tests/test_ranks.py",
    ".ci/run": ".github/workflows/ci.yml",
}
# What nothing runs, and why.
NOT_RUN = {
    "pip install mla_fast[": "the extras of a package that is not on PyPI yet; that they exist is checked here",
    "python -m bench.throughput.tune": "rewrites kernels/launch.json on a GPU; tests/test_bench.py has its problems and choices",
    "make tune": "the same",
    "pip install PySide6-WebEngine": "optional, and large; .ci/run does it where it can, for tests/test_pages.py",
    "make results": "nine minutes on a quiet machine, into bench/results; its parts are those of make bench",
}


def commands():
    """(page, command) of each in a block of shell, comments left out, and of each in the text, where options may be left out."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in SHELL.findall(text):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if words := shlex.split(line, comments=True):
                    yield pytest.param(words, True, id=f"{page}: {shlex.join(words)[:90]}")
        for span in SPAN.findall(re.sub(r"\s+", " ", re.sub(r"```.*?```", "", text, flags=re.DOTALL))):
            yield pytest.param(shlex.split(span), False, id=f"{page}: {span[:90]}")


COMMANDS = list(commands())


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings}


def check_mla_fast(words, whole):
    parsers = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    words = [words[0], *cli._in_full(words[1:])]
    assert words[1] in parsers
    given = [word.split("=")[0] for word in words if word.startswith("--")]
    assert set(given) <= options_of(parsers[words[1]]), words
    if whole and "--config" not in given:  # whose file has the rest
        cli._parse(words[1:])


def check_make(words, whole):
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        pattern = rf"^{name} [?:]?=" if equals else rf"^{name}:"
        assert re.search(pattern, MAKEFILE, re.MULTILINE), f"the Makefile has no {name}"


def check_python(words, whole):
    if words[1] != "-m":
        assert any((ROOT / folder / words[1]).exists() for folder in (".", "examples"))
        return
    module = words[2].removesuffix(".NAME")
    assert importlib.util.find_spec(module) is not None
    given = {word for word in words if word.startswith("--")}
    if given and module == words[2]:
        assert given <= set(re.findall(r"--[\w-]+", help_of(module)))


def help_of(module):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [module, "--help"])
        patch.delitem(sys.modules, module, raising=False)  # or runpy warns that it is run again
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    return out.getvalue()


def check_pip(words, whole):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [name for word in words for inside in re.findall(r"(?:mla_fast|\.)\[(.*?)\]", word) for name in inside.split(",")]
    assert set(named) <= set(extras)


def check_file(words, whole):
    if "-m" in words:
        return check_mla_fast(["mla-fast", *words[words.index("-m") + 2 :]], whole)
    assert any((ROOT / folder / words[-1]).exists() for folder in (".", "examples"))


CHECKS = {"mla-fast": check_mla_fast, "make": check_make, "python": check_python, "pip": check_pip}


@pytest.mark.parametrize("words,whole", COMMANDS)
def test_it_is_a_command_with_options_that_there_are(words, whole):
    assert words[0] in PROGRAMS, "the first word of a line in a block of shell"
    CHECKS.get(words[0], check_file)(words, whole)


@pytest.mark.parametrize("words,whole", COMMANDS)
def test_something_runs_it_or_says_why_not(words, whole):
    text = " ".join(words)
    found = max((begin for begin in (*RUN_BY, *NOT_RUN) if text.startswith(begin)), key=len, default=None)
    assert found is not None, f"add what runs {text!r} to RUN_BY, or why nothing does to NOT_RUN"
    path, _, name = RUN_BY.get(found, "README.md").partition("::")
    assert (ROOT / path).exists() and (not name or f"def {name}(" in (ROOT / path).read_text())


def test_what_is_listed_is_there():
    texts = [" ".join(param.values[0]) for param in COMMANDS]
    assert [begin for begin in (*RUN_BY, *NOT_RUN) if not any(text.startswith(begin) for text in texts)] == []
    ci = "".join((ROOT / ".ci" / name).read_text() for name in ("run", "gpu-check", "wheel"))
    for begin, by in RUN_BY.items():
        if by in (".ci/run", ".ci/gpu-check") and begin.startswith(("make", "python")):
            name = begin.split()[-1].replace("test-all", "test-exhaustive")
            assert name in ci or name == "gpu-check", begin


def test_the_roofline_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.throughput.roofline", "--classes", "101"])
    roofline.main()
    assert "lazy" in capsys.readouterr().out


def write(path, modalities, seed, session="speaker"):
    """An .npz of 60 rows that show their class, of 6 speakers."""
    random, label = np.random.default_rng(seed), np.arange(60) % 3
    arrays = {name: random.normal(size=(60, 6)).astype(np.float32) + 2 * np.eye(6)[label] for name in modalities}
    np.savez(path, label=np.array(["cat", "dog", "eel"])[label], **{session: np.arange(60) // 3 % 6}, **arrays)


SHORT = {  # the last of an option counts
    "train": ["--epochs", "2"],
    "compare": "--epochs 1 --trials 1 --seeds 0 --jobs 1 --missing 0.3".split(),
}
METHODS = ["--methods", "Late fusion,MLA window"], ["--methods", "Late fusion,MLA rls"]  # without and with --protocol


def run_in(folder, monkeypatch, names):
    """Run all commands of these names, in the order in which they stand, in a folder with the files that they name."""
    monkeypatch.chdir(folder)
    for seed, name in enumerate(("file.npz", "new.npz", "other.npz")):
        write(name, ("audio", "image"), seed)
    write("iemocap.npz", ("audio", "text", "image"), 4, "session")
    ran = []
    for words, whole in (param.values for param in COMMANDS):
        if words[0] == "mla-fast" and whole and words[1] in names and cli._in_full(words[1:]) == words[1:]:
            more = [*SHORT.get(words[1], ()), *(METHODS["--protocol" in words] if words[1] == "compare" else ())]
            assert cli.main([*words[1:], *more]) == 0, words
            ran.append(words[1])
    assert set(ran) == set(names)


def test_the_readmes_commands_run_in_the_order_in_which_they_stand(tmp_path, monkeypatch):
    write(tmp_path / "file.npz", ("image",), 0)
    old = ["train", "--data", str(tmp_path / "file.npz"), "--modalities", "image", "--target", "update", "--bias", "project"]
    assert cli.main([*old, "--epochs", "1", "--output", str(tmp_path / "old")]) == 0
    run_in(tmp_path, monkeypatch, ("train", "predict", "eval"))
    assert (tmp_path / "predictions.csv").read_text().splitlines()[0].startswith("row,predicted,probability_cat")


@pytest.mark.exhaustive
def test_the_readmes_comparisons_run(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    run_in(tmp_path, monkeypatch, ("compare",))
