"""What an ``MLAOptimizer`` saves beside the wrapped optimizer's state: settings, every P (or window) and the counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast import groups
from mla_fast.caller import warn
from mla_fast.head import HeadLayer
from mla_fast.projection import Projection
from mla_fast.settings import Settings
from mla_fast.watch import Watch

VERSION = 3


class HeadState:
    """The ``"mla"`` part of an ``MLAOptimizer``'s state as an object with ``state_dict`` and ``load_state_dict``, as
    torch.distributed.checkpoint takes them."""

    def __init__(self, optimizer: Stateful):
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._optimizer
        return {
            "version": VERSION,
            "optimizer": type(optimizer.optimizer).__name__,
            "settings": optimizer.settings.state_dict(),
            "layers": [layer.state_dict() for layer in optimizer.layers],
            "skipped": optimizer.counted(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError and changes nothing if it does not fit."""
        self.prepared(state_dict)()

    def prepared(self, saved: Any) -> Callable[[], None]:
        """Return what takes the state over, all of it checked and nothing of it in use yet; ValueError if it does not fit."""
        optimizer = self._optimizer
        if not isinstance(saved, dict) or saved.get("version") != VERSION:
            got = f"version {saved.get('version')}" if isinstance(saved, dict) else type(saved).__name__
            raise ValueError(f"state_dict: expected one that MLAOptimizer saved (version {VERSION}), got {got}")
        settings = self._settings(saved["settings"])
        kinds = [kind.__name__ for kind in type(optimizer.optimizer).__mro__]  # AdamW takes Adam's
        if saved["optimizer"] not in kinds:
            raise ValueError(f"state_dict: expected one of {kinds[0]}, got one of {saved['optimizer']}")
        if len(saved["layers"]) != len(optimizer.layers):
            raise ValueError(f"state_dict: expected {len(optimizer.layers)} head layers, got {len(saved['layers'])}")
        pairs = list(zip(optimizer.layers, saved["layers"], strict=True))
        projections = [layer.restored(settings, of_layer) for layer, of_layer in pairs]
        return lambda: self._take_over(settings, projections, saved)

    def _take_over(self, settings: Settings, projections: list[Projection], saved: dict[str, Any]) -> None:
        optimizer = self._optimizer
        if settings != optimizer.settings:
            warn(f"state_dict: the projection goes on as it was saved, {settings}, not as it was built, {optimizer.settings}")
        optimizer.settings = settings
        if isinstance(settings.alpha, Tensor):
            settings.alpha.fill_(saved["settings"]["alpha"])
        optimizer.counted()  # what the device has counted until now is not of this state
        optimizer.skipped = dict.fromkeys(optimizer.skipped, 0) | saved["skipped"]
        for layer, projection, of_layer in zip(optimizer.layers, projections, saved["layers"], strict=True):
            layer.adopt(projection, of_layer)

    def _settings(self, saved: dict[str, Any]) -> Settings:
        alpha = self._optimizer.settings.alpha
        if saved["alpha"] is None and not callable(alpha):
            raise ValueError("state_dict: saved with a callable alpha; build MLAOptimizer with the same callable to load it")
        ours = saved["alpha"] is None or isinstance(alpha, Tensor)
        return Settings(**{**saved, "alpha": alpha if ours else saved["alpha"]})


class Stateful(torch.optim.Optimizer):
    """What of an ``MLAOptimizer`` is saved, and how: by ``state_dict``, by torch.distributed.checkpoint, copied and pickled."""

    optimizer: torch.optim.Optimizer
    settings: Settings
    layers: list[HeadLayer]
    skipped: dict[str, int]
    watch: Watch

    def counted(self) -> dict[str, int]:
        """Return the numbers of skipped steps."""
        raise NotImplementedError

    @property
    def projections(self) -> HeadState:
        """The ``"mla"`` part of the state by itself, for torch.distributed.checkpoint, whose ``get_optimizer_state_dict`` is for
        the wrapped optimizer (``optimizer.optimizer``) alone."""
        return HeadState(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's, and under ``"mla"`` the settings, every P (or window) and the counts."""
        return {**self.optimizer.state_dict(), "mla": self.projections.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, settings included. Raises ValueError and changes nothing if it does not fit.

        One from before modalities were added leaves their groups as they are, and the head without momentum, as the addition did.
        """
        if "mla" not in state_dict:
            got = ", ".join(map(str, state_dict))
            raise ValueError(f'state_dict: expected one that MLAOptimizer saved, with its part "mla", got keys {got}')
        take_over = self.projections.prepared(state_dict["mla"])
        saved = {key: value for key, value in state_dict.items() if key != "mla"}
        whole = groups.extended(saved, self.optimizer)
        self.optimizer.load_state_dict(whole)
        take_over()
        if whole is not saved:
            for layer in self.layers:
                layer.free = 0
                groups.drop_state(self, layer.module.parameters())

    def __getstate__(self) -> dict[str, Any]:
        kept = ("optimizer", "settings", "layers", "modality", "skipped", "watch", "_account")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "watch" not in state:  # pickled before there was one
            self.skipped = {"nonfinite": 0, "empty": 0, "lone": 0} | self.skipped
            self.watch = Watch(nn.ModuleList(layer.module for layer in self.layers), self.layers, self.settings.bias)
            self.watch.alternates()
        super().__setstate__({})
