"""What an optimizer says, once each, about use that trains something else than it seems to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from mla_fast.alternation import Alternation
from mla_fast.caller import warn
from mla_fast.head import HeadLayer, HeadStep, on_host
from mla_fast.wrapped import parameters_of

LOOKS_FOR_FROZEN = 100  # steps between looks
EVERY = 64


def is_due(count: int) -> bool:
    """Whether to look at this one of many: at 1, 2, 4, … and every 64th."""
    return count % EVERY == 0 or count & (count - 1) == 0


class Watch:
    """Look at steps: whether they alternate, whether parts of the head train without a projection, whether it has frozen."""

    def __init__(self, head: nn.Module, layers: list[HeadLayer], bias: str):
        self.head, ours = head, {layer.module for layer in layers}
        linears = [(name or "head", m) for name, m in head.named_modules() if isinstance(m, nn.Linear)]
        frozen = [(f"the weight of {name}", m.weight) for name, m in linears if m not in ours and not m.weight.requires_grad]
        if bias == "project":
            frozen += [(f"the bias of {layer.name}", layer.module.bias) for layer in layers if not layer.has_bias]
        self._unprojected = [(name, p) for name, p in frozen if p is not None]
        self._features = layers[0].features
        self._features.alternation = Alternation(head)
        self._said, self._steps = set[str](), Counter[str]()
        for layer in layers:
            if type(layer.module).forward is not nn.Linear.forward or "forward" in vars(layer.module):
                warn(
                    f"head: {layer.name} ({type(layer.module).__name__}) has a forward of its own: x̄ is the mean of what goes "
                    "into the module, which must be what its weight is multiplied with (normalise features before a cosine head)"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {"_said": set[str](), "_steps": Counter[str](), **state}  # of what was pickled without them, too

    def alternates(self) -> None:
        """Stop looking for alternation: our own loops alternate by construction."""
        self._features.alternation = None

    def forget(self) -> None:
        """Forget what no step has taken."""
        if self._features.alternation is not None:
            self._features.alternation.forget()

    def before(self, modality: str | None, optimizer: torch.optim.Optimizer, windowed: bool) -> None:
        """Look at a step that `optimizer` is about to take; windowed: the projection keeps a mean for each modality."""
        if self._features.alternation is not None:
            if self._features.alternation.look(modality, parameters_of(optimizer), windowed):
                self._features.alternation = None
        if late := [name for name, p in self._unprojected if p.requires_grad and p.grad is not None]:
            self._unprojected = []
            warn(
                f"head: {', '.join(late)} was frozen when MLAOptimizer was built and trains now without a projection; "
                "build MLAOptimizer anew"
            )

    def say(self, what: str, message: str) -> None:
        """Warn of something, the first time."""
        if what not in self._said:
            self._said.add(what)
            warn(message)

    def due(self, modality: str) -> bool:
        """Count a step of a modality's encoder; returns whether to look at it, at first often."""
        self._steps[modality] += 1
        return is_due(self._steps[modality])

    def unpaired(self) -> None:
        """Warn of batches that an interaction learns nothing from."""
        self.say("unpaired", "interaction: it does not train on batches of one modality, which show no two of a sample")

    def after(self, steps: list[HeadStep]) -> None:
        """Look now and then at what was left of steps, where that need not wait for a device."""
        due = [step.layer for step in steps if step.layer.projection.step % LOOKS_FOR_FROZEN == 0 and on_host(step.x_bar)]
        if due:
            self.frozen([layer.name for layer in due if layer.frozen()])

    def frozen(self, layers: list[str]) -> None:
        """Warn that these have stopped learning."""
        if layers:
            self.say(
                "frozen",
                f"{', '.join(layers)}: less than a thousandth of the gradient is left after the projection, so this layer has "
                'stopped learning; raise alpha, or use projection="window", which does not shrink',
            )
