"""Callbacks that keep an epoch's numbers: a CSV, and any logger."""

import csv

import pytest
import torch
from helpers import assert_bitwise, make_inputs, make_model, wrap

import mla_fast as mla
from mla_fast.callbacks import CSV, Log, flatten


def batches():
    return [(make_inputs(seed=i), torch.tensor([0, 1, 2, 0, 1, 2])) for i in range(2)]


def fit(callback, epochs=3, resume=None, checkpoint=None):
    model = make_model()
    trainer = mla.Trainer(model, wrap(model), seed=0, callbacks=[callback])
    if resume is not None:
        trainer.resume(resume)
    return trainer.fit(batches(), epochs, validation=batches(), checkpoint=checkpoint)


def test_a_row_for_each_epoch_over_several_processes(tmp_path):
    path, checkpoint = tmp_path / "folder/history.csv", tmp_path / "checkpoint.pt"
    fit(CSV(path), 2, checkpoint=checkpoint)
    fit(CSV(path), 3)  # a third epoch whose checkpoint was lost
    history = fit(CSV(path), 4, resume=checkpoint)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == [flatten(record) for record in history]
    assert {"epoch", "loss/audio", "validation/accuracy/fused"} <= set(rows[0]) and len(rows) == 4


def test_numbers_that_come_later_get_a_column(tmp_path):
    log = CSV(tmp_path / "a.csv")
    log({"epoch": 1, "loss": {"audio": 0.5}})
    log({"epoch": 2, "loss": {"audio": 0.25, "text": 1.0}})
    assert (tmp_path / "a.csv").read_text() == "epoch,loss/audio,loss/text\n1,0.5,\n2,0.25,1.0\n"


def test_any_logger():
    said = []
    history = fit(Log(lambda numbers, step: said.append((step, numbers))))
    assert [step for step, _ in said] == [1, 2, 3]
    for (_, numbers), record in zip(said, history, strict=True):
        assert numbers == {name: value for name, value in flatten(record).items() if name != "epoch"}
    with pytest.raises(TypeError, match=r"^log: expected a function of \(numbers, step=epoch\), got 3"):
        Log(3)


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True)])
def test_checkpoints_with_and_without_compile(tmp_path, saved, loaded):
    def trainer(compiled):
        model = make_model()
        if compiled:
            encoders = {m: torch.compile(encoder, backend="eager") for m, encoder in model.encoders.items()}
            model = mla.MultimodalModel(encoders, model.head)
        return mla.Trainer(model, wrap(model), seed=0)

    first, second = trainer(saved), trainer(loaded)
    first.fit(batches(), 1, checkpoint=tmp_path / "checkpoint.pt")
    assert not any("_orig_mod" in name for name in mla.checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")["model"])
    second.resume(tmp_path / "checkpoint.pt")
    first.fit(batches(), 2)
    second.fit(batches(), 2)
    assert_bitwise(list(first.model.parameters()), list(second.model.parameters()))


def test_a_checkpoint_that_an_older_version_wrote_of_a_compiled_model(tmp_path):
    model = make_model()
    first = mla.Trainer(model, wrap(model), seed=0)
    first.fit(batches(), 1, checkpoint=tmp_path / "checkpoint.pt")
    payload = mla.checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")
    named = {n.replace("encoders.audio.", "encoders.audio._orig_mod."): t for n, t in payload["model"].items()}
    mla.checkpoint.write_checkpoint(tmp_path / "old.pt", payload | {"model": named})
    again = make_model(seed=1)
    mla.Trainer(again, wrap(again)).resume(tmp_path / "old.pt")
    assert_bitwise(dict(again.state_dict()), dict(model.state_dict()))
