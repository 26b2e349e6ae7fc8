"""torchrun itself: a rank that is killed, with no chance to tidy up, at moments that nobody chose."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import exhaustive
from ranks import run_command
from test_ranks import archive, command  # noqa: F401
from torch.utils._pytree import tree_leaves

from mla_fast.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are looked for in /proc")


def torchrun(argv, *options, **settings):
    own = ["--standalone", "--nproc-per-node", "2", *options, "-m", "mla_fast", *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *own], text=True, env=environment, **settings)


def children(process):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
            parent = int(rest.rpartition(") ")[2].split()[1])
        except (OSError, ValueError):  # gone
            continue
        if parent == process.pid:
            found.append(int(pid))
    return found


def written(checkpoint):
    """When the checkpoint was; None without one."""
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else None


def kill_some(process, checkpoint, kills, moments):
    """Kill one of the ranks as often, each time some while after another checkpoint was written; return how far training was."""
    reached = []
    while len(reached) < kills and process.poll() is None:
        before = written(checkpoint)
        while process.poll() is None and written(checkpoint) == before:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.4))
        if process.poll() is None and (ranks := children(process)):
            os.kill(moments.choice(ranks), signal.SIGKILL)
            saved = read_checkpoint(checkpoint)
            reached.append((saved["epoch"], saved["batches"]))
    return reached


def leaves(saved):
    """All that a checkpoint holds but the states of Python's and NumPy's generators, which nobody has seeded and nobody asks."""
    for rank in saved["ranks"]:
        for states in (rank["random"], rank["data"]):
            del states["python"], states["numpy"]
    return tree_leaves(saved)


@pytest.mark.parametrize("kills", [1, *exhaustive(3)])
def test_a_killed_rank_ends_in_the_state_of_a_run_that_was_left_alone(archive, tmp_path, kills):  # noqa: F811
    more = ["--validation", "0.3", "--checkpoint-every", "1", "--projection", "window"]
    epochs = 10 * (kills + 1)
    whole = run_command([command(archive, tmp_path / "whole", *more, epochs=epochs)] * 2, tmp_path, timeout=120 * kills)
    argv = command(archive, tmp_path / "killed", *more, epochs=epochs)
    process = torchrun(argv, "--max-restarts", str(kills), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    reached = kill_some(process, tmp_path / "killed" / "checkpoint.pt", kills, random.Random())
    said, _ = process.communicate(timeout=120 * kills)
    assert process.returncode == 0 and [status for status, _, _ in whole] == [0, 0]
    assert len(reached) == kills and reached == sorted(reached) and reached[-1] < (epochs, 0), reached
    assert said.count("continuing after") == kills, said
    for name in ("checkpoint.pt", "best.pt"):
        one, two = (read_checkpoint(tmp_path / run / name) for run in ("whole", "killed"))
        assert one["config"] == two["config"] and one["history"] == two["history"]
        for a, b in zip(*map(leaves, (one, two)), strict=True):  # the states of torch's generators among them
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a
