"""Whether steps alternate: in its first steps an optimizer looks whose encoder's features went through the head."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mla_fast.caller import warn
from mla_fast.parts import is_sharded

LOOKS = 16  # steps that are looked at
STILL = 3  # steps of a modality after which its parameters have moved, if they do at all
_MERGES = ("CatBackward", "StackBackward", "AddBackward", "MulBackward")
_LOOP = (
    "MLA takes one modality a step: for each modality zero_grad(), backward() of its own loss (several times to accumulate), "
    'step(modality="…")'
)


class Call(NamedTuple):
    """One call of the head that was differentiated. encoder: the parameters that its features depend on, a bit for each. joined:
    features of encoders that share no parameter were put together before the head."""

    encoder: int
    joined: bool


class Alternation:
    """Warn, once, where a step mixes modalities: it can only do harm, and nothing else would show it.

    What it sees is the graph behind the features. Two calls of the head in one step whose encoders share no parameter, or that
    earlier steps of different names kept apart, are a joint loss, or accumulation with the modalities inside. Steps of
    different names through the very same parameters, or features that were joined before the head in every step, are joint
    training. Steps of one name through encoders that share no parameter keep one mean for several modalities, which the window
    is to tell apart. Gradients of encoders that no call went through are of another step, or zeros. Parameters of encoders that
    no optimizer moves from step to step were forgotten. It looks at the first 16 steps; after them nothing is left of it.
    """

    def __init__(self, head: nn.Module):
        self._head = set(head.parameters())
        self._bits: dict[Tensor, int] = {}
        self._calls: list[Call] = []
        self._alone: dict[str | None, int] = {}  # the encoder of the last step of each name
        self._seen: set[int] = set()
        self._steps, self._joined = 0, 0
        self._unmoved: dict[Tensor, tuple[int, int]] = {}  # of what the optimizer does not hold: its version, and for how long

    def call(self, features: Tensor) -> Call:
        """Return what the graph behind `features` says; ``add`` it once they are differentiated."""
        return Call(*self._behind(features.grad_fn))

    def add(self, call: Call) -> None:
        self._calls.append(call)

    def forget(self) -> None:
        """Forget calls that no step has taken."""
        self._calls = []

    def look(self, modality: str | None, held: Iterable[Tensor], windowed: bool) -> bool:
        """Look at a step of an optimizer that holds these parameters; returns whether there is nothing more to look for.

        windowed: the projection keeps a mean for each name.
        """
        calls, self._calls = [call for call in self._calls if call.encoder], []
        if not calls:
            return False
        self._steps += 1
        said = self._trouble(calls, modality, set(held), windowed)
        if said is not None:
            warn(f"step: {said}. {_LOOP}")
        return said is not None or self._steps == LOOKS

    def _trouble(self, calls: list[Call], modality: str | None, held: set[Tensor], windowed: bool) -> str | None:
        encoders = list(dict.fromkeys(call.encoder for call in calls))
        apart = {encoder: name for name, encoder in self._alone.items()}
        known = {apart[encoder] for encoder in encoders if encoder in apart}
        if len(known) > 1 or any(not a & b for a, b in itertools.combinations(encoders, 2)):
            sizes = ", ".join(str(encoder.bit_count()) for encoder in encoders)
            return (
                f"gradients of {len(encoders)} encoders (of {sizes} parameters) came together in one step, so this is a joint "
                "loss, or accumulation with the modalities inside"
            )
        now = functools.reduce(operator.or_, encoders)
        idle = [p for p, bit in self._bits.items() if not now >> bit & 1 and p.grad is not None and p in held]
        if idle:
            return (
                f"{len(idle)} parameters of encoders that nothing went through have a gradient: one of an earlier step, for want "
                "of zero_grad(), zeros of an engine's, which momentum and weight decay step on, or one of another loss, which "
                "belongs into the turn of their own modality"
            )
        if (said := self._forgotten(now, modality, held)) is not None:
            return said
        if modality is not None and len(encoders) == 1 and (said := self._misnamed(modality, encoders[0], windowed)) is not None:
            return said
        self._seen.update(encoders)
        self._joined += all(call.joined for call in calls)
        if self._joined == LOOKS and len(self._seen) == 1:
            return (
                "in every step features of parts that share nothing were joined before the head, so this is joint training, "
                "unless they are one modality's"
            )
        return None

    def _forgotten(self, encoders: int, modality: str | None, held: set[Tensor]) -> str | None:
        """Return what is wrong where parameters behind the features are not held, and have stood still for three steps."""
        behind = [p for p, bit in self._bits.items() if encoders >> bit & 1]
        if any(map(is_sharded, held)):  # fully_shard calls with others than it has
            return None
        for p in behind:
            version, times = self._unmoved.get(p, (-1, 0))
            self._unmoved[p] = p._version, times + 1 if p not in held and p._version == version else 0
        forgotten = sum(self._unmoved[p][1] >= STILL for p in behind)
        if not forgotten:
            return None
        return (
            f"{forgotten} of {len(behind)} parameters of the encoder of {modality!r} are not the optimizer's, and none of its "
            "steps or another's has moved them: give them to it, or requires_grad_(False) if that is meant"
        )

    def _misnamed(self, modality: str, encoder: int, windowed: bool) -> str | None:
        """Return what is wrong with the name of a step through one encoder; None, and keep it in mind, if nothing is."""
        other = next((name for name, e in self._alone.items() if e == encoder and name not in (None, modality)), None)
        if other is not None:
            return (
                f"those of {other!r} and of {modality!r} move the very same {encoder.bit_count()} parameters outside the head, "
                "so this is joint training, unless one encoder serves both on purpose"
            )
        before = self._alone.setdefault(modality, encoder)
        if windowed and not before & encoder:
            return (
                f"those of {modality!r} move encoders that share no parameter, so that the window has one mean for all of them "
                "and projects nothing, unless they are one modality's; each modality has a name of its own"
            )
        self._alone[modality] = encoder
        return None

    def _behind(self, root: Any) -> tuple[int, bool]:
        """Return the parameters behind a node of the graph, and whether branches that share none of them meet there."""
        found: dict[Any, int] = {None: 0}
        joined, stack = False, [root]
        while stack:
            node = stack[-1]
            below = [] if node in found else [parent for parent, _ in node.next_functions]
            if waiting := [parent for parent in below if parent not in found]:
                stack += waiting
                continue
            stack.pop()
            if node in found:
                continue
            found[node] = self._bit(node)
            for parent in below:
                found[node] |= found[parent]
            if node.name().startswith(_MERGES):
                branches = [found[parent] for parent in below if found[parent].bit_count() > 1]  # a position or a token has one
                joined |= any(not a & b for a, b in itertools.combinations(branches, 2))
        return found[root], joined

    def _bit(self, node: Any) -> int:
        p = getattr(node, "variable", None)  # of a leaf of the graph
        if not isinstance(p, nn.Parameter) or p in self._head:
            return 0
        return 1 << self._bits.setdefault(p, len(self._bits))
