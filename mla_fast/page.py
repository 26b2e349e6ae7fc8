"""One page of HTML without anything from the network: its sections, tables and pictures."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}tr.best{background:#e8f1fa}svg{max-width:100%;height:auto}
section{overflow-x:auto}#findings{background:#f5f5f0;padding:.7rem 1rem}.note{color:#666;font-size:13px}"""


def page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return a page of sections, each an id, a title and a body in HTML."""
    parts = [f'<section id="{name}"><h2>{html.escape(head)}</h2>{body}</section>' for name, head, body in sections]
    title = html.escape(title)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{title}</h1>{"".join(parts)}</body></html>\n'


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), marked: str | None = None) -> str:
    """Return a table in HTML; the row whose first cell is `marked` stands out."""
    lines = [(header, "th", ""), *((row, "td", ' class="best"' if row[0] == marked else "") for row in rows)]
    cells = [(mark, "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)) for row, tag, mark in lines if row]
    return f"<table>{''.join(f'<tr{mark}>{line}</tr>' for mark, line in cells)}</table>"


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure of matplotlib, in inches, and its axes, several in a row if there are more columns than one."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's choice

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def svg(figure: Any) -> str:
    """Return a figure as SVG to put into a page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mla_fast"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> str:
    """Draw a confusion matrix [true class, predicted class] of counts; names: of the classes, shown where they are few."""
    figure, axes = new_figure(4.5, 4)
    shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 20:
        for i, row in enumerate(counts):
            for j, cell in enumerate(row):
                if cell:
                    axes.text(j, i, cell, ha="center", va="center", fontsize=6, color="white" if shares[i][j] > 0.5 else "black")
        if names is not None:
            short = [name if len(name) < 13 else f"{name[:11]}…" for name in names]
            axes.set_xticks(range(len(names)), short, rotation=90 if max(map(len, short)) > 3 else 0, fontsize=7)
            axes.set_yticks(range(len(names)), short, fontsize=7)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(picture, ax=axes, label="share of the true class")
    return svg(figure)
