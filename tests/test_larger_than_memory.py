"""Data that is read when it is asked for: folders of .npy, what ``datasets`` has saved, WebDataset shards; beside the .npz."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import mla_fast as mla
from mla_fast import data
from mla_fast.cli import main
from mla_fast.data import column
from mla_fast.data.npy import NpyFile

N = 90
CLASS = np.arange(N) % 3
NAMES = np.array(["cat", "dog", "emu"])
MODALITIES = ("audio", "image", "text", "flags", "level")
KINDS = ("npy", "datasets", "shards", "pattern")


def arrays(seed=0):
    """Modalities of several dtypes and shapes that show the class; labels and speakers."""
    random = np.random.default_rng(seed)
    audio = random.normal(1e3, 2, (N, 5))
    audio[:, :3] += 4 * np.eye(3)[CLASS]
    audio[:, 3] = 1.5
    image = random.integers(0, 60, (N, 8, 9, 3)).astype(np.uint8)
    text = random.integers(2**60, 2**60 + 40, (N, 6))
    return {
        "audio": audio,
        "image": image,
        "text": text,
        "flags": random.random((N, 4)) < 0.5,
        "level": random.normal(size=N).astype(np.float16),
        "label": NAMES[CLASS],
        "speaker": np.arange(N) % 5,
    }


def save(kind, folder, values):
    """Write arrays as `kind` says; return the path to load them from."""
    folder.mkdir(exist_ok=True)
    if kind == "npz":
        np.savez(folder / "all.npz", **values)
        return folder / "all.npz"
    if kind == "npy":
        for name, array in values.items():
            np.save(folder / f"{name}.npy", array)
        return folder
    if kind == "datasets":
        return save_with_datasets(folder, values)
    writer = pytest.importorskip("webdataset").ShardWriter
    with writer(str(folder / "part-%03d.tar"), maxcount=40, verbose=0) as shards:
        for i in range(len(values["label"])):
            sample = {f"{name}.npy": np.asarray(a[i]) for name, a in values.items() if name not in ("label", "speaker")}
            shards.write(
                {"__key__": f"{i:04}", "label.txt": str(values["label"][i]), "speaker.cls": int(values["speaker"][i])} | sample
            )
    return folder if kind == "shards" else folder / "part-{000..002}.tar"


def save_with_datasets(folder, values):
    datasets = pytest.importorskip("datasets")
    features = {}
    for name, array in values.items():
        kind = datasets.Value(str(array.dtype) if array.dtype.kind != "U" else "string")
        lists = {1: kind, 2: datasets.List(kind), 4: datasets.Array3D(array.shape[1:], str(array.dtype))}
        features[name] = lists[array.ndim]
    features["label"] = datasets.ClassLabel(names=NAMES.tolist())
    values = values | {"label": CLASS}
    made = datasets.Dataset.from_dict({name: list(array) for name, array in values.items()}, datasets.Features(features))
    made.save_to_disk(folder)
    return folder


@pytest.fixture(params=KINDS)
def both(request, tmp_path):
    """The same data in memory, and read when it is asked for."""
    values = arrays()
    there = save(request.param, tmp_path / "there", values)
    return data.load(save("npz", tmp_path / "held", values), MODALITIES), data.load(there, MODALITIES)


def same(one, other):
    (x, *rest), (y, *others) = one, other
    assert list(x) == list(y)
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name
    assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))


def test_rows_are_those_in_memory(both):
    held, there = both
    assert there.class_names == held.class_names and torch.equal(there.target, held.target)
    assert there.fields["speaker"].tolist() == held.fields["speaker"].tolist()
    assert not any(isinstance(x, torch.Tensor) for x in there.inputs.values())
    order = torch.randperm(N)
    some = torch.rand(N) < 0.3
    for index in (7, slice(3, 60, 4), [5, 4, 6, 7, 8, 80, 5], order, some, torch.empty(0, dtype=torch.long)):
        same(there[index], held[index])
    parts = [data.random_split(of, 0.3, 1)[0] for of in (held, there)]
    same(parts[1][:], parts[0][:])
    parts = [data.split_where(of, "speaker=1,3")[1].subset(order[order < 30]) for of in (held, there)]
    same(parts[1][:], parts[0][:])
    layouts = data.find_layouts(held, {"text": "features", "image": "channels_last"})
    assert data.find_layouts(there, {"text": "features", "image": "channels_last"}) == layouts
    arranged = [data.arrange(of, layouts) for of in (held, there)]
    assert [x.shape for x in arranged[1].inputs.values()] == [x.shape for x in arranged[0].inputs.values()]
    found = data.statistics(arranged[0], "feature", layouts)
    same(*(data.apply_statistics(of, found)[order] for of in arranged))


def test_the_next_batch_is_announced_before_one_is_used(tmp_path, monkeypatch):
    asked = []
    for name in ("read", "expect"):
        plain = getattr(NpyFile, name)
        monkeypatch.setattr(
            NpyFile, name, lambda self, rows, f=plain, name=name: (asked.append((name, set(rows))), f(self, rows))[1]
        )
    there = data.load(save("npy", tmp_path / "there", arrays()), ["audio"])
    part = data.random_split(there, 0.3, 1)[0]
    asked.clear()
    batches = list(data.loader(part, 16, shuffle=True))
    reads, announced = ([rows for name, rows in asked if name == kind] for kind in ("read", "expect"))
    assert announced == reads[1:] and len(reads) == len(batches) == -(-len(part) // 16)
    assert [name for name, _ in asked[:3]] == ["expect", "read", "expect"]
    assert set().union(*reads) == set(part.inputs["audio"].rows.tolist())


def test_one_read_a_batch_for_a_plain_loader(both):
    held, there = both
    for plain, ours in zip(DataLoader(there, 32), data.loader(held, 32), strict=True):
        same(plain, ours)
    torch.manual_seed(3)
    alone = list(data.loader(there, 32, shuffle=True))
    torch.manual_seed(3)
    for batch, other in zip(data.loader(there, 32, shuffle=True, workers=1), alone, strict=True):
        same(batch, other)
    same(pickle.loads(pickle.dumps(there))[5:9], held[5:9])


@pytest.mark.parametrize("per", ["feature", "array"])
def test_statistics_of_one_pass(both, per, monkeypatch):
    monkeypatch.setattr(column, "CHUNK", 50)  # values: parts of some rows
    held, there = both
    present = torch.rand(N, len(MODALITIES)) < 0.7
    datasets = [data.MultimodalDataset(of.inputs, of.target, of.fields, present) for of in both]
    layouts = {"image": "image"}
    held, there = (data.survey(of, per, layouts) for of in datasets)
    assert there.constant == held.constant == ({"audio": [3]} if per == "feature" else {})
    for name in MODALITIES:
        parts = zip(held.statistics[name], there.statistics[name], strict=True)
        for i, (expected, found) in enumerate(parts):  # mean, deviation, and of integers the base, which is exact
            scale = 1 if i < 2 else 0
            np.testing.assert_allclose(found, expected, rtol=N * 2**-52 * scale, atol=1e3 * N * 2**-52 * scale, err_msg=name)


def test_statistics_do_not_read_the_test_part(tmp_path, monkeypatch):
    values = arrays()
    test = values["speaker"] == 2
    values["audio"][test] = np.nan
    train, held_out = data.split_where(data.load(save("npy", tmp_path / "there", values), ["audio", "text"]), "speaker=2")
    seen, read = set(), NpyFile.read
    monkeypatch.setattr(NpyFile, "read", lambda self, rows: seen.update(rows.tolist()) or read(self, rows))
    found = data.statistics(train)
    assert seen == set(np.flatnonzero(~test).tolist())
    assert np.isfinite(found["audio"][0]).all()
    with pytest.raises(ValueError, match=r"there: 'audio': expected finite values, row 2 has others"):
        data.apply_statistics(held_out, found)[:4]


def test_missing_modalities(tmp_path):
    values = arrays()
    present = np.random.default_rng(1).random((N, 2)) < 0.6
    present[:, 0] |= ~present.any(1)
    values["audio"][~present[:, 0]] = np.nan
    values |= {"present": present[:, ::-1].copy(), "modalities": np.array([b"image", b"audio"])}
    held, there = (data.load(save(kind, tmp_path / kind, values), ["audio", "image"]) for kind in ("npz", "npy"))
    assert torch.equal(there.present, torch.from_numpy(present))
    found = data.statistics(held)
    for dataset in (held, there):
        inputs, _, here = data.apply_statistics(dataset, found)[:]
        assert inputs["audio"][here[:, 0]].isfinite().all()
    assert torch.equal(there.rows("audio"), held.rows("audio"))


def test_samples_of_shards_may_lack_a_modality(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as shard:
        for i in range(6):
            audio = {"audio.npy": np.full(3, i)} if i % 3 else {}
            shard.write({"__key__": f"{i}", "image.npy": np.ones(2) * i, "label.cls": i % 2, **audio})
    dataset = data.load(tmp_path / "a.tar", ["image", "audio"])
    assert dataset.present.tolist() == [[True, i % 3 > 0] for i in range(6)]
    assert dataset.rows("audio")[:, 0].tolist() == [1, 2, 4, 5]
    assert dataset.fields["shard"].tolist() == ["a.tar"] * 6


def command(path, output, *more):
    modalities = ["--modalities", "audio,image,level", "--layout", "image=channels_last", "--test-where", "speaker=1"]
    how = ["--device", "cpu", "--features", "8", "--batch-size", "16", "--epochs", "2", "--validation", "0.2"]
    return main(["train", "--data", str(path), "--output", str(output), *modalities, *how, *more])


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_trains_as_in_memory(kind, tmp_path, capsys):
    values = arrays()
    paths = [save(of, tmp_path / of, values) for of in ("npz", kind)]
    results = []
    for path, output in zip(paths, ("held", "there"), strict=True):
        assert command(path, tmp_path / output) == 0
        results.append(json.loads((tmp_path / output / "metrics.json").read_text()))
        results[-1]["config"].pop("data")
    assert results[0] == results[1]
    assert main(["eval", str(tmp_path / "held" / "best.pt"), "--data", str(paths[1]), "--device", "cpu"]) == 0
    for path in paths:
        output = ["--output", str(tmp_path / "p.csv"), "--overwrite"]
        assert main(["predict", str(tmp_path / "there" / "best.pt"), str(path), *output, "--device", "cpu"]) == 0
        results.append((tmp_path / "p.csv").read_text())
    assert results[2] == results[3] and len(results[2].splitlines()) == N + 1
    if kind == "shards":
        assert command(paths[1], tmp_path / "whole", "--test-where", "shard=part-002.tar") == 0
        assert "test accuracy on 10 samples" in capsys.readouterr().out


def test_resumes_inside_an_epoch(tmp_path):
    dataset = data.load(save("npy", tmp_path / "there", arrays()), ["audio", "level"])
    dataset = data.apply_statistics(data.arrange(dataset, {"audio": "features", "level": "features"}), data.statistics(dataset))

    def trainer():
        torch.manual_seed(0)
        encoders = {m: torch.nn.Linear(x.shape[-1] if x.dim() > 1 else 1, 4) for m, x in dataset.inputs.items()}
        model = mla.MultimodalModel(encoders, torch.nn.Linear(4, 3))
        return mla.Trainer(
            model, mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.head), seed=1, progress=False
        )

    class Killed(Exception):
        pass

    class Failing(data.MultimodalDataset):
        reads = 0

        def __getitem__(self, index):
            Failing.reads += 1
            if Failing.reads == 5:
                raise Killed
            return super().__getitem__(index)

    whole, first, second = trainer(), trainer(), trainer()
    whole.fit(data.loader(dataset, 16, shuffle=True), 2)
    failing = Failing(dataset.inputs, dataset.target)
    with pytest.raises(Killed):
        first.fit(data.loader(failing, 16, shuffle=True), 2, checkpoint=tmp_path / "c.pt", checkpoint_every=1)
    second.resume(tmp_path / "c.pt")
    second.fit(data.loader(dataset, 16, shuffle=True, workers=1), 2)
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_batch_takes_the_memory_of_its_rows(tmp_path):
    """A file of 64 MB that is one hole, of which 100 rows of 1 kB are read."""
    with open(tmp_path / "audio.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (65536, 256)})
        file.truncate(file.tell() + 65536 * 1024)
    np.save(tmp_path / "label.npy", np.arange(65536) % 2)
    dataset = data.load(tmp_path, ["audio"])
    tracemalloc.start()
    x = dataset[torch.randperm(65536)[:100]][0]["audio"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x.shape == (100, 256) and peak < 2**20


def truncated(path):
    path.write_bytes(path.read_bytes()[:-8])


def lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: truncated(f / "audio.npy"), r"audio\.npy: expected \d+ bytes for float64 \[90, 5\], got \d+: cut short\?"),
        (lambda f: (f / "audio.npy").write_bytes(b"\x93NUMPY\1\0"), r"audio\.npy: "),
        (lambda f: (f / "audio.npy").write_bytes(b""), r"audio\.npy: expected a NumPy array, got something else"),
        (lambda f: lfs(f / "audio.npy"), r"audio\.npy: .*Git LFS pointer"),
        (
            lambda f: np.save(f / "audio.npy", np.ones((89, 5))),
            r"one length N .*, got audio \[89, 5\], level \[90\], label \[90\]",
        ),
        (lambda f: np.save(f / "audio.npy", np.ones((90, 5), object)), r"there: 'audio': .*got Python objects, which are never"),
        (lambda f: np.save(f / "audio.npy", np.asfortranarray(np.ones((90, 5)))), r"audio\.npy: expected C order.*Fortran"),
        (lambda f: np.save(f / "audio.npy", np.full((90, 5), "x")), r"there: 'audio': expected numbers, got dtype <U1"),
        (
            lambda f: np.save(f / "audio.npy", np.ones((90, 5), complex)),
            r"there: 'audio': expected numbers, got dtype complex128",
        ),
        (lambda f: (f / "audio.npy").unlink(), r"there: no array 'audio'; there are: .*label"),
        (lambda f: [path.unlink() for path in f.iterdir()], r"there: expected .*\.npy files.*, got nothing"),
        (lambda f: np.save(f / "label.npy", np.array(list("abcdefghij" * 9))[:, None].repeat(2, 1)), r"'label': expected \[N\]"),
        (lambda f: np.save(f / "label.npy", np.array([f"{i}" for i in range(N)])), r"'label': .*another label in each of 90"),
    ],
)
def test_folders_that_are_refused(damage, message, tmp_path):
    folder = save("npy", tmp_path / "there", arrays())
    damage(folder)
    with pytest.raises(ValueError, match=message):
        data.load(folder, ["audio", "level"])


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    dataset = data.load(save("npy", tmp_path / "there", arrays()), ["audio"])
    (tmp_path / "there" / "audio.npy").write_bytes((tmp_path / "there" / "audio.npy").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"audio\.npy: expected as many bytes as when it was opened"):
        dataset[80:]


def shard(path, samples, **entries):
    with pytest.importorskip("webdataset").TarWriter(str(path)) as writer:
        for i in range(samples):
            writer.write({"__key__": f"{path.stem}{i}", "label.cls": i % 2, **{f"{k}.npy": v for k, v in entries.items()}})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "1.tar").unlink(), r"\{0\.\.2\}\.tar: 1 of 3 shards are missing: .*1\.tar"),
        (lambda f: shard(f / "1.tar", 4, level=np.ones(2)), r"1\.tar: expected 'audio' in its samples"),
        (lambda f: (f / "1.tar").write_bytes((f / "1.tar").read_bytes()[:4000]), r"1\.tar: expected an uncompressed tar file"),
        (lambda f: lfs(f / "1.tar"), r"1\.tar: expected an uncompressed tar file"),
        (
            lambda f: shard(f / "1.tar", 4, audio=np.ones(3, np.float32)),
            r"1\.tar: 'audio\.npy' of sample 0: expected float64 \[3\]",
        ),
        (lambda f: shard(f / "1.tar", 4, audio=np.ones(4)), r"1\.tar: 'audio\.npy' of sample 0: expected .*got float64 \[4\]"),
        (lambda f: shard(f / "1.tar", 4, audio=np.array([None])), r"1\.tar: 'audio\.npy' of sample 0: .*pickle|Object"),
    ],
)
def test_shards_that_are_refused(damage, message, tmp_path):
    pytest.importorskip("webdataset")
    for i in range(3):
        shard(tmp_path / f"{i}.tar", 4, audio=np.ones(3), level=np.ones(2))
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.statistics(data.load(tmp_path / "{0..2}.tar", ["audio"]))


def test_labels_that_are_no_classes_in_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i}", "audio.npy": np.ones(2), **({"label.cls": b"cat"} if i else {"label.cls": b"1"})})
    with pytest.raises(ValueError, match=r"a\.tar: 'label\.cls' of sample 1: cannot be read: invalid literal.*cat"):
        data.load(tmp_path / "a.tar", ["audio"])
    shard(tmp_path / "a.tar", 3, audio=np.ones(2))
    with pytest.raises(ValueError, match=r"a\.tar: no array 'genre'; there are:"):
        data.load(tmp_path / "a.tar", ["audio"], "genre")


def test_saved_data_that_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    ragged = datasets.Dataset.from_dict({"audio": [[1.0], [1.0, 2.0]] * 3, "label": [0, 1] * 3})
    ragged.save_to_disk(tmp_path / "ragged")
    with pytest.raises(ValueError, match=r"ragged: .*'audio'"):
        data.load(tmp_path / "ragged", ["audio"])[:]
    datasets.DatasetDict({"train": ragged, "test": ragged}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"splits: expected one split, as .*splits/train, got train, test"):
        data.load(tmp_path / "splits", ["audio"])
    unlabelled = datasets.Features(audio=datasets.Value("float32"), label=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_dict({"audio": [1.0, 2.0], "label": [0, -1]}, unlabelled).save_to_disk(tmp_path / "some")
    with pytest.raises(ValueError, match=r"some: 'label': expected a class in every row, row 1 has none"):
        data.load(tmp_path / "some", ["audio"])
    next((tmp_path / "some").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"some: "):
        data.load(tmp_path / "some", ["audio"])


def test_what_needs_memory_says_so(tmp_path, capsys):
    folder = save("npy", tmp_path / "there", arrays())
    assert main(["compare", "--data", str(folder), "--modalities", "audio,level", "--output", str(tmp_path / "out")]) == 2
    assert "there: expected an .npz, which is held in memory, got a folder" in capsys.readouterr().err


def saved(folder, kinds, **columns):
    """Write four rows, of features as `kinds` says, and a class of each."""
    datasets = pytest.importorskip("datasets")
    label, audio = columns.pop("label", [0, 1, 0, 1]), columns.pop("audio", [[1.0, 2.0]] * 4)
    kinds = {"label": "int64", "audio": datasets.List(datasets.Value("float32"))} | kinds
    features = {name: datasets.Value(kind) if isinstance(kind, str) else kind for name, kind in kinds.items()}
    made = datasets.Dataset.from_dict({"label": label, "audio": audio, **columns}, datasets.Features(features))
    made.save_to_disk(folder)
    return folder


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "list", "fixed", "array", "bool"])
def test_nulls_are_no_numbers(kind, inside, row, tmp_path):
    datasets = pytest.importorskip("datasets")
    integer = datasets.Value("int64")
    feature, value, part = {
        "scalar": (integer, 5, None),
        "list": (datasets.List(integer), [1, 2], [1, None]),
        "fixed": (datasets.List(integer, length=2), [1, 2], [None, 2]),
        "array": (datasets.Array2D((2, 2), "uint8"), [[1, 2], [3, 4]], [[1, 2], [None, 4]]),
        "bool": (datasets.List(datasets.Value("bool")), [True, False], [True, None]),
    }[kind]
    values = [value] * 4
    values[row] = part if inside else None
    folder = saved(tmp_path / "there", {"x": feature}, x=values)
    with pytest.raises(ValueError, match=rf"there: 'x': expected a value in every row, row {row} has none"):
        data.load(folder, ["x"])[torch.tensor([3, row, 1])]
    assert data.load(folder, ["audio"])[:][0]["audio"].tolist() == [[1, 2]] * 4  # nobody has asked for x
    saved(tmp_path / "whole", {"x": feature}, x=[value] * 4)
    scale = 255 if kind == "array" else 1
    assert np.allclose(data.load(tmp_path / "whole", ["x"])[1][0]["x"].numpy() * scale, value)


def test_a_modality_that_all_rows_lack(tmp_path):
    folder = saved(tmp_path / "there", {"x": "int64", "y": "float32"}, x=[None] * 4, y=[None] * 4)
    with pytest.raises(ValueError, match=r"'x': expected a value in every row, row 0 has none"):
        data.load(folder, ["x"])[:]
    with pytest.raises(ValueError, match=r"'y': expected finite values, row 0 has others"):
        data.load(folder, ["y"])[:]
    saved(tmp_path / "lists", {}, audio=[[1.0], [2.0], None, [1.0]])
    with pytest.raises(ValueError, match=r"'audio': expected a value in every row, row 2 has none"):
        data.load(tmp_path / "lists", ["audio"])[:]


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("kind, value", [("string", "a"), ("bool", True), ("int64", 3)])
def test_fields_that_cannot_be_read_are_left_out(kind, value, row, tmp_path):
    values = [value] * 4
    values[row] = None
    dataset = data.load(saved(tmp_path / "there", {"x": kind, "y": "int64"}, x=values, y=[1, 2, 3, 4]), ["audio"])
    assert list(dataset.fields) == ["y"]
    for part in (dataset, dataset.subset([0, 1]), dataset.with_inputs(dataset.inputs), data.with_missing(dataset, 0.0, 0)):
        with pytest.raises(ValueError, match=rf"where: .*there: 'x': expected a value in every row, row {row} has none"):
            data.split_where(part, f"x={value}")
    with pytest.raises(ValueError, match=rf"there: 'x': expected a value in every row, row {row} has none"):
        data.load(tmp_path / "there", ["audio"], "x")


def test_saved_data_without_rows(tmp_path):
    with pytest.raises(ValueError, match=r"there: expected at least one row, got none"):
        data.load(saved(tmp_path / "there", {}, label=[], audio=[]), ["audio"])


def test_folders_of_two_kinds(tmp_path):
    folder = save("npy", tmp_path / "there", arrays())
    (folder / "._audio.npy").write_bytes(b"what macOS leaves")
    (folder / "._x.tar").write_bytes(b"what macOS leaves")
    data.load(folder, ["audio"])
    (folder / "backup.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there: expected either .*, got audio\.npy and backup\.tar"):
        data.load(folder, ["audio"])
    np.save(saved(tmp_path / "saved", {}) / "more.npy", np.ones(4))
    with pytest.raises(ValueError, match=r"saved: expected either .*, got more\.npy and dataset_info\.json"):
        data.load(tmp_path / "saved", ["audio"])


def test_texts_of_shards_end_without_a_new_line(tmp_path):
    with pytest.importorskip("webdataset").TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, end in enumerate(["", "\n", "\r\n", "\n"]):
            label = {"label.txt": f"{'cat' if i % 2 else 'a dog'}{end}", "speaker.txt": f" of\n{i // 2}{end}"}
            writer.write({"__key__": f"{i}", "audio.npy": np.ones(2), **label})
    (tmp_path / "._a.tar").write_bytes(b"what macOS leaves")
    dataset = data.load(tmp_path, ["audio"])
    assert dataset.class_names == ["a dog", "cat"] and dataset.target.tolist() == [0, 1, 0, 1]
    assert dataset.fields["speaker"].tolist() == [" of\n0", " of\n0", " of\n1", " of\n1"]


def test_two_samples_of_one_key(tmp_path):
    with pytest.importorskip("webdataset").TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in (0, 1, 1, 2):
            writer.write({"__key__": f"clip{i}", "audio.npy": np.ones(2), "label.cls": i % 2})
    with pytest.raises(ValueError, match=r"a\.tar: expected a key of each sample's own, got two 'clip1' with 'audio\.npy'"):
        data.load(tmp_path, ["audio"])


@pytest.mark.parametrize("row", [0, 2])
def test_fields_of_shards_that_cannot_be_read_are_left_out(row, tmp_path):
    with pytest.importorskip("webdataset").TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i}", "audio.npy": np.ones(2), "label.cls": i % 2, "x.cls": b"7" if i != row else b"cat"})
    dataset = data.load(tmp_path, ["audio"])
    assert list(dataset.fields) == ["shard"]
    message = rf"a\.tar: 'x\.cls' of sample {row}: cannot be read"
    with pytest.raises(ValueError, match=message):
        data.split_where(dataset, "x=7")
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path, ["audio"], "x")
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path, ["x"])[:]


def test_the_command_line_says_why_there_is_no_field(tmp_path, capsys):
    folder = saved(tmp_path / "there", {"x": "string"}, x=["a", None, "b", "a"])
    assert (
        main(["train", "--data", str(folder), "--modalities", "audio", "--test-where", "x=a", "--output", str(tmp_path / "out")])
        == 2
    )
    assert "there: 'x': expected a value in every row, row 1 has none" in capsys.readouterr().err
