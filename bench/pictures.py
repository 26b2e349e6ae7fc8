"""Pictures without pyplot."""

from __future__ import annotations

from pathlib import Path

PAGE = 8.0  # inches of a page's width, at which letters of 10 points are as large as the text around them
FAMILIES = {"joint training": "#7d838c", "with a loss of each modality": "#c8621b", "MLA": "#1f6fb4"}
UNIMODAL = ("Late fusion", "QMF", "Multi-loss", "unimodal")  # the methods that have one, by how their names begin
LINES = {"MLA rls": "--", "MLA window": "-", "MLA none": ":", "MLA official": "-."}


def new_figure(width: float, height: float):
    """A figure that leaves pyplot alone, or None and a line that says why."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: matplotlib is missing (pip install "mla_fast[demo]")')
        return None
    return Figure(figsize=(width, height), layout="constrained")


def family(method: str) -> str:
    """Return of which kind a method is, so that one colour stands for it in all pictures."""
    joint, unimodal, mla = FAMILIES
    return mla if method.startswith("MLA") else unimodal if method.startswith(UNIMODAL) else joint


def style(method: str) -> dict[str, object]:
    """Return how a line of this method is drawn."""
    return {"color": FAMILIES[family(method)], "ls": LINES.get(method, "-"), "lw": 2 if method in LINES else 1.5}


def legend(figure, entries: dict[str, dict[str, object]], columns: int) -> None:
    """Put one legend for all panels below them: {what: how a line of it is drawn}."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **how) for name, how in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def families(figure) -> None:
    """Say below the panels which colour is which kind of method."""
    legend(figure, {name: {"color": color, "marker": "o", "ls": ""} for name, color in FAMILIES.items()}, len(FAMILIES))


def save(figure, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
    return True


def shrink(path: Path) -> None:
    """A few colours are enough, and a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(64)
    few.save(path, optimize=True)
