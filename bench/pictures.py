"""Pictures without pyplot."""

from __future__ import annotations

from pathlib import Path


def new_figure(width: float, height: float):
    """A figure that leaves pyplot alone, or None and a line that says why."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: matplotlib is missing (pip install "mla_fast[demo]")')
        return None
    return Figure(figsize=(width, height), layout="constrained")


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
