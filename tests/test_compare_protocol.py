"""The protocol of the comparison: parts, trials, the choice on validation, runs that survive being killed, what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from bench.accuracy import balanced
from mla_fast import cli, data
from mla_fast.cli_options import seeds
from mla_fast.compare import runner
from mla_fast.compare.learners import Budget, make_learner
from mla_fast.compare.methods import METHODS, select, trials
from mla_fast.compare.records import append, read
from mla_fast.compare.run import Job, run, train_to_best_epoch
from mla_fast.compare.statistics import choose
from mla_fast.compare.task import Task, hold_out, load_task
from mla_fast.encoders import MeanEmbedding

SMALL = Budget(epochs=2, batch_size=32, features=8)


def dataset(N=120, classes=3, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % classes
    inputs = {
        m: torch.nn.functional.one_hot(y, w) + noise * torch.randn(N, w, generator=generator) for m, w in (("a", 4), ("b", 6))
    }
    return data.MultimodalDataset(inputs, y, {"speaker": (np.arange(N) // classes) % 6})


def save(path, whole=None, **replaced):
    whole = whole or dataset()
    arrays = {**{m: x.numpy() for m, x in whole.inputs.items()}, "label": whole.target.numpy(), **whole.fields, **replaced}
    np.savez(path, **arrays)
    return path


def task(permuted=False):
    def prepare(seed):
        rest, test = hold_out(dataset(), None, seed, "test")
        if permuted:
            order = torch.randperm(len(test), generator=torch.Generator().manual_seed(9))
            test = data.MultimodalDataset(test.inputs, test.target[order], test.fields)
        return rest, test

    return Task("small", "x", prepare)


def job(method="Concat", seed=0, trial=0, where=None):
    return Job(where or task(), method, seed, trial, SMALL, (0.5,), "cpu", "digest")


def command(tmp_path, *options):
    return cli.main(["compare", "--output", str(tmp_path / "out"), "--jobs", "1", *map(str, options)])


@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_in_two_parts(seed, tmp_path):
    whole = load_task(str(save(tmp_path / "x.npz")), ["a", "b"], group="speaker")
    parts = whole.parts(seed)
    groups = [set(part.fields["speaker"].tolist()) for part in parts]
    assert sum(map(len, parts)) == 120 and sum(map(len, groups)) == 6 and all(groups)
    assert whole.parts(seed)[0].target.equal(parts[0].target)
    for x in parts[0].inputs.values():
        assert x.mean().item() == pytest.approx(0, abs=1e-5) and x.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_folds_leave_out_one_group_after_the_other(tmp_path):
    whole = load_task(str(save(tmp_path / "x.npz")), ["a", "b"], group="speaker", folds=True)
    tested = []
    for seed in range(6):
        parts = [set(part.fields["speaker"].tolist()) for part in whole.split(seed)]
        assert sum(map(len, parts)) == 6 and len(parts[2]) == 1
        tested += parts[2]
    assert tested == sorted(tested) and len(set(tested)) == 6


def test_every_class_has_its_share_without_a_group():
    train, validation, test = task().parts(3)
    assert [len(part) for part in (train, validation, test)] == [68, 22, 30]
    assert torch.bincount(test.target).tolist() == [10, 10, 10]


@pytest.mark.parametrize("method", METHODS)
def test_trials_are_the_defaults_first_and_no_two_the_same(method):
    found = trials(method, 4)
    assert found[0] == {name: values[0] for name, values in METHODS[method].grid.items()} | {
        "lr_factor": 1.0,
        "weight_decay": 0.0,
    }
    assert len({json.dumps(each, sort_keys=True) for each in found}) == 4 and trials(method, 2) == found[:2]


def test_every_method_starts_from_the_same_encoders():
    train, validation, _ = task().parts(0)
    first = None
    for name in METHODS:
        learner = make_learner(name, trials(name, 1)[0], train, validation, SMALL, 0)
        weights = [p.detach().clone() for p in learner.model.encoders.parameters()]
        first = first or weights
        assert all(map(torch.equal, weights, first)), name


@pytest.mark.parametrize("method", ["Concat", "PMR", "MLA rls"])
def test_the_best_epoch_is_that_of_the_validation_part(method):
    train, validation, _ = task().parts(0)
    scored = []
    learner = make_learner(method, {"lr_factor": 3.0}, train, validation, dataclasses.replace(SMALL, epochs=6), 0)
    original = learner.train_epoch

    def remember(epoch):
        original(epoch)
        logits = learner.logits(validation.inputs, None)
        right = (logits.argmax(1) == validation.target).double().mean().item()
        scored.append((right, -torch.nn.functional.cross_entropy(logits.double(), validation.target).item(), logits))

    learner.train_epoch = remember
    epoch, found = train_to_best_epoch(learner, validation)
    best = max(range(6), key=lambda i: scored[i][:2])
    assert epoch == best + 1 and found["accuracy"] == pytest.approx(scored[best][0])
    torch.testing.assert_close(learner.logits(validation.inputs, None), scored[best][2])


def test_nothing_chosen_sees_the_test_labels():
    cases = [("Concat", 0), ("Concat", 1), ("Diagnosing & Re-learning", 0), ("Diagnosing & Re-learning", 1), ("MLA window", 0)]
    chosen = []
    for permuted in (False, True):
        runs = choose([run(job(method, 1, trial, task(permuted))) for method, trial in cases])
        chosen.append([(r["method"], r["trial"], r["epoch"], r["validation"]) for r in runs])
        accuracies = [r["test"]["accuracy"] for r in runs]
    assert chosen[0] == chosen[1] and max(accuracies) < 0.6  # permuted labels cannot be told


def test_a_choice_is_by_accuracy_then_likelihood_then_the_first():
    def record(trial, accuracy, nll, seed=0):
        return {"method": "M", "seed": seed, "trial": trial, "validation": {"accuracy": accuracy, "nll": nll}}

    found = [record(2, 0.9, 0.2), record(0, 0.9, 0.3), record(1, 0.8, 0.1), record(3, 0.9, 0.2), record(1, 0.5, 1.0, seed=1)]
    assert [(r["seed"], r["trial"]) for r in choose(found)] == [(0, 2), (1, 1)]


def test_a_run_costs_what_it_says():
    found = {method: run(job(method))["cost"] for method in ("Concat", "UMT", "G-Blending", "MLA none")}
    assert {name: cost["passes_before"] for name, cost in found.items()} == {
        "Concat": 0,
        "UMT": 2,
        "G-Blending": 4,
        "MLA none": 0,
    }
    assert all(cost["passes"] == 2 and 0 <= cost["seconds_before"] <= cost["seconds"] for cost in found.values())


def fake(job):
    """A run that takes no time."""
    return {
        **{name: getattr(job, name) for name in ("method", "seed", "trial", "settings")},
        "validation": {"accuracy": 0.5, "nll": 1.0},
        "cost": {"seconds": 0.0},
    }


def test_only_what_is_not_done_is_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "run", lambda job: ran.append((job.method, job.seed, job.trial)) or fake(job))
    jobs = [job(method, seed) for method in ("Sum", "Concat") for seed in range(2)]
    append(tmp_path / "runs.jsonl", fake(jobs[2]))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"method": "Concat", "se')  # killed while writing
    found = runner.run_all(jobs, tmp_path, 1, say=lambda _: None)
    assert ran == [("Sum", 0, 0), ("Sum", 1, 0), ("Concat", 1, 0)]
    assert [(r["method"], r["seed"]) for r in found] == [("Sum", 0), ("Sum", 1), ("Concat", 0), ("Concat", 1)]
    assert len(read(tmp_path / "runs.jsonl")) == 4


def test_a_failure_keeps_what_is_done(tmp_path, monkeypatch):
    def fail(job):
        if job.seed == 2:
            raise ValueError("no")
        return fake(job)

    monkeypatch.setattr(runner, "run", fail)
    with pytest.raises(ValueError, match="no"):
        runner.run_all([job(seed=seed) for seed in range(4)], tmp_path, 1, say=lambda _: None)
    assert [r["seed"] for r in read(tmp_path / "runs.jsonl")] == [0, 1]


@pytest.mark.exhaustive
def test_killed_at_any_moment_the_results_are_the_same(tmp_path):
    path = save(tmp_path / "x.npz")
    options = ["compare", "--data", str(path), "--modalities", "a,b", "--epochs", "2", "--methods", "Concat,UMT,MLA rls"]
    options += ["--seeds", "0-1", "--trials", "2", "--jobs", "1", "--output"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        arguments = [sys.executable, "-m", "mla_fast", *options, str(folder)]
        return subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL)

    lines, random = [0], np.random.default_rng(5)
    for _ in range(3):
        process = start(tmp_path / "killed")
        until = time.monotonic() + 60
        while process.poll() is None and len(read(tmp_path / "killed" / "runs.jsonl")) <= lines[-1] and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 'methods = ["Concat", "UMT", "MLA rls"]' in (tmp_path / "killed" / "run.toml").read_text()
        lines.append(len(read(tmp_path / "killed" / "runs.jsonl")))
    runs = 12
    assert lines[1] < runs
    for folder in ("killed", "whole"):
        assert cli.main([*options, str(tmp_path / folder)]) == 0
    results = []
    for folder in ("killed", "whole"):
        found = read(tmp_path / folder / "runs.jsonl")
        for each in found:
            each["cost"] = each["cost"]["passes_before"]
        results.append(sorted(map(json.dumps, found)))
        assert (tmp_path / folder / "report.html").exists() and (tmp_path / folder / "results.csv").exists()
    assert results[0] == results[1] and len(results[0]) == runs


REFUSED = {
    "modalities: expected at least two names": ["--modalities", "a"],
    "group: expected one of speaker, one, got 'room'": ["--group", "room"],
    "folds: expected --group beside it": ["--folds"],
    "seeds: expected 0 … 5, one for each value of 'speaker' with --folds, got 6": [
        "--group",
        "speaker",
        "--folds",
        "--seeds",
        "6",
    ],
    "group: expected at least three values of 'one', to train, to choose and to test on, got 1": ["--group", "one"],
    "methods: expected all, or some of Sum, Concat": ["--methods", "Concat,Magic"],
    "trials: expected 1 to 9, the points of the grid of Concat, got 10": ["--trials", "10", "--methods", "Concat"],
    "--device: expected auto or an available device, got 'moon'": ["--device", "moon"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_bad_input_before_anything_is_run(tmp_path, capsys, message):
    whole = dataset()
    whole.fields["one"] = np.zeros(len(whole), dtype=np.int64)
    path = save(tmp_path / "x.npz", whole)
    assert command(tmp_path, "--data", path, "--modalities", "a,b", *REFUSED[message]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "runs.jsonl").exists()


def test_refuses_data_that_cannot_be_judged(tmp_path, capsys):
    whole = dataset()
    alone = torch.where(torch.from_numpy(whole.fields["speaker"]) == 0, 3, whole.target)  # a class that one speaker says
    path = save(tmp_path / "alone.npz", whole, label=alone.numpy())
    options = ["--modalities", "a,b", "--group", "speaker", "--seeds", "0-5", "--methods", "Concat"]
    assert command(tmp_path, "--data", path, *options) == 2
    assert "expected every class in the training part, got none of class 3" in capsys.readouterr().err
    few = save(tmp_path / "few.npz", whole.subset(slice(2)))
    assert command(tmp_path, "--data", few, "--modalities", "a,b") == 2
    assert "data: expected enough samples for a" in capsys.readouterr().err
    assert command(tmp_path, "--data", tmp_path / "none.npz", "--modalities", "a,b") == 2
    assert "data: expected digits, competition or an .npz" in capsys.readouterr().err


def test_arrays_are_read_as_train_reads_them(tmp_path, capsys):
    label = np.arange(90) % 3
    words = np.stack([label + 1, 5 + np.arange(90) % 2, np.zeros_like(label)], 1)
    np.savez(
        tmp_path / "x.npz", words=words, picture=np.eye(3, dtype=np.float32)[label][:, None, :, None].repeat(4, 3), label=label
    )
    options = ["compare", "--data", str(tmp_path / "x.npz"), "--modalities", "words,picture", "--seeds", "0", "--trials", "1"]
    options += ["--epochs", "2", "--jobs", "1", "--methods", "Concat,MLA window", "--missing", "0.3"]
    assert cli.main([*options, "--output", str(tmp_path / "a")]) == 2
    assert "may be tokens" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert cli.main([*options, "--output", str(tmp_path / "a"), "--layout", "words=tokens"]) == 0
    task = load_task(str(tmp_path / "x.npz"), ["words", "picture"], layouts={"words": "tokens"})
    assert task.layouts == {"words": "tokens", "picture": "image"} and task.vocabulary == {"words": 7}
    train = task.parts(0)[0]
    assert train.inputs["words"].dtype == torch.int64 and train.inputs["words"].min() == 0  # not standardised
    assert (
        type(make_learner("Sum", {}, *task.parts(0)[:2], SMALL, 0, encoder=task.encoder).model.encoders["words"]) is MeanEmbedding
    )
    assert cli.main([*options, "--output", str(tmp_path / "a"), "--layout", "words=features"]) == 2
    assert "layout" in capsys.readouterr().err
    assert cli.main([*options, "--output", str(tmp_path / "b"), "--layout", "words=tokens", "--protocol", "cpm"]) == 2
    assert "got tokens of 'words'" in capsys.readouterr().err


def test_refuses_results_of_other_data_or_settings_and_keeps_them(tmp_path, capsys):
    options = ["--modalities", "a,b", "--methods", "Concat", "--seeds", "0", "--trials", "1", "--epochs", "1"]
    first, second = save(tmp_path / "x.npz"), save(tmp_path / "y.npz", dataset(seed=5))
    assert command(tmp_path, "--data", first, *options) == 0
    kept = (tmp_path / "out" / "runs.jsonl").read_text()
    assert command(tmp_path, "--data", second, *options) == 2
    assert "has results of data 'x', expected 'y'; choose another folder" in capsys.readouterr().err
    save(first, dataset(seed=6))
    assert command(tmp_path, "--data", first, *options) == 2
    assert "has results of identity" in capsys.readouterr().err
    save(first)
    assert command(tmp_path, "--data", first, *options[:-1], "2") == 2
    assert "has results of epochs 1, expected 2" in capsys.readouterr().err
    assert command(tmp_path, "--data", first, *options[:-4], "--trials", "2", "--epochs", "1") == 0  # more of the same
    assert (tmp_path / "out" / "runs.jsonl").read_text().startswith(kept)
    (tmp_path / "out" / "runs.jsonl").write_text(json.dumps({**json.loads(kept), "settings": "other"}) + "\n")
    assert command(tmp_path, "--data", first, *options) == 2
    assert "line 1 is a run with other settings" in capsys.readouterr().err


def test_methods_for_another_number_of_modalities_are_left_out_or_refused():
    names, left_out = select(["all"], 3)
    assert left_out == ["PMR"] and len(names) == len(METHODS) - 1
    assert select(["all"], 2)[1] == []
    with pytest.raises(ValueError, match="expected methods for 3 modalities, got 'PMR', which is for 2"):
        select(["Concat", "PMR"], 3)


def test_seeds_are_each_taken_once():
    assert seeds("0-2,1,5") == [0, 1, 2, 5]


def test_the_bench_goes_by_the_same_protocol(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(balanced.TASKS, "competition")
    options = ["--methods", "Concat,MLA none", "--seeds", "0-1", "--trials", "1", "--epochs", "1", "--jobs", "1"]
    balanced.main([*options, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "avdigits B is left out: it needs --data avdigits.npz" in printed and "| digits, 2 seeds, 1 trials" in printed
    assert len(read(tmp_path / "digits" / "runs.jsonl")) == 4 and (tmp_path / "digits" / "report.html").exists()
    balanced.main(["--show", str(tmp_path)])
    assert printed.endswith(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        balanced.main(["--show", str(tmp_path / "nowhere")])
    assert "show: expected a folder with results" in capsys.readouterr().err
