"""The table of a study: what the paper prints beside what was measured in its settings and in those of the released code."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_fast.compare import records
from mla_fast.compare.published import Row, Study
from mla_fast.compare.records import Record
from mla_fast.tables import markdown_table

HEADS = {"paper": "in the paper's settings", "released": "as released: no projection, best epoch on test"}
NEVER = (
    "As released the projection never fires: rows with and without HGM are the same runs there. The best epoch is chosen on the "
    "test part, which flatters: these numbers are for comparing with the released code's alone."
)


def write(found: Sequence[Record], study: Study, dataset: str, modalities: Sequence[str], folder: Path) -> str:
    """Write ``table.md`` to a folder and return it; found: the runs that are done, settings in the order of the columns."""
    text = "\n\n".join([table(found, study, dataset, modalities), *notes(found)])
    records.replace(folder / "table.md", text + "\n")
    return text


def table(found: Sequence[Record], study: Study, dataset: str, modalities: Sequence[str]) -> str:
    """Return a line for each row of the study, modality and mask: published, and mean ± deviation over the seeds, in %.

    A dash stands for what was not published, or not run.
    """
    settings = list(dict.fromkeys(record["setting"] for record in found))
    masks = list(dict.fromkeys((record["masked"], record["share"]) for record in found))
    lines = []
    for masked, share in masks:
        for row in study.rows:
            for name in (*modalities, "multi"):
                printed = study.published[dataset].get(row.label, {}).get(name)
                of = f", {masked} {100 * share:.0f} % masked" if masked else ""
                cells = [_cell(_values(found, row, setting, (masked, share), name)) for setting in settings]
                lines.append([f"{row.label}{of}", name, "–" if printed is None else f"{printed:.2f}", *cells])
            if study.gap:
                gaps = [[r["gap"] for r in _runs(found, row, setting, (masked, share))] for setting in settings]
                lines.append([row.label, "gap", "–", *(_cell(values, 1, 3) for values in gaps)])
    return markdown_table([f"{study.title}: {dataset}, %", "", "published", *(HEADS[setting] for setting in settings)], lines)


def notes(found: Sequence[Record]) -> list[str]:
    """Return how the epochs were chosen, of how many seeds the means are, and what a reader has to know of the released code."""
    chosen = {r["setting"]: r["chosen_on"] for r in found}
    said = [
        f"{len({r['seed'] for r in found})} seeds; the epoch is chosen on: " + ", ".join(f"{s}: {c}" for s, c in chosen.items())
    ]
    return [*said, NEVER] if "released" in chosen else said


def _runs(found: Sequence[Record], row: Row, setting: str, mask: tuple[Any, Any]) -> list[Record]:
    method = "MLA none" if setting == "released" and row.method == "MLA rls" else row.method
    return [r for r in found if (r["method"], r["setting"], (r["masked"], r["share"])) == (method, setting, mask)]


def _values(found: Sequence[Record], row: Row, setting: str, mask: tuple[Any, Any], name: str) -> list[float]:
    key = row.fusion if name == "multi" else name
    return [100 * r["test"][key] for r in _runs(found, row, setting, mask) if r["test"].get(key) is not None]


def _cell(values: Sequence[float], digits: int = 2, more: int = 0) -> str:
    if not values:
        return "–"
    digits += more
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
