"""Writes ``bench/REPORT.md`` and its pictures, and the tables of the README, from the records in ``bench/results``.

    python -m bench.report

No number of the report is typed: tables and pictures come from the records. In the README, what stands between
``<!-- report: NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import first_screen, pictures, records
from bench.accuracy import balanced, missing, tables
from bench.accuracy.__main__ import STUDIES
from bench.accuracy.studies import adding
from bench.throughput import gpu, plot, speed
from bench.throughput.speed import Throughput

BENCH = Path(__file__).parent
RESULTS, PLOTS, REPORT, README = BENCH / "results", BENCH / "plots", BENCH / "REPORT.md", BENCH.parent / "README.md"
CPU = RESULTS / "cpu-xeon.jsonl"
GPU = "nvidia-h200"
TEMPLATE = BENCH / "report.md.in"
WIDTH = 130


def parts() -> dict[str, str]:
    """All tables by the names that the template and the README have for them."""
    found, cpu, card = records.read(RESULTS / "accuracy.jsonl"), Throughput(CPU), gpu.GPU(RESULTS, GPU)
    tasks = tables.complete(found)
    named = {
        "ours": tables.OURS,
        "summary": tables.summary(tasks),
        "modalities": "\n\n".join(map(tables.by_modality, tasks)),
        "missing": "\n\n".join(map(tables.by_rate, tables.missing(found))),
        **balanced.parts(RESULTS),
        **missing.parts(RESULTS),
        "ablation": "\n\n".join(map(tables.ablation, tasks)),
        "adding summary": adding.summary(records.read(RESULTS / "adding.jsonl")),
        "operators": speed.operators(cpu),
        "operators reading": speed.read_operators(cpu),
        "steps": speed.step_times(cpu),
        "ratios": speed.step_ratios(cpu),
        "gpu machine": gpu.measured_on(card),
        "gpu steps": gpu.steps(card),
        "gpu ratios": gpu.ratios(card),
        "gpu operators": gpu.operators(card),
        "gpu targets": gpu.targets(card),
        "gpu largest": gpu.largest(card),
        "gpu large heads": gpu.large_heads(card),
        "gpu counters": gpu.counters(RESULTS / f"{GPU}-ncu.csv"),
        "gpu kernels": gpu.kernels(card),
    }
    named |= {study.name: study.table(records.read(RESULTS / f"{study.name}.jsonl")) for study in STUDIES}
    return {name: text if text.startswith(("|", "-")) else textwrap.fill(text, WIDTH) for name, text in named.items()}


def report(named: dict[str, str]) -> str:
    """The template with every ``{name}`` replaced."""
    return re.sub(r"\{([\w ]+)\}", lambda match: named[match[1]], TEMPLATE.read_text())


def readme(named: dict[str, str], text: str) -> str:
    """The text with its marked parts made anew."""
    return re.sub(
        r"(<!-- report: ([\w ]+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{named[m[2]]}\n{m[3]}", text, flags=re.DOTALL
    )


def drawings() -> dict[str, Callable[[Path], object]]:
    """name → what draws it into a file."""
    found = records.read(RESULTS / "accuracy.jsonl")
    drawn = {"accuracy": partial(tables.draw_accuracy, found), "method": first_screen.draw_method}
    drawn["drowning"] = partial(first_screen.draw_drowning, found)
    for study in STUDIES:
        drawn[study.name] = partial(study.draw, records.read(RESULTS / f"{study.name}.jsonl"))
    best = speed.best_threads(list(records.timings(CPU).values()))
    return drawn | {"operators": partial(plot.draw, best), "missing": partial(missing.plot, RESULTS)}


def main() -> None:
    try:
        importlib.import_module("matplotlib")
        named = parts()
    except (ValueError, ImportError) as error:
        raise SystemExit(f"bench.report: error: {error}") from None
    REPORT.write_text(report(named))
    README.write_text(readme(named, README.read_text()))
    for name, draw in drawings().items():
        draw(PLOTS / f"{name}.png")
        pictures.shrink(PLOTS / f"{name}.png")
    print(f"wrote {REPORT} and the tables of {README}")


if __name__ == "__main__":
    main()
