"""The command line in several processes: one process with the same batches is the oracle."""

import functools
import json

import numpy as np
import pytest
import torch
from helpers import assert_bitwise, everything, exhaustive, make_model, momentum_sgd
from ranks import run_command, run_ranks

import mla_fast as mla
from mla_fast import ranks
from mla_fast.checkpoint import read_checkpoint
from mla_fast.cli import main
from mla_fast.distributed import portable_state_dict

f64 = torch.float64
N = 84  # training samples: the last of their batches has as many as it happens to


def samples(seed=0):
    """Samples of three modalities, of which 40 % are missing."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {m: torch.randn(N, w, generator=generator, dtype=f64) for m, w in {"audio": 4, "image": 6, "text": 3}.items()}
    present = torch.rand(N, 3, generator=generator) < 0.6
    return mla.data.MultimodalDataset(inputs, torch.randint(3, (N,), generator=generator), present=present)


def trained(rank, world):
    """Some 100 steps of each modality on global batches of 8, shared by rows; the last batch of an epoch is of 4."""
    results = {}
    for projection, target in (("rls", "gradient"), ("window", "update")):
        model = make_model(dtype=f64)
        model = mla.distribute(model) if world > 1 else model
        optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters(), lr=0.02), model.head, projection=projection, target=target)
        trainer = mla.Trainer(model, optimizer, seed=0, progress=False)
        batches = ranks.share(mla.data.loader(samples(), 8, shuffle=True), ranks.ShareOfBatches)
        trainer.fit(batches, epochs=9)
        state = {**everything(model, optimizer), "model": portable_state_dict(model)}
        results[projection] = state, trainer.history
    return results


@pytest.mark.parametrize("world", [2, *exhaustive(4)])
def test_ranks_are_one_process_with_the_same_batches_after_100_steps(tmp_path, world):
    alone = trained(0, 1)
    found = run_ranks(trained, world, tmp_path)
    for projection, (expected, history) in alone.items():
        assert all(layer["step"] > 250 for layer in expected["layers"].values())  # of three modalities
        for rank in found:
            assert_bitwise(rank[projection][0], found[0][projection][0])
        torch.testing.assert_close(found[0][projection][0], expected, rtol=1e-12, atol=1e-12)
        for record, one in zip(found[0][projection][1], history, strict=True):
            assert record["loss"] == pytest.approx(one["loss"], rel=1e-12)


class Stop(Exception):
    pass


def resumed(folder, leave_at, size, rank, world, seed=0):
    """Some epochs from a checkpoint, if there is one, until batch `leave_at` of the run, on global batches of `size`."""
    model = make_model(dtype=f64)
    model = mla.distribute(model) if world > 1 else model
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters(), lr=0.02), model.head, projection="window", target="update")
    trainer = mla.Trainer(model, optimizer, seed=0, progress=False)
    if (folder / "c.pt").exists():
        trainer.resume(folder / "c.pt")
    batches = ranks.share(mla.data.loader(samples(seed), size, shuffle=True), ranks.ShareOfBatches)
    trained_on = trainer._train_on

    def until(group):
        if trainer.epoch * 11 + trainer._position.batches == leave_at:
            raise Stop
        return trained_on(group)

    trainer._train_on = until
    try:
        trainer.fit(batches, 4, checkpoint=folder / "c.pt", checkpoint_every=1)
    except (Stop, ValueError) as error:
        return str(error)
    return {**everything(model, optimizer), "model": portable_state_dict(model)}, trainer.history


def test_another_number_of_ranks_goes_on_inside_of_an_epoch(tmp_path):
    for name in ("alone", "two", "wrong", "other", "three"):  # whose ranks find each other there
        (tmp_path / name).mkdir()
    expected, history = resumed(tmp_path / "alone", None, 8, 0, 1)
    run_ranks(functools.partial(resumed, tmp_path, 16, 8), 2, tmp_path / "two")
    wrong = run_ranks(functools.partial(resumed, tmp_path, 40, 12), 3, tmp_path / "wrong")
    assert all("5 of 40 samples over all of them, got 60: the batches of all ranks" in said for said in wrong)
    other = run_ranks(functools.partial(resumed, tmp_path, 40, 8, seed=1), 3, tmp_path / "other")
    assert all("5 of 40 samples over all of them, got others: the batches" in said for said in other)
    resumed(tmp_path, 25, 8, 0, 1)
    found = run_ranks(functools.partial(resumed, tmp_path, None, 8), 3, tmp_path / "three")
    for state, records in found:
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
        for record, one in zip(records, history, strict=True):
            assert record["loss"] == pytest.approx(one["loss"], rel=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_of_a_batch_are_the_batch_in_its_order(world):
    batches = [list(range(8)), [8, 9, 10], [11]]
    shares = [list(ranks.ShareOfBatches(batches, rank, world)) for rank in range(world)]
    for i, batch in enumerate(batches):
        assert [sample for share in shares for sample in share[i]] == batch
        sizes = [len(share[i]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    whole = [ranks.EveryOther(batches, rank, world) for rank in range(world)]
    assert sorted(batch for share in whole for batch in share) == batches
    assert [len(share) for share in whole] == [len(list(share)) for share in whole]


@pytest.fixture
def archive(tmp_path):
    random = np.random.default_rng(0)
    label = np.arange(90) % 3
    image = random.integers(0, 60, (90, 6, 7)).astype(np.uint8)
    image[np.arange(90), label * 2] += 150
    sound = random.normal(size=(90, 7)).astype(np.float32)
    sound[np.arange(90), label] += 3
    path = tmp_path / "file.npz"
    np.savez(path, image=image, sound=sound, label=label, speaker=np.arange(90) % 5)
    return path


def command(archive, output, *more, epochs=3):
    what = ["train", "--data", archive, "--modalities", "sound,image", "--test-where", "speaker=2,4", "--device", "cpu"]
    return [*what, "--epochs", epochs, "--batch-size", "16", "--missing", "0.2", "--output", output, *more]


def alone(argv):
    return main(list(map(str, argv)))


def statuses(found):
    return [status for status, _, _ in found]


def assert_close_runs(folder, other, names=("checkpoint.pt",)):
    """The parameters and P of two runs, to float32's rounding after some steps."""
    for name in names:
        one, two = read_checkpoint(folder / name), read_checkpoint(other / name)
        torch.testing.assert_close(one["model"], two["model"], rtol=1e-4, atol=1e-5)
        P, Q = (saved["optimizer"]["mla"]["layers"][0]["tensors"] for saved in (one, two))
        torch.testing.assert_close(P, Q, rtol=1e-4, atol=1e-5)
        for record, other_record in zip(one["history"], two["history"], strict=True):
            assert record["loss"] == pytest.approx(other_record["loss"], rel=1e-4)


def test_train_and_eval_are_those_of_one_process(archive, tmp_path, capsys):
    more = ["--validation", "0.3"]
    assert alone(command(archive, tmp_path / "one", *more)) == 0
    expected = capsys.readouterr().out
    first, second = run_command([command(archive, tmp_path / "two", *more)] * 2, tmp_path)
    assert first[0] == second[0] == 0 and second[1:] == ("", "")
    tables = [said.partition("test accuracy")[2].partition("wrote")[0] for said in (expected, first[1])]
    assert tables[0] == tables[1] and first[1].count("epoch 3/3") == 1
    assert_close_runs(tmp_path / "one", tmp_path / "two", ("checkpoint.pt", "best.pt"))
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for part in ("accuracy", "macro_f1", "use", "class_accuracy", "samples"):
        assert results[0]["test"][part] == results[1]["test"][part]
    argv = ["eval", tmp_path / "one" / "checkpoint.pt", "--all"]
    assert alone(argv) == 0
    expected = capsys.readouterr().out
    found = run_command([argv] * 3, tmp_path)
    assert statuses(found) == [0, 0, 0] and found[0][1] == expected and found[1][1] == found[2][1] == ""


def test_a_checkpoint_goes_on_with_another_number_of_ranks(archive, tmp_path):
    for world, epochs in ((2, 1), (1, 2), (4, 3)):
        argv = command(archive, tmp_path / "some", *([] if epochs == 1 else ["--resume"]), epochs=epochs)
        assert statuses(run_command([argv] * world, tmp_path)) == [0] * world
    assert len(read_checkpoint(tmp_path / "some" / "checkpoint.pt")["ranks"]) == 4
    # The learning rate falls as the first command has planned it, so one process is given the same three.
    for epochs in (1, 2, 3):
        assert alone(command(archive, tmp_path / "same", *([] if epochs == 1 else ["--resume"]), epochs=epochs)) == 0
    assert_close_runs(tmp_path / "same", tmp_path / "some")


def refused(found, *texts):
    """Every rank has ended with an error that has these texts in it, and nothing else."""
    for status, _, said in found:
        assert status == 2 and len(said.splitlines()) == 1 and all(text in said for text in texts), said


def test_bad_input_is_an_error_on_all_ranks_that_names_it(archive, tmp_path):
    other = tmp_path / "other.npz"
    arrays = dict(np.load(archive))
    good = command(archive, tmp_path / "run")
    for name, change, texts in (
        (
            "fewer samples",
            {key: x[:80] for key, x in arrays.items()},
            ("expected the same samples on every rank, got [54, 36]", "on rank 1"),
        ),
        ("another shape", {**arrays, "sound": np.zeros((90, 8), np.float32)}, ("expected the same encoders", "on rank 1")),
        ("other values", {**arrays, "sound": arrays["sound"] + 1}, ("expected the same statistics", "on rank 1")),
        ("other labels", {**arrays, "label": arrays["label"][::-1]}, ("expected the same labels", "on rank 1")),
        ("no such array", {key: x for key, x in arrays.items() if key != "image"}, ("image",)),
    ):
        np.savez(other, **change)
        found = run_command([good, command(other, tmp_path / "run")], tmp_path)
        refused(found, *texts)
        assert not (tmp_path / "run" / "run.toml").exists(), name
    found = run_command([good, command(tmp_path / "nowhere.npz", tmp_path / "run")], tmp_path)
    refused(found, "nowhere.npz")
    assert "rank 1: " in found[0][2]
    refused(run_command([good, command(archive, tmp_path / "elsewhere")], tmp_path), "--output: expected a folder that all ranks")
    refused(run_command([good, [*good, "--lr", "0.5"]], tmp_path), "expected the same lr on every rank, got 0.03 on rank 0")
    for size in ("1", "15"):
        refused(
            run_command([[*good, "--batch-size", size]] * 2, tmp_path), "--batch-size: expected a multiple of the 2 ranks", size
        )


class Idle(torch.nn.Linear):
    """An encoder with a layer that nothing goes through."""

    def __init__(self):
        super().__init__(7, 4)
        self.unused = torch.nn.Linear(2, 2)


def test_a_parameter_that_no_pass_uses_is_refused_by_name(archive, tmp_path):
    argv = command(archive, tmp_path / "run", "--encoder", f"sound={__name__}:Idle", "--features", 4)
    refused(run_command([argv] * 2, tmp_path), "--encoder: expected all parameters to be used in every pass")


def test_what_one_process_does_is_refused_by_name(archive, tmp_path):
    predict = ["predict", tmp_path / "c.pt", archive]
    for argv, text in ((["demo"], "demo: "), (predict, "predict: "), (["env"], "env: ")):
        refused(run_command([argv] * 2, tmp_path), f"{text}expected one process, got 2")
    adding = [*command(archive, tmp_path / "run"), "--add", "sound", "--from", tmp_path / "c.pt"]
    refused(run_command([adding] * 2, tmp_path), "--add: expected one process")
    refused(run_command([[*command(archive, tmp_path / "run"), "--device", "cuda:1"]] * 2, tmp_path), "--device: expected")


def test_what_torchrun_has_restarted_goes_on(archive, tmp_path, monkeypatch):
    """A run that is there is another's unless this launch has begun it; then it goes on, whatever the options say."""
    run, again = tmp_path / "run", {"TORCHELASTIC_RESTART_COUNT": "1"}
    argv = command(archive, run, epochs=1)
    monkeypatch.setattr("mla_fast.cli_output.write_report", lambda *_: None)
    assert alone(argv) == 0
    for environment in ({}, again):
        refused(run_command([argv] * 2, tmp_path, **environment), "--resume continues that run")
    assert statuses(run_command([[*argv, "--overwrite"]] * 2, tmp_path)) == [0, 0]
    for more in ([], ["--overwrite"], ["--resume"]):
        found = run_command([[*argv, *more]] * 2, tmp_path, **again)
        assert statuses(found) == [0, 0] and "nothing left to train" in found[0][1]
    (run / "checkpoint.pt").unlink()  # killed before the first was written
    found = run_command([argv] * 2, tmp_path, **again)
    assert statuses(found) == [0, 0] and "epoch 1/1" in found[0][1]
    refused(run_command([argv] * 2, tmp_path, TORCHELASTIC_RUN_ID="b", **again), "--resume continues that run")


class Unreadable:
    """A loader of two batches on rank 0, and on rank 1 one batch and an error."""

    def __init__(self, rank, error):
        self.rank, self.error = rank, error

    def __len__(self):
        return 2

    def __iter__(self):
        batch = {m: torch.zeros(4, w) for m, w in {"audio": 4, "image": 6, "text": 3}.items()}, torch.arange(4) % 3
        yield batch
        if self.rank == 1 and self.error == "read":
            raise OSError("shard 7 is gone")
        if self.rank == 1:
            yield {"audio": torch.zeros(4, 4)}, torch.full((4,), 9)
        yield batch


def unreadable(rank, world):
    messages = []
    for error in ("read", "label"):
        model = mla.distribute(make_model())
        trainer = mla.Trainer(model, mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head), progress=False)
        for call in (
            lambda t=trainer, e=error: t.fit(Unreadable(rank, e), 1),
            lambda t=trainer, e=error: t.evaluate(Unreadable(rank, e)),
        ):
            try:
                call()
            except (OSError, ValueError) as failure:
                messages.append((type(failure).__name__, str(failure)))
    return messages


def test_a_batch_that_one_rank_cannot_read_is_an_error_on_all(tmp_path):
    others, own = run_ranks(unreadable, 2, tmp_path)
    label = "target: expected labels in 0 … 2, got 9"
    assert own == [("OSError", "shard 7 is gone")] * 2 + [("ValueError", label)] * 2
    assert others == [("RankError", "rank 1: shard 7 is gone")] * 2 + [("RankError", f"rank 1: {label}")] * 2


def test_a_comparison_is_spread_over_ranks(tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("scipy"), pytest.importorskip("torchmetrics")
    argv = ["compare", "--data", "competition", "--methods", "Concat,MLA none", "--trials", 1, "--epochs", 1, "--jobs", 1]
    argv += ["--output", tmp_path / "runs"]
    assert alone([*argv, "--seeds", "0"]) == 0
    found = run_command([[*argv, "--seeds", "0,1"]] * 2, tmp_path, timeout=240)
    assert statuses(found) == [0, 0] and "2 of 4 runs are done already" in found[0][1] and found[1][1:] == ("", "")
    runs = [json.loads(line) for line in (tmp_path / "runs" / "runs.jsonl").read_text().splitlines()]
    assert sorted((run["method"], run["seed"]) for run in runs) == [(m, s) for m in ("Concat", "MLA none") for s in (0, 1)]
    assert (tmp_path / "runs" / "report.html").exists()
