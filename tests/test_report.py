"""The report is what the committed records say, and its tables and readings are those of one's own arithmetic."""

import json
import re

import pytest

from bench import gpu, readings, report, speed, throughput
from bench.speed import Throughput

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
    assert quoted == ["summary", "missing", "operators", "operators reading", "steps reading", "gpu steps"] and quoted[0] in parts
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
    assert sorted(named) == sorted(report.pictures()) == sorted(path.stem for path in report.PLOTS.iterdir())
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
    forgetting = report.pictures()["forgetting"]
    monkeypatch.setattr(report, "pictures", lambda: {"forgetting": forgetting})
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
    compared = {"case": "mlps", "device": "cpu", "machine": {**MACHINE, "threads": 1}, "low": 1.04, "high": 1.06}
    for comparison, target, verdict in (
        ("ours in turn rls / plain loop, by what is added", "≤ 1.03", "missed"),
        ("ours in turn rls / plain loop", "", ""),
        ("ours rls / plain loop", "", ""),
        ("ours in turn rls / b", "≤ 2.00", "met"),
    ):
        found.append({**compared, "comparison": comparison, "ratio": 1.05, "target": target, "verdict": verdict})
    path = tmp_path / "cpu.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return Throughput(path)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if not line.startswith("|-")]


def test_the_table_of_operators_by_hand(cpu):
    header, *rows = cells(speed.operators(cpu))
    assert header[3:] == ["× best eager, 1 thread", "× best eager, 2 threads", "× released arithmetic"]
    assert rows == [
        ["rls s=8", "10.0", "25.0", "2.50", "0.50", "8.00"],
        ["rls s=9", "10.0", "12.0", "1.20", "-", "-"],
        ["window s=8", "2.0", "-", "-", "-", "-"],
        ["infer a", "7.0", "-", "-", "-", "-"],
        ["infer b", "7.0", "-", "-", "-", "-"],
    ]


def test_readings_of_speed_by_hand(cpu):
    said = speed.read_operators(cpu)
    assert "On 1 thread ours is faster than the best eager form in 1 of 2 cases" in said and "being 1.85 times" in said
    assert "it ties in 1 and is slower in 0." in said and "slower in 1: rls s=8 (0.50)." in said
    assert "1.5 times as fast" in speed.read_window(cpu) and " 9 to 11 µs" in speed.read_inference(cpu)
    asked = "ours in turn rls / plain loop, by what is added on mlps, 1 thread (1.050, ≤ 1.03)"
    assert speed.read_steps(cpu) == f"Of 2 bounds that were set beforehand: met 1, unclear 0, missed 1 ({asked})."
    added, taken = speed.read_overhead(cpu).split(". ")
    assert added.endswith("+5.0 % (rls) on mlps, 1 thread") and taken.endswith(" 1.05 (rls) on mlps, 1 thread.")


def test_the_tables_of_steps_by_hand(cpu):
    columns = ["mlps, 1 thread", "mlps, 2 threads"]
    assert cells(speed.step_times(cpu)) == [["ms a batch", *columns], ["ours rls", "1.50", "-"], ["plain loop", "-", "1.00"]]
    assert [row[1] for row in cells(speed.step_ratios(cpu))[1:]] == [
        "1.05 (1.04–1.06), ≤ 1.03: missed",
        "1.05 (1.04–1.06)",
        "1.05 (1.04–1.06)",
        "1.05 (1.04–1.06), ≤ 2.00: met",
    ]


def test_readings_of_accuracy_by_hand():
    def run(method, seed, fused, missing=0.0, average=0.5):
        accuracy = {"a": 0.1, "average": average, "fused": fused}
        return {"data": "x", "config": "B", "epochs": 2, "method": method, "seed": seed, "missing": missing, "accuracy": accuracy}

    found = [run("MLA window", 0, 0.9), run("MLA window", 1, 0.7), run("Sum", 0, 0.8), run("Sum", 1, 0.75), run("Concat", 0, 0.1)]
    found += [run("Late fusion", 0, 0.5), run("QMF", 1, 0.7), run("MLA none", 0, 0.6), run("MLA official", 1, 0.3)]
    said = readings.accuracy(found)
    assert said.startswith("- x B, 2 epochs: MLA window reaches 80.0 %; +2.5 points against Sum (ahead in 1 of 2 seeds)")
    assert "+40.0 points against Late fusion (ahead in 1 of 1 seeds); +0.0 points against QMF (ahead in 0 of 1 seeds)" in said
    assert "x B, 2 epochs, seed 1" in readings.infinite(found) and "none of the runs" in readings.infinite(found[:8])
    assert "and +30.0 points (x B, 2 epochs, MLA window)" in readings.ablation(found)
    assert "between +10.0 (x B, 2 epochs, MLA none)" in readings.ablation(found)


def test_throughput_passes_its_options_on_and_measures_what_is_left(monkeypatch, tmp_path):
    seen = []

    def fails(argv):
        seen.append(argv)
        raise SystemExit("ours is wrong")

    monkeypatch.setattr(throughput.ops, "main", fails)
    monkeypatch.setattr(throughput.step, "main", seen.append)
    with pytest.raises(SystemExit, match="ours is wrong"):
        throughput.main(["--device", "cpu", "--threads", "2", "--quick", "--compile", "--output", "out.jsonl"])
    common = ["--device", "cpu", "--threads", "2", "--output", "out.jsonl"]
    assert seen == [[*common, "--compile", "--seconds", "0.2"], [*common, "--quick"]]


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
