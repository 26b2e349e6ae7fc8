"""Modules by the name of their modality, whatever that name is."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping

from torch import nn

_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))  # names of modules may not hide them


class ModalityDict(nn.ModuleDict):
    """Hold modules as ``nn.ModuleDict`` does, under any names that are not empty: ``"type"``, ``"values"`` and ``"a.b"`` too.

    Parameters are named ``audio.weight`` as in an ``nn.ModuleDict``, but of modalities whose names it would refuse, as
    ``%type.weight`` or ``a%2Eb.weight``; there "%" is ``%25``.

    Raises TypeError or ValueError, naming `encoders`, for names that are no strings or empty, and for what is no module.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | nn.ModuleDict):
        if not isinstance(modules, (Mapping, nn.ModuleDict)):
            raise TypeError(f"encoders: expected a dict {{modality: module}}, got {type(modules).__name__}")
        if not modules:
            raise ValueError("encoders: expected at least one modality, got none")
        super().__init__(dict(modules.items()))

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(_key(name))

    def __setitem__(self, name: str, module: nn.Module) -> None:
        if not isinstance(name, str):
            raise TypeError(f"encoders: expected strings as names of modalities, got {name!r}")
        if not name:
            raise ValueError("encoders: expected names of modalities that are not empty, got ''")
        if not isinstance(module, nn.Module):
            raise TypeError(f"encoders[{name!r}]: expected an nn.Module, got {type(module).__name__}")
        super().__setitem__(_key(name), module)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(_key(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(_key(name))

    def __iter__(self) -> Iterator[str]:
        return map(_name, super().__iter__())

    def keys(self) -> KeysView[str]:
        return dict.fromkeys(self).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return dict(zip(self, self.values(), strict=True)).items()


def parameter_prefix(modality: str) -> str:
    """Return what the names of a modality's parameters begin with in a model's state."""
    return f"encoders.{_key(modality)}."


def _key(name: str) -> str:
    """Return what a module may be called, from which ``_name`` finds `name`."""
    return f"%{name}" if name in _ATTRIBUTES else name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key[1:] if key[1:] in _ATTRIBUTES else key.replace("%2E", ".").replace("%25", "%")
