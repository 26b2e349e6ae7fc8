"""What comes to a model later: a modality, or classes, when the data of those before is gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast import groups
from mla_fast.addition_checks import Parts
from mla_fast.inputs import Inputs
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import begin_training, last_linear, unwrap_ddp
from mla_fast.seen import SeenClasses, counted_labels

SEEN = "seen"  # in a state_dict, bool [M, C]; only where a modality has not seen all


class Frozen(NamedTuple):
    """What of an encoder, by name, was trained and what was in training mode until it was frozen."""

    parameters: list[str]
    modules: list[str]


class Growing(Parts):
    """A model to which modalities and classes can be added, and from which modalities can be taken.

    added: the names of the modalities that came later, in their order. All encoders before the last of them are frozen: they
        have no gradient and stay in evaluation mode, so that neither their parameters nor their buffers move.
    seen: the classes that each modality has been trained on, as ``Trainer`` and ``alternating_step`` record them; ``saw`` is for
        loops of your own.
    """

    added: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self._start_growing()

    def _start_growing(self) -> None:
        self.added, self.seen = (), SeenClasses()
        self._frozen: dict[str, Frozen] = {}
        self.register_state_dict_post_hook(_put_seen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_seen)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "added" not in state:  # of a model that was pickled without it
            self._start_growing()
        elif "seen" in state:  # when it was no module
            before = self.__dict__.pop("seen")
            self.seen = SeenClasses(self.modalities)
            self.seen.counts = before.counts
            self.seen.take(before.recorded())

    @property
    def frozen(self) -> tuple[str, ...]:
        """The modalities that were there before the last addition, whose encoders do not move."""
        return tuple(self._frozen)

    def train(self, mode: bool = True) -> Growing:
        """Set the mode of all parts but the frozen encoders, which stay in evaluation mode."""
        super().train(mode)
        for modality in self._frozen:
            self.encoders[modality].eval()
        return self

    def take_growth(self, other: Growing) -> None:
        """Take over what `other`, with the same encoders, knows of its additions."""
        self.added, self.seen, self._frozen = other.added, other.seen, dict(other._frozen)
        self.train(self.training)

    def saw(self, modality: str, target: Tensor, weights: Tensor | None = None) -> None:
        """Record that `modality` has been trained on classes target [n], int64, for ``predict``, which lets it vote on no others.

        ``Trainer``, ``alternating_step`` and ``GraphedStep`` do so themselves; a loop of your own has to. Rows of label −100, as
        of weight 0 (weights [n], if given), do not count; nobody waits for a device, where labels that name no class do not.

        Raises TypeError or ValueError that names the argument, and records nothing.
        """
        if modality not in self.encoders:
            raise ValueError(f"modality: expected one of {', '.join(self.modalities)}, got {modality!r}")
        if (classes := self.classes) is None:
            raise ValueError(f"head: expected a call of it before, which tells its classes, got {type(self.head).__name__}")
        self.seen.record(modality, target, classes, counted_labels(target, classes, weights))

    def seen_by(self, modalities: Iterable[str]) -> Tensor | None:
        """Return bool [M, C] on the CPU, which classes these have seen; None where all modalities have seen all, and before the
        first addition, and where modalities are fused as their mean. Warns once of what a prediction by these leaves out because
        it is in no record."""
        return None if self.fusion == "mean" else self.seen.mask(modalities)

    def add_modality(
        self,
        name: str,
        encoder: nn.Module,
        *,
        optimizer: MLAOptimizer | None = None,
        classes: int = 0,
        example: Inputs = None,
        **settings: Any,
    ) -> None:
        """Add a modality to train by data of its own, without those of the others: its encoder and the head learn, nothing else.

        The encoder moves to the head's device; the encoders there are freeze. Batches need not have the old modalities; those
        that do (a replay) take steps of the head alone.

        optimizer: the model's, if it has one. It gets a group of parameters with the encoder's; `settings` are the group's, as
            ``lr=0.01``. P goes on as it is, and the head's momentum, which is of the old data, is dropped. Warns under
            ``"window"`` and ``"none"``, which do not keep the head from forgetting.
        classes: how many the head is to get beside its own; see ``add_classes``.
        example: a few inputs of the modality, to see before anything changes that the encoder's features fit the head. Without
            it this is seen here for layers in sequence, and for others when they are first called. It has to be given where only
            a call tells the head's classes, and there was none yet.

        Raises TypeError or ValueError that names the argument, and changes nothing.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("add_modality: expected to be called outside of inference_mode(), whose tensors are never trained")
        self._check_addition(name, encoder, optimizer, settings)
        device = next(self.head.parameters()).device
        encoder.to(device)
        self._check_example(name, encoder, example)
        if classes:
            self._check_growth(classes, optimizer)
        if isinstance(self.head, DistributedDataParallel) and any(p.requires_grad for p in encoder.parameters()):
            encoder = encoder if isinstance(encoder, DistributedDataParallel) else DistributedDataParallel(encoder)
        if optimizer is not None:
            optimizer.zero_grad()
            groups.join(optimizer, name, encoder, settings)
            groups.drop_state(optimizer, self.head.parameters())
            for layer in optimizer.layers:
                layer.free = 0
        if classes:
            self.add_classes(classes, optimizer=optimizer)
        if self.classes is not None:
            self.seen.add(name, self.modalities, self.classes)
        if self.training:
            begin_training(encoder)
        else:
            encoder.eval()
        self.encoders[name] = encoder
        self.added = (*self.added, name)
        self._settle()

    def remove_modality(self, name: str, *, optimizer: MLAOptimizer | None = None) -> nn.Module:
        """Take a modality away and return its encoder, the way back from ``add_modality``.

        Encoders that only it froze learn again. The head and P stay as they are; for those from before the addition, load a
        checkpoint from before it.

        Raises ValueError that names the argument, and changes nothing.
        """
        if name not in self.encoders:
            raise ValueError(f"name: expected one of {', '.join(self.modalities)}, got {name!r}")
        if len(self.encoders) == 1:
            raise ValueError(f"name: expected a modality beside others, got {name!r}, which is the only one")
        self._check_stands_alone("remove_modality")
        self._check_belongs(optimizer)
        encoder = self.encoders[name]
        if optimizer is not None:
            optimizer.zero_grad()
            groups.leave(optimizer, name, encoder)
            groups.drop_state(optimizer, self.head.parameters())
        self._thaw(name)
        del self.encoders[name]
        self.added = tuple(other for other in self.added if other != name)
        self.seen.forget(name)
        self._settle()
        return unwrap_ddp(encoder)

    def add_classes(self, count: int, *, optimizer: MLAOptimizer | None = None) -> None:
        """Add `count` classes after those there are: rows of zeros at the end of the head's last ``nn.Linear``.

        P stays as it is and projects the old rows alone; the new ones, which have nothing to forget, are free until the next
        modality is added. What the optimizer knows of the old rows is kept. No modality has seen the new classes.

        Raises ValueError that names the argument, and changes nothing.
        """
        self._check_growth(count, optimizer)
        last = last_linear(self.head)
        assert last is not None
        self.seen.grow(self.modalities, last.out_features, count)
        if optimizer is not None:
            optimizer.zero_grad()
            for layer in optimizer.layers:
                layer.free += count * (layer.module is last)
        for name, old in list(last.named_parameters(recurse=False)):
            rows = old.detach().new_zeros(count, *old.shape[1:])
            new = nn.Parameter(torch.cat([old.detach(), rows]), requires_grad=old.requires_grad)
            setattr(last, name, new)
            if optimizer is not None:
                groups.replace(optimizer, old, new)
        last.out_features += count

    def _settle(self) -> None:
        """Freeze the encoders before the last addition, and no others."""
        names = self.modalities
        old = names[: names.index(self.added[-1])] if self.added else ()
        for name in names:
            if name in old and name not in self._frozen:
                encoder = self.encoders[name]
                trained = [of for of, p in encoder.named_parameters() if p.requires_grad]
                self._frozen[name] = Frozen(trained, [of for of, module in encoder.named_modules() if module.training])
                encoder.requires_grad_(False).eval()
                for p in encoder.parameters():
                    p.grad = None
            elif name not in old:
                self._thaw(name)

    def _thaw(self, name: str) -> None:
        if name in self._frozen:
            before, encoder = self._frozen.pop(name), self.encoders[name]
            for of, p in encoder.named_parameters():
                p.requires_grad_(of in before.parameters)
            for of, module in encoder.named_modules():
                module.training = self.training and of in before.modules


def _put_seen(model: Growing, state: dict[str, Any], prefix: str, _: Any) -> None:
    mask = None if model.fusion == "mean" else model.seen.of(model.modalities)
    if mask is not None:
        state[prefix + SEEN] = mask


def _take_seen(model: Growing, state: dict[str, Any], prefix: str, *_: Any) -> None:
    mask = state.pop(prefix + SEEN, None)
    if mask is not None and len(mask) == len(model.modalities):
        model.seen.counts = True
        model.seen.take(dict(zip(model.modalities, mask, strict=True)))
    elif any(name.startswith(f"{prefix}head.") for name in state):  # a whole one, of a model whose modalities have seen all
        model.seen.take({})
