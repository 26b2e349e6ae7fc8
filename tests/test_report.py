"""The report is what the committed records say, and its tables are those of one's own arithmetic."""

import json
import re

import pytest

from bench import report
from bench.throughput import __main__ as throughput
from bench.throughput import gpu, speed
from bench.throughput.speed import Throughput

MACHINE = {"cpu": "Xeon", "torch": "2.13.0", "python": "3.11.7", "commit": "a"}


@pytest.fixture(scope="module")
def parts():
    return report.parts()


def test_the_committed_report_and_readme_are_what_the_records_say(parts):
    assert report.REPORT.read_text() == report.report(parts), "run make report"
    assert report.README.read_text() == report.readme(parts, report.README.read_text()), "run make report"


def test_the_readme_quotes_and_links_the_report(parts):
    text = report.README.read_text()
    quoted = re.findall(r"<!-- report: ([\w ]+) -->", text)
    expected = ["missing", "table 2", "adding summary", "operators", "operators reading", "ratios", "gpu steps", "summary"]
    assert quoted == expected and quoted[0] in parts
    assert "(bench/REPORT.md)" in text
    assert all(parts[name] in report.report(parts) for name in quoted)


def test_what_is_marked_is_replaced_and_nothing_else():
    text = "a\n<!-- report: x y -->\nold\n\nolder\n<!-- end -->\nb\n<!-- report: z -->\n<!-- end -->\n"
    new = "a\n<!-- report: x y -->\n| 1 |\n<!-- end -->\nb\n<!-- report: z -->\n2\n<!-- end -->\n"
    assert report.readme({"x y": "| 1 |", "z": "2"}, text) == new
    with pytest.raises(KeyError, match="z"):
        report.readme({"x y": ""}, text)


def test_every_picture_is_there_and_small():
    named = re.findall(r"\]\(plots/(\w+)\.png\)", report.REPORT.read_text())
    named += re.findall(r"\]\(bench/plots/(\w+)\.png\)", report.README.read_text())
    assert sorted(named) == sorted(report.drawings()) == sorted(path.stem for path in report.PLOTS.iterdir())
    for name in named:
        picture = (report.PLOTS / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_every_link_to_a_heading_has_one():
    headings = re.findall(r"^#+ (.*)$", report.REPORT.read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for path in (report.README, report.BENCH / "README.md"):
        assert set(re.findall(r"REPORT\.md#([\w-]+)", path.read_text())) <= anchors


def test_made_anew_in_one_command(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    copies = tmp_path / "REPORT.md", tmp_path / "README.md"
    copies[1].write_text(report.README.read_text())
    monkeypatch.setattr(report, "REPORT", copies[0])
    monkeypatch.setattr(report, "README", copies[1])
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    forgetting = report.drawings()["forgetting"]
    monkeypatch.setattr(report, "drawings", lambda: {"forgetting": forgetting})
    before = copies[1].read_text()
    report.main()
    assert copies[1].read_text() == before and copies[0].read_text().startswith("# Report\n")
    assert len((tmp_path / "plots" / "forgetting.png").read_bytes()) < 100_000


def test_a_file_that_says_nothing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CPU", tmp_path / "nothing.jsonl")
    with pytest.raises(SystemExit, match="nothing.jsonl: expected results of bench.throughput, got none"):
        report.main()


def time(case, provider, median, threads=1, op="rls", spread=0.01):
    record = {"case": case, "provider": provider, "op": op, "device": "cpu", "machine": {**MACHINE, "threads": threads}}
    return record | {"median_us": median, "p20_us": (1 - spread) * median, "p80_us": (1 + spread) * median}


@pytest.fixture
def cpu(tmp_path):
    found = [time("rls s=8", "ours", 10.0), time("rls s=8", "eager a", 40.0), time("rls s=8", "eager b", 25.0)]
    found += [time("rls s=8", "released", 80.0), time("rls s=8", "ours", 10.0, 2), time("rls s=8", "eager a", 5.0, 2)]
    found += [time("window s=8", "ours", 2.0, op="window"), time("window s=8", "rls eager a", 3.0, op="window")]
    found += [time("rls s=9", "ours", 10.0), time("rls s=9", "eager a", 12.0, spread=0.3)]
    found += [time("infer a", "ours", 7.0, op="infer"), time("infer a", "ours predict", 16.0, op="infer")]
    found += [time("infer b", "ours", 7.0, op="infer"), time("infer b", "ours dispatched", 9.0, op="infer")]
    found += [time("infer b", "ours predict", 20.0, op="infer")]
    found += [time("mlps", "ours rls", 1500.0, op="step"), time("mlps", "plain loop", 1000.0, 2, op="step")]
    found += [time("mlps", "plain loop", 1100.0, op="step"), time("mlps", "ours in turn rls", 1200.0, 2, op="step")]
    for comparison, threads, ratio, high, target, verdict in (
        ("ours in turn rls / plain loop, by what is added", 1, 1.05, 1.06, "≤ 1.03", "missed"),
        ("ours in turn rls / plain loop, by what is added", 2, 1.07, 1.09, "≤ 1.03", "missed"),
        ("ours in turn rls / plain loop", 2, 1.2, 1.06, "", ""),
        ("ours rls / plain loop", 1, 1.05, 1.06, "", ""),
        ("ours in turn rls / b", 1, 1.05, 1.06, "≤ 2.00", "met"),
    ):
        compared = {"case": "mlps", "device": "cpu", "machine": {**MACHINE, "threads": threads}, "low": 1.04, "high": high}
        found.append({**compared, "comparison": comparison, "ratio": ratio, "target": target, "verdict": verdict})
    path = tmp_path / "cpu.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    read = Throughput(path)
    read.all = found[:-5]
    return read


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if not line.startswith("|-")]


def test_each_contender_stands_at_its_own_best(cpu):
    header, *rows = cells(speed.operators(cpu))
    assert header == ["µs (threads)", "ours", "best eager", "× best eager", "× released arithmetic", "× torch.compile"]
    assert rows == [
        ["rls s=8", "10.0 (1)", "5.0 (2)", "0.50", "8.00", "-"],
        ["rls s=9", "10.0 (1)", "12.0 (1)", "1.20", "-", "-"],
        ["window s=8", "2.0 (1)", "-", "-", "-", "-"],
        ["window s=8, for an RLS step", "2.0 (1)", "3.0 (1)", "1.50", "-", "-"],
        ["infer a", "7.0 (1)", "-", "-", "-", "-"],
        ["infer b", "7.0 (1)", "-", "-", "-", "-"],
    ]
    said = speed.read_operators(cpu)
    assert (
        "faster than the best eager form in 0 of 2 cases, ties in 1 and is slower in 1: rls s=8; " in said and "is 0.85." in said
    )
    best = {(r["case"], r["provider"]): r["machine"]["threads"] for r in speed.best_threads(cpu.all)}
    assert best["rls s=8", "ours"] == 1 and best["rls s=8", "eager a"] == 2


def test_the_tables_of_steps_by_hand(cpu):
    rows = [["ours rls", "1.50 (1)"], ["plain loop", "1.00 (2)"], ["ours in turn rls", "1.20 (2)"]]
    assert cells(speed.step_times(cpu)) == [["ms a batch (threads)", "mlps"], *rows]
    assert [row[1] for row in cells(speed.step_ratios(cpu))[1:]] == [
        "1.07 (1.04–1.09), ≤ 1.03: missed",  # on two threads, where both are at their best
        "1.20 (1.04–1.06)",
        "1.50",  # which no round has compared
        "-",
    ]


def test_throughput_measures_each_number_of_threads_and_what_is_left(monkeypatch, tmp_path, cpu, capsys):
    seen = []

    def fails(argv):
        seen.append(argv)
        raise SystemExit("ours is wrong")

    monkeypatch.setattr(throughput.ops, "main", fails)
    monkeypatch.setattr(throughput.step, "main", seen.append)
    monkeypatch.setattr(throughput.speed, "Throughput", lambda path: cpu)
    with pytest.raises(SystemExit, match="ours is wrong"):
        throughput.main(["--device", "cpu", "--threads", "1,2", "--quick", "--compile", "--output", "out.jsonl"])
    one, two = (["--device", "cpu", "--threads", threads, "--output", "out.jsonl"] for threads in "12")
    quick = ["--compile", "--seconds", "0.2"]
    assert seen == [[*one, *quick], [*one, "--quick"], [*two, *quick], [*two, "--quick"]]
    assert speed.operators(cpu) in capsys.readouterr().out


def test_a_gpus_tables_are_of_its_last_commit_and_the_best_rival(tmp_path):
    def write(part, *found):
        lines = [json.dumps({**r, "machine": {**MACHINE, "commit": r.pop("commit")}}) + "\n" for r in found]
        (tmp_path / f"card-{part}.jsonl").write_text("".join(lines))

    spread = {"p20_us": 1.0, "p80_us": 9.0}
    kernel = {"case": "rls s=512 C=6 hot", "kernel": "rls_read_kernel", "copy_gb_per_s": 4000.0, **spread}
    write("kernels", {**kernel, "mean_a_call_us": 4.0, "commit": "a"}, {**kernel, "mean_a_call_us": 3.0, "commit": "b"})
    case = {"case": "rls s=512 C=6", "commit": "a"}
    times = {
        "ours": 2.0,
        "ours graph": 1.0,
        "eager x": 8.0,
        "eager y": 6.0,
        "graph eager y": 5.0,
        "released": 10.0,
        "compile": 4.0,
    }
    found = [{**case, "op": "rls", "provider": name, "median_us": us} for name, us in times.items()]
    found[1] |= {"gb_per_s": 2000.0, "copy_gb_per_s": 4000.0}
    other = {"case": "rls s=1024 C=6", "commit": "a", "op": "rls"}
    found += [{**other, "provider": "ours graph", "median_us": 1.0}, {**other, "provider": "graph eager x", "median_us": 6.0}]
    found += [{"case": "window s=8", "commit": "a", "op": "window", "provider": "ours graph", "median_us": 11.0}]
    large = {"case": "C=101", "commit": "a", "op": "largest", "provider": "ours", "s": 8192, "share": 0.5}
    write("ops", *found, {**large, "median_us": 2e3})
    batch = {"case": "mlps N=64", "provider": "plain loop", **spread}
    write("step", {**batch, "median_us": 4e3, "commit": "a"}, {**batch, "median_us": 3e3, "commit": "b"})
    card = gpu.GPU(tmp_path, "card")
    assert re.search(r"rls s=512 C=6 +\| +read \| +4.0 \(1.0–9.0\) \| +3.0 \(1.0–9.0\)", gpu.kernels(card))
    numbers = re.findall(r"\d+\.\d|\d+ %", gpu.operators(card).splitlines()[-1])
    assert numbers == ["2.0", "6.0", "4.0", "1.0", "5.0", "10.0", "50 %"]
    assert [row[1:] for row in cells(gpu.targets(card))[1:]] == [
        ["≥ 8.0×", "10.0×", "met"],
        ["≥ 3.0×", "6.0×", "met"],
        ["≥ 3.0×", "5.0× to 6.0×", "met"],
        ["≥ 1.5×", "4.0×", "met"],
        ["≤ 10.0 µs", "11.0 µs", "missed"],
    ]
    assert cells(gpu.largest(card))[1:] == [["ours", "8192", "50 %", "2.0"]]
    assert re.search(r"plain loop +\| +3.00 \(0.00–0.01\)", gpu.steps(card)) and "joint" not in gpu.steps(card)
    with pytest.raises(ValueError, match="expected results of make gpu-check for other"):
        gpu.GPU(tmp_path, "other")
