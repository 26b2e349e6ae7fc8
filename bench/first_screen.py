"""The README's first two pictures: what a step of MLA is, and what it is for, from the records of the accuracy bench."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import pictures
from bench.records import Record

LIT, DIM, HEAD = "#1f6fb4", "#c9ccd1", "#c8621b"
SHOWN = {"Concat": "joint training (Concat)", "Late fusion": "separate classifiers", "MLA window": "MLA (window)"}


def draw_method(path: Path) -> bool:
    """Draw two steps, one modality lit in each, and the prediction by both."""
    figure = pictures.new_figure(10, 3.1)
    if figure is None:
        return False
    panels = figure.subplots(1, 3)
    titles = ("step t: audio", "step t + 1: image", "prediction")
    for axes, title, lit in zip(panels, titles, (("audio",), ("image",), ("audio", "image")), strict=True):
        for name, y in (("audio", 2.0), ("image", 0.6)):
            color = LIT if name in lit else DIM
            _box(axes, (0.1, y), (2.5, 0.8), f"{name}\nencoder", color)
            _arrow(axes, (2.65, y + 0.4), (3.5, 1.7), color)
        training = len(lit) == 1
        _box(axes, (3.5, 1.2), (1.9, 1.0), "shared\nhead", HEAD)
        _arrow(axes, (5.4, 1.7), (6.1, 1.7), LIT)
        _box(axes, (6.1, 1.2), (2.3, 1.0), f"loss of\n{lit[0]}" if training else "fused by\ncertainty λ", LIT)
        axes.text(
            4.45, 0.75, "step projected:\nthe others are kept" if training else "", ha="center", va="top", size=9, color=HEAD
        )
        axes.set(xlim=(0, 8.5), ylim=(-0.1, 3.0), title=title)
        axes.axis("off")
    return pictures.save(figure, path)


def _box(axes, corner, size, text, color) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=color, edgecolor="none"))
    ink = "#555" if color == DIM else "white"
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", color=ink, size=10)


def _arrow(axes, start, end, color) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})


def draw_drowning(found: Sequence[Record], path: Path) -> bool:
    """Draw, on configuration B, how good each modality is by itself after joint training and after MLA: a point for each seed."""
    figure = pictures.new_figure(10, 3.6)
    if figure is None:
        return False
    axes = figure.subplots()
    runs = [r for r in found if (r["data"], r["config"], r["missing"]) == ("avdigits", "B", 0) and r["method"] in SHOWN]
    places, colors = ("audio", "image", "fused"), (DIM, "#8a8f98", LIT)
    for i, (method, label) in enumerate(SHOWN.items()):
        for j, name in enumerate(places):
            values = [100 * run["accuracy"][name] for run in runs if run["method"] == method]
            x = j + 0.27 * (i - 1)
            axes.bar(x, statistics.mean(values), 0.25, color=colors[i], label=label if j == 0 else None)
            axes.plot([x] * len(values), values, "o", ms=3, color="black", alpha=0.5)
            axes.text(x, 2, f"{statistics.mean(values):.0f}", ha="center", color="white" if i else "#444", size=10)
    seeds = len({run["seed"] for run in runs})
    axes.set(
        xticks=range(3),
        xticklabels=["audio alone", "image alone", "both"],
        ylabel="test accuracy, %",
        yticks=range(0, 101, 20),
        ylim=(0, 115),
    )
    axes.set_title(f"spoken and written digits (avdigits B), mean of {seeds} seeds", size=11)
    axes.legend(frameon=False, loc="upper left", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    return pictures.save(figure, path)
