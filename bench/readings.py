"""What the accuracy records say in words: the numbers come from the records, which method is meant stands here."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from bench import tables
from bench.records import Record
from bench.studies import collapse, forgetting, isolation

JOINT = ("Sum", "Concat", "FiLM", "BiGated", "OGM-GE")
PROJECTIONS = ("MLA none", "MLA rls", "MLA window")


def accuracy(found: Sequence[Record]) -> str:
    """Of each task: MLA beside the best joint method, late fusion and QMF."""
    return "\n".join(f"- {tables.title(group[0])}: {_beside(group)}" for group in tables.complete(found))


def _beside(group: Sequence[Record]) -> str:
    ours = tables.fused(group)
    joint = max((name for name in JOINT if tables.fused(group, name)), key=lambda name: mean(tables.fused(group, name).values()))
    said = [_lead(ours, tables.fused(group, name), name) for name in (joint, "Late fusion", "QMF")]
    return f"{tables.OURS} reaches {100 * mean(ours.values()):.1f} %; {said[0]}, the best joint method; {said[1]}; {said[2]}."


def _lead(ours: dict[int, float], theirs: dict[int, float], name: str) -> str:
    gains = [100 * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys()]
    return f"{mean(gains):+.1f} points against {name} (ahead in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds)"


def baselines(found: Sequence[Record]) -> str:
    """How far the baselines come on digits, beside late fusion."""
    (group,) = [group for group in tables.complete(found) if group[0]["data"] == "digits"]
    late = mean(tables.fused(group, "Late fusion").values())
    shares = {name: mean(tables.fused(group, name).values()) / late for name in (*JOINT, "QMF")}
    least = min(shares, key=shares.get)
    return f"On digits every baseline reaches at least {100 * shares[least]:.1f} % of late fusion's accuracy ({least})."


def infinite(found: Sequence[Record]) -> str:
    """In how many runs the released arithmetic ends below half of what the others reach."""
    lost = []
    for group in tables.complete(found):
        ours, official = tables.fused(group), tables.fused(group, "MLA official")
        lost += [f"{tables.title(group[0])}, seed {seed}" for seed in official if official[seed] < 0.5 * ours[seed]]
    said = "; ".join(lost) or "none of the runs"
    return f"It ends below half of what {tables.OURS} reaches in {said}."


def missing(found: Sequence[Record]) -> str:
    (group,) = tables.missing(found)
    rates = sorted({record["missing"] for record in group})
    said = []
    for rate in (rates[0], rates[-1]):
        at_rate = [record for record in group if record["missing"] == rate]
        leads = [_lead(tables.fused(at_rate), tables.fused(at_rate, name), name) for name in ("Concat", "Late fusion")]
        said.append(f"with {rate:.0%} missing {' and '.join(leads)}")
    return f"{tables.OURS} has, {'; '.join(said)}."


def ablation(found: Sequence[Record]) -> str:
    """The largest mean gain and loss, over tasks and projections."""
    fusion, projection = {}, {}
    for group in tables.complete(found):
        for method, (by_fusion, by_projection) in tables.gains(group).items():
            fusion[tables.title(group[0]), method] = 100 * mean(by_fusion)
            if method != "MLA none":
                projection[tables.title(group[0]), method] = 100 * mean(by_projection)
    return f"Entropy fusion gains {_extremes(fusion)}; projecting the head gains {_extremes(projection)}."


def _extremes(means: dict[tuple[str, str], float]) -> str:
    low, high = min(means, key=means.get), max(means, key=means.get)
    return f"between {means[low]:+.1f} ({', '.join(low)}) and {means[high]:+.1f} points ({', '.join(high)})"


def isolated(found: Sequence[Record]) -> str:
    largest: dict[str, float] = {}
    for (method, *_), curve in isolation.moves(found).items():
        largest[method] = max(largest.get(method, 0.0), *map(abs, curve.values()))
    said = ", ".join(f"{move:.1f} with {method}" for method, move in largest.items())
    return f"The largest moves, in either direction, are of so many points: {said}."


def gap(found: Sequence[Record]) -> str:
    by_method = {runs[0]["method"]: runs for runs in tables.groups(found, ["method"])}
    gaps, fused = ({name: mean(run[key] for run in by_method[name]) for name in PROJECTIONS} for key in ("gap", "accuracy"))
    said = "; ".join(f"{gaps[name]:.2f} and {100 * fused[name]:.1f} % with {name}" for name in PROJECTIONS)
    return f"The gap and the accuracy are {said}."


def collapsed(found: Sequence[Record]) -> str:
    kept = []
    for runs in tables.groups(found, ["method", "alpha"]):
        share = mean(run["gradient_kept"][-1] for run in runs)
        kept.append(f"{100 * share:.2g} % ({collapse.label(runs[0])})")
    said = ", ".join(kept)
    return f"At the end of training this is left of the head's gradient: {said}."


def forgotten(found: Sequence[Record]) -> str:
    rises = {forgetting.label(runs[0]): mean(map(forgetting.rise, runs)) for runs in tables.groups(found, ["method", "bias"])}
    none = rises["MLA none, bias free"]
    said = [
        f"{100 * rise / none:.1f} % of that with {label}" for label, rise in rises.items() if not label.startswith("MLA none")
    ]
    return f"Without projection the first modality's loss rises by {none:.3f}; {', '.join(said)}."


def competition(found: Sequence[Record]) -> str:
    """At the smallest and the largest μ, from the middle scale."""
    scales, mus = (sorted({record[name] for record in found}) for name in ("scale", "mu"))
    said = []
    for mu in (mus[0], mus[-1]):
        shares = []
        for runs in tables.groups([r for r in found if r["mu"] == mu and r["scale"] == scales[1]], ["method"]):
            shares.append(f"{100 * mean(run['learned']['found'] for run in runs):.0f} % ({runs[0]['method']})")
        said.append(f"{', '.join(shares)} at μ = {mu}")
    return f"From the initial scale {scales[1]} are found {'; '.join(said)}."
