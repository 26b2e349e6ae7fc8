"""The examples run as they stand there, and show what they say."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_adding_a_modality(capsys):
    found = load("add_modality").main()
    before, after = found["before"]["image"], found["after"]
    assert before - after["image"] < 0.03 and after["sound"] > 0.4 and after["fused"] > before + 0.03
    assert capsys.readouterr().out.startswith(f"image alone  {before:.1%} before, ")


def test_every_example_has_a_test():
    assert [path.stem for path in EXAMPLES.glob("*.py")] == ["add_modality"]
