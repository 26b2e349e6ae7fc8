"""A checkpoint is whole or not there, and nothing that is not one is taken for one."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from helpers import PROJECTIONS, assert_bitwise, everything, make_model, make_steps, momentum_sgd, train
from torch.utils._pytree import tree_flatten, tree_unflatten

import mla_fast as mla
from mla_fast.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

PAYLOAD = {"epoch": 3, "model": {"weight": torch.arange(12.0)}, "history": [{"loss": {"audio": 0.5}}], "config": None}


def test_round_trip(tmp_path):
    path = tmp_path / "runs" / "new" / "checkpoint.pt"
    write_checkpoint(path, PAYLOAD)
    payload = read_checkpoint(str(path))
    assert_bitwise({"model": payload.pop("model")}, {"model": PAYLOAD["model"]})
    assert payload.items() >= {key: value for key, value in PAYLOAD.items() if key != "model"}.items()
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_new_one_replaces_the_old(tmp_path):
    for epoch in range(3):
        write_checkpoint(tmp_path / "c.pt", PAYLOAD | {"epoch": epoch})
    assert read_checkpoint(tmp_path / "c.pt")["epoch"] == 2


@pytest.mark.parametrize(
    "value",
    [
        {np.int64(3): np.float32(0.5)},
        {(1, np.int64(2)): np.str_("a")},
        Counter({np.int64(1): 2}),
        OrderedDict(b=np.bool_(True)),
        defaultdict(int, a=1),
        {np.int64(1), 2},
        [(np.int64(1), {"a": {np.float64(2.0)}})],
    ],
)
def test_whatever_is_written_is_read_as_it_was(value, tmp_path):
    write_checkpoint(tmp_path / "c.pt", PAYLOAD | {"history": value})
    assert read_checkpoint(tmp_path / "c.pt")["history"] == value


def test_checksums_are_written_where_others_are_not(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(tmp_path / "c.pt", PAYLOAD)
        assert read_checkpoint(tmp_path / "c.pt")["epoch"] == 3 and not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_link_stays_one(tmp_path):
    (tmp_path / "large").mkdir()
    link = tmp_path / "c.pt"
    link.symlink_to(tmp_path / "large" / "c.pt")
    write_checkpoint(link, PAYLOAD)
    assert link.is_symlink() and read_checkpoint(tmp_path / "large" / "c.pt")["epoch"] == 3


def test_a_bit_that_has_flipped_is_noticed(tmp_path):
    path, draw = tmp_path / "c.pt", random.Random(0)
    write_checkpoint(path, PAYLOAD | {"model": {"weight": torch.randn(4000)}})
    whole = path.read_bytes()
    expected, refused = read_checkpoint(path), 0
    for _ in range(60):
        damaged, bit = bytearray(whole), draw.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert_bitwise(read_checkpoint(path)["model"], expected["model"])  # it was between the parts
        except CheckpointError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "c.pt"
    write_checkpoint(path, PAYLOAD)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left on device; .* is untouched: .*c.pt") as raised:
            write_checkpoint(path, PAYLOAD | {"epoch": 4})
    assert raised.value.errno == errno.ENOSPC
    assert read_checkpoint(path)["epoch"] == 3 and os.listdir(tmp_path) == ["c.pt"]


def test_an_interrupted_first_one_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "c.pt", PAYLOAD)
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, signal, sys, torch
from mla_fast.checkpoint import write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write_checkpoint(sys.argv[1], {"epoch": 3})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_checkpoint(sys.argv[1], {"epoch": 4, "model": torch.zeros(10_000)})
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_write_cut_short_by_the_system_leaves_the_old_one(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "c.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") and "untouched" in done.stdout
    assert read_checkpoint(tmp_path / "c.pt")["epoch"] == 3 and os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "c.pt"
    write_checkpoint(path, PAYLOAD)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(mla.CheckpointError, match="c.pt: expected a checkpoint written by mla_fast, got a foreign or truncated"):
        read_checkpoint(path)


class Harmful:
    """What unpickling would run."""

    def __reduce__(self):
        return os.mkdir, ("was_run",)


def torch_file(value):
    return lambda path: torch.save(value, path)


FOREIGN = {
    "random bytes": lambda path: path.write_bytes(os.urandom(4000)),
    "text": lambda path: path.write_text("epoch: 3\n"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(PAYLOAD["history"], protocol=2)),
    "harmful pickle": lambda path: path.write_bytes(pickle.dumps(Harmful(), protocol=2)),
    "harmful torch file": torch_file({"format": "mla_fast.checkpoint", "version": 1, "model": Harmful()}),
    "a dict": torch_file({"epoch": 3}),
    "a tensor": torch_file(torch.ones(3)),
    "another format": torch_file({"format": "other", "version": 1}),
    "another version": torch_file({"format": "mla_fast.checkpoint", "version": 99}),
    "no version": torch_file({"format": "mla_fast.checkpoint"}),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    FOREIGN[name](tmp_path / "c.pt")
    with pytest.raises(mla.CheckpointError, match="c.pt: expected"):
        read_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "was_run").exists()


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_distributed_checkpoint_round_trip(tmp_path, projection):
    """The wrapped optimizer's state as torch takes it, ours beside it; a fresh optimizer has neither momentum nor means."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def parts(model, optimizer):
        wrapped = get_optimizer_state_dict(model, optimizer.optimizer)
        return {"model": model.state_dict(), "optimizer": wrapped, "mla": optimizer.projections}

    model, optimizer = trained(projection)
    dcp.save(parts(model, optimizer), checkpoint_id=tmp_path)
    other, fresh = untrained(projection, seed=9)
    state = parts(other, fresh)
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, fresh.optimizer, state["optimizer"])
    assert_bitwise(everything(other, fresh), everything(model, optimizer))
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, make_steps(6, seed=8))
    assert_bitwise(everything(other, fresh), everything(model, optimizer))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_all_tensors_go_through_safetensors(tmp_path, projection):
    """They are contiguous and share no memory; the rest of the state is numbers, names and lists."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer = trained(projection)
    leaves, structure = tree_flatten(optimizer.state_dict())
    tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    others = json.loads(json.dumps({str(i): leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}))
    safetensors.save_file(tensors, tmp_path / "state.safetensors")
    loaded = others | safetensors.load_file(tmp_path / "state.safetensors")
    other, fresh = untrained(projection, seed=9)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(tree_unflatten([loaded[str(i)] for i in range(len(leaves))], structure))
    assert_bitwise(everything(other, fresh), everything(model, optimizer))


def untrained(projection, seed=0):
    model = make_model(seed=seed)
    return model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head, projection=projection)


def trained(projection):
    model, optimizer = untrained(projection)
    train(model, optimizer, make_steps(7))
    return model, optimizer
