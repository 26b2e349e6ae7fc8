"""What the command line prints of an evaluation."""

from __future__ import annotations

from typing import Any

LISTED = 20  # classes


def print_result(result: dict[str, Any], class_names: list[str] | None, complete: bool) -> None:
    """Print what ``Trainer.evaluate`` found with its use test, and what of it calls for an action.

    complete: no sample lacks a modality, so that their accuracies are over the same samples.
    """
    accuracy, macro_f1, use = result["accuracy"], result["macro_f1"], result["use"]
    print(f"test accuracy on {result['samples']} samples")
    width = max(map(len, ["interaction", *accuracy]))
    print(f"  {'':{width}}  accuracy  macro-F1  lost when permuted")
    for name, value in accuracy.items():
        lost = f"  {100 * use[name]:8.1f} %" if name in use else ""
        print(f"  {name:{width}}  {100 * value:6.1f} %  {100 * macro_f1[name]:6.1f} %{lost}".rstrip())
    if "interaction" in use:
        print(f"  {'interaction':{width}}  {'':8}  {'':8}  {100 * use['interaction']:8.1f} %")
    _print_classes(result["class_accuracy"], class_names)
    for note in notes(result, complete):
        print(f"note: {note}")


def _print_classes(shares: list[float], names: list[str] | None) -> None:
    names = names or [str(c) for c in range(len(shares))]
    each = [f"{name} {100 * share:.1f}" for name, share in zip(names, shares, strict=False) if share == share]
    print(f"fused accuracy by class, %: {', '.join(each[:LISTED])}{', …' if len(each) > LISTED else ''}")


def notes(result: dict[str, Any], complete: bool = True) -> list[str]:
    """Return what accuracy alone hides, and what to do about it."""
    accuracy, majority = result["accuracy"], result["majority"]
    fused, found = accuracy.get("fused", float("nan")), []
    alone = {m: value for m, value in accuracy.items() if m not in ("average", "fused", "without_interaction")}
    best = max(alone, key=lambda m: alone[m] if alone[m] == alone[m] else -1.0, default=None)
    chance = 2 * (max(fused * (1 - fused), 0) / max(result["samples"], 1)) ** 0.5  # two deviations of an accuracy
    if majority == 1:
        return ["there is one class in these samples: accuracy says little"]
    if majority > 0.5:
        found.append(f"answering always the most frequent class is right for {100 * majority:.1f} %: look at macro-F1")
    if fused <= majority:
        found.append(f"fused ({100 * fused:.1f} %) is no better than that: the classes were not learned")
    if complete and best is not None and alone[best] > fused + chance:
        found.append(
            f"fused ({100 * fused:.1f} %) is below {best} alone ({100 * alone[best]:.1f} %): the others only add noise here; "
            f"train with --modalities {best}, or leave out those that lose nothing when permuted"
        )
    return found
