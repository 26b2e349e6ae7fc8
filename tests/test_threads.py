"""How many threads are used: one where that is asked for, and no more than the work is worth."""

import subprocess
import sys

import pytest
import torch

from mla_fast import ops
from mla_fast.threads import one_thread

SMALL = """
import os, sys
import torch
import mla_fast as mla

def woken():
    return len(os.listdir("/proc/self/task"))  # OpenMP makes its threads when they are first woken, and keeps them

def rls(s, C):
    return mla.rls_project_, torch.eye(s), torch.rand(s) / s, torch.randn(C, s), 1.0

torch.set_num_threads(1)
logits, present = list(torch.randn(3, 64, 101)), torch.rand(64, 3) > 0.5
plan, features = mla.dispatch(present), {m: torch.randn(64, 1024) for m in range(3)}
small = [rls(64, 101), rls(128, 6), rls(128, 101), rls(256, 101), rls(512, 6), (mla.entropy_fusion, logits)]
small += [(mla.window_project, torch.rand(2, 1024), torch.randn(101, 1024), 1.0), (plan.pack, list(features.values()))]
function, *arguments = rls(1024, 20)
torch.set_num_threads(2)
before = woken()
for call, *given in small:
    call(*given)
    assert woken() == before, given
function(*arguments)
assert woken() > before, "this is worth a thread"
"""


@pytest.mark.skipif(not ops.available("cpp") or sys.platform != "linux", reason="of the compiled operators, on Linux")
def test_small_operators_wake_no_thread():
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_thread_inside_and_as_many_as_before_after():
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2


def test_the_core_imports_no_periphery():
    periphery = {
        "bench",
        *(f"mla_fast.{name}" for name in ("demo", "competition", "baselines", "compare", "cli", "tables", "threads")),
    }
    code = f"import sys, mla_fast; sys.exit(', '.join({periphery} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
