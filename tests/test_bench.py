"""The benchmark refuses to time what is wrong, and compares side by side."""

import json

import pytest
import torch

from bench import ops as bench_ops
from bench.timing import interleave, write_jsonl
from mla_fast import ops

needs_cpp = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=str(ops.CPP_MISSING))


@needs_cpp
def test_every_case_passes_its_gate_and_is_recorded(tmp_path):
    for case in (
        bench_ops.rls_case(9, 3, False),
        bench_ops.window_case(9, 3, False),
        bench_ops.fusion_case(2, 4, 3, True, False),
    ):
        times = interleave(case.providers, seconds=0, rounds=(3, 3))
        records = bench_ops.rows(case, times)
        assert max(r["speedup"] for r in records if r["provider"].startswith("eager")) == 1
        write_jsonl(tmp_path / "ops.jsonl", records)
    lines = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert {"case", "provider", "median_us", "speedup", "machine"} <= lines[0].keys() and lines[0]["machine"]["threads"] == 1


def test_the_gate_is_shut_for_wrong_and_for_nan():
    right = torch.ones(3, dtype=torch.float64)
    bench_ops.check("right", right.float(), right, 1e-6)
    for wrong in (right * 1.1, right * torch.nan):
        with pytest.raises(SystemExit, match="not timed"):
            bench_ops.check("wrong", wrong, right, 1e-6)


def test_providers_take_turns():
    calls = []
    interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, rounds=(4, 4))
    measured = calls[-8:]
    assert measured.count("a") == measured.count("b") == 4
