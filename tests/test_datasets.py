"""The paper's data sets on small made trees with their traps, their cache, and training on them."""

import json
import warnings

import numpy as np
import pytest
import torch
import trees
from torch import nn
from torch.utils.data import DataLoader

import mla_fast as mla
from mla_fast.datasets import IEMOCAP, MVSA, CremaD, Food101, KineticsSounds, Loader, prepare
from mla_fast.datasets.audio import Fbank
from mla_fast.datasets.food101 import read_titles
from mla_fast.datasets.images import Images

pytest.importorskip("PIL")
pytest.importorskip("soundfile")

SMALL = {"audio": Fbank(32), "image": Images(16, frames=3)}


def by_words(text):
    return [len(word) for word in text.split()]


def ids(dataset):
    return [entry.id for entry in dataset.entries]


def shown(dataset):
    """{id: the modalities that are there}, decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        present = [dataset[i][2] for i in range(len(dataset))]
    return {
        name: {m for m, here in zip(dataset.modalities, row, strict=True) if here}
        for name, row in zip(ids(dataset), present, strict=True)
    }


def test_crema_d_by_speaker(tmp_path):
    root = trees.crema_d(tmp_path)
    parts = {part: CremaD(root, part, readers=SMALL) for part in ("train", "validation", "test", "all")}
    assert {part: sorted(set(data.groups)) for part, data in parts.items() if part != "all"} == {
        "train": ["1002"],
        "validation": ["1001", "1011"],
        "test": ["1010"],
    }
    assert sorted(sum((ids(parts[p]) for p in ("train", "validation", "test")), [])) == ids(parts["all"])
    assert parts["test"].target.tolist() == [0, 1, 2, 3, 4, 5] and parts["test"].class_names[4] == "Neutral"
    train = parts["train"]
    with pytest.warns(UserWarning, match="CREMA-D train: audio of 1002_IEO_ANG_LO is left out: .*1002_IEO_ANG_LO.wav: silent"):
        inputs, label, present = train[0]
    assert not inputs["audio"].any() and label.item() == 0 and present.tolist() == [False, True]
    assert shown(train) == {
        "1002_IEO_ANG_LO": {"image"},
        "1002_IEO_DIS_LO": {"audio"},
        "1002_IEO_FEA_LO": {"image"},
        "1002_IEO_HAP_LO": {"audio"},
        "1002_IEO_NEU_LO": {"audio", "image"},
    }
    assert train.left_out["audio: empty file; image: folder without frames"] == ["1002_IEO_SAD_LO"]
    assert train.absent["audio: Git LFS pointer, run git lfs pull"] == ["1002_IEO_FEA_LO"]
    assert "not a name of a clip: 1 (readme_sound)" in parts["all"].describe()
    assert "image: folder without frames: 1 (1002_IEO_DIS_LO)" in train.describe()


def test_crema_d_reads_what_is_there(tmp_path):
    data = CremaD(trees.crema_d(tmp_path), "test", readers=SMALL)
    inputs, label, present = data[3]
    assert label.dtype == torch.int64 and present.tolist() == [True, True]
    banks = Fbank(32).decode(tmp_path / "AudioWAV/1010_IEO_HAP_LO.wav")
    assert torch.equal(inputs["audio"][: len(banks)], banks) and not inputs["audio"][len(banks) :].any()
    frame = Images(16, frames=3).decode(tmp_path / "Image-01-FPS/1010_IEO_HAP_LO")
    assert torch.equal(inputs["image"], SMALL["image"].finish(frame, False)) and inputs["image"].shape == (3, 3, 16, 16)
    assert CremaD(tmp_path, "train").augment and not CremaD(tmp_path, "test").augment
    other = CremaD(tmp_path, "test", modalities=["image"], readers=SMALL)
    assert other.modalities == ("image",) and other[0][0].keys() == {"image"}


@pytest.mark.parametrize("layout", ["OGM-GE", "MLA"])
def test_crema_d_by_its_lists(tmp_path, layout):
    root = trees.crema_d(tmp_path)
    train, test = ["1001_IEO_ANG_LO", "1010_IEO_HAP_LO", "1099_IEO_SAD_HI"], ["1001_IEO_SAD_LO", "1040_ITH_SAD_XX"]
    trees.write_wav(root / "AudioWAV/1040_ITH_SAD_X.wav", trees.tone(5))  # as old copies call it
    for part, names in (("train", train), ("test", test)):
        if layout == "MLA":
            trees.write_text(root / f"my_{part}_cre.txt", "".join(f"{name}.flv Anger\n" for name in names))
        else:
            trees.write_text(root / f"{part}.csv", "\r\n".join(f"{name},ANG" for name in names), "utf-8-sig")
    data = CremaD(root, readers=SMALL)
    assert data.split == "lists" and ids(data) == train[:2] and data.target.tolist() == [0, 3]  # of the name, not the list
    assert data.left_out["audio: not on disk; image: not on disk"] == ["1099_IEO_SAD_HI"]
    assert ids(CremaD(root, "test", readers=SMALL)) == ["1001_IEO_SAD_LO", "1040_ITH_SAD_X"]
    with pytest.raises(ValueError, match="part: expected one of train, test, all with the published lists; split='speaker' has"):
        CremaD(root, "validation")
    assert len(CremaD(root, "test", split="speaker", readers=SMALL)) == 7


def test_crema_d_in_mlas_folders(tmp_path):
    for part, name in (("train", "1001_IEO_ANG_LO"), ("test", "1001_IEO_SAD_LO")):
        (tmp_path / f"audio/{part}_fbank").mkdir(parents=True)
        np.save(tmp_path / f"audio/{part}_fbank/{name}.npy", np.ones((32, 128)))
        trees.write_image(tmp_path / f"visual/{part}_imgs/Image-01-FPS/{name}/00000.jpg", trees.picture(8, 8))
        trees.write_text(tmp_path / f"my_{part}_cre.txt", f"{name}.flv Anger\n")
    for part in ("train", "test"):
        inputs, _, present = CremaD(tmp_path, part, readers=SMALL)[0]
        assert present.all() and (inputs["audio"] == 1).all()


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: expected a folder, got .*nowhere"):
        CremaD(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"root: expected samples, got none \(nothing was found\)"):
        CremaD(tmp_path)
    (tmp_path / "AudioWAV").mkdir()
    (tmp_path / "AudioWAV/1002_IEO_SAD_LO.wav").write_text(trees.LFS_POINTER)
    with pytest.raises(ValueError, match="root: expected samples, got none .*Git LFS pointer, run git lfs pull"):
        CremaD(tmp_path)
    for build, message in (
        (lambda: CremaD(tmp_path, "dev"), "part: expected one of train, validation, test, all, got 'dev'"),
        (lambda: CremaD(tmp_path, split="actor"), "split: expected lists or speaker, got 'actor'"),
        (lambda: CremaD(trees.crema_d(tmp_path), modalities=["text"]), "modalities: expected among audio, image, got 'text'"),
        (lambda: MVSA(tmp_path, labels="both"), "labels: expected one of agreeing, merged, got 'both'"),
        (lambda: IEMOCAP(tmp_path, session=6), "session: expected 1 … 5, got 6"),
        (lambda: IEMOCAP(tmp_path, split="speaker"), "split: expected session or lists, got 'speaker'"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    for build, message in (
        (lambda: CremaD(tmp_path, split="lists"), "split: expected train.csv or my_train_cre.txt in .*, got neither"),
        (lambda: KineticsSounds(tmp_path), "root: expected my_train.txt or my_train_ks.txt in"),
        (lambda: Food101(tmp_path), "root: expected texts/train_titles.csv, train.jsonl or text_token/train_token in"),
        (lambda: MVSA(tmp_path), "root: expected labelResultAll.txt or train.jsonl in"),
        (lambda: IEMOCAP(tmp_path), "root: expected SessionK/dialog/EmoEvaluation"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            build()


def test_kinetics_sounds_of_ogm_ge(tmp_path):
    root = trees.kinetics_sounds(tmp_path)
    readers = {"image": Images(16, frames=3)}
    train, test = (KineticsSounds(root, part, readers=readers) for part in ("train", "test"))
    assert ids(train) == [f"yt{label}_00000{i}_000010" for label in (0, 1) for i in range(3)][:5]
    assert train.left_out == {
        "fewer than three frames": ["yt1_000002_000010"],
        "audio: not on disk; image: not on disk": ["gone_000001_000002"],
    }
    assert train.target.tolist() == [0, 0, 0, 1, 1] and train.class_names == ["0", "1"] and ids(test) == ["yt0_3", "yt1_3"]
    inputs, _, present = train[4]
    assert present.all() and inputs["audio"].shape == (1024, 128)


def test_kinetics_sounds_of_mla(tmp_path):
    for part, name in (("train", "a-b_c"), ("test", "d")):
        (tmp_path / f"audio/{part}_fbank").mkdir(parents=True)
        np.save(tmp_path / f"audio/{part}_fbank/{name}.npy", np.ones((1024, 128)))
        for i in range(3):
            trees.write_image(tmp_path / f"visual/{part}_imgs/Image-01-FPS/{name}/{i:05}.jpg", trees.picture(8, 8))
    trees.write_text(tmp_path / "my_train_ks.txt", "a-b_c.mp4 tapping pen\n")
    trees.write_text(tmp_path / "my_test_ks.txt", "d.mp4 bowling\n")
    train, test = (KineticsSounds(tmp_path, part) for part in ("train", "test"))
    assert train.class_names == ["bowling", "tapping pen"] and train.target.tolist() == [1] and test.target.tolist() == [0]
    assert train[0][2].all()
    trees.write_text(tmp_path / "my_test_ks.txt", "d.mp4\n")
    with pytest.raises(ValueError, match="my_test_ks.txt, line 1: expected NAME,10,label or NAME.mp4 class, got 'd.mp4'"):
        KineticsSounds(tmp_path)


def test_food101_of_kaggle(tmp_path):
    root = trees.food101(tmp_path)
    rows, unreadable = read_titles(root / "texts/train_titles.csv")
    assert [name for name, *_ in rows] == ["apple_pie_1", "apple_pie_2"] + [f"breakfast_burrito_73{i}" for i in range(5)]
    assert [title for _, title, _ in rows][2:5] == [
        "Breakfast burrito with a quote that stays open",
        "Breakfast burrito again",
        "A title of two lines",
    ]
    assert rows[0][1] == "Apple pie, the best" and rows[6][1] == 'Say "cheese" now' and unreadable == []
    data = Food101(root, tokenizer=by_words, readers={"image": Images(16, squash=False)})
    assert data.class_names == ["apple_pie", "breakfast_burrito"] and data.modalities == ("text", "image")
    assert data.left_out == {"class in the list is not the file's": ["breakfast_burrito_733"]}
    assert data.absent == {"image: not on disk": ["apple_pie_2"], "text: not on disk": ["apple_pie_3"]}
    both = {"text", "image"}
    assert shown(data) == {
        "apple_pie_1": both,
        "apple_pie_2": {"text"},
        "apple_pie_3": {"image"},
        "breakfast_burrito_730": both,
        "breakfast_burrito_731": both,  # grey
        "breakfast_burrito_732": both,
        "breakfast_burrito_734": {"text"},  # a page in place of an image
    }
    inputs, label, _ = data[2]
    assert not inputs["text"].any() and inputs["text"].shape == (256,) and label.item() == 0  # a missing text is padding alone
    assert Food101(root, "test", tokenizer=by_words).target.tolist() == [0, 1]
    with pytest.raises(ValueError, match="part: expected one of train, test, all, got 'validation'"):
        Food101(root, "validation")


def test_a_row_that_is_none_is_counted(tmp_path):
    root = trees.food101(tmp_path)
    with (root / "texts/train_titles.csv").open("a") as file:
        file.write("apple_pie_5.jpg,no class here\n")
    assert Food101(root, tokenizer=by_words).left_out["row without file, title and class"] == ["apple_pie_5.jpg,no class here"]


def test_food101_by_mmbts_lists(tmp_path):
    root = trees.mmbt(tmp_path)
    parts = {part: Food101(root, part, tokenizer=by_words) for part in ("train", "validation", "test", "all")}
    assert {part: data.target.tolist() for part, data in parts.items()} == {
        "train": [1, 0, 1],
        "validation": [0],
        "test": [1, 0],
        "all": [1, 0, 1, 0, 1, 0],
    }
    inputs, _, present = parts["test"][0]
    assert present.all() and inputs["text"][:2].tolist() == [1, 5] and inputs["image"].shape == (3, 256, 256)
    trees.write_text(root / "dev.jsonl", '{"id": 3}')
    with pytest.raises(ValueError, match="dev.jsonl, line 1: expected id, label, text and img in JSON"):
        Food101(root)


def test_food101_in_mlas_folders(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"text_token/{part}_token").mkdir(parents=True)
        for name in ("hot_dog_1", "pad_thai_2"):
            np.save(tmp_path / f"text_token/{part}_token/{name}_token.npy", np.arange(256)[None])
            np.save(tmp_path / f"text_token/{part}_token/{name}_pm.npy", np.zeros((1, 256)))
            trees.write_image(tmp_path / f"visual/{part}_imgs/{name}.jpg", trees.picture(8, 8))
    data = Food101(tmp_path, "train")
    inputs, label, present = data[1]
    assert data.class_names == ["hot_dog", "pad_thai"] and label.item() == 1 and present.all()
    assert inputs["text"].tolist() == list(range(256)) and inputs["text"].dtype == torch.int64


def test_mvsa(tmp_path):
    root = trees.mvsa(tmp_path)
    agreeing = {part: MVSA(root, part, tokenizer=by_words) for part in ("train", "validation", "test", "all")}
    assert sorted(map(int, ids(agreeing["all"]))) == list(range(3, 31, 3))
    assert [len(agreeing[p]) for p in ("train", "validation", "test")] == [6, 2, 2]
    assert sorted(sum((ids(agreeing[p]) for p in ("train", "validation", "test")), [])) == sorted(ids(agreeing["all"]))
    assert len(agreeing["all"].left_out["labels of text and image that differ"]) == 20
    merged = MVSA(root, "all", labels="merged", tokenizer=by_words)
    assert len(merged) == 20 and len(merged.left_out["labels that contradict"]) == 10
    labels = {name: merged.class_names[label] for name, label in zip(ids(merged), merged.target, strict=True)}
    assert labels["1"] == "positive" and labels["4"] == "negative" and labels["3"] == "positive"  # the neutral one yields
    assert merged.absent["image: not on disk"] == ["4"] and merged.absent["text: empty file"] == ["7"]
    assert shown(merged)["7"] == {"image"}
    assert ids(MVSA(root, "test", seed=1, tokenizer=by_words)) != ids(agreeing["test"])
    trees.write_text(root / "labelResultAll.txt", "ID\ttext,image\n1\tpositive\n")
    with pytest.raises(
        ValueError, match="labelResultAll.txt, line 2: expected ID<tab>label,label of negative, neutral, positive"
    ):
        MVSA(root)


def test_iemocap_by_session(tmp_path):
    root = trees.iemocap(tmp_path)
    readers = {"audio": Fbank(32), "image": Images(16)}
    parts = {p: IEMOCAP(root, p, tokenizer=by_words, readers=readers) for p in ("train", "validation", "test", "all")}
    sessions = {p: sorted(set(data.groups)) for p, data in parts.items()}
    assert sessions == {"train": ["1"], "validation": ["4"], "test": ["5"], "all": ["1", "4", "5"]}
    assert set(IEMOCAP(root, "validation", session=1, tokenizer=by_words).groups) == {"5"}
    test = parts["test"]
    assert [test.class_names[label] for label in test.target] == ["Angry", "Happy", "Happy", "Neutral", "Sad"]
    assert test.left_out == {"emotion xxx": [f"Ses0{s}F_impro01_F005" for s in (1, 4, 5)]}
    inputs, _, present = test[2]
    assert test.modalities == ("audio", "image", "text") and present.all()
    assert inputs["text"][:4].tolist() == [5, 2, 4, 0] and inputs["image"].shape == (3, 16, 16)


def test_iemocap_by_mlas_lists(tmp_path):
    root = trees.iemocap(tmp_path)
    line = "{}.mp4 [split|sign] words [split|sign] Angry\n"
    names = ["Ses01F_impro01_F000", "Ses04F_impro01_F005"]
    trees.write_text(root / "my_train_iemo.txt", "".join(map(line.format, names)))
    data = IEMOCAP(root, split="lists", tokenizer=by_words)
    assert ids(data) == names[:1] and data.left_out["in the list, but not among the labels"] == names[1:]


def test_iemocap_shows_the_video_where_no_face_was_extracted(tmp_path):
    av = pytest.importorskip("av")
    root = trees.iemocap(tmp_path, sessions=(5,))
    for path in (root / "faces/Ses05F_impro01_F003").iterdir():
        path.unlink()
    (root / "faces/Ses05F_impro01_F003").rmdir()
    avi = root / "Session5/dialog/avi/DivX/Ses05F_impro01.avi"
    avi.parent.mkdir(parents=True)
    with av.open(str(avi), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 40 * (i // 10), "u1"), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = IEMOCAP(root, "test", tokenizer=by_words)
    decoded = data.decode(ids(data).index("Ses05F_impro01_F003"), "image")  # from 3.29 to 4.24 seconds
    assert abs(decoded.float().mean() - 140) < 15


def test_a_cache_holds_what_is_decoded(tmp_path, capsys):
    root, cache = trees.crema_d(tmp_path / "data"), tmp_path / "cache"
    data = CremaD(root, "all", readers=SMALL)
    report = prepare(data, cache, workers=2, progress=False)
    assert report["samples"] == 23 and report["written"] == 42
    assert {name: reason for name, (_, reason) in report["failed"].items()}.keys() == {
        "audio/1002_IEO_ANG_LO",
        "image/1002_IEO_HAP_LO",
    }
    cached = CremaD(root, "all", readers=SMALL, cache=cache)
    for name in ("1010_IEO_ANG_LO", "1001_IEO_SAD_LO"):
        i = ids(data).index(name)
        for modality in ("audio", "image"):
            assert torch.equal(cached[i][0][modality], data[i][0][modality])
    assert shown(cached) == shown(data)
    with pytest.warns(UserWarning, match="1002_IEO_ANG_LO.wav: silent"):
        cached[ids(data).index("1002_IEO_ANG_LO")]
    assert prepare(data, cache, progress=False)["written"] == 0
    (cache / "audio/1010_IEO_ANG_LO.npy").unlink()  # as if it had been killed
    trees.write_wav(root / "AudioWAV/1002_IEO_ANG_LO.wav", trees.tone(1))  # and repaired
    again = prepare(data, cache, progress=False)
    assert again["written"] == 2 and list(again["failed"]) == ["image/1002_IEO_HAP_LO"]
    with pytest.raises(
        ValueError, match=r"cache: expected .* to be prepared with audio=Fbank\(frames=16.*, got Fbank\(frames=32"
    ):
        CremaD(root, "all", readers={**SMALL, "audio": Fbank(16)}, cache=cache)
    with pytest.raises(FileNotFoundError, match="cache: expected a folder written by mla-fast prepare, got"):
        CremaD(root, "all", cache=tmp_path / "none")


class Pooled(nn.Module):
    """An encoder for anything that a data set gives."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(8)

    def forward(self, x):
        return self.layer(x.flatten(1).float()[:, :400])


@pytest.mark.parametrize("name", ["CREMA-D", "Kinetics-Sounds", "Food-101", "MVSA", "IEMOCAP"])
def test_an_epoch_with_workers(tmp_path, name):
    small = {"image": Images(16)}
    make = {
        "CREMA-D": lambda: CremaD(trees.crema_d(tmp_path), "all", readers=SMALL),
        "Kinetics-Sounds": lambda: KineticsSounds(trees.kinetics_sounds(tmp_path), readers={"image": Images(16, frames=3)}),
        "Food-101": lambda: Food101(trees.food101(tmp_path), tokenizer=by_words, readers=small),
        "MVSA": lambda: MVSA(trees.mvsa(tmp_path), labels="merged", tokenizer=by_words, readers=small),
        "IEMOCAP": lambda: IEMOCAP(trees.iemocap(tmp_path), tokenizer=by_words, readers={"audio": Fbank(32), **small}),
    }
    data = make[name]()
    torch.manual_seed(0)
    model = mla.MultimodalModel({m: Pooled() for m in data.modalities}, nn.Linear(8, data.classes))
    for m, x in data[0][0].items():
        model.encoders[m](x[None])
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), model.head)
    trainer = mla.Trainer(model, optimizer, seed=0, progress=False)
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2 if name == "CREMA-D" else 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*is left out")
        trainer.fit(loader, epochs=1)
        result = trainer.evaluate(loader, use_test=True)
    assert set(result["accuracy"]) == {*data.modalities, "average", "fused"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_what_a_plain_one_gives(tmp_path, workers):
    """Bytes come from the workers and are expanded here, of a clip without frames and a silent one to zeros."""
    data = CremaD(trees.crema_d(tmp_path, (1002,)), "all", readers=SMALL)
    plain, ours = DataLoader(data, 3, num_workers=workers), Loader(data, 3, workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches, again = list(plain), list(ours)
    assert len(ours) == len(batches) == len(again) == 2
    for (inputs, target, present), (other, *labels) in zip(batches, again, strict=True):
        assert torch.equal(target, labels[0]) and torch.equal(present, labels[1]) and not present.all()
        for modality, x in inputs.items():
            assert torch.equal(x, other[modality]) and x.dtype == other[modality].dtype


def test_what_goes_between_processes_is_bytes_and_is_augmented(tmp_path):
    data = CremaD(trees.crema_d(tmp_path, (1001, 1002)), "all", readers={"image": Images(16, frames=3, jitter=0.4)}, augment=True)
    torch.manual_seed(0)
    whole = data[0][0]["image"]
    torch.manual_seed(0)
    small = data.sample(0, compact=True)[0]["image"]
    assert small.dtype == torch.uint8 and small.shape == (3, 3, 16, 16)
    assert torch.equal(data.readers["image"].expand(small[None])[0], whole)
    assert torch.equal(data.readers["image"].compact(None, True), torch.zeros(3, 3, 16, 16, dtype=torch.uint8))


def test_a_cache_holds_filter_banks_without_their_padding(tmp_path):
    root, cache = trees.crema_d(tmp_path / "data", (1001, 1002)), tmp_path / "cache"
    readers = {"audio": Fbank(64, (-5.0, 4.0)), "image": Images(16)}
    prepare(CremaD(root, "all", readers=readers), cache, progress=False)
    kept = np.load(cache / "audio/1001_IEO_ANG_LO.npy")
    assert kept.shape == (28, 128)  # of 0.3 seconds
    for data in (CremaD(root, "all", readers=readers, cache=cache), CremaD(root, "all", readers=readers)):
        x = data[0][0]["audio"]
        assert x.shape == (64, 128) and (x[28:] == 5.0 / 4.0).all() and torch.equal(x[:28], torch.from_numpy(kept))


def test_a_tokenizer_is_loaded_once_before_workers_are_made(tmp_path, monkeypatch):
    from mla_fast.datasets.text import Tokens

    loaded = []
    monkeypatch.setattr(Tokens, "load", lambda self: loaded.append(self.length))
    data = MVSA(trees.mvsa(tmp_path), "all", tokenizer=by_words, readers={"image": Images(16)})
    assert len(list(Loader(data, 64))) == 1 and not loaded
    assert len(list(Loader(data, 64, workers=1))) == 1 and loaded == [256]


def test_mvsa_by_the_lists_of_qmf(tmp_path):
    for part, ids_ in (("train", (1, 2, 3)), ("dev", (4,)), ("test", (5,))):
        rows = [
            {"id": str(i), "label": ("negative", "neutral", "positive")[i % 3], "text": f"tweet {i}", "img": f"data/{i}.jpg"}
            for i in ids_
        ]
        trees.write_text(tmp_path / f"{part}.jsonl", "\n".join(map(json.dumps, rows)))
        for i in ids_:
            trees.write_image(tmp_path / f"data/{i}.jpg", trees.picture(20, 20))
    parts = {p: MVSA(tmp_path, p, tokenizer=by_words) for p in ("train", "validation", "test", "all")}
    assert [len(data) for data in parts.values()] == [3, 1, 1, 5] and parts["train"].target.tolist() == [1, 2, 0]
    assert parts["validation"][0][0]["text"][:3].tolist() == [5, 1, 0]
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="part: expected validation among the lists .*, got train, test"):
        MVSA(tmp_path, "validation")
    trees.write_text(tmp_path / "test.jsonl", json.dumps({"id": "5", "label": "angry", "text": "", "img": None}))
    with pytest.raises(ValueError, match="test.jsonl: 5: expected a label of negative, neutral, positive, got 'angry'"):
        MVSA(tmp_path, "test")


@pytest.mark.parametrize("base", ["", "video/"])
def test_kinetics_in_folders_of_its_classes(tmp_path, base):
    """Spaces, underscores, capitals and parentheses in the folders; names of clips that begin with a dash."""
    names = {"playing guitar": "-a_b_000001_000011", "tap_dancing": "x_000002_000012", "Playing Drums (in a band)": "d_1_2"}
    for part in ("train", "val"):
        for folder, name in names.items():
            trees.write_text(tmp_path / f"{base}{part}/{folder}/{name}{part}.mp4", "no video")
            trees.write_wav(tmp_path / f"audio/{name}{part}.wav", trees.tone(1))
        trees.write_text(tmp_path / f"{base}{part}/abseiling/z.mp4", "no video")
        trees.write_text(tmp_path / f"{base}{part}/playing guitar/._{name}.mp4", "")
    data = KineticsSounds(tmp_path, "test", readers={"audio": Fbank(32)})
    assert data.class_names == ["playing drums", "playing guitar", "tap dancing"] and len(data) == 3
    assert data.left_out == {"not a class of Kinetics-Sounds": ["abseiling", "abseiling"]}
    entry = data.entries[data.target.tolist().index(1)]
    assert entry.id == "-a_b_000001_000011val" and entry.sources["image"].parent.name == "playing guitar"
    assert KineticsSounds(tmp_path, modalities=["audio"])[0][2].all()
