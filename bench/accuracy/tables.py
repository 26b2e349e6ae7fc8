"""Tables in Markdown and pictures of what ``bench.accuracy`` found, from its records alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import pictures
from bench.records import Record
from mla_fast.baselines import MLA_SETTINGS
from mla_fast.tables import markdown_table

OURS = "MLA window"
GROUP = ("data", "config", "epochs", "missing")


def accuracy(found: Sequence[Record]) -> str:
    """All that the records say: the summary, missing modalities by rate, each task by itself and its ablation."""
    tasks = complete(found)
    parts = [summary(tasks)] if len(tasks) > 1 else []
    parts += [*map(by_rate, missing(found)), *map(by_modality, tasks)]
    return "\n\n".join(parts + [ablation(group) for group in tasks if len(_ablated(group)) > 1])


def complete(found: Sequence[Record]) -> list[list[Record]]:
    """The records of each task in which nothing is missing."""
    return groups([record for record in found if not record["missing"]], GROUP)


def missing(found: Sequence[Record]) -> list[list[Record]]:
    """The records of each task in which modalities are missing, at all rates."""
    return groups([record for record in found if record["missing"]], GROUP[:3])


def summary(tasks: Sequence[Sequence[Record]]) -> str:
    """Methods by task: fused accuracy, and in how many of the seeds MLA is ahead."""
    ours = [fused(group) for group in tasks]
    rows = []
    for runs in groups(itertools.chain(*tasks), ["method"]):
        here = [[run for run in runs if run in group] for group in tasks]
        cells = [
            f"{spread([run['accuracy']['fused'] for run in each])}{_score(each, o)}" for each, o in zip(here, ours, strict=True)
        ]
        rows.append([runs[0]["method"], *cells])
    columns = [heading(group) for group in tasks]
    return markdown_table([f"fused accuracy, % ({OURS} ahead)", *columns], rows)


def groups(found: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    """Records that agree in `names`, in the order in which they first appear."""
    groups: dict[tuple, list[Record]] = {}
    for record in found:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return list(groups.values())


def title(record: Record) -> str:
    config = "" if record["config"] == "default" else f" {record['config']}"
    return f"{record['data']}{config}, {record['epochs']} epochs"


def by_modality(group: Sequence[Record]) -> str:
    """Methods by what they reach: mean ± deviation over the seeds, and in how many of them MLA is ahead."""
    columns = _columns(group)
    ours = fused(group)
    rows = []
    for runs in groups(group, ["method"]):
        cells = [spread([run["accuracy"].get(column) for run in runs]) for column in columns]
        rows.append([runs[0]["method"], *cells, _wins(runs, ours)])
    names = [column if column in ("average", "fused") else f"{column} alone" for column in columns]
    return markdown_table([heading(group), *names, f"{OURS} ahead"], rows)


def _columns(group: Sequence[Record]) -> list[str]:
    """Modalities first, then the average, then what counts."""
    names = dict.fromkeys(itertools.chain.from_iterable(record["accuracy"] for record in group))
    return [name for name in names if name not in ("average", "fused")] + ["average", "fused"]


def fused(group: Sequence[Record]) -> dict[int, float]:
    """seed → ours."""
    return {record["seed"]: record["accuracy"]["fused"] for record in group if record["method"] == OURS}


def _wins(runs: Sequence[Record], ours: dict[int, float]) -> str:
    """In how many of the seeds MLA does better, as "2 of 3"."""
    shared = [run for run in runs if run["seed"] in ours]
    if not shared or runs[0]["method"] == OURS:
        return "-"
    return f"{sum(ours[run['seed']] > run['accuracy']['fused'] for run in shared)} of {len(shared)}"


def _score(runs: Sequence[Record], ours: dict[int, float]) -> str:
    wins = _wins(runs, ours)
    return "" if wins == "-" else f" ({wins})"


def ablation(group: Sequence[Record]) -> str:
    """Table 3 of the paper: with and without the head's projection (HGM), with and without entropy fusion (DF).

    Points gained are means of the differences in each seed.
    """
    by_method, rows = _ablated(group), []
    for method, runs in by_method.items():
        none = {seed: run["fused"] for seed, run in by_method["MLA none"].items()}
        cells = [[run[column] for run in runs.values()] for column in ("average", "fused")]
        cells.append([run["fused"] - run["average"] for run in runs.values()])
        cells.append([runs[seed]["fused"] - none[seed] for seed in sorted(runs.keys() & none.keys()) if method != "MLA none"])
        rows.append([method, *map(spread, cells)])
    return markdown_table([heading(group), "average", "fused", "by fusion", "by projection"], rows)


def _ablated(group: Sequence[Record]) -> dict[str, dict[int, dict[str, float]]]:
    """method → seed → accuracies, of MLA's three projections; none without the one that is compared with."""
    methods = {
        name: {record["seed"]: record["accuracy"] for record in group if record["method"] == name} for name in MLA_SETTINGS
    }
    found = {name: runs for name, runs in methods.items() if runs}
    return found if "MLA none" in found else {}


def by_rate(group: Sequence[Record]) -> str:
    """Methods by rate: fused accuracy."""
    rates = sorted({record["missing"] for record in group})
    rows = []
    for runs in groups(group, ["method"]):
        cells = [spread([run["accuracy"]["fused"] for run in runs if run["missing"] == rate]) for rate in rates]
        rows.append([runs[0]["method"], *cells])
    return markdown_table([heading(group), *(f"{rate:.0%} missing" for rate in rates)], rows)


def heading(group: Sequence[Record]) -> str:
    """The task, and how many seeds a method has; if not all have as many, the fewest and the most."""
    counts = {len({run["seed"] for run in runs}) for runs in groups(group, ["method"])}
    return f"{title(group[0])}, {'–'.join(map(str, sorted({min(counts), max(counts)})))} seed{'s' * (max(counts) > 1)}"


def spread(values: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
    """Mean ± sample standard deviation, in percent unless told."""
    values = [scale * value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def draw_accuracy(found: Sequence[Record], path: Path) -> bool:
    """Fused accuracy: a panel for each task, and one over the rates where modalities are missing. False without matplotlib."""
    tasks, rates = complete(found), missing(found)
    rows = -(-(len(tasks) + len(rates)) // 2)
    figure = pictures.new_figure(pictures.PAGE, 3.7 * rows + 0.3)
    if figure is None:
        return False
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    names = list(dict.fromkeys(run["method"] for group in tasks for run in group))
    for i, (axes, group) in enumerate(zip(panels, tasks, strict=False)):
        _draw_task(axes, group, names)
        axes.set(yticks=range(len(names)), yticklabels=names if i % 2 == 0 else [])
    for axes, group in zip(panels[len(tasks) :], rates, strict=False):
        for runs in groups(group, ["method"]):
            means = {rate: statistics.mean(100 * r["accuracy"]["fused"] for r in each) for rate, each in _by(runs, "missing")}
            axes.plot(
                means.keys(), means.values(), marker="o", ms=4, label=runs[0]["method"], **pictures.style(runs[0]["method"])
            )
        axes.set(title=f"{group[0]['data']} {group[0]['config']}, some missing", xlabel="rate", ylabel="fused accuracy, %")
        axes.legend(fontsize=8)
    for axes in panels[len(tasks) + len(rates) :]:
        axes.remove()
    pictures.families(figure)
    return pictures.save(figure, path)


def _draw_task(axes: Any, group: Sequence[Record], names: Sequence[str]) -> None:
    """Draw a point for each seed and a line at the mean, a row for each method."""
    for runs in groups(group, ["method"]):
        method, values = runs[0]["method"], [100 * run["accuracy"]["fused"] for run in runs]
        place, color = names.index(method), pictures.FAMILIES[pictures.family(method)]
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5)
        axes.plot(statistics.mean(values), place, "|", color="black", ms=14)
    axes.set(title=title(group[0]), xlabel="fused accuracy, %; one point a seed")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", alpha=0.3)


def _by(runs: Sequence[Record], name: str) -> list[tuple[float, list[Record]]]:
    return sorted((each[0][name], each) for each in groups(runs, [name]))
