"""The accuracy bench: same batches for all, nothing run twice, clear errors, and tables that say what the records say."""

import json
import sys

import numpy as np
import pytest
import torch

from bench import records
from bench.accuracy import __main__ as command
from bench.accuracy import jobs, methods, settings, tables
from bench.accuracy.methods import METHODS, Batches
from bench.accuracy.settings import setting
from mla_fast import data, reference


@pytest.fixture
def npz(tmp_path):
    """60 samples of two modalities that show one of three classes."""
    target = np.arange(60) % 3
    noise = np.random.RandomState(0)
    shown = {m: np.eye(width)[target] + 0.3 * noise.randn(60, width) for m, width in (("a", 3), ("b", 5))}
    path = tmp_path / "made_up.npz"
    np.savez(path, **shown, label=target, group=np.repeat(np.arange(6), 10))
    return path


def main(npz, output, *arguments):
    command.main(["--data", str(npz), "--modalities", "a,b", "--epochs", "1", "--output", str(output), *arguments])


def test_batches_repeat_from_their_seed_and_hold_everyone():
    train, _ = setting("competition").parts(0)
    plain, indexed = Batches(train, 3), Batches(train, 3, indexed=True)
    epochs = [list(plain), list(plain)]
    for (inputs, target, present), (same, same_target, same_present, index) in zip(epochs[0], indexed, strict=True):
        assert torch.equal(inputs["r0"], same["r0"]) and torch.equal(target, same_target)
        assert torch.equal(train.inputs["r1"][index], inputs["r1"]) and present is same_present is None
    assert len(epochs[0][-1][1]) == 300 % 64
    rows = [torch.cat([inputs["r0"] for inputs, *_ in epoch]) for epoch in epochs]
    assert not torch.equal(*rows) and torch.equal(*(r.sort(0).values for r in (rows[0], train.inputs["r0"])))


def test_every_method_starts_from_the_same_encoders(npz, monkeypatch):
    task = setting(str(npz), modalities=["a", "b"], epochs=1)
    train, _ = task.parts(0)
    drawn, encoder_for = [], methods.encoder_for
    monkeypatch.setattr(methods, "encoder_for", lambda *a: drawn.append(encoder_for(*a)) or drawn[-1])
    monkeypatch.setattr(methods, "fit_joint", lambda *_, **__: None)
    monkeypatch.setattr(methods.mla.Trainer, "fit", lambda *_, **__: None)
    for method in METHODS:
        methods.train(method, train, task, 7)
    first, second = (torch.stack([encoder[0].weight for encoder in drawn[m::2]]) for m in (0, 1))
    assert len(first) == len(METHODS) and (first == first[0]).all() and (second == second[0]).all()


def test_the_released_alpha_falls_within_each_epoch(npz):
    task = setting(str(npz), modalities=["a", "b"])
    train, _ = task.parts(0)  # 45 samples: one batch; of 150 three
    many = data.MultimodalDataset({m: x.repeat(4, 1)[:150] for m, x in train.inputs.items()}, train.target.repeat(4)[:150])
    alpha = methods._mla_settings("MLA official", many)["alpha"]
    batches = [0, 0, 1, 1, 2, 2, 0, 0]  # two modalities in each
    assert [alpha(step) for step in range(8)] == [reference.official_alpha(i, 3) for i in batches]


def test_all_methods_run_and_nothing_is_run_twice(npz, tmp_path, capsys, monkeypatch):
    output = tmp_path / "deep" / "results.jsonl"
    main(npz, output, "--seeds", "0-1", "--test-where", "group=0,3")
    found = records.read(output)
    assert [(r["method"], r["seed"]) for r in found] == [(m, s) for m in METHODS for s in (0, 1)]
    for record in found:
        assert (
            (record["data"], record["config"]) == ("made_up", "a,b label group=0,3")
            and record["epochs"] == 1
            and record["missing"] == 0
        )
        assert {"a", "b", "fused"} == record["accuracy"].keys() - {"average"}
        assert all(0 <= value <= 1 for value in record["accuracy"].values())
        assert ("average" in record["accuracy"]) == record["method"].startswith("MLA")
    said = capsys.readouterr().out
    assert f"[{2 * len(METHODS)}/{2 * len(METHODS)}" in said and said.rstrip().endswith(tables.accuracy(found).splitlines()[-1])

    monkeypatch.setattr(command, "run", lambda job: pytest.fail(f"{job} was run again"))
    main(npz, output, "--seeds", "1,0", "--test-where", "group=0,3", "--methods", "MLA window,Sum")
    assert records.read(output) == found and "| Sum" in capsys.readouterr().out


def test_a_file_cut_in_half_keeps_what_was_finished(npz, tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    arguments = ("--methods", "Sum,Concat,FiLM", "--seeds", "0")
    main(npz, output, *arguments)
    whole = output.read_text().splitlines(keepends=True)
    output.write_text("".join(whole[:2]) + whole[2][:25])
    main(npz, output, *arguments)
    assert "line 3 was cut short" in capsys.readouterr().err
    again = records.read(output)
    assert output.read_text().splitlines(keepends=True)[:2] == whole[:2] and len(again) == 3
    assert again[2]["accuracy"] == json.loads(whole[2])["accuracy"]  # and a run repeats

    output.write_text(whole[0] + whole[1][:25] + "\n" + whole[2])
    with pytest.raises(SystemExit):
        main(npz, output, *arguments)
    assert "line 2: expected a record in JSON" in capsys.readouterr().err
    assert output.read_text().startswith(whole[0])


def test_everything_goes_into_one_folder(npz, tmp_path, monkeypatch):
    studies, folder = [], tmp_path / "all of it"
    monkeypatch.setattr(command, "EVERYTHING", ("--data {data} --modalities a,b --epochs 1 --methods 'Sum,MLA none' --seeds 0",))
    monkeypatch.setattr(jobs, "main", lambda study, argv: studies.append((study.name, argv)))
    command.main(["--everything", "--data", str(npz), "--output", str(folder)])
    assert [r["method"] for r in records.read(folder / "accuracy.jsonl")] == ["Sum", "MLA none"]
    assert [name for name, _ in studies] == ["isolation", "gap", "collapse", "forgetting", "competition", *3 * ["adding"]]
    own = ["--jobs", "1", "--output", str(folder / "adding.jsonl")]
    assert studies[0][1][:4] == ["--data", str(npz), "--config", "B"] and studies[-1][1] == ["--data", "competition", *own]


@pytest.mark.exhaustive
def test_processes_find_what_one_does(npz, tmp_path):
    arguments = ["--methods", "Concat,MLA rls", "--seeds", "0", "--missing", "0.5"]
    for processes in ("1", "2"):
        main(npz, tmp_path / processes, *arguments, "--jobs", processes)
    one, two = ({r["method"]: r["accuracy"] for r in records.read(tmp_path / processes)} for processes in ("1", "2"))
    assert one == two and len(one) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "Sum,Product"], "got 'Product'"),
        (["--seeds", ""], "expected at least one seed, got ''"),
        (["--seeds", "3-1"], "expected at least one seed, got '3-1'"),
        (["--seeds", "0..5"], 'expected seeds as "0-5"'),
        (["--missing", "0.5:1.1"], "expected rates in [0, 1), got '0.5:1.1'"),
        (["--missing", "half"], 'expected rates as "0.1:0.7"'),
        (["--config", "Z"], "config: expected one of B, C, got 'Z'"),
        (["--label", "class"], "no array 'class'"),
        (["--test-where", "group=9"], "no sample has group=9"),
    ],
)
def test_bad_input_is_said(npz, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(npz, tmp_path / "out.jsonl", *arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_bad_data_is_said(npz):
    with pytest.raises(FileNotFoundError, match="no file nowhere.npz"):
        setting("nowhere.npz", modalities=["a"])
    with pytest.raises(ValueError, match="modalities: expected names of arrays"):
        setting(str(npz))
    with pytest.raises(ValueError, match="config: expected none for digits, got 'B'"):
        setting("digits", "B")
    with pytest.raises(ValueError, match="dataset: expected at least two modalities, got a"):
        methods.train("FiLM", setting(str(npz), modalities=["a"]).parts(0)[0], setting(str(npz), modalities=["a"]), 0)
    with pytest.raises(ValueError, match="method: expected one of"):
        methods.train("Product", setting("competition").parts(0)[0], setting("competition"), 0)


def test_rates():
    assert command.rates("0.1:0.7") == [0.1, 0.3, 0.5, 0.7]
    assert command.rates("0,0.25") == [0, 0.25] and jobs.seeds("0-2,7") == [0, 1, 2, 7]


def test_modalities_are_missing_in_both_parts_and_statistics_do_not_see_them(npz):
    task = setting(str(npz), modalities=["a", "b"], epochs=1)
    for i, part in enumerate(task.parts(4, 0.5)):
        assert torch.equal(part.present, data.missing_mask(len(part), 2, 0.5, 8 + i))
    train, _ = task.parts(4, 0.5)
    assert train.rows("a").mean().abs() < 1e-6 and train.inputs["a"].mean().abs() > 1e-4


def avdigits_file(path, N=120):
    """As avdigits.npz, but small; the images are blank."""
    label = np.arange(N) % 10
    audio = np.zeros((N, 32, 32), np.uint8)
    audio[np.arange(N), label] = 255
    np.savez(path, audio=audio, image=np.zeros((N, 28, 28), np.uint8), label=label, speaker=np.arange(N) // 10 % 6)
    return str(path)


def test_avdigits_b_holds_out_speakers_and_adds_noise(tmp_path):
    path = avdigits_file(tmp_path / "avdigits.npz")
    task = setting(path, "B")
    for seed, speakers in ((0, [2, 4]), (4, [0, 3]), (5, [1, 5])):
        train, test = task.prepare(seed)
        assert sorted(set(test.fields["speaker"])) == speakers and len(train) == 2 * len(test) == 80
        assert train.inputs["audio"].shape[1:] == (16, 16) and train.inputs["image"].shape[1:] == (14, 14)
        assert train.inputs["image"].std().item() == pytest.approx(0.3, rel=0.02)
    expected = np.random.RandomState(1005).randn(120, 14, 14)[np.arange(120) // 10 % 6 == 1] * 0.3
    np.testing.assert_allclose(test.inputs["image"][:10], expected[:10], atol=1e-6)
    assert (task.data, task.config, task.epochs, task.lr) == ("avdigits", "B", 20, 0.03)


def test_avdigits_c_asks_for_the_sum(tmp_path):
    whole = settings.avdigits(avdigits_file(tmp_path / "avdigits.npz"))
    whole.inputs["image"] += whole.target[:, None, None]
    added = settings._added(whole, 3)
    spoken = added.inputs["audio"].mean(2).argmax(1) * 2  # the row of the label, before halving
    assert len(added) == 480 and torch.equal(added.target - added.inputs["image"][:, 0, 0].long(), whole.target.repeat(4))
    assert ((spoken - whole.target.repeat(4)).abs() <= 1).all()
    assert added.target.unique().tolist() == list(range(19))


def made_up_records():
    task = {"data": "made_up", "config": "default", "epochs": 3}
    for seed, (rival, ours) in enumerate([(0.8, 0.9), (0.7, 0.7), (0.6, 0.8)]):
        yield {**task, "method": "Sum", "seed": seed, "missing": 0.0, "accuracy": {"a": 0.5, "fused": rival}}
        accuracies = {"a": 0.5, "average": ours - 0.1, "fused": ours}
        yield {**task, "method": "MLA window", "seed": seed, "missing": 0.0, "accuracy": accuracies}
    yield {**task, "method": "Sum", "seed": 0, "missing": 0.5, "accuracy": {"a": 0.5, "fused": 0.25}}


def test_tables_worked_out():
    missing, complete = tables.accuracy(list(made_up_records())).split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in complete.splitlines()]
    assert cells[0] == ["made_up, 3 epochs, 3 seeds", "a alone", "average", "fused", "MLA window ahead"]
    assert cells[2] == ["Sum", "50.0 ± 0.0", "-", "70.0 ± 10.0", "2 of 3"]
    assert cells[3] == ["MLA window", "50.0 ± 0.0", "70.0 ± 10.0", "80.0 ± 10.0", "-"]
    assert [cell.strip() for cell in missing.splitlines()[2].strip("|").split("|")] == ["Sum", "25.0"]


def test_ablation_pairs_its_seeds():
    task = {"data": "x", "config": "B", "epochs": 1, "missing": 0.0}
    found = [
        {**task, "method": method, "seed": seed, "accuracy": {"average": average, "fused": fused}}
        for method, runs in {"MLA none": [(0.5, 0.4), (0.7, 0.8)], "MLA rls": [(0.6, 0.6), (0.8, 0.9)]}.items()
        for seed, (average, fused) in enumerate(runs)
    ]
    rls, none = tables.ablation(found).splitlines()[2:]
    assert [cell.strip() for cell in rls.strip("|").split("|")][3:] == ["5.0 ± 7.1", "15.0 ± 7.1"]
    assert [cell.strip() for cell in none.strip("|").split("|")][3:] == ["0.0 ± 14.1", "-"]


def test_show_prints_the_tables_and_draws(tmp_path, capsys, monkeypatch):
    path = tmp_path / "results.jsonl"
    for record in made_up_records():
        records.append(path, record)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command.main(["--show", str(path)])
    assert tables.accuracy(records.read(path)) in capsys.readouterr().out and not (tmp_path / "results.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    command.main(["--show", str(path)])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        command.main(["--show", str(tmp_path / "nothing.jsonl")])
    assert "expected results of bench.accuracy, got none" in capsys.readouterr().err
