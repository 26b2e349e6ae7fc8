"""The paper's studies on its data sets, which methods each compares, and the accuracies that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Accuracies = Mapping[str, Mapping[str, float]]  # {row: {modality or "multi": %}}


class Row(NamedTuple):
    """A row of a table: what it is called, the method that is trained, and which of its ways to fuse is meant by "multi"."""

    label: str
    method: str
    fusion: str = "multi"


@dataclass(frozen=True)
class Study:
    """A table or a figure of the paper.

    published: {data set: accuracies that it prints}; a figure prints none. masked: shares of the training samples that lack one
    modality, each modality in turn. gap: whether the modality gap of the features is measured.
    """

    title: str
    rows: tuple[Row, ...]
    published: Mapping[str, Accuracies]
    masked: tuple[float, ...] = ()
    gap: bool = False


def _columns(labels: tuple[str, ...], **lines: str) -> dict[str, dict[str, float]]:
    """Return {label: {modality: value}} of {modality: values in the order of the labels}."""
    values = {modality: list(map(float, line.split())) for modality, line in lines.items()}
    return {label: {modality: row[i] for modality, row in values.items()} for i, label in enumerate(labels)}


_METHODS = ("Sum", "Concat", "Late fusion", "FiLM", "BiGated", "OGM-GE", "QMF", "MLA")
_ABLATION = ("neither", "DF", "HGM", "HGM and DF")  # head gradient modification, dynamic fusion
_MLA = Row("MLA", "MLA rls", "dynamic")

TABLE_1 = {
    "crema-d": _columns(
        _METHODS,
        audio="54.14 55.65 52.17 53.89 51.49 53.76 59.41 59.27",
        image="18.45 18.68 55.48 18.67 17.34 28.09 39.11 64.91",
        multi="60.32 61.56 66.32 60.07 59.21 68.14 63.71 79.70",
    ),
    "kinetics-sounds": _columns(
        _METHODS,
        audio="48.77 49.18 47.87 48.67 49.96 48.87 51.57 54.67",
        image="24.53 24.67 46.76 23.15 23.77 29.73 32.19 51.03",
        multi="64.72 64.84 65.53 63.33 63.72 65.74 65.78 71.35",
    ),
    "food-101": _columns(
        _METHODS,
        text="85.63 86.02 85.19 85.84 85.79 85.17 84.13 86.47",
        image="4.57 3.51 58.46 4.68 14.20 22.35 45.74 69.60",
        multi="86.19 86.32 90.21 87.21 88.87 87.54 92.87 93.33",
    ),
    "mvsa": _columns(
        _METHODS,
        text="73.33 75.22 72.15 74.85 73.13 74.76 74.87 75.72",
        image="28.46 27.32 45.24 27.12 28.15 31.98 32.99 54.99",
        multi="76.19 76.25 76.88 75.34 75.94 76.37 77.96 79.94",
    ),
    "iemocap": _columns(
        _METHODS,
        audio="39.79 41.93 43.12 41.64 42.23 41.38 42.98 46.29",
        image="29.44 30.00 32.38 29.85 27.45 30.24 31.22 37.63",
        text="65.16 67.84 68.79 66.37 65.16 70.79 75.03 73.22",
        multi="74.18 75.91 74.96 74.32 73.34 76.17 76.17 78.92",
    ),
}
TABLE_3 = {
    "crema-d": _columns(
        _ABLATION, audio="52.17 52.17 59.27 59.27", image="55.48 55.48 64.91 64.91", multi="66.32 72.79 74.51 79.70"
    ),
    "kinetics-sounds": _columns(
        _ABLATION, audio="47.87 47.87 54.66 54.66", image="46.76 46.76 51.03 51.03", multi="65.53 66.34 70.72 71.35"
    ),
    "food-101": _columns(
        _ABLATION, text="85.19 85.19 86.47 86.47", image="58.46 58.46 69.60 69.60", multi="90.21 91.37 91.72 93.33"
    ),
    "mvsa": _columns(_ABLATION, text="72.15 72.15 75.72 75.72", image="45.24 45.24 54.99 54.99", multi="76.88 77.53 79.59 79.94"),
    "iemocap": _columns(
        _ABLATION,
        audio="43.12 43.12 46.29 46.29",
        image="32.38 32.38 37.63 37.63",
        text="68.79 68.79 73.22 73.22",
        multi="74.96 75.42 77.58 78.92",
    ),
}
TABLE_4 = {"clip-food101": _columns(("CLIP", "CLIP + MLA"), image="63.07 72.22", text="83.98 85.34", multi="93.07 93.47")}

STUDIES = {
    "table-1": Study("Table 1", (*(Row(name, name) for name in _METHODS[:-1]), _MLA), TABLE_1),
    "table-3": Study(
        "Table 3, the ablation",
        tuple(
            Row(label, method, fusion)
            for label, (method, fusion) in zip(
                _ABLATION,
                (("MLA none", "fixed"), ("MLA none", "dynamic"), ("MLA rls", "fixed"), ("MLA rls", "dynamic")),
                strict=True,
            )
        ),
        TABLE_3,
    ),
    "table-4": Study("Table 4, features of CLIP", (Row("CLIP", "Concat"), _MLA._replace(label="CLIP + MLA")), TABLE_4),
    "figure-2": Study(
        "Figure 2, one modality masked in training",
        (Row("QMF", "QMF"), _MLA),
        {"kinetics-sounds": {}},
        masked=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
    ),
    "figure-3": Study("Figure 3, the modality gap", (Row("Concat", "Concat"), _MLA), {"food-101": {}}, gap=True),
}


def find_study(name: str, dataset: str) -> Study:
    """Return a study; raise ValueError where the paper has it for other data sets."""
    study = STUDIES[name]
    if dataset not in study.published:
        raise ValueError(f"--study: expected {name} of {', '.join(study.published)}, got {dataset}")
    return study
