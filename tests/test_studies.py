"""The studies: what they measure, worked out on small examples."""

import importlib

import pytest
import torch

from bench import records
from bench.accuracy import jobs as command
from bench.accuracy.settings import Setting, setting
from bench.accuracy.studies import adding, collapse, competition, forgetting, gap, isolation
from mla_fast.data import MultimodalDataset

STUDIES = ("isolation", "gap", "collapse", "forgetting", "competition", "adding")


def parts(seed):
    """Two modalities that show one of three classes."""
    y = torch.arange(90) % 3
    generator = torch.Generator().manual_seed(seed)
    shown = {m: torch.eye(3)[y] + 0.2 * torch.randn(90, 3, generator=generator) for m in ("a", "b")}
    dataset = MultimodalDataset(shown, y)
    return dataset.subset(slice(0, 60)), dataset.subset(slice(60, 90))


TASK = Setting("made_up", "default", parts, epochs=2)


@pytest.mark.parametrize("name", STUDIES)
def test_each_runs_by_its_command_and_nothing_twice(name, tmp_path, monkeypatch, capsys):
    study = importlib.import_module(f"bench.accuracy.studies.{name}").STUDY
    monkeypatch.setattr(command, "setting", lambda *_, **__: TASK)
    monkeypatch.setattr(competition, "ROUNDS", TASK.epochs)
    path = tmp_path / "out.jsonl"
    command.main(study, ["--seeds", "0", "--output", str(path)])
    found = records.read(path)
    jobs = study.jobs(TASK, [0])
    assert len(found) == len(jobs) > 3 and all(r["study"] == name and r["epochs"] == 2 for r in found)
    said = capsys.readouterr().out
    assert study.table(found) in said
    command.main(study._replace(run=lambda job: pytest.fail("run again")), ["--seeds", "0", "--output", str(path)])
    assert records.read(path) == found
    command.main(study, ["--show", str(path)])
    assert capsys.readouterr().out.count(study.table(found)) == 2
    with pytest.raises(SystemExit):
        command.main(study, ["--show", str(tmp_path / "nothing")])
    assert "expected results of bench.accuracy.studies" in capsys.readouterr().err


def test_masks_grow_and_leave_the_other_modality_alone():
    train, _ = parts(0)

    def present(rate, seed=0):
        return isolation.masked(train, isolation.Job(TASK, "Sum", seed, "b", rate)).present

    assert present(0.1).sum(0).tolist() == [60, 54] and present(0.9).sum(0).tolist() == [60, 6]
    assert (present(0.9) <= present(0.1)).all() and not torch.equal(present(0.5), present(0.5, seed=1))
    assert isolation.masked(train, isolation.Job(TASK, "Sum", 0, None, 0.0)).present.all()


def test_moves_are_paired_by_seed():
    def record(seed, masked, rate, a, b):
        return {"method": "X", "seed": seed, "masked": masked, "rate": rate, "accuracy": {"a": a, "b": b, "fused": 1.0}}

    found = [record(0, None, 0.0, 0.5, 0.6), record(1, None, 0.0, 0.7, 0.8)]
    found += [record(0, "a", 0.9, 0.1, 0.65), record(1, "a", 0.9, 0.1, 0.75), record(0, "b", 0.5, 0.4, 0.1)]
    moved = isolation.moves(found)
    assert moved.keys() == {("X", "a", "b"), ("X", "b", "a")}
    assert moved["X", "a", "b"] == {0.9: pytest.approx(0)} and moved["X", "b", "a"] == {0.5: pytest.approx(-10)}


def test_the_gap_worked_out():
    right, up = torch.tensor([[2.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert gap.gap([right, up]) == pytest.approx(2**0.5)
    assert gap.gap([right, right]) == 0 and gap.gap([right, -right]) == pytest.approx(2)
    assert gap.gap([right, up, right]) == pytest.approx(2 * 2**0.5 / 3)
    assert gap.directions(torch.zeros(1, 2)).tolist() == [[0, 0]]  # a dead encoder


def test_the_picture_keeps_distances_within_its_plane():
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(5, 5)).Q[:2]
    features = [torch.randn(n, 2) @ turned for n in (4, 7)]
    points = gap.projected(features)
    assert [p.shape for p in points] == [(4, 2), (7, 2)]
    expected = torch.cdist(*map(gap.directions, features))
    torch.testing.assert_close(torch.cdist(*points), expected)


def test_p_shrinks_with_rls_and_not_with_the_window():
    curves = {}
    for method, alpha in (("MLA rls", 1.0), ("MLA window", 1.0)):
        curves[method] = collapse.run(collapse.Job(TASK, method, alpha, 0))
    assert curves["MLA rls"]["steps"] == [2, 4]  # one batch of two modalities in each epoch
    first, last = curves["MLA rls"]["P_norm"]
    assert last < first < 8 and curves["MLA window"]["P_norm"][1] >= 63**0.5  # ‖I − u uᵀ‖ with one u


def test_only_the_head_can_forget(monkeypatch):
    seen = []
    trained = forgetting.mla_trainer

    def trainer(*arguments, **options):
        seen.append(trained(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(forgetting, "mla_trainer", trainer)
    job = forgetting.Job(TASK, "MLA rls", "project", "a", "b", 0)
    before = forgetting.run(job)["losses"]
    assert before["after"] != before["before"]
    assert seen[0].optimizer.settings.bias == "project" and seen[0].optimizer.param_groups[0]["lr"] == 0.1
    assert all(set(record["loss"]) == {m} for record, m in zip(seen[0].history, "aabb", strict=True))


def test_falls_are_from_where_a_modality_was_trained_last():
    record = {"old": "a", "new": "b+c", "phases": [{"a": 0.9}, {"a": 0.8, "b": 0.7}, {"a": 0.6, "b": 0.65, "c": 1.0}]}
    assert adding.falls(record, 1) == pytest.approx(10)
    assert adding.falls(record) == pytest.approx((30 + 5) / 2)


def test_what_is_added_sees_its_own_classes_and_a_part_of_the_old_data():
    train, _ = parts(0)
    jobs = adding.jobs(TASK, [0, 1, 2, 3])
    assert {(j.old, j.new, j.classes) for j in jobs} == {(*o, c) for o in (("a", "b"), ("b", "a")) for c in ("all", "half")}
    replay = list(adding.Replay(adding.Batches(adding.select(train, ["b"]), 0), adding.select(train, ["a"]), 0))
    assert [list(batch[0]) for batch in replay] == [["b"], ["a"]] and len(replay[1][1]) == 1
    found = adding.run(adding.Job(TASK, "a", "b", "half", "frozen head", 0))
    assert found["phases"][0]["a"] == found["phases"][1]["a"] and len(found["new_alone"]) == 1
    image = MultimodalDataset({"a": torch.arange(12.0).view(1, 4, 3)}, torch.zeros(1, dtype=torch.int64))
    assert adding.select(image, ["a/1"]).inputs["a/1"].tolist() == [[[6, 7, 8], [9, 10, 11]]]


def test_digits_have_what_the_studies_need():
    pytest.importorskip("sklearn")
    assert len(forgetting.jobs(setting("digits"), [0])) == 6
    assert len(isolation.jobs(setting("digits"), [0])) == 4 * 16
