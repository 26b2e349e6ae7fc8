"""Pickles that others have published, read without running anything that is in them."""

from __future__ import annotations

import codecs
import io
import math
import pickletools
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLAIN = "strings, numbers, lists, dicts, sets and NumPy arrays"
Calls = dict[str, Callable[..., Any]]
SHORT = reprlib.Repr()
SHORT.maxstring = 80
SCALARS = (str, bytes, int, float, np.generic, type(None))
DTYPE = re.compile(r"b1|[iu][1248]|f[248]|[SU][0-9]{1,6}|O[48]?")

# The instructions of a pickle, by what they do.
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"}
LITERALS |= {"SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
NEW: Calls = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
NEW |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
ADDED = {"APPEND": (list, 1), "APPENDS": (list, None), "SETITEM": (dict, 2), "SETITEMS": (dict, None), "ADDITEMS": (set, None)}


def shown(value: Any) -> str:
    """Return how a message shows a value of a file: a short text or number, of all else the type, as its repr may never end."""
    value = value.item() if isinstance(value, np.generic) else value
    short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
    return SHORT.repr(value) if short else type(value).__name__


@dataclass(frozen=True)
class _Name:
    """Stand in for a function or class that a pickle names."""

    text: str


@dataclass
class _DType:
    """Stand in for a dtype, of which a pickle may change the byte order and nothing else."""

    dtype: np.dtype[Any]


class Machine:
    """Run a pickle of strings, numbers, lists, tuples, dicts, sets and NumPy arrays and scalars; refuse everything else.

    A pickle is a program for a machine of a stack and a memo. Python's own runs it on live objects of Python and NumPy; this one
    imports nothing, calls only the functions below, which check their arguments, and changes only what it has made. What it holds
    is bounded by the size of the pickle, and what it hashes is never nested.
    """

    def __init__(self, data: bytes, expected: str = PLAIN):
        self.file, self.expected = io.BytesIO(data), expected
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.left = 4 * len(data)  # NumPy copies what it writes twice at most

    def run(self) -> Any:
        """Return what the pickle holds; raise ValueError, or whatever damage leads to, if it is refused."""
        while opcode := OPCODES.get(self.file.read(1)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name == "STRING":  # of Python 2, with bytes that pickletools takes for an error
                text, _ = codecs.escape_decode(pickletools.read_stringnl(self.file, decode=False))
                self.stack.append(text.decode("latin-1"))
            else:
                self._step(opcode.name, opcode.arg.reader(self.file) if opcode.arg else None)
        raise ValueError("expected an opcode, got a byte that is none, or the end of the file")

    def _step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in NEW:
            self.stack.append(NEW[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name == "POP" and self.stack:
            self.stack.pop()
        elif name in ("POP", "POP_MARK"):
            self._pop()
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name not in ("PROTO", "FRAME"):
            self._make(name, argument)

    def _make(self, name: str, argument: Any) -> None:
        made: Any
        if name in TUPLES:
            made = tuple(self._pop(TUPLES[name]))
        elif name in GATHERED:
            made = GATHERED[name](self._pop())
        elif name == "GLOBAL":
            made = self._name(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            made = self._name(*self._pop(2))
        elif name == "REDUCE":
            made = self._call(*self._pop(2))
        elif name == "BUILD":
            made, state = self._pop(2)
            self._spend(state)
            _build(made, *state)
        elif name in ADDED:
            kind, count = ADDED[name]
            items = self._pop(count)
            made = self.stack.pop()
            if type(made) is not kind:
                raise ValueError(f"expected a {kind.__name__} to add to, got {shown(made)}")
            made.extend(items) if kind is list else made.update(_dict(items) if kind is dict else _hashable(items))
        else:
            raise ValueError(f"expected {self.expected}, got opcode {name}")
        self.stack.append(made)

    def _pop(self, count: int | None = None) -> list[Any]:
        """Return the last entries of the stack, as many as are asked for, or all since the mark, and remove them."""
        if count is None:
            items, self.stack = self.stack, self.below.pop()
            return items
        if len(self.stack) < count:
            raise ValueError(f"expected {count} entries on the stack, got {len(self.stack)}")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _name(self, module: Any, name: Any) -> _Name:
        text = f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else ""
        text = text.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        if text not in CALLS and text != "numpy ndarray":
            got = ".".join(shown(part).strip("'") for part in (module, name))
            raise ValueError(f"expected {self.expected}, got {got}")
        return _Name(text)

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, _Name) or name.text not in CALLS:
            raise ValueError(f"expected {self.expected}, got a call of {shown(name)}")
        self._spend(arguments)
        return CALLS[name.text](*arguments)

    def _spend(self, arguments: Any) -> None:
        """Refuse arguments that are copied again and again, by which a small pickle would fill the memory."""
        if type(arguments) is not tuple:
            raise ValueError(f"expected a tuple of arguments, got {shown(arguments)}")
        self.left -= sum(len(x) for x in arguments if isinstance(x, str | bytes | bytearray | list | tuple))
        if self.left < 0:
            raise ValueError("expected content that is written once, got the same again and again")


def _hashable(items: Any) -> Sequence[Any]:
    """Return items whose hash takes no time and no stack: no tuples, which may be nested, and no integers made to collide."""
    if not isinstance(items, list | tuple):
        raise ValueError(f"expected a list, got {shown(items)}")
    for item in items:
        if not isinstance(item, SCALARS) or (isinstance(item, int) and item.bit_length() > 64):
            raise ValueError(f"expected strings, numbers of 64 bits or None as keys and members, got {shown(item)}")
    return items


def _dict(items: Any) -> dict[Any, Any]:
    return dict(zip(_hashable(items[::2]), items[1::2], strict=True))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"expected text to encode in latin1, got {shown(text)} and {shown(encoding)}")
    return text.encode("latin1")


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _DType:
    if type(code) is not str or not DTYPE.fullmatch(code):
        raise ValueError(f"expected a dtype of booleans, numbers or strings, got {shown(code)}")
    return _DType(np.dtype(code[0] if code[0] == "O" else code))


def _reconstruct(kind: Any, shape: Any, code: Any) -> NDArray[Any]:
    """Return an array that is filled by ``_build``, as there may be references to it before."""
    if not isinstance(kind, _Name) or kind.text != "numpy ndarray":
        raise ValueError(f"expected numpy.ndarray, got {shown(kind)}")
    return np.array([], np.int8)


def _scalar(dtype: Any, data: Any) -> Any:
    content, kind = _content(dtype, (), data)
    return np.frombuffer(content, kind)[0] if content else kind.type()  # no content: an empty string


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = ()) -> NDArray[Any]:
    content, kind = _content(dtype, shape, data)
    array: NDArray[Any] = np.frombuffer(bytearray(content), kind)  # a copy, in memory of its own
    array = array.reshape(shape, order="C" if order == "K" else order)
    return array.transpose(axes) if order == "K" else array


def _build(made: Any, *state: Any) -> None:
    """Set the byte order of a dtype, or fill an array that is new."""
    if isinstance(made, _DType):
        _, order, *structure = state
        if structure[:3] != [None] * 3 or len(structure) != 6:
            raise ValueError("expected a dtype without fields, subarray and metadata, got one with them, or damage")
        made.dtype = made.dtype.newbyteorder(order)
    elif isinstance(made, np.ndarray) and made.shape == (0,) and made.dtype == np.int8:
        _, shape, dtype, fortran, data = state
        content, kind = _content(dtype, shape, data, objects=True)
        if not kind.hasobject:
            content = bytes(memoryview(content))  # a copy: the array would write into bytes that are elsewhere, too
        made.__setstate__((1, shape, kind, bool(fortran), content))  # type: ignore[arg-type]  # NumPy 2 takes no np.bool
    else:
        raise ValueError(f"expected the state of a new array or of a dtype, got that of {shown(made)}")


def _content(dtype: Any, shape: Any, data: Any, objects: bool = False) -> tuple[Any, np.dtype[Any]]:
    """Return the bytes, or of objects the list, that are exactly an array of a dtype and shape, and its real dtype."""
    if not isinstance(dtype, _DType):
        raise ValueError(f"expected a dtype, got {shown(dtype)}")
    whole = type(shape) is tuple and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not whole or math.prod(max(n, 1) for n in shape) >= 2**40:  # an empty array has a shape, too
        raise ValueError(f"expected the shape of an array, got {shown(shape)}")
    kind, count = dtype.dtype, math.prod(shape)
    if kind.hasobject:  # strings, numbers and None: NumPy frees nested arrays recursively, until the stack overflows
        if not objects or type(data) is not list or len(data) != count:
            raise ValueError(f"expected {count} numbers or strings, got {shown(data)}")
        return _hashable(data), kind
    data = _encode(data) if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray) or len(data) != count * kind.itemsize or not (kind.itemsize or shape == ()):
        raise ValueError(f"expected {count * kind.itemsize} bytes of {kind} {list(shape)}, got {shown(data)} of other length")
    if kind.kind in "bU":  # NumPy takes for granted that booleans are 0 or 1, and characters Unicode
        values, most = ("u1", 1) if kind.kind == "b" else (f"{kind.byteorder}u4", sys.maxunicode)
        if np.frombuffer(data, values).max(initial=0) > most:
            raise ValueError(f"expected values up to {most} of {kind}, got others")
    return data, kind


CALLS: Calls = {
    "builtins set": lambda items: set(_hashable(items)),
    "builtins frozenset": lambda items: frozenset(_hashable(items)),
    "builtins bytes": lambda: b"",  # of no bytes; others are encoded
    "_codecs encode": _encode,
    "numpy dtype": _dtype,
    "numpy.core.multiarray _reconstruct": _reconstruct,
    "numpy.core.multiarray scalar": _scalar,
    "numpy.core.numeric _frombuffer": _frombuffer,
}
GATHERED: Calls = {"LIST": list, "TUPLE": tuple, "DICT": _dict, "FROZENSET": CALLS["builtins frozenset"]}


def load_plain(path: Path, expected: str = PLAIN) -> Any:
    """Return what a pickle holds, strings of Python 2 among it; raise ValueError that names the file for anything else."""
    return run_plain(path, path.read_bytes(), expected)


def run_plain(path: Path, data: bytes, expected: str = PLAIN) -> Any:
    """Return what the pickle in `data` holds, of a file of this name; raises as ``load_plain``."""
    try:
        return Machine(data, expected).run()
    except Exception as error:  # damage leads to nearly anything
        raise ValueError(f"{path}: refused or damaged, nothing in it was run: {str(error):.300}") from None
