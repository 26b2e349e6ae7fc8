"""The results of a comparison as a CSV and as one page of HTML without anything from the network."""

from __future__ import annotations

import csv
import html
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_fast.compare import pictures, records
from mla_fast.compare.findings import Groups, findings, percent
from mla_fast.compare.records import Record
from mla_fast.compare.statistics import by_method, choose, difference, estimate, leader, values
from mla_fast.page import page, table
from mla_fast.tables import markdown_table


def write(found: Sequence[Record], settings: dict[str, Any], folder: Path) -> str:
    """Write ``results.csv`` and ``report.html`` of the runs to a folder; return the ranking as Markdown and the findings."""
    groups = sort(by_method(choose(found)))
    records.replace(folder / "results.csv", to_csv([run for group in groups.values() for run in group]))
    records.replace(folder / "report.html", to_html(groups, settings))
    header, rows = ranking_table(groups)
    return "\n\n".join([markdown_table(header, rows), *findings(groups)])


def sort(groups: Groups) -> dict[str, list[Record]]:
    """Return the groups in the order of their mean accuracy on the test part."""
    means = {name: statistics.fmean(values(runs, "test", "accuracy").values()) for name, runs in groups.items()}
    return {name: list(groups[name]) for name in sorted(groups, key=lambda name: -means[name])}


def ranking_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the ranking."""
    best = leader(groups)
    ours = values(groups[best], "test", "accuracy")
    header = [
        "method",
        "accuracy, %",
        f"{best} minus it",
        "seeds +/=/−",
        "macro-F1, %",
        "NLL",
        "ECE, %",
        "seconds",
        "passes",
        "MiB",
    ]
    rows = []
    for name, runs in groups.items():
        gap = None if name == best else difference(ours, values(runs, "test", "accuracy"))
        signs = ["–", "–"] if gap is None else [percent(gap.estimate, sign=True), f"{gap.above}/{gap.equal}/{gap.below}"]
        accuracy = percent(estimate(list(values(runs, "test", "accuracy").values())))
        others = [_mean(runs, 100, 1, "test", "macro_f1"), _mean(runs, 1, 3, "test", "nll"), _mean(runs, 100, 1, "test", "ece")]
        before = statistics.fmean(values(runs, "cost", "passes_before").values())
        passes = _mean(runs, 1, 0, "cost", "passes") + (f" + {before:.0f}" if before else "")
        rows.append(
            [name, accuracy, *signs, *others, _mean(runs, 1, 1, "cost", "seconds"), passes, _mean(runs, 1, 0, "cost", "peak_mb")]
        )
    return header, rows


def to_csv(runs: Sequence[Record]) -> str:
    """Return a row for each run: its trial, what it reached and what it cost."""
    file = io.StringIO()
    rows = [_flat(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _flat(run: Record) -> dict[str, Any]:
    row: dict[str, Any] = {name: run[name] for name in ("method", "rate", "share", "seed", "trial", "epoch") if name in run}
    row |= {f"validation_{name}": value for name, value in run["validation"].items()}
    for name, value in run["test"].items():
        if isinstance(value, dict):
            row |= {f"{name}_{part}": each for part, each in value.items()}
        elif name != "confusion":
            row[name] = value
    row |= run["cost"]
    return row | {f"option_{name}": value for name, value in run["options"].items()}


def to_html(groups: Groups, settings: dict[str, Any]) -> str:
    """Return the page."""
    best = leader(groups)
    sections = [
        ("findings", "What the numbers say", "".join(f"<p>{html.escape(text)}</p>" for text in findings(groups))),
        ("ranking", "Ranking", _table(groups, best) + pictures.ranking(groups, best)),
        ("alone", "Each modality alone", pictures.bars(groups, "alone", "test accuracy of the modality alone, %")),
        ("use", "Use of each modality", _use(groups)),
        ("cost", "Cost against accuracy", pictures.cost(groups, best)),
        ("confusion", f"Confusion matrix of {best}", pictures.confusion(groups[best])),
    ]
    if settings["missing"]:
        sections.insert(4, ("missing", "Missing modalities", pictures.missing(groups)))
    sections.append(("protocol", "How it was measured", _protocol(groups, settings)))
    return page(f"Which method for {settings['data']}?", sections)


def _table(groups: Groups, best: str) -> str:
    header, rows = ranking_table(groups)
    said = (
        "Means over the seeds with 95 % bootstrap intervals. The marked method is the best on the validation part; differences "
        "are paired by seed, and +/=/− counts the seeds in which it is above, equal and below. Passes: over each modality, + "
        "beforehand. Intervals from few seeds are too narrow: look at the counts, too."
    )
    return f'{table(rows, header, best)}<p class="note">{said}</p>'


def _use(groups: Groups) -> str:
    said = "How many points of accuracy are lost when a modality is exchanged at random between the test samples."
    return f'<p class="note">{said}</p>{pictures.bars(groups, "use", "points lost without the right modality")}'


def _protocol(groups: Groups, settings: dict[str, Any]) -> str:
    first = next(iter(groups.values()))[0]
    parts = ", ".join(f"{count} {name}" for name, count in first["samples"].items())
    seeds = len({run["seed"] for runs in groups.values() for run in runs})
    group = "" if settings["group"] is None else f", disjoint by {settings['group']}"
    device = settings.get("device", "cpu")
    where = "on one thread of the CPU" if device == "cpu" else f"on {device}"
    text = (
        f"Samples of the first seed: {parts}{group}. {seeds} seeds, each with a split of its own. Trials of hyperparameters of "
        f"every method: {settings['trials']}; trial and epoch are chosen on the validation part, by accuracy and then by "
        "likelihood. All start from the same encoders and see the same batches, each modality as often. Missing "
        "modalities, the exchange and each modality alone are measured on the test part; training is on the data as they are. "
        f"Seconds and memory (above what was in use before) are of the training of one run, {where}."
    )
    return f"<p>{html.escape(text)}</p>{table(list(settings.items()))}"


def _mean(runs: Sequence[Record], scale: float, digits: int, *path: str) -> str:
    found = values(runs, *path)
    return f"{scale * statistics.fmean(found.values()):.{digits}f}" if found else "–"
