"""``report.html`` of a run: curves, the confusion matrix and the share of each modality."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_fast import page
from mla_fast.trainer import Trainer

MOST = 100  # classes of a confusion matrix that can be read


def write_report(
    path: Path, trainer: Trainer, test: Iterable[Any], result: Mapping[str, Any], epoch: int, said: list[str]
) -> None:
    """Write the page; ImportError without matplotlib.

    test: a loader of what `result` is of; epoch: the one that was tested; said: the notes on the result.
    """
    config = trainer.config or {}
    counts, weights = count(trainer, test)
    names = config.get("class_names") or [str(c) for c in range(len(counts))]
    title = f"{', '.join(trainer.model.modalities)}: {100 * result['accuracy'].get('fused', float('nan')):.1f} % fused"
    confusion = page.confusion(counts, names) if len(counts) <= MOST else f"<p>Left out, of {len(counts)} classes.</p>"
    settings = {k: v for k, v in config.items() if k not in ("statistics", "class_names")}
    sections = [
        ("test", "Test", _test(result, said)),
        ("curves", "Curves", curves(trainer.history, epoch)),
        ("share", "The share of each modality", share(result, weights)),
        ("confusion", "Confusion matrix of the fused answer", confusion),
        ("settings", "Settings", page.table(list(settings.items()))),
    ]
    path.write_text(page.page(title, sections), encoding="utf-8")


def count(trainer: Trainer, test: Iterable[Any]) -> tuple[list[list[int]], dict[str, float]]:
    """Return the confusion matrix of fused answers, [true class][predicted class], and the mean weight of each modality (eq. 8).

    Samples without any modality are left out, and logits that are NaN are no answer.
    """
    table: Tensor | None = None
    total, samples = torch.zeros(len(trainer.model.modalities), dtype=torch.float64), 0
    for inputs, target, *present in test:
        logits, weights, _ = (part.cpu() for part in trainer.predict((inputs, target, *present)))
        C = logits.shape[1]
        table = torch.zeros(C, C, dtype=torch.int64) if table is None else table
        there = weights.sum(1) > 0
        largest, answers = logits.max(1)
        sure = there & (largest == largest)
        table.view(-1).index_add_(0, target[sure] * C + answers[sure], torch.ones(int(sure.sum()), dtype=torch.int64))
        places = [trainer.model.modalities.index(m) for m in inputs]
        total[places] += weights[there].double().sum(0)
        samples += int(there.sum())
    shares = (total / max(samples, 1)).tolist()
    return [] if table is None else table.tolist(), dict(zip(trainer.model.modalities, shares, strict=True))


def curves(history: Sequence[Mapping[str, Any]], epoch: int) -> str:
    """Draw the loss of each modality, and the validation accuracies if there are any, by epoch; mark the one that was tested."""
    if not history:
        return "<p>No epoch was trained.</p>"
    judged = [record for record in history if "validation" in record]
    validated = bool(judged)
    figure, axes = page.new_figure(8 if validated else 5, 3.2, 1 + validated)
    left, *right = axes if validated else [axes]
    epochs = [record["epoch"] for record in history]
    for modality in dict.fromkeys(m for record in history for m in record["loss"]):
        left.plot(epochs, [record["loss"].get(modality, float("nan")) for record in history], "o-", ms=3, label=modality)
    left.set(xlabel="epoch", ylabel="training loss")
    for axis in right:
        for name in judged[-1]["validation"]["accuracy"]:
            found = [100 * record["validation"]["accuracy"].get(name, float("nan")) for record in judged]
            axis.plot([record["epoch"] for record in judged], found, "o-", ms=3, lw=2 if name == "fused" else 1, label=name)
        axis.set(xlabel="epoch", ylabel="validation accuracy, %")
        axis.axvline(epoch, color="0.7", lw=1, ls=":")
    for axis in (left, *right):
        axis.locator_params(axis="x", integer=True)
        axis.legend(fontsize=8, frameon=False)
    return page.svg(figure)


def share(result: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    """Return a table and a picture of what each modality contributes to the fused answer."""
    rows = [
        [m, f"{100 * weights[m]:.1f}", f"{100 * result['accuracy'][m]:.1f}", f"{100 * result['use'][m]:.1f}"]
        for m in weights
        if m in result["accuracy"]
    ]
    header = ["modality", "mean fusion weight, %", "accuracy alone, %", "points lost when permuted"]
    figure, axes = page.new_figure(6, 0.6 + 0.4 * len(rows))
    axes.barh([row[0] for row in rows], [float(row[1]) for row in rows], 0.6, color="#1f6fb4")
    axes.set(xlabel="mean fusion weight, %", xlim=(0, 100))
    axes.invert_yaxis()
    said = (
        "The weight is what the fused answer takes of a modality; what is lost is how far fused accuracy falls when its features "
        "are given to other samples."
    )
    return f'{page.table(rows, header)}<p class="note">{said}</p>{page.svg(figure)}'


def _test(result: Mapping[str, Any], said: list[str]) -> str:
    rows = [[n, f"{100 * a:.1f}", f"{100 * result['macro_f1'][n]:.1f}"] for n, a in result["accuracy"].items()]
    lines = "".join(f"<p>{html.escape(note)}</p>" for note in said)
    return f"<p>{result['samples']} samples</p>{page.table(rows, ['', 'accuracy, %', 'macro-F1, %'], 'fused')}{lines}"
