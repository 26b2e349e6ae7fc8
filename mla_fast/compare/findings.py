"""What the numbers say, by rules that anyone can check."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from mla_fast.compare.records import Record
from mla_fast.compare.statistics import Difference, Estimate, difference, estimate, leader, values

Groups = Mapping[str, Sequence[Record]]
TOGETHER = ("Sum", "Concat", "FiLM", "BiGated")  # every modality learns from the joint loss alone
ALONE = ("Late fusion", "UME")  # every modality learns from its own loss alone
INTERACTION = 0.05  # of accuracy, that training together must win
DROWNED = 0.10  # of accuracy, that a modality alone loses by being trained together


def findings(groups: Groups) -> list[str]:
    """Return sentences on the best method and what ties with it, on interaction and on modalities that drown."""
    return [*_best(groups), *_interaction(groups), *_drowning(groups)]


def ties(groups: Groups, best: str) -> list[str]:
    """Return the methods that the best one is not above: the interval of its paired difference reaches zero, or there is none."""
    ours = values(groups[best], "test", "accuracy")
    found = []
    for name, runs in groups.items():
        gap = difference(ours, values(runs, "test", "accuracy"))
        if name != best and not (gap is not None and _above(gap)):
            found.append(name)
    return found


def cheapest(groups: Groups, names: Sequence[str]) -> str:
    """Return the method with the fewest seconds a run."""
    return min(names, key=lambda name: statistics.fmean(values(groups[name], "cost", "seconds").values()))


def percent(found: Estimate, sign: bool = False) -> str:
    """Return a mean and its interval in percent, as "93.2 [92.5, 94.0]"."""
    form = "{:+.1f}" if sign else "{:.1f}"
    mean = form.format(100 * found.mean)
    return mean if found.interval is None else f"{mean} [{', '.join(form.format(100 * end) for end in found.interval)}]"


def _best(groups: Groups) -> list[str]:
    best = leader(groups)
    reached = percent(estimate(list(values(groups[best], "test", "accuracy").values())))
    said = [f"{best} is best on the validation part and reaches {reached} % on the test part."]
    if len(groups) == 1:
        return said
    if len(groups[best]) < 2:
        return [*said, "One seed gives no intervals: what is better than what cannot be told."]
    tied = ties(groups, best)
    if not tied:
        return [*said, f"It is above every other method: no interval of its paired differences reaches zero. Take {best}."]
    choice = cheapest(groups, [best, *tied])
    seconds = statistics.fmean(values(groups[choice], "cost", "seconds").values())
    take = f"take the cheapest, {choice}, {seconds:.1f} s a run"
    if len(tied) == len(groups) - 1:
        return [*said, f"All tie: no interval of its paired differences lies above zero. So {take}."]
    return [*said, f"{len(tied)} of {len(groups) - 1} others tie with it ({', '.join(tied)}): of these and it, {take}."]


def _interaction(groups: Groups) -> list[str]:
    """Compare the best of what is trained together with the best of what is trained alone, both chosen on validation."""
    sides = [{name: groups[name] for name in names if name in groups} for names in (TOGETHER, ALONE)]
    if not all(sides):
        return []
    together, alone = (leader(side) for side in sides)
    gap = difference(values(groups[together], "test", "accuracy"), values(groups[alone], "test", "accuracy"))
    if gap is None:
        return []
    measured = f"{together}, trained together, minus {alone}, trained alone, is {percent(gap.estimate, sign=True)} points"
    if _above(gap) and gap.estimate.mean > INTERACTION:
        return [f"Modalities act on each other: {measured}."]
    return [f"No sign that modalities act on each other: {measured}."]


def _drowning(groups: Groups) -> list[str]:
    """Compare each modality inside what was trained together and what was trained alone: its accuracy alone, and its use."""
    together = next((name for name in ("Concat", "Sum") if name in groups), None)
    alone = next((name for name in ALONE if name in groups), None)
    if together is None or alone is None:
        return []
    said = []
    for modality in groups[alone][0]["test"]["alone"]:
        inside, apart = (values(groups[name], "test", "alone", modality) for name in (together, alone))
        used, of = (estimate(list(values(groups[name], "test", "use", modality).values())) for name in (together, alone))
        gap = difference(apart, inside)
        if gap is not None and _above(gap) and gap.estimate.mean > DROWNED and used.mean < of.mean / 2:
            accuracies = " % and ".join(percent(estimate(list(each.values()))) for each in (inside, apart))
            said.append(
                f"{modality} drowns in training together: inside {together} and {alone}, it reaches {accuracies} % alone, and "
                f"its exchange costs {100 * used.mean:.1f} and {100 * of.mean:.1f} points."
            )
    return said or [f"No modality drowns inside {together}, compared with {alone}."]


def _above(gap: Difference) -> bool:
    return gap.estimate.interval is not None and gap.estimate.interval[0] > 0
