"""The documentation: every public name has a docstring and an entry, and the pages take what they quote from where it stands."""

import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = ("mla_fast", "mla_fast.callbacks", "mla_fast.data", "mla_fast.encoders", "mla_fast.reference")


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    return runpy.run_path(str(DOCS / "hooks.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring_and_an_entry(hooks, name):
    module = importlib.import_module(name)
    page = hooks["on_page_markdown"]((DOCS / "api.md").read_text())
    for each in hooks["public"](module):
        documented = getattr(module, each)
        assert f"::: {name}.{each}" in page.splitlines()
        if inspect.isclass(documented) or inspect.isfunction(documented):
            assert inspect.getdoc(documented), each
            for method, function in vars(documented).items() if inspect.isclass(documented) else ():
                if inspect.isfunction(function) and not method.startswith("_") and method != "forward":
                    assert inspect.getdoc(getattr(documented, method)), f"{each}.{method}"


def test_modules_that_the_package_offers_are_listed():
    import mla_fast as mla

    listed = set(re.findall(r"names of ([\w.]+) \}\}", (DOCS / "api.md").read_text()))
    assert listed == set(MODULES) == {"mla_fast"} | {f"mla_fast.{n}" for n in mla.__all__ if inspect.ismodule(getattr(mla, n))}


def test_each_page_finds_what_it_quotes(hooks):
    for path in DOCS.glob("*.md"):
        made = hooks["on_page_markdown"](path.read_text())
        assert "{{" not in re.sub(r"```.*?```", "", made, flags=re.DOTALL), path
        assert not re.search(r"\]\((?!https?:|#|plots/|[\w-]+\.md)", re.sub(r"```.*?```|`[^`]*`", "", made, flags=re.DOTALL)), (
            path
        )
        assert path.name in (DOCS.parent / "mkdocs.yml").read_text()


def test_a_section_and_its_links(hooks):
    text = "before\n## One\n[a](#modalities-that-act-on-each-other) [b](x.py)\n![c](bench/plots/d.png)\n### Sub\nno\n## Two\n"
    assert hooks["section"](text, None) == "before\n"
    found = hooks["relinked"](hooks["section"](text, "One"), Path("."))
    assert found == "[a](interaction.md) b\n![c](plots/d.png)\n"
    with pytest.raises(KeyError, match="no section 'Three'"):
        hooks["section"](text, "Three")
