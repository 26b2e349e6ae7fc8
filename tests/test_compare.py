"""What counts as slower, worked out on made-up times."""

import json

import pytest

from bench.throughput import compare

MACHINE = {"cpu": "Xeon", "threads": 1, "torch": "2.13.0", "python": "3.11.7", "commit": "a"}


def record(provider, p20, median, p80, **machine):
    times = {"median_us": median, "p20_us": p20, "p80_us": p80}
    return {"case": "rls", "provider": provider, "device": "cpu", "op": "rls", **times, "machine": {**MACHINE, **machine}}


BEFORE = [record("ours", 9, 10, 11), record("wide", 5, 10, 30), record("close", 9.9, 10, 10.1), record("fast", 18, 20, 22)]
BEFORE += [record("ours", 9, 10, 11, threads=2), record("gone", 1, 1, 1)]
AFTER = [record("ours", 99, 99, 99), record("ours", 11.5, 12, 13), record("wide", 20, 25, 40), record("close", 10.2, 10.4, 10.5)]
AFTER += [record("fast", 9, 10, 11), record("ours", 29, 30, 31, threads=2), {"case": "rls", "comparison": "a / b", "ratio": 1}]


@pytest.fixture
def run(tmp_path, capsys):
    def run(before, after, *options):
        """(exit status, stdout, stderr)"""
        paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
        for path, found in zip(paths, (before, after), strict=True):
            path.write_text("".join(json.dumps(line) + "\n" for line in found))
        with pytest.raises(SystemExit) as exit:
            compare.main([*map(str, paths), *options])
        return exit.value.code, *capsys.readouterr()

    return run


def test_regressions_come_first_and_are_the_exit_status(run):
    status, out, _ = run(BEFORE, AFTER)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| rls")]
    assert [(row[0], row[1], row[4], row[5]) for row in cells] == [
        ("rls: ours", "cpu, 2 thread(s)", "3.00", "slower"),
        ("rls: ours", "cpu, 1 thread(s)", "1.20", "slower"),  # its last time counts
        ("rls: fast", "cpu, 1 thread(s)", "0.50", "faster"),
        ("rls: wide", "cpu, 1 thread(s)", "2.50", ""),  # the intervals overlap
        ("rls: close", "cpu, 1 thread(s)", "1.04", ""),  # they do not, but 4 % are below the threshold
    ]
    assert status == 1 and out.endswith("2 slower, 1 faster, 2 within the noise, 1 in one file only\nmedian ratio 1.20\n")


def test_without_a_regression_the_status_is_zero(run):
    assert run(BEFORE, BEFORE)[0] == 0
    assert run(BEFORE[2:3], AFTER[3:4])[0] == 0
    assert run(BEFORE[2:3], AFTER[3:4], "--threshold", "0.03")[0] == 1


def test_another_machine_is_refused_and_other_software_named(run):
    status, out, err = run(BEFORE, [record("ours", 1, 1, 1, cpu="EPYC")])
    assert status == 2 and not out and "expected the same machine" in err and "cpu: Xeon → EPYC" in err
    status, out, _ = run(BEFORE, [record("ours", 1, 1, 1, cpu="EPYC")], "--other-machine")
    assert status == 0 and "not the same: cpu: Xeon → EPYC" in out
    status, out, _ = run(BEFORE, [record("ours", 9, 10, 11, torch="2.14.0", commit="b")])
    assert status == 0 and "not the same: torch: 2.13.0 → 2.14.0" in out and "commit" not in out


def test_what_cannot_be_compared_is_said(run, tmp_path, capsys):
    assert "measured in both, got none" in run(BEFORE, [record("other", 1, 1, 1)])[2]
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "nothing.jsonl")])
    assert "got no such file" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text("half a\nfile\n")
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert "line 1: expected a record" in capsys.readouterr().err


def test_a_line_that_was_cut_short_is_left_out(run, tmp_path, capsys):
    run(BEFORE, BEFORE)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"case": "rls", "prov')
    with pytest.raises(SystemExit, match="0"):
        compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert "cut short" in capsys.readouterr().err
