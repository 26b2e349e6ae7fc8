"""``report.html`` of a run: curves, the confusion matrix and the share of each modality."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_fast import page
from mla_fast.ops.fusion import Fused
from mla_fast.trainer import Trainer

MOST = 100  # classes of a confusion matrix that can be read


def write_report(path: Path, trainer: Trainer, answers: Answers, result: Mapping[str, Any], epoch: int, said: list[str]) -> None:
    """Write the page; ImportError without matplotlib.

    answers: of what `result` is of; epoch: the one that was tested; said: the notes on the result.
    """
    config = trainer.config or {}
    title = f"{', '.join(trainer.model.modalities)}: {100 * result['accuracy'].get('fused', float('nan')):.1f} % fused"
    settings = {k: v for k, v in config.items() if k not in ("statistics", "class_names")}
    sections = [
        ("test", "Test", _test(result, said)),
        ("curves", "Curves", curves(trainer.history, epoch)),
        ("share", "The share of each modality", share(result, answers.weights())),
        ("confusion", "Confusion matrix of the fused answer", _confusion(answers, config.get("class_names"))),
        ("settings", "Settings", page.table(list(settings.items()))),
    ]
    path.write_text(page.page(title, sections), encoding="utf-8")


class Answers:
    """The confusion matrix of fused answers, [true class][predicted class], and the mean weight of each modality (eq. 8).

    Samples without any modality are left out, and logits that are NaN are no answer. counts: None of more than 100 classes, and
    before the first batch.
    """

    def __init__(self, modalities: Sequence[str]):
        self.modalities, self.samples = tuple(modalities), 0
        self.counts: Tensor | None = None
        self._weights = torch.zeros(len(self.modalities), dtype=torch.float64)

    def add(self, modalities: Sequence[str], fused: Fused, target: Tensor) -> None:
        """Count a batch of these modalities."""
        logits, weights, target, C = fused.logits.cpu(), fused.weights.cpu(), target.cpu(), fused.logits.shape[1]
        there = weights.sum(1) > 0
        if C <= MOST:
            self.counts = torch.zeros(C, C, dtype=torch.int64) if self.counts is None else self.counts
            largest, answers = logits.max(1)
            sure = there & (largest == largest)
            self.counts.view(-1).index_add_(0, target[sure] * C + answers[sure], torch.ones(int(sure.sum()), dtype=torch.int64))
        self._weights[[self.modalities.index(m) for m in modalities]] += weights[there].double().sum(0)
        self.samples += int(there.sum())

    def joined(self, other: Answers) -> Answers:
        """Return what both have counted, of which one may have seen nothing."""
        both = Answers(self.modalities)
        tables = [each.counts for each in (self, other) if each.counts is not None]
        both.counts = torch.stack(tables).sum(0) if tables else None
        both.samples, both._weights = self.samples + other.samples, self._weights + other._weights
        return both

    def weights(self) -> dict[str, float]:
        return dict(zip(self.modalities, (self._weights / max(self.samples, 1)).tolist(), strict=True))


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


def _confusion(answers: Answers, names: Sequence[str] | None) -> str:
    if answers.counts is None:
        return f"<p>Left out, of more than {MOST} classes.</p>" if answers.samples else "<p>Nothing was answered.</p>"
    return page.confusion(answers.counts.tolist(), names or [str(c) for c in range(len(answers.counts))])


def _test(result: Mapping[str, Any], said: list[str]) -> str:
    rows = [[n, f"{100 * a:.1f}", f"{100 * result['macro_f1'][n]:.1f}"] for n, a in result["accuracy"].items()]
    lines = "".join(f"<p>{html.escape(note)}</p>" for note in said)
    return f"<p>{result['samples']} samples</p>{page.table(rows, ['', 'accuracy, %', 'macro-F1, %'], 'fused')}{lines}"
