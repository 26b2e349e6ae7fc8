"""Files that are replaced whole, by whoever writes them."""

import argparse
import csv
import json
import os

import numpy as np
import pytest
import torch

from mla_fast import cli_features
from mla_fast.callbacks import CSV
from mla_fast.checkpoint import read_checkpoint, write_checkpoint
from mla_fast.compare import records
from mla_fast.datasets import cache
from mla_fast.files import replacing


@pytest.mark.parametrize("per_process", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_text_and_bytes(tmp_path, per_process, durable):
    path, how = tmp_path / "new" / "folder" / "a.txt", {"per_process": per_process, "durable": durable}
    for mode, content in (("w", "ä\n"), ("wb", b"\xff\r\n")):
        with replacing(path, mode, **how) as file:
            file.write(content)
        assert path.read_bytes() == (content.encode() if mode == "w" else content) and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_an_error_leaves_the_old_file_whole_and_nothing_else(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise error

    path = tmp_path / "a.txt"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with monkeypatch.context() as patched, pytest.raises(error):
            if call != "write":
                patched.setattr(os, call, fail)
            with replacing(path, "w", durable=True) as file:
                file.write("half")
                if call == "write":
                    fail()
        assert os.listdir(tmp_path) == ([] if before is None else ["a.txt"])
    assert path.read_text() == "old"


def test_processes_do_not_write_into_each_others_file(tmp_path, monkeypatch):
    with replacing(tmp_path / "a", "w", per_process=True) as file:
        file.write("mine")
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: 1)
            with replacing(tmp_path / "a", "w", per_process=True) as other:
                other.write("theirs")
        assert (tmp_path / "a").read_text() == "theirs"
    assert (tmp_path / "a").read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_behind_is_overwritten(tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    (tmp_path / ".a.pt.tmp").write_bytes(b"half")
    write_checkpoint(tmp_path / "a.pt", {"epoch": 2})
    assert read_checkpoint(tmp_path / "a.pt")["epoch"] == 2 and os.listdir(tmp_path) == ["a.pt"]


def table(path):
    CSV(path)({"epoch": 1, "loss": 0.5})


def features(path):
    given = {"iemocap": None, "mmin": path.parents[1], "session": None, "fold": 1, "classes": 4, "output": path}
    given["overwrite"] = True
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli_features.datasets, "read_mmin", lambda *_: ({"label": np.zeros(2)}, []))
        cli_features.features(argparse.Namespace(**given))


class Decoded:
    """A data set of one sample."""

    name, readers = "data", {"audio": "reader"}

    def __init__(self):
        self.entries = [type("Entry", (), {"id": "one", "sources": {"audio": "file"}})]

    def __len__(self):
        return 1

    def decode(self, index, modality):
        return torch.ones(2)


WRITERS = {  # path, how it is written, what goes wrong in the middle
    "a checkpoint": ("a.pt", lambda path: write_checkpoint(path, {"epoch": 1}), (os, "fsync")),
    "a table of epochs": ("a.csv", table, (csv.DictWriter, "writerows")),
    "a report": ("a.html", lambda path: records.replace(path, "text"), (os, "replace")),
    "features": ("a.npz", features, (np, "savez")),
    "a decoded sample": ("audio/one.npy", lambda path: cache.prepare(Decoded(), path.parents[1], progress=False), (np, "save")),
    "failures": ("failures.json", lambda path: cache.prepare(Decoded(), path.parent, progress=False), (json, "dump")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_leaves_nothing_behind_after_an_error(tmp_path, monkeypatch, name):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    where, write, call = WRITERS[name]
    path = tmp_path / "folder" / where
    write(path)
    whole = path.read_bytes()
    if name == "a decoded sample":
        path.unlink()  # one that is there is not decoded again
    there = sorted(p for p in tmp_path.rglob("*") if p != path)
    monkeypatch.setattr(*call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert sorted(p for p in tmp_path.rglob("*") if p != path) == there
    assert not path.exists() if name == "a decoded sample" else path.read_bytes() == whole
