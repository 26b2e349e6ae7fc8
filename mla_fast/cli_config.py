"""Options of a command as a TOML file: each run writes ``run.toml``, and ``--config`` reads it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NO_SETTINGS = ("name", "full_name", "command", "config", "resume", "overwrite", "dataset", "root")  # what to run, not how


def config_path(argv: Sequence[str]) -> Path | None:
    """Return the file that ``--config`` names on a command line, if it does."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", type=Path)
    path: Path | None = finder.parse_known_args(argv)[0].config
    return path


def read_options(path: Path) -> list[str]:
    """Return the settings of a TOML file as they are typed: ``lr = 0.1`` is ``--lr=0.1``.

    Lists are joined by commas, tables become NAME=VALUE, ``true`` and ``false`` are ``--name`` and ``--no-name``.

    Raises FileNotFoundError; ValueError, naming the file, for anything else than TOML of such values.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are such
        raise ValueError(f"{path}: expected settings in TOML, as lr = 0.1, got something else ({error})") from None
    return [_typed(path, name, value) for name, value in given.items()]


def _typed(path: Path, name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    listed = isinstance(value, (list, dict))
    texts = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value if listed else [value]
    plain = list(value.values()) if isinstance(value, dict) else texts
    if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in plain):
        raise ValueError(f"{path}: {name}: expected text, a number, true or false, a list or a table of these, got {value!r}")
    if listed and any("," in str(each) for each in texts):
        raise ValueError(f"{path}: {name}: expected entries without commas, which separate them, got {value!r}")
    return f"{option}={','.join(map(str, texts))}"


def write_options(arguments: argparse.Namespace, path: Path) -> None:
    """Write every setting of a run as TOML that ``--config`` reads; paths are absolute."""
    what = [f"{name}" for name in ("dataset", "root") if hasattr(arguments, name)]
    command = " ".join(["mla-fast", arguments.name, *(str(getattr(arguments, name)) for name in what), "--config", path.name])
    settings = {name: value for name, value in vars(arguments).items() if name not in NO_SETTINGS}
    settings = {"from" if name == "start" else name: value for name, value in settings.items()}
    lines = [f"{name} = {_toml(value)}" for name, value in settings.items() if value is not None and value not in ([], {}, "")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {command}\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Path):
        return _toml(str(value.resolve()))
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which is TOML, too, for numbers and strings
