"""Put what the README and the report say into the pages, so that nothing is said twice, and list the public names.

A line ``{{ README.md: Heading }}`` becomes that section of the file, ``{{ README.md }}`` what stands before its first section,
``{{ bench/REPORT.md: * }}`` the whole file, and ``{{ names of mla_fast.data }}`` an entry of the reference for each public name.
"""

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {  # where the sections of the README have come to stand, and what else links point at
    "#modalities-that-act-on-each-other": "interaction.md",
    "#add-a-modality-later": "adding.md",
    "docs/architecture.md": "architecture.md",
    "docs/losses.md": "losses.md",
    "docs/ranks.md": "ranks.md",
    "docs/scale.md": "scale.md",
    "bench/REPORT.md": "report.md",
}


def on_files(files, config):
    """Add the plots."""
    for path in sorted((ROOT / "bench/plots").glob("*.png")):
        files.append(File.generated(config, f"plots/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    markdown = re.sub(r"^\{\{ names of ([\w.]+) \}\}$", lambda m: names_of(m[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"^\{\{ ([\w./]+)(?:: ([^}]+))? \}\}$", lambda m: included(m[1], m[2]), markdown, flags=re.MULTILINE)


def included(path, heading):
    """Return a part of a file, its links as they are from a page."""
    return relinked(section((ROOT / path).read_text(encoding="utf-8"), heading), Path(path).parent)


def section(text, heading):
    """Return the text under a heading, without its subsections if they have pages of their own; KeyError if it has none."""
    if heading == "*":
        return text
    if heading is None:
        return re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{2,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(f"no section {heading!r}")
    return found[2]


def relinked(text, folder):
    """Return the text with links to pages and pictures as they are here; links into the repository become their words alone."""

    def replaced(match):
        mark, words, target = match.groups()
        if re.match(r"https?:", target):
            return match[0]
        if target.startswith("#"):
            return f"{mark}[{words}]({PAGES.get(target, target)})"
        path, _, anchor = str(Path(folder, target)).partition("#")
        if path.startswith("bench/plots/"):
            return f"{mark}[{words}](plots/{Path(path).name})"
        page = PAGES.get(path)
        return words if page is None else f"{mark}[{words}]({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replaced, text)


def public(module):
    """Return the public names of a module that are no modules."""
    own = [n for n, o in vars(module).items() if not n.startswith("_") and getattr(o, "__module__", None) == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not inspect.ismodule(getattr(module, name))]


def names_of(name):
    module = importlib.import_module(name)
    return "\n\n".join(f"::: {name}.{each}" for each in public(module))
