"""What comes to a model later: a modality, or classes, when the data of those before is gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mla_fast import groups
from mla_fast.caller import warn
from mla_fast.head import has_own_weight, is_sharded
from mla_fast.inputs import Inputs, describe
from mla_fast.modality_dict import ModalityDict
from mla_fast.optimizer import MLAOptimizer
from mla_fast.parts import evaluating, known_width, last_linear, unwrap_ddp
from mla_fast.seen import SeenClasses

SEEN = "seen"  # in a state_dict, bool [M, C]; only where a modality has not seen all
PROTECTS = 'projection="rls", target="update", bias="project"'


class Parts(nn.Module):
    """What a model has of modalities and classes, and the checks of what is to come."""

    encoders: ModalityDict
    head: nn.Module
    interaction: nn.Module | None
    fusion = "entropy"  # also for models that were pickled without it

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the order of the columns of ``present`` and of the training schedule (eq. 1)."""
        return tuple(self.encoders)

    @property
    def classes(self) -> int | None:
        """C if the head is an ``nn.Linear`` or ends in one, otherwise None."""
        last = last_linear(self.head)
        return None if last is None else last.out_features

    def _check_stands_alone(self, what: str) -> None:
        if self.interaction is not None:
            raise ValueError(f"interaction: expected None, to {what}: one is made for the modalities and classes that there are")

    def _check_belongs(self, optimizer: MLAOptimizer | None) -> None:
        if optimizer is None:
            return
        if not isinstance(optimizer, MLAOptimizer):
            raise TypeError(f"optimizer: expected the model's MLAOptimizer, got {type(optimizer).__name__}")
        if not {layer.module for layer in optimizer.layers} & set(self.head.modules()):
            raise ValueError("optimizer: expected the MLAOptimizer of this model's head, got that of another one")

    def _check_addition(self, name: str, encoder: Any, optimizer: MLAOptimizer | None, settings: dict[str, Any]) -> None:
        self._check_stands_alone("add_modality")
        if name in self.encoders:
            raise ValueError(f"name: expected one that no modality has, got {name!r} beside {', '.join(self.modalities)}")
        ModalityDict({name: encoder})
        if name in ("average", "fused"):
            raise ValueError(f"name: expected another than {name!r}, which results use for all modalities together")
        ours = {p for part in (*self.encoders.values(), self.head) for p in part.parameters()}
        if ours & set(encoder.parameters()):
            raise ValueError("encoder: expected parameters of its own, got some that are the model's, which would be frozen")
        head = unwrap_ddp(self.head)
        if isinstance(head, nn.Linear) and known_width(encoder) not in (None, head.in_features):
            raise ValueError(
                f"encoder: expected features [N, {head.in_features}] to match head.in_features, got [N, {known_width(encoder)}]"
            )
        self._check_belongs(optimizer)
        if optimizer is None:
            if settings:
                raise ValueError(f"{next(iter(settings))}: expected an optimizer to set it for, got none")
            return
        groups.check_joins(optimizer, encoder, settings)
        if (projection := optimizer.settings.projection) in ("window", "none"):
            warn(
                f"projection: {projection!r} does not keep the head from forgetting {', '.join(self.modalities)}, whose data is "
                f"not there; train with {PROTECTS} from the start, to add a modality later"
            )

    @torch.no_grad()
    def _check_example(self, name: str, encoder: nn.Module, example: Inputs) -> None:
        with evaluating(encoder):
            features = encoder(example)
        width = getattr(unwrap_ddp(self.head), "in_features", None)
        if not isinstance(features, Tensor) or features.dim() != 2 or width not in (None, features.shape[1]):
            raise ValueError(f"encoder: expected features [N, {width or 's'}] for {name!r}, got {describe(features)}")

    def _check_growth(self, count: Any, optimizer: MLAOptimizer | None) -> None:
        self._check_stands_alone("add_classes")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"count: expected at least 1 class, got {count!r}")
        self._check_belongs(optimizer)
        last = last_linear(self.head)
        if last is None:
            raise ValueError(f"head: expected an nn.Linear, or one that ends a sequence, got {type(self.head).__name__}")
        whole = has_own_weight(last) and not is_sharded(last.weight)
        if isinstance(self.head, DistributedDataParallel) or not whole:
            raise ValueError("head: expected one that is neither distributed, split nor parametrized, to add classes before that")


class Growing(Parts):
    """A model to which modalities and classes can be added, and from which modalities can be taken.

    added: the names of the modalities that came later, in their order. All encoders before the last of them are frozen: they
        have no gradient and stay in evaluation mode, so that neither their parameters nor their buffers move.
    seen: the classes that each modality has been trained on, as ``Trainer`` and ``alternating_step`` record them; ``saw`` is for
        loops of your own.
    """

    added: tuple[str, ...]
    seen: SeenClasses

    def __init__(self) -> None:
        super().__init__()
        self._start_growing()

    def _start_growing(self) -> None:
        self.added, self.seen = (), SeenClasses()
        self._frozen: dict[str, list[str]] = {}  # of each frozen encoder, the parameters that were trained until then
        self.register_state_dict_post_hook(_put_seen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_seen)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "added" not in state:  # of a model that was pickled without it
            self._start_growing()

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
        self.added, self.seen, self._frozen = other.added, other.seen, {name: list(of) for name, of in other._frozen.items()}
        self.train(self.training)

    def saw(self, modality: str, target: Tensor, weights: Tensor | None = None) -> None:
        """Record that `modality` has been trained on classes target [n], for ``predict``, which lets it vote on no others.

        ``Trainer``, ``alternating_step`` and ``GraphedStep`` do so themselves. weights [n]: rows of zero do not count.
        """
        if (classes := self.classes) is not None:
            self.seen.record(modality, target, classes, weights)

    def seen_by(self, modalities: Iterable[str]) -> Tensor | None:
        """Return bool [M, C] on the CPU, which classes these have seen; None where all modalities have seen all, and before the
        first addition, and where modalities are fused as their mean."""
        return None if self.fusion == "mean" else self.seen.mask(modalities, self.modalities)

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
            it this is seen here for layers in sequence, and for others when they are first called.

        Raises TypeError or ValueError that names the argument, and changes nothing.
        """
        self._check_addition(name, encoder, optimizer, settings)
        device = next(self.head.parameters()).device
        encoder.to(device)
        if example is not None:
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
        self.encoders[name] = encoder.train(self.training)
        self.added, self.seen.counts = (*self.added, name), True
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
                self._frozen[name] = [of for of, p in encoder.named_parameters() if p.requires_grad]
                encoder.requires_grad_(False).eval()
                for p in encoder.parameters():
                    p.grad = None
            elif name not in old:
                self._thaw(name)

    def _thaw(self, name: str) -> None:
        if name in self._frozen:
            trained, encoder = self._frozen.pop(name), self.encoders[name]
            for of, p in encoder.named_parameters():
                p.requires_grad_(of in trained)
            encoder.train(self.training)


def _put_seen(model: Growing, state: dict[str, Any], prefix: str, _: Any) -> None:
    mask = model.seen_by(model.modalities)
    if mask is not None:
        state[prefix + SEEN] = mask


def _take_seen(model: Growing, state: dict[str, Any], prefix: str, *_: Any) -> None:
    mask = state.pop(prefix + SEEN, None)
    if mask is not None and len(mask) == len(model.modalities):
        model.seen.load_state_dict(dict(zip(model.modalities, mask, strict=True)))
        model.seen.counts = True
    elif any(name.startswith(f"{prefix}head.") for name in state):  # a whole one, of a model whose modalities have seen all
        model.seen.load_state_dict({})
