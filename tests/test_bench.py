"""The benchmark refuses to time what is wrong, compares side by side, and counts bytes as one does by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
from bench.records import read, timings
from bench.throughput import cases, plot, providers, roofline, timing, tune
from bench.throughput import ops as bench_ops
from bench.throughput.cases import Spec
from bench.throughput.problems import RLS
from bench.throughput.providers import GateError, Provider
from bench.throughput.timing import interleave
from mla_fast import ops

CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(not ops.available("cpp"), reason=str(ops.MISSING["cpp"]))
TINY = (Spec("rls", 3, 9), Spec("window", 3, 9, 3), Spec("fusion", 3, None, 2, 4), Spec("fusion", 3, None, 2, 4, True))
TINY += (Spec("infer", 3, 9, 2, 5), Spec("infer", 3, 9, 2, 5, True))
TINY += (Spec("dispatch", N=5), Spec("dispatch", N=5, means=True), Spec("predict", 3, N=5))


def run(monkeypatch, *arguments):
    """bench.throughput.ops on tiny cases, without minutes of timing."""
    monkeypatch.setattr(sys, "argv", ["bench.throughput.ops", "--device", "cpu", "--seconds", "0", *map(str, arguments)])
    monkeypatch.setattr(bench_ops, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(bench_ops, "interleave", lambda p, **options: interleave(p, **{**options, "rounds": (3, 3)}))
    monkeypatch.setattr(bench_ops, "specs", lambda *_: list(TINY))
    bench_ops.main()


@needs_cpp
@pytest.mark.parametrize("spec", TINY, ids=lambda spec: spec.name)
def test_every_provider_passes_its_gate(spec, capsys):
    case = cases.build(spec, CPU)
    assert not case.failed and "left out" not in capsys.readouterr().err
    assert {"ours"} < case.providers.keys() == case.traffic.keys() == case.periods.keys()


@pytest.mark.skipif(not ops.INTERPRETED, reason="on the CPU only the interpreted kernels defer")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_gate_of_a_deferred_step_is_beyond_its_first_fold(rows):
    rls = RLS(9, 3, CPU, rows)
    rls.backend = "triton"
    assert len(rls.steps) > rows
    step, gate = rls.start(rls.ours, rows)
    gate()
    step, gate = rls.start(lambda state: lambda: (rls.ours(state)(), state.P.mul_(1.001))[0], rows)
    with pytest.raises(GateError, match="not timed"):
        gate()


def test_the_gate_is_shut_for_wrong_and_for_nan():
    right = torch.ones(3, dtype=torch.float64)
    providers.check("right", right.float(), right, 1e-6)
    for wrong in (right * 1.1, right * torch.nan, right[:1]):
        with pytest.raises(GateError, match="not timed"):
            providers.check("wrong", wrong, right, 1e-6)


def test_who_fails_is_left_out_and_ours_is_remembered(capsys):
    case = cases.Case(TINY[0], {}, {}, {}, {})

    def breaks():
        raise RuntimeError("no kernel\nfor this\ndevice")

    cases.admit(case, Provider("eager broken", breaks))
    cases.admit(case, Provider("ours graph", lambda: (int, breaks)))
    cases.admit(case, Provider("ours", lambda: (int, int), None, 4))
    assert case.providers == {"ours": int} and case.periods == {"ours": 4}
    assert case.failed == {"ours graph": "RuntimeError: no kernel for this"}
    assert "eager broken is left out: RuntimeError: no kernel" in capsys.readouterr().err


@needs_cpp
def test_main_measures_the_rest_and_fails_when_ours_does(monkeypatch, tmp_path, capsys):
    output = tmp_path / "results" / "ops.jsonl"
    run(monkeypatch, "--output", output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    keys = "case provider median_us p20_us p80_us speedup machine op s C M N device bytes gb_per_s copy_gb_per_s"
    assert all(set(keys.split()) <= r.keys() for r in records)
    assert {r["case"] for r in records} == {spec.name for spec in TINY}
    assert records[0]["machine"]["threads"] == 1
    for spec in TINY:
        eager = [r["speedup"] for r in records if r["case"] == spec.name and r["provider"].startswith("eager")]
        assert max(eager) == 1
    assert "× eager" in capsys.readouterr().out

    window_step = ops.window_step_
    monkeypatch.setattr(ops, "window_step_", lambda *arguments: (window_step(*arguments), arguments[5].mul_(1.01)))
    with pytest.raises(SystemExit, match="window s=9 C=3 M=3: ours: GateError"):
        run(monkeypatch, "--output", output)
    again = [json.loads(line) for line in output.read_text().splitlines()][len(records) :]
    assert len(again) == len(records) - 1 and again[-1]["op"] == "predict"


@needs_cpp
def test_main_stops_at_its_budget(monkeypatch, capsys):
    run(monkeypatch, "--budget", "-1")
    assert f"{len(TINY)} of {len(TINY)} cases are skipped" in capsys.readouterr().err


def test_main_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main, arguments in ((bench_ops.main, ["--device", "cuda"]), (tune.main, [])):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        with pytest.raises(SystemExit, match="torch sees no GPU"):
            main()


def test_cases_that_say_most_come_first():
    gpu = SimpleNamespace(type="cuda")
    found = cases.specs(gpu)
    assert [spec.name for spec in found[:2]] == ["rls s=512 C=6", "rls s=512 C=101"]
    assert {"fusion [3, 65536, 1000]", "fusion [3, 64, 101] masked", "window s=4096 C=101 M=3"} <= {s.name for s in found[:13]}
    assert len(found) == len(set(found)) == 7 * 4 + 2 * (3 * 4 + 2) + 7 * 3 + 6 + 4 + 2
    assert len(cases.specs(CPU)) == 25
    assert {spec.op for spec in cases.specs(CPU, (64,), (7,), ("rls",))} == {"rls"}


def test_providers_take_turns():
    calls = []
    interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, rounds=(4, 4))
    measured = calls[-8:]
    assert measured.count("a") == measured.count("b") == 4
    assert all(set(measured[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))


def test_a_sample_on_the_host_and_the_number_of_rounds(monkeypatch):
    now, calls = [0], []

    def takes(name, us):
        def call():
            now[0] += 1000 * us
            calls.append(name)

        return call

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    providers = {"short": takes("short", 200), "long": takes("long", 300_000)}
    samples = timing.sample(providers, seconds=1.6, rounds=(3, 100), host_us=1000)
    assert samples == {"short": 5 * [200.0], "long": 5 * [300_000.0]}
    assert calls.count("long") == 2 + 5 and calls[-30:].count("short") == 5 * 5
    assert len(timing.sample(providers, seconds=0, rounds=(3, 100))["short"]) == 3
    assert len(timing.sample(providers, seconds=99, rounds=(3, 7))["short"]) == 7


def test_what_is_put_off_to_every_fourth_call_counts():
    times = [1.0, 1.0, 1.0, 9.0] * 5
    assert timing.summary(times).median == 1
    assert timing.summary(times, 4) == (3, 3, 3)
    assert timing.summary([9.0, *times], 4).median == 3


def test_the_device_clock_makes_one_sample_of_many_short_calls(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return (other.at - self.at) / 1e3  # ms

    def takes(us):
        def call():
            now[0] += us

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu = SimpleNamespace(type="cuda")
    times = interleave({"short": takes(2.0), "long": takes(5e3)}, seconds=0, rounds=(3, 3), device=gpu)
    assert times["short"].median == pytest.approx(2) and times["long"].median == pytest.approx(5e3)
    assert timing._calls(timing.DeviceClock(), takes(2.0)) == 500
    assert timing._calls(timing.DeviceClock(), takes(5e3)) == 1


def test_bytes_counted_by_hand():
    s, C = 10, 3  # s² = 100, C s = 30; 4 bytes to a number
    assert roofline.released(s, C).bytes == 4 * (1500 + 60)
    assert roofline.eager_stacked(s, C).bytes == 4 * (300 + 210)
    assert roofline.lazy(s, C) == ("lazy", 4 * (200 + 120), 2)
    assert roofline.at_once(s, C).bytes == 4 * (300 + 120)
    assert roofline.half(s, C) == ("half", 4 * (100 + 120), 1)
    assert roofline.deferred(s, C, 4) == ("deferred R=4", 4 * (125 + 150 + 20), 2)
    assert roofline.deferred(s, 1000, 4) == ("deferred R=4", 4 * (250 + 50000 + 20), 3)
    assert roofline.window(s, C, 2) == ("window", 4 * (60 + 40), 1)
    assert roofline.fusion_one_read(6, 2, 3, 5).bytes == 4 * (30 + 15 + 12)
    assert roofline.fusion_one_read(4, 2, 3, 5).bytes == 4 * (20 + 15 + 12)
    assert roofline.fusion_two_reads(6, 2, 3, 5).bytes == 4 * (60 + 15 + 12)
    assert roofline.fusion_backward(6, 2, 3, 5).bytes == 4 * (60 + 15 + 12)
    assert roofline.fusion_backward(6, 2, 3, 5, reads=2).bytes == 4 * (90 + 30 + 12)
    assert roofline.dispatch(6, 2, 100, False) == ("dispatch", 6 * 2 * (1 + 8 + 8) + 200, 2)
    assert roofline.dispatch(6, 2, 100, True) == ("dispatch", 6 * 2 * (1 + 8 + 8) + 300, 5)
    assert roofline.Traffic("copy", 4300, 1).floor_us(4300) == pytest.approx(1e-3)
    assert [roofline._floor(roofline.Traffic("copy", size, 1), 4300, 5e6) for size in (4_300_000, 8_600_000)] == [
        "(1.00)",
        "2.00",
    ]


def test_the_form_of_our_step_follows_from_its_backend_and_size():
    forms = {(b, C, R): roofline.ours_rls(b, 10, C, R) for b in ("cpp", "triton") for C in (6, 101, 1000) for R in (0, 1, 16)}
    assert forms["triton", 101, 1] == ("lazy", 4 * (200 + 4 * 1010), 2)
    assert [forms["cpp", C, 1].form for C in (6, 101)] == ["half", "lazy"]
    assert forms["cpp", 6, 0].bytes == 4 * (250 + 240) and forms["cpp", 101, 1].bytes == 4 * (300 + 4040)
    assert forms["triton", 1000, 1].bytes == 4 * (300 + 40000) and forms["triton", 1000, 1].launches == 3
    assert forms["triton", 1000, 16].form == "deferred R=16"
    launch = pytest.importorskip("mla_fast.kernels.launch")
    assert roofline.TRITON_ONE_PASS == launch.MAX_BLOCK_C


def test_the_tables_of_the_readme_are_what_the_formulas_say():
    text = Path(bench.__file__).with_name("README.md").read_text()
    assert roofline.tables(101) in text


def test_a_tuned_table_is_written_as_it_was_read():
    text = tune.PATH.read_text()
    assert tune.dump(json.loads(text)) == text


def test_every_row_of_the_table_has_alternatives_and_a_size():
    table = json.loads(tune.PATH.read_text())
    assert tune.AXES.keys() == {op for op, rows in table.items() if isinstance(rows, list)}
    for op, axes in tune.AXES.items():
        for index, row in enumerate(table[op]):
            size = tune.representative(table, op, index)
            assert row["up_to"].keys() <= size.keys()
            for axis, (names, _) in enumerate(axes):
                found = list(tune.variants(op, row, axis))
                assert found and row not in found and all(other["up_to"] == row["up_to"] for other in found)
                changed = {"config": {n: v for n, v in row["config"].items() if n not in (*names, "maxnreg")}}
                assert all(changed["config"].items() <= other["config"].items() for other in found)
                assert all(32 * o["config"]["num_warps"] * o["config"].get("maxnreg", 0) <= 65536 for o in found)
    with pytest.raises(ValueError, match="no size"):
        tune.representative({"window": [{"up_to": {"J": 0}}, {"up_to": {}}]}, "window", 0)


def test_where_the_deferred_form_begins():
    assert tune.deferred_from({1024: (3, 4), 2048: (5, 6), 4096: (20, 15), 8192: (80, 50)}) == 4096
    assert tune.deferred_from({1024: (4, 3), 2048: (5, 6), 4096: (20, 15)}) == 4096
    assert tune.deferred_from({1024: (3, 4), 2048: (5, 5)}) == 4096
    assert tune.deferred_from({1024: (4, 3), 2048: (6, 5)}) == 1024


def test_an_installed_row_is_the_one_that_is_launched(monkeypatch):
    launch = pytest.importorskip("mla_fast.kernels.launch")
    monkeypatch.setitem(launch.TABLE, "window", list(launch.TABLE["window"]))
    before = launch.window_config(1024, 2, 4)
    row = next(tune.variants("window", launch.TABLE["window"][0], 0))
    try:
        tune.install(launch, "window", 0, row)
        assert launch.window_config(1024, 2, 4) != before
    finally:
        tune.install(launch, "window", 0, json.loads(tune.PATH.read_text())["window"][0])


@needs_cpp
@pytest.mark.parametrize(
    "op,size",
    [
        ("rls_read", {"s": 9, "C": 3}),
        ("rls_finish", {"s": 9, "R": 1}),
        ("window", {"s": 9, "J": 3}),
        ("entropy_fusion", {"C": 5}),
        ("entropy_fusion_backward", {"C": 5}),
    ],
)
@torch.no_grad()
def test_what_is_tuned_passes_its_gate(op, size, monkeypatch):
    """On the CPU, where a step stands for its graph; it has nothing that folds several rows."""
    monkeypatch.setattr(tune, "capture", lambda step: step)
    monkeypatch.setattr(tune, "captured", lambda make: make)
    _, gate = tune.problem(op, size, CPU)()
    gate()


def test_what_was_measured_is_drawn(tmp_path, monkeypatch):
    record = {"case": "rls s=8 C=6", "op": "rls", "s": 8, "C": 6, "M": None, "N": 64, "masked": False, "device": "cpu"}
    record |= {"machine": {"threads": 1}}
    lines = [{**record, "provider": "ours", "median_us": us} for us in (9.0, 1.0)]
    lines += [{**record, "case": "rls s=16 C=6", "s": 16, "provider": "ours", "median_us": 2.0}]
    lines += [{**record, "case": "rls s=8 C=101", "C": 101, "provider": "ours", "median_us": 7.0}]
    fusion = {**record, "case": "fusion", "op": "fusion", "s": None, "M": 2}
    lines += [{**fusion, "provider": name, "median_us": us} for name, us in (("eager b", 5.0), ("eager a", 3.0), ("ours", 2.0))]
    lines += [{**fusion, "provider": "ours functional", "median_us": 0.1}, {**fusion, "provider": "rls eager", "median_us": 9.0}]
    lines += [{"case": "of an older file", "provider": "ours"}]
    source, picture = tmp_path / "results.jsonl", tmp_path / "pictures" / "out.png"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = list(timings(source).values())
    expected = {"rls s=8 C=6": {"ours": 1.0}, "rls s=16 C=6": {"ours": 2.0}, "rls s=8 C=101": {"ours": 7.0}}
    assert plot.rows(records) == expected | {"fusion": {"eager": 3.0, "ours": 2.0}}
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["bench.throughput.plot", str(source), str(picture)])
    plot.main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_message_and_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot.draw([], tmp_path / "out.png")
    assert "no plot" in capsys.readouterr().out


def test_the_input_pipeline_of_a_made_tree(tmp_path, monkeypatch, capsys):
    pytest.importorskip("soundfile")
    from bench.throughput import input_pipeline

    output = tmp_path / "out.jsonl"
    input_pipeline.main(["--clips", "3", "--workers", "0", "--rounds", "1", "--output", str(output)])
    found = read(output)
    assert [(r["source"], r["loader"]) for r in found] == [
        (source, loader) for source in ("cache", "files") for loader in ("Loader", "Loader, bytes", "DataLoader")
    ]
    assert all(r["samples_per_s"] > 0 and r["cpu_ms_per_sample"] > 0 and "load" in r for r in found)
    assert "samples_per_s" in capsys.readouterr().out
