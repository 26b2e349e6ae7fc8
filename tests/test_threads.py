"""How many threads are used: one where that is asked for, and no more than the work is worth."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_bitwise, make_inputs, noisy_model

from mla_fast import ops, threads
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


def measured(monkeypatch, seconds, batch=None, count=2):
    """What is chosen where a batch takes so many seconds, by number of threads."""
    monkeypatch.setattr(threads, "_seconds", lambda model, inputs, count: seconds[count])
    torch.set_num_threads(count)
    return threads.measured(noisy_model(), batch or (make_inputs(), torch.zeros(6, dtype=torch.int64)))


def test_a_small_model_takes_one_thread_unless_several_are_clearly_faster(monkeypatch):
    assert measured(monkeypatch, {1: 0.002, 2: 0.007}) == (1, {1: 0.002, 2: 0.007})
    assert measured(monkeypatch, {1: 0.010, 2: 0.009})[0] == 1
    assert measured(monkeypatch, {1: 0.010, 2: 0.006})[0] == 2
    assert measured(monkeypatch, {1: 0.100}) == (2, {})
    assert measured(monkeypatch, {}, count=1) == (1, {})


def test_measuring_moves_nothing():
    model, present = noisy_model(), torch.ones(6, 3, dtype=torch.bool)
    present[1:, 0] = False  # a lone row, which BatchNorm refuses
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    torch.set_num_threads(2)
    chosen, seconds = threads.measured(model, (make_inputs(), torch.zeros(6, dtype=torch.int64), present))
    assert set(seconds) == {1, 2} and chosen in seconds and torch.get_num_threads() == 2
    assert_bitwise(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
