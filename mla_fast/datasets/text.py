"""Texts as tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mla_fast.datasets.files import DecodeError, load_array, read_text

Tokenizer = Callable[[str], list[int]]


class Tokens:
    """Read texts as token numbers int64 [length], 0 being padding, from a string, a ``.txt``, or a ``.npy`` of that length.

    tokenizer: a name or a folder for ``transformers``' AutoTokenizer, used without special tokens as M3AE is; or a function from
        a text to its tokens. A text without tokens is one that is not there.
    """

    def __init__(self, tokenizer: str | Tokenizer = "bert-base-uncased", length: int = 256):
        self.tokenizer, self.length = tokenizer, length

    def __repr__(self) -> str:
        name = self.tokenizer if isinstance(self.tokenizer, str) else getattr(self.tokenizer, "__qualname__", "own")
        return f"Tokens({name!r}, {self.length})"

    @cached_property
    def _tokenize(self) -> Tokenizer:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(f"texts need transformers: pip install 'mla_fast[paper]' ({error})") from error
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def load(self) -> None:
        """Load the tokenizer now, so that processes forked afterwards have it; raise ImportError without ``transformers``."""
        _ = self._tokenize

    def __getstate__(self) -> dict[str, object]:
        return {"tokenizer": self.tokenizer, "length": self.length}

    def decode(self, source: str | Path) -> Tensor:
        if isinstance(source, Path) and source.suffix == ".npy":
            ids = torch.from_numpy(load_array(source)).flatten().long()
            if len(ids) != self.length:
                raise DecodeError(source, f"expected {self.length} tokens, got {len(ids)}")
        else:
            text = read_text(source) if isinstance(source, Path) else source
            ids = torch.tensor(self._tokenize(text)[: self.length], dtype=torch.int64)
        if not ids.any():
            raise DecodeError(source if isinstance(source, Path) else repr(source), "no text")
        return ids

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        return torch.cat([decoded, decoded.new_zeros(self.length - len(decoded))])

    def empty(self) -> Tensor:
        return torch.zeros(self.length, dtype=torch.int64)
