"""Files that are replaced whole: whoever reads one finds its old content or its new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str, *, per_process: bool = False, durable: bool = False) -> Iterator[IO[Any]]:
    """Open a file beside `path`, in UTF-8 if it is text, that replaces `path` at the end; an error leaves `path` as it was.

    per_process: each process has a file of its own, as several may write `path` at once; otherwise what a killed process left
    behind is overwritten. durable: wait until the content is on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{f'{os.getpid()}.' if per_process else ''}tmp")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with open(beside, mode, encoding=encoding, newline=newline) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
