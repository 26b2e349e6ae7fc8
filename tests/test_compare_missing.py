"""Table 2: what is masked in a run, who is left out, what the table and its reading say."""

import argparse
import csv
import json

import numpy as np
import pytest
import torch
from test_compare_protocol import dataset, save

from bench.accuracy import missing as bench
from mla_fast import cli, data
from mla_fast.cli_options import rates
from mla_fast.compare import missing_report
from mla_fast.compare.learners import Budget, make_learner
from mla_fast.compare.methods import TABLE_2, trials
from mla_fast.compare.missing import _rates_of_same_masks, masked
from mla_fast.compare.records import read
from mla_fast.compare.task import Task, hold_out

BUDGET = Budget(epochs=1, batch_size=32, features=128, hidden=(128, 128))


def task(whole=None):
    return Task("small", "x", lambda seed: hold_out(whole or dataset(), None, seed, "test"))


def command(tmp_path, *options):
    return cli.main(["compare", "--output", str(tmp_path / "out"), "--jobs", "1", "--modalities", "a,b", *map(str, options)])


@pytest.mark.parametrize("protocol", data.PROTOCOLS)
def test_what_is_masked_is_nan_and_full_alone_has_it(protocol):
    each = masked(task(), 0.4, protocol)
    parts, full = each.parts(3), each.full(3)
    for i, part in enumerate(parts):
        assert torch.equal(part.present, data.PROTOCOLS[protocol](len(part), 2, 0.4, 9 + i))
        for m, x in enumerate(part.inputs.values()):
            assert torch.equal(x.isnan().all(1), ~part.present[:, m]) and torch.equal(x.isnan().any(1), ~part.present[:, m])
    for m, (name, x) in enumerate(parts[0].inputs.items()):
        seen = x[parts[0].present[:, m]]
        assert torch.equal(full[name][parts[0].present[:, m]], seen) and full[name].isfinite().all()
        assert seen.mean(0).abs().max() < 1e-5 and (seen.std(0, correction=0) - 1).abs().max() < 1e-4
    assert torch.equal(each.parts(3)[0].present, parts[0].present) and not torch.equal(each.parts(4)[0].present, parts[0].present)


@pytest.mark.parametrize("name", TABLE_2)
def test_every_method_predicts_whatever_is_masked(name):
    each = masked(task(), 0.4, "cpm")
    train, validation, test = each.parts(0)
    learner = make_learner(name, trials(name, 1)[0], train, validation, BUDGET, 0, full=each.full(0))
    if hasattr(learner.model, "test_rounds"):
        learner.model.test_rounds = 2
    learner.train_epoch(0)
    assert learner.logits(test.inputs, test.present).isfinite().all()


def test_a_command_makes_the_table_and_goes_on(tmp_path, capsys):
    path = save(tmp_path / "x.npz")
    options = ["--data", path, "--methods", "Late fusion,CCA,MMIN", "--seeds", "0-1", "--trials", "1", "--epochs", "2"]
    options += ["--protocol", "cpm", "--missing"]
    assert command(tmp_path, *options, "0.1") == 0
    assert len(read(tmp_path / "out" / "runs.jsonl")) == 6
    capsys.readouterr()
    assert command(tmp_path, *options, "0.1,0.5") == 0
    said = capsys.readouterr().out
    assert "6 of 12 runs are done already" in said and "10 % missing: " in said and "50 % missing: " in said
    found = read(tmp_path / "out" / "runs.jsonl")
    assert len(found) == 12 and {record["rate"] for record in found} == {0.1, 0.5}
    assert {record["method"]: record["cost"]["passes_before"] for record in found}["MMIN"] == 2
    assert (
        "<svg" in (tmp_path / "out" / "report.html").read_text() and "weighted F1" in (tmp_path / "out" / "table.md").read_text()
    )
    assert command(tmp_path, *options[:-2], "independent", "--missing", "0.1") == 2
    assert "has results of protocol 'cpm', expected 'independent'" in capsys.readouterr().err


def test_what_is_masked_alike_is_run_once(tmp_path, capsys):
    options = [
        "--data",
        save(tmp_path / "x.npz"),
        "--methods",
        "Late fusion,CCA",
        "--seeds",
        "0-1",
        "--trials",
        "1",
        "--epochs",
        "1",
    ]
    options += ["--protocol", "cpm", "--missing"]
    assert command(tmp_path, *options, "0.4,0.5,0.7") == 0
    assert "[8/8]" in capsys.readouterr().out
    found = {(r["method"], r["seed"], r["rate"]): r for r in read(tmp_path / "out" / "runs.jsonl")}
    for method in ("Late fusion", "CCA"):
        for seed in (0, 1):
            there, here = found[method, seed, 0.5], found[method, seed, 0.7]
            assert here == {**there, "rate": 0.7, "run_at": 0.5} and "run_at" not in found[method, seed, 0.4]
    assert "\n50 % to 70 % missing: " in (tmp_path / "out" / "table.md").read_text()
    assert command(tmp_path, *options, "0.4,0.5,0.6,0.7") == 0  # what is there stays, and what is added is a copy
    assert "8 of 8 runs are done already" in capsys.readouterr().out
    assert len(read(tmp_path / "out" / "runs.jsonl")) == 16


@pytest.mark.parametrize("protocol, M, alike", [("cpm", 2, [[0.5, 0.6, 0.7]]), ("cpm", 3, [[0.7, 0.8]]), ("independent", 2, [])])
def test_masks_that_are_alike_give_the_same_run(protocol, M, alike):
    whole = dataset()
    inputs = {f"m{i}": x for i, x in enumerate([*whole.inputs.values(), *whole.inputs.values()][:M])}
    each = task(data.MultimodalDataset(inputs, whole.target))
    rates = [0.1, 0.5, 0.6, 0.7, *([0.8] if M == 3 else [])]
    same = _rates_of_same_masks(each, argparse.Namespace(missing=rates, protocol=protocol), 0)
    assert [[first, *others] for first, others in same.items() if others] == alike
    assert sorted([*same, *(rate for others in same.values() for rate in others)]) == rates
    for first, others in same.items():
        for rate in others:
            one, other = (masked(each, r, protocol).parts(0) for r in (first, rate))
            assert all(torch.equal(x.present, y.present) for x, y in zip(one, other, strict=True))


def test_data_that_really_lack_modalities(tmp_path, capsys):
    present = data.missing_mask(120, 2, 0.3, 0)
    path = save(tmp_path / "x.npz", present=present.numpy())
    options = ["--data", path, "--seeds", "0", "--trials", "1", "--epochs", "1", "--protocol", "cpm", "--missing", "0.1"]
    assert command(tmp_path, *options, "--methods", "AE") == 2
    assert "AE learns from true values of what is masked, expected data that lack no modalities" in capsys.readouterr().err
    whole = dataset()
    lacking = data.MultimodalDataset(whole.inputs, whole.target, present=present)
    each = masked(task(lacking), 0.4, "cpm")
    assert each.full(0) is None
    nothing = data.MultimodalDataset(whole.inputs, whole.target, present=torch.ones(120, 2, dtype=torch.bool))
    assert each.full(0) is None and masked(task(nothing), 0.4, "cpm").full(0) is not None
    assert all(part.present.any(1).all() for part in each.parts(0))
    from mla_fast.compare.missing import choose_methods

    need = ["AE", "CRA", "MMIN", "IF-MMIN", "TATE"]
    assert choose_methods(["all"], each, [0]) == ([name for name in TABLE_2 if name not in need], need)


def test_rows_without_any_modality_are_left_out_of_all_parts(tmp_path, capsys):
    present = np.ones((120, 2), bool)
    present[:7] = False
    whole = dataset()
    path = save(tmp_path / "x.npz", present=present)
    options = ["--data", path, "--seeds", "0", "--trials", "1", "--epochs", "1", "--methods", "Late fusion"]
    for more in ([], ["--protocol", "cpm", "--missing", "0.3"]):
        assert command(tmp_path / str(len(more)), *options, *more) == 0
        assert f"7 rows of {path} have none of these modalities and are left out" in capsys.readouterr().out
        (record,) = read(tmp_path / str(len(more)) / "out" / "runs.jsonl")
        assert sum(record["samples"].values()) == len(whole) - 7
    (tmp_path / "file").touch()
    assert cli.main(["compare", "--output", str(tmp_path / "file"), *map(str, options), "--modalities", "a,b"]) == 2
    assert "output: expected a folder, got the file" in capsys.readouterr().err


def test_data_that_lack_modalities_in_some_seeds_training_part(tmp_path, capsys):
    """Whichever seed comes first; as they are without a rate; and the report says who is left out, what runs cost and how."""
    speaker = dataset().fields["speaker"]
    present = np.ones((120, 2), bool)
    present[np.flatnonzero(speaker == 5)[::2], 0] = False
    path = save(tmp_path / "x.npz", present=present)
    options = ["--data", path, "--group", "speaker", "--folds", "--trials", "1", "--epochs", "1", "--protocol", "cpm"]
    for seeds in ("5,0", "0,5"):
        assert command(tmp_path / seeds, *options, "--seeds", seeds, "--methods", "MMIN") == 2
        assert "MMIN learns from true values" in capsys.readouterr().err
    assert command(tmp_path / "whole", *options, "--seeds", "5", "--methods", "Late fusion") == 2
    assert "protocol: expected --missing beside it" in capsys.readouterr().err
    assert command(tmp_path / "both", *options, "--seeds", "5,0", "--methods", "all") == 0
    printed = capsys.readouterr().out
    assert "as they are" in printed and "Left out: AE, CRA, MMIN, IF-MMIN, TATE, which learn" in printed
    folder = next((tmp_path / "both").rglob("report.html")).parent
    page, text = ((folder / name).read_text() for name in ("report.html", "table.md"))
    assert "Left out: AE" in text
    for part in ("Left out: AE", "passes before", "Samples of the first seed", "in training, validation and test alike", "[0.0]"):
        assert part in page
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["method"] for row in rows} == {"Late fusion", "QMF", "MLA rls", "CCA", "DCCA", "DCCAE", "CPM-Net"}
    assert {row["seed"] for row in rows} == {"0", "5"} and {row["rate"] for row in rows} == {"0.0"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "MMIN"], "methods: expected --protocol beside MMIN"),
        (["--protocol", "cpm"], "protocol: expected --missing beside it"),
        (["--protocol", "cpm", "--missing", "0.1", "--methods", "Magic"], "methods: expected all, or some of"),
        (
            ["--protocol", "cpm", "--missing", "0.1", "--group", "speaker", "--folds", "--seeds", "0,6"],
            "seeds: expected 0 … 5, one for each value of 'speaker' with --folds, got 6",
        ),
    ],
)
def test_refuses(tmp_path, capsys, options, message):
    assert command(tmp_path, "--data", save(tmp_path / "x.npz"), *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "runs.jsonl").exists()
    assert not (tmp_path / "out" / "settings.json").exists()


def test_rates_have_steps():
    assert rates("0.1:0.7:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7] and rates("0.1:0.7") == [0.1, 0.3, 0.5, 0.7]
    for bad in ("0.1:0.7:0", "0.1:0.7:-1", "0.1:0.7:0.1:3", "0.7:0.1:0.1"):
        with pytest.raises(Exception, match="expected rates"):
            rates(bad)


def runs(method, rate, accuracies):
    return [
        {
            **{"method": method, "rate": rate, "seed": seed, "trial": 0, "epoch": 1, "options": {}},
            **{"validation": {"accuracy": value, "nll": 1.0}, "samples": {"train": 9, "validation": 3, "test": 4}},
            "test": {"accuracy": value, "macro_f1": value, "weighted_f1": value},
            "cost": {"seconds": 1.5, "seconds_before": 0.1, "passes": 20, "passes_before": 2.0, "peak_mb": None},
        }
        for seed, value in enumerate(accuracies)
    ]


def test_the_winner_is_bold_and_what_falls_short_is_named():
    found = [*runs("Late fusion", 0.1, [0.9, 0.92]), *runs("AE", 0.1, [0.5, 0.5]), *runs("MLA rls", 0.1, [0.95, 0.96])]
    found += runs("Late fusion", 0.7, [0.5, 0.6])
    table = missing_report.table(found, "x")
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()}
    assert cells["MLA rls"] == ["**95.5 ± 0.7**", "–"] and cells["Late fusion"] == ["91.0 ± 1.4", "**55.0 ± 7.1**"]
    said = missing_report.reading(found)
    assert said[0].startswith("10 % missing: MLA rls is best on validation and reaches 95.5")
    assert said[0].endswith("; no other is level with it.")
    assert said[1].startswith("70 % missing, 1 of 3 methods run: Late fusion is best on validation and reaches")
    assert said[2].startswith("2 seeds are few: an interval is their span")
    assert said[3].startswith("Below 90 % of late fusion's accuracy at 10 % missing: AE (50.0 %).") and "dropout" in said[3]
    assert len(said) == 4
    for record in found:
        record["share"] = 0.5 if record["rate"] == 0.7 else 0.1
    assert missing_report.reading(found)[3] == "Of all entries are missing: 50 % at 70 %."
    found[4]["validation"] = {"accuracy": 0.1, "nll": 1.0}  # not chosen for what the test part says
    assert "Late fusion is best on validation and reaches 91.0" in missing_report.reading(found)[0]
    assert "one seed cannot tell" in missing_report.reading([record for record in found if record["seed"] == 0])[0]
    assert "reaches 90 %" in missing_report.reading([record for record in found if record["method"] != "AE"])[-1]


def test_the_bench_shows_what_there_is(tmp_path, capsys):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs("CCA", 0.1, [0.5])))
    bench.main(["--show", str(tmp_path)])
    assert "| digits, 1 seed |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--show", str(tmp_path / "nowhere")])
    assert "show: expected a folder with results" in capsys.readouterr().err
