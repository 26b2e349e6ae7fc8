"""The table of accuracy by the rate of missing modalities, its picture and its reading, by rules that anyone can check."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla_fast import page
from mla_fast.compare import pictures, records
from mla_fast.compare.findings import percent, ties
from mla_fast.compare.methods import TABLE_2
from mla_fast.compare.records import Record
from mla_fast.compare.report import to_csv
from mla_fast.compare.statistics import by_method, choose, estimate, leader
from mla_fast.compare.statistics import values as values_of
from mla_fast.tables import markdown_table

FEW = 3  # seeds, of which a 95 % bootstrap interval is the span
SHARE = 0.9  # of late fusion's accuracy, which a method is expected to reach at the smallest rate
MEASURES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "weighted_f1": "weighted F1"}
UNLABELLED = "CCA, DCCA and DCCAE learn what modalities have in common, without labels, and fill in means."
SLOW = "AE and CRA are deep, with dropout of 0.5, and take more epochs than the others."
LINEAR = "CPM-Net has no encoder, and its decoders are linear."
REASONS = {"CCA": UNLABELLED, "DCCA": UNLABELLED, "DCCAE": UNLABELLED, "AE": SLOW, "CRA": SLOW, "CPM-Net": LINEAR}
ByRate = Mapping[str, Mapping[float, Mapping[int, float]]]  # {method: {rate: {seed: value}}}


def by_rate(found: Sequence[Record], measure: str = "accuracy") -> dict[str, dict[float, dict[int, float]]]:
    """Return a measure of the test part, of the trial that is best on validation, for each method, rate and seed."""
    values: dict[str, dict[float, dict[int, float]]] = {}
    for rate, groups in _chosen(found).items():
        for name, runs in groups.items():
            values.setdefault(name, {})[rate] = values_of(runs, "test", measure)
    order = {name: place for place, name in enumerate(TABLE_2)}  # records are in that in which runs have ended
    return dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))


def _chosen(found: Sequence[Record]) -> dict[float, dict[str, list[Record]]]:
    """Return {rate: {method: a run of each seed}}, of the trial that is best on validation."""
    rates = sorted({record["rate"] for record in found})
    return {rate: by_method(choose([record for record in found if record["rate"] == rate])) for rate in rates}


def table(found: Sequence[Record], title: str, measure: str = "accuracy") -> str:
    """Return a table in Markdown: a row for each method, a column for each rate, mean ± deviation over the seeds in %.

    The best mean of each column is bold; a dash stands for what was not run.
    """
    values = by_rate(found, measure)
    rates = sorted({rate for rows in values.values() for rate in rows})
    best = {rate: max(statistics.fmean(rows[rate].values()) for rows in values.values() if rate in rows) for rate in rates}
    body = [[name, *(_cell(rows.get(rate), best[rate]) for rate in rates)] for name, rows in values.items()]
    return markdown_table([title, *map(_title, rates)], body)


def _title(rate: float) -> str:
    return f"{100 * rate:.3g} % missing" if rate else "as they are"


def costs(found: Sequence[Record]) -> list[list[str]]:
    """Return what a run of each method takes, in the mean over rates and seeds: passes over the data, beforehand and in training,
    and seconds."""
    runs: dict[str, list[Mapping[str, float]]] = {name: [] for name in by_rate(found)}
    for record in found:
        if "run_at" not in record:
            runs[record["method"]].append(record["cost"])
    columns = {"passes_before": 0, "passes": 0, "seconds": 1}
    means = {name: [statistics.fmean(cost[of] for cost in each) for of in columns] for name, each in runs.items()}
    return [
        [name, *(f"{mean:.{digits}f}" for mean, digits in zip(of, columns.values(), strict=True))] for name, of in means.items()
    ]


def _cell(seeds: Mapping[int, float] | None, best: float) -> str:
    if not seeds:
        return "–"
    sample = [100 * value for value in seeds.values()]
    mean = statistics.fmean(sample)
    text = f"{mean:.1f}" + (f" ± {statistics.stdev(sample):.1f}" if len(sample) > 1 else "")
    return f"**{text}**" if mean >= 100 * best - 1e-9 else text


def reading(found: Sequence[Record]) -> list[str]:
    """Return who is best at each rate and what ties with it, how much is missing, and what falls short of late fusion."""
    values = by_rate(found)
    groups = _chosen(found)
    said = [_best_at(groups[same[0]], same, len(values)) for same in _alike(values, list(groups))]
    seeds = {record["seed"] for record in found}
    if 1 < len(seeds) <= FEW:
        said.append(
            f"{len(seeds)} seeds are few: an interval is their span, and what does not tie was behind in every one of them."
        )
    return [*said, *_shares(found), *_short_of_late_fusion(values, next(iter(groups)))]


def _alike(values: ByRate, rates: Sequence[float]) -> list[list[float]]:
    """Return the rates together of which all methods have the same accuracies, as where a protocol masks the same at both."""
    together: list[list[float]] = []
    for rate in rates:
        if together and _column(values, rate) == _column(values, together[-1][0]):
            together[-1].append(rate)
        else:
            together.append([rate])
    return together


def _column(values: ByRate, rate: float) -> dict[str, Mapping[int, float]]:
    return {name: rows[rate] for name, rows in values.items() if rate in rows}


def _best_at(groups: Mapping[str, Sequence[Record]], rates: Sequence[float], methods: int) -> str:
    """Return who is best on validation at these rates and what it reaches; methods that lack seeds are left out."""
    seeds = max(map(len, groups.values()))
    here = {name: runs for name, runs in groups.items() if len(runs) == seeds}
    part = f", {len(here)} of {methods} methods run" if len(here) < methods else ""
    best = leader(here)
    shares = " to ".join(f"{100 * rate:.3g} %" for rate in sorted({rates[0], rates[-1]}))
    reached = {name: list(values_of(runs, "test", "accuracy").values()) for name, runs in here.items()}
    top = max(here, key=lambda name: statistics.fmean(reached[name]))
    said = f"{shares} missing{part}: {best} is best on validation and reaches {percent(estimate(reached[best]))} %"
    highest = "" if top == best else f", {top} highest with {100 * statistics.fmean(reached[top]):.1f} %"
    if seeds < 2:
        return f"{said}{highest}; one seed cannot tell what is better."
    tied = ties(here, best)
    return f"{said}; level with it or above: {', '.join(tied)}{highest}." if tied else f"{said}; no other is level with it."


def _shares(found: Sequence[Record]) -> list[str]:
    """Return how much is really missing where that is not the rate: of every sample a modality stays, and data may lack some."""
    shares: dict[float, list[float]] = {}
    for record in found:
        if "share" in record:
            shares.setdefault(record["rate"], []).append(record["share"])
    off = {rate: mean for rate, of in sorted(shares.items()) if abs((mean := statistics.fmean(of)) - rate) > 0.01}
    if not off:
        return []
    return [
        "Of all entries are missing: "
        + ", ".join(f"{100 * mean:.0f} % at {100 * rate:.3g} %" for rate, mean in off.items())
        + "."
    ]


def _short_of_late_fusion(values: ByRate, rate: float) -> list[str]:
    if rate not in values.get("Late fusion", {}):
        return []
    means = {name: statistics.fmean(rows[rate].values()) for name, rows in values.items() if rate in rows}
    short = [f"{name} ({100 * mean:.1f} %)" for name, mean in means.items() if mean < SHARE * means["Late fusion"]]
    if not short:
        return [f"Every method reaches 90 % of late fusion's accuracy at {100 * rate:.3g} % missing."]
    why = {reason for name, reason in REASONS.items() if any(each.startswith(f"{name} (") for each in short)}
    return [" ".join([f"Below 90 % of late fusion's accuracy at {100 * rate:.3g} % missing: {', '.join(short)}.", *sorted(why)])]


def write(found: Sequence[Record], settings: dict[str, Any], folder: Path, left_out: Sequence[str] = ()) -> str:
    """Write ``report.html``, ``table.md`` and ``results.csv`` of the runs to a folder; return the table of accuracies and the
    reading. left_out: methods that need true values of what the data lack."""
    title = f"{settings['data']}, {settings['protocol']} protocol, {settings['epochs']} epochs"
    tables = {name: table(found, f"{title}: {name}, %", measure) for measure, name in MEASURES.items()}
    said = reading(found)
    if left_out:
        said.append(
            f"Left out: {', '.join(left_out)}, which learn from true values of what is masked, since the data themselves lack "
            "modalities."
        )
    chosen = [run for groups in _chosen(found).values() for runs in groups.values() for run in runs]
    records.replace(folder / "table.md", "\n\n".join([*tables.values(), *said]) + "\n")
    records.replace(folder / "results.csv", to_csv(chosen))
    records.replace(folder / "report.html", _page(title, tables, found, said, settings))
    return "\n\n".join([tables["accuracy"], *said])


def _page(
    title: str, tables: Mapping[str, str], found: Sequence[Record], said: Sequence[str], settings: Mapping[str, Any]
) -> str:
    sections = [("findings", "What the numbers say", "".join(f"<p>{html.escape(text)}</p>" for text in said))]
    sections.append(("by-rate", "Accuracy by the rate of missing modalities", pictures.by_rate(by_rate(found))))
    sections += [(name.replace(" ", "-"), name, f"<pre>{html.escape(text)}</pre>") for name, text in tables.items()]
    header = ["method", "passes before", "passes", "seconds of a run"]
    sections.append(("cost", "What a run costs", page.table(costs(found), header)))
    sections.append(("protocol", "How it was measured", f"<p>{_measured(found)}</p>{page.table(list(settings.items()))}"))
    return page.page(title, sections)


def _measured(found: Sequence[Record]) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in found[0]["samples"].items())
    return (
        f"Samples of the first seed: {parts}. Seeds: {len({record['seed'] for record in found})}, each with a split and masks of "
        "its own; modalities are taken away in training, validation and test alike. Trial and epoch are chosen on the validation "
        "part. Seconds are those of the training of one run."
    )
