"""The experiments of ``mla-fast demo``: joint training and MLA on real digits, and on synthetic data of modality competition."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from mla_fast.baselines import MLA_SETTINGS, Concat, Sum, fit_joint, joint_accuracy
from mla_fast.competition import Learned, train_joint, train_mla
from mla_fast.data import MultimodalDataset, digits, loader
from mla_fast.encoders import encoder_for
from mla_fast.model import MultimodalModel
from mla_fast.optimizer import MLAOptimizer
from mla_fast.tables import markdown_table
from mla_fast.threads import one_thread
from mla_fast.trainer import Trainer

FEATURES = 64
BATCH = 64
JOINT: dict[str, type[Sum] | type[Concat]] = {"joint, sum": Sum, "joint, concat": Concat}
COLORS = dict(zip((*JOINT, *MLA_SETTINGS), ("#b8b8b8", "#7a7a7a", "#1f6fb4", "#2a9d5c", "#9cc6e6"), strict=True))


def run(output: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run both experiments, print progress, write ``results.json`` and ``demo.png`` to `output` and return the results.

    quick: take a few seconds in place of half a minute on two cores, with too little training for the numbers to mean much.
    seed: the first of the seeds; torch's global generator is seeded from it.

    Without scikit-learn the digits are left out, and without matplotlib the plot; a message says so.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    results: dict[str, Any] = {"quick": quick, "seeds": seeds}
    with one_thread():
        results["digits"] = run_digits(seeds, epochs=3 if quick else 15)
        results["competition"] = run_competition(seeds, rounds=250 if quick else 800)
    results["seconds"] = round(time.perf_counter() - started, 1)
    print(summary(results))
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {output / 'results.json'}")
    plot(results, output / "demo.png")
    print(f"{results['seconds']} s")
    return results


def summary(results: dict[str, Any]) -> str:
    """Return the tables of both experiments with notes on how to read them."""
    mean = f"%, mean over seed(s) {', '.join(map(str, results['seeds']))}"
    parts = []
    if results["digits"]:
        parts += [f"\nDigits: test accuracy in {mean}\n", digits_table(results["digits"])]
        parts += ['\nJoint training: "alone" has the other views\' features at zero, "average" is the joint prediction.']
    parts += [f"\nModality competition: {mean}\n", competition_table(results["competition"])]
    parts += ["\nAn illustration: data, initial scale and learning rate are tuned so that the effect shows.\n"]
    return "\n".join(parts)


def run_digits(seeds: Sequence[int], epochs: int) -> dict[str, dict[str, float]]:
    """Return {method: accuracy}, means over the seeds: of each view alone, of the average of the logits and of entropy fusion.

    Without scikit-learn, print a message and return nothing.
    """
    print("Digits: 1,797 handwritten digits, three views of the same pixels")
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        try:
            train, test = digits(seed)
        except ImportError as error:
            print(f"  left out: {error}")
            return {}
        for method in (*JOINT, *MLA_SETTINGS):
            runs.setdefault(method, []).append(digits_accuracy(method, train, test, epochs, seed))
        print(f"  seed {seed}: {len(train)} to train on, {len(test)} to test; {len(runs)} methods, {epochs} epochs each")
    return {method: {key: fmean(run[key] for run in each) for key in each[0]} for method, each in runs.items()}


def digits_accuracy(method: str, train: MultimodalDataset, test: MultimodalDataset, epochs: int, seed: int) -> dict[str, float]:
    """Train once and return the accuracies; all methods start from the same encoders and see the samples in the same order."""
    torch.manual_seed(seed)
    encoders = {modality: encoder_for(x.shape[1:], FEATURES) for modality, x in train.inputs.items()}
    batches = loader(train, BATCH, shuffle=True)
    if method in JOINT:
        joint = JOINT[method](encoders, FEATURES, train.classes)
        sgd = torch.optim.SGD(joint.parameters(), lr=0.03, momentum=0.9)
        torch.manual_seed(seed)
        fit_joint(joint, sgd, batches, epochs)
        accuracy = joint_accuracy(joint, loader(test, 512))
        return {**{m: accuracy[m] for m in joint.modalities}, "average": accuracy["joint"]}
    model = MultimodalModel(encoders, nn.Linear(FEATURES, train.classes))
    sgd = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    optimizer = MLAOptimizer(sgd, head=model.head, **MLA_SETTINGS[method])
    trainer = Trainer(model, optimizer, seed=seed, progress=False)
    trainer.fit(batches, epochs)
    result: dict[str, float] = trainer.evaluate(loader(test, 512))["accuracy"]
    return result


def run_competition(seeds: Sequence[int], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return {method: [``competition.Learned`` as a dictionary, one for each seed]}."""
    print("Modality competition: synthetic data on which joint training picks one modality per class (a tuned regime)")
    methods: dict[str, Callable[..., Learned]] = {"joint, sum": train_joint, "MLA rls": train_mla}
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for seed in seeds:
        for method, train in methods.items():
            learned = train(seed, rounds=rounds)
            runs[method].append(learned._asdict())
            print(f"  seed {seed}, {method}: found {learned.found:.0%} of the (class, modality) pairs")
    return runs


def digits_table(results: dict[str, dict[str, float]]) -> str:
    """Format the results of ``run_digits``; the joint prediction of joint training is in the column "average"."""
    views = [key for key in next(iter(results.values())) if key != "average"]
    columns = {**{view: f"{view} alone" for view in views}, "average": "average", "fused": "entropy"}
    rows = [
        [method, *(f"{100 * accuracy[key]:.1f}" if key in accuracy else "-" for key in columns)]
        for method, accuracy in results.items()
    ]
    return markdown_table(["method", *columns.values()], rows)


def competition_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Format the results of ``run_competition``, in %, as means over the seeds."""
    columns = {"found": "pairs found", "one_sufficient": "accuracy, one modality shows it", "accuracy": "accuracy, all"}
    rows = [[method, *(f"{100 * fmean(run[key] for run in runs):.0f}" for key in columns)] for method, runs in results.items()]
    return markdown_table(["method", *columns.values()], rows)


def plot(results: dict[str, Any], path: Path) -> bool:
    """Draw both experiments as bars to `path` and return True; without matplotlib, print a message and return False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print('no plot: matplotlib is missing (pip install "mla_fast[demo]")')
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, whose backend is the user's choice
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if results["digits"]:
        views = [key for key in results["digits"]["MLA rls"] if key != "fused"]
        bars = {method: [accuracy[view] for view in views] for method, accuracy in results["digits"].items()}
        _bars(left, [view if view == "average" else f"{view} alone" for view in views], bars)
    left.set(title="Digits, three views" if results["digits"] else "Digits: left out, no scikit-learn", ylabel="test accuracy")
    measures = {"found": "pairs found", "one_sufficient": "accuracy where one\nmodality shows the class"}
    bars = {m: [fmean(run[key] for run in runs) for key in measures] for m, runs in results["competition"].items()}
    _bars(right, list(measures.values()), bars)
    right.set(title="Modality competition (tuned regime)")
    handles = {label: bar for axes in (right, left) for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
    return True


def _bars(axes: Any, labels: Sequence[str], groups: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(groups)
    for i, (name, heights) in enumerate(groups.items()):
        places = [x + (i - (len(groups) - 1) / 2) * width for x in range(len(labels))]
        axes.bar(places, heights, width, label=name, color=COLORS[name])
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 1)
