"""IEMOCAP's released features in made trees of the same layout, with their traps; pickles that would run something."""

import os
import pickle

import numpy as np
import pytest

from mla_fast import cli, data
from mla_fast.datasets.pickles import load_names, load_plain

NAMES = ["Ses01F_impro01_F000", "Ses01F_impro01_M000", "Ses02M_script01_1_F003", "Ses05M_impro02_M001", "Ses05F_impro02_M004"]
FOLDERS = {"wav2vec-large-c-UTT": 4, "deberta-large-4-UTT": 6, "manet_UTT": 5}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def tree(root, labels=(0, 1, 2, 3, 1), classes=4, extra=()):
    generator = np.random.default_rng(0)
    features = {}
    for folder, d in FOLDERS.items():
        (root / "features" / folder).mkdir(parents=True)
        for name in NAMES:
            features[folder, name] = generator.normal(size=d).astype(np.float32)
            np.save(root / "features" / folder / f"{name}.npy", features[folder, name])
    names, values = {"Ses01F_impro01": NAMES[:2], "other": NAMES[2:]}, {"Ses01F_impro01": [*labels[:2]], "other": [*labels[2:]]}
    content = [names, values, {}, {}, {"Ses01F_impro01"}, {"other"}, *extra]
    (root / f"IEMOCAP_features_raw_{classes}way.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return features


def command(root, *options, kind="--iemocap"):
    return cli.main(["features", kind, str(root), "--output", str(root / "made.npz"), *map(str, options)])


def test_the_release_becomes_an_npz_that_can_be_trained_on(tmp_path, capsys):
    features = tree(tmp_path)
    manet = tmp_path / "features" / "manet_UTT"
    (manet / f"{NAMES[0]}.npy").unlink()
    (manet / NAMES[0]).mkdir()  # an empty folder
    (manet / f"{NAMES[1]}.npy").unlink()
    (manet / NAMES[1]).mkdir()
    frames = np.arange(15, dtype=np.float32).reshape(3, 5)
    for i, frame in enumerate(frames):
        np.save(manet / NAMES[1] / f"{i}.npy", frame)
    for folder in FOLDERS:
        (tmp_path / "features" / folder / f"{NAMES[2]}.npy").unlink()  # an utterance without features
    (tmp_path / "features" / "deberta-large-4-UTT" / f"{NAMES[3]}.npy").write_bytes(b"damaged")
    assert command(tmp_path) == 0
    said = capsys.readouterr().out
    assert (
        "1 × without any features, left out" in said
        and "manet_UTT: empty folder" in said
        and "deberta-large-4-UTT: damaged" in said
    )
    made = data.load_npz(tmp_path / "made.npz", ["audio", "text", "image"])
    assert len(made) == 4 and made.class_names == ["angry", "happy", "sad"]
    assert [made.class_names[i] for i in made.target] == ["happy", "sad", "angry", "sad"]
    assert made.present.tolist() == [[True, True, False], [True] * 3, [True, False, True], [True] * 3]
    np.testing.assert_array_equal(made.inputs["image"][1], frames.mean(0))
    np.testing.assert_array_equal(made.inputs["audio"][3], features["wav2vec-large-c-UTT", NAMES[4]])
    assert made.fields["part"].tolist() == ["train", "train", "test", "test"]
    assert made.fields["speaker"].tolist() == ["01F", "01M", "05M", "05M"] and made.fields["session"].tolist() == [
        "1",
        "1",
        "5",
        "5",
    ]


@pytest.mark.parametrize("classes, kept", [(4, 3), (6, 5)])
def test_labels_that_name_no_class_are_left_out_and_counted(tmp_path, capsys, classes, kept):
    tree(tmp_path, labels=(0, 4, 2, 5, 1), classes=classes)
    assert command(tmp_path, "--classes", classes, "--session", 1) == 0
    with np.load(tmp_path / "made.npz") as made:
        assert (
            len(made["label"]) == kept and "present" not in made and (made["part"] == "test").sum() == (2 if classes == 6 else 1)
        )
    assert ("label 4 is no class" in capsys.readouterr().out) == (classes == 4)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, capsys):
    tree(tmp_path, extra=[Evil(tmp_path / "ran")])
    assert command(tmp_path) == 2
    said = capsys.readouterr().err
    assert "IEMOCAP_features_raw_4way.pkl: refused or damaged, nothing in it was run" in said and "system" in said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "made.npz").exists()
    for content in (eval, os.getcwd, Exception("x"), pickle.Unpickler):
        (tmp_path / "other.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"other\.pkl: refused"):
            load_plain(tmp_path / "other.pkl")
    np.save(tmp_path / "names.npy", np.array([Evil(tmp_path / "ran"), "a"], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"names\.npy: refused"):
        load_names(tmp_path / "names.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 1, 30, 200])
def test_a_pickle_cut_short_is_named(tmp_path, size):
    whole = pickle.dumps([{"a": np.arange(9)}, {1, 2}, "x" * 300])
    (tmp_path / "d.pkl").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"d\.pkl: refused or damaged"):
        load_plain(tmp_path / "d.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_harmless_is_read(tmp_path, protocol):
    content = [{"a": [1, 2.5, None, True]}, {"x", "y"}, np.arange(3), np.float32(2), np.array(["é", "b"]), (b"ab",)]
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_plain(tmp_path / "d.pkl")
    assert found[:2] == content[:2] and found[2].tolist() == [0, 1, 2] and found[3] == 2 and found[4].tolist() == ["é", "b"]


def test_mmin_folds(tmp_path):
    generator, total = np.random.default_rng(0), 0
    for short, N in (("trn", 6), ("val", 3), ("tst", 4)):
        for folder, d in (("A", 4), ("V", 5), ("L", 6)):
            (tmp_path / folder / "2").mkdir(parents=True, exist_ok=True)
            shape = (N, 7, d) if folder == "V" else (N, d)
            np.save(tmp_path / folder / "2" / f"{short}.npy", generator.normal(size=shape))
        (tmp_path / "target" / "2").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "target" / "2" / f"{short}_label.npy", np.eye(4)[np.arange(N) % 4])
        names = np.array([f"Ses0{1 + i % 5}F_impro01_F00{i}".encode() for i in range(N)], dtype=object)
        np.save(tmp_path / "target" / "2" / f"{short}_int2name.npy", names, allow_pickle=True)
        total += N
    assert command(tmp_path, "--fold", 2, kind="--mmin") == 0
    made = data.load_npz(tmp_path / "made.npz", ["audio", "text", "image"])
    assert len(made) == total and made.target.tolist()[:6] == [0, 1, 2, 3, 0, 1]
    expected = np.load(tmp_path / "V" / "2" / "trn.npy")[2].mean(0)
    np.testing.assert_allclose(made.inputs["image"][2], expected, rtol=1e-5)
    assert made.fields["session"].tolist()[:3] == ["1", "2", "3"] and made.fields["part"].tolist().count("validation") == 3


def test_cpm_nets_folds(tmp_path, capsys):
    generator = np.random.default_rng(0)
    (tmp_path / "3").mkdir()
    for short, N in (("trn", 5), ("val", 2), ("tst", 3)):
        arrays = {name: generator.normal(size=(N, d)) for name, d in (("audio", 4), ("video", 5), ("text", 6))}
        names = [f"Ses0{1 + i}F_impro01_F00{i}" for i in range(N)]
        np.savez(tmp_path / "3" / f"{short}.npz", **arrays, label=np.eye(4)[np.arange(N) % 4], name=names)
    assert command(tmp_path, "--fold", 3, kind="--cpm") == 0
    made = data.load_npz(tmp_path / "made.npz", ["audio", "text", "image"])
    assert len(made) == 10 and made.target.tolist()[:5] == [0, 1, 2, 3, 0] and made.fields["session"].tolist()[1] == "2"
    expected = np.load(tmp_path / "3/tst.npz")["video"].astype("f4")
    np.testing.assert_array_equal(made.inputs["image"][7:], expected)
    assert command(tmp_path, kind="--cpm") == 2 and "root: expected 1/trn.npz" in capsys.readouterr().err
    np.savez(tmp_path / "3/val.npz", audio=np.zeros((2, 4)), video=np.zeros((2, 5)), text=np.array([Evil("x")] * 2), label=[0, 1])
    assert command(tmp_path, "--fold", 3, kind="--cpm") == 2
    assert "val.npz: expected arrays of numbers and strings, saved without pickle" in capsys.readouterr().err
    np.savez(tmp_path / "3/val.npz", audio=np.zeros((2, 4)))
    assert command(tmp_path, "--fold", 3, kind="--cpm") == 2 and "expected arrays audio, video" in capsys.readouterr().err


def test_mmins_sequences_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "A").mkdir()
    (tmp_path / "A/comparE.h5").write_bytes(b"")
    assert command(tmp_path, kind="--mmin") == 2
    assert "A/comparE.h5, V/denseface.h5 and L/bert_large.h5 are MMIN's sequences by frame" in capsys.readouterr().err


def test_what_is_not_there_is_named(tmp_path, capsys):
    assert command(tmp_path) == 2 and "expected one folder" in capsys.readouterr().err
    assert command(tmp_path, kind="--mmin") == 2 and "root: expected A/1/trn.npy" in capsys.readouterr().err
    assert command(tmp_path / "nowhere") == 2 and "root: expected a folder" in capsys.readouterr().err
    tree(tmp_path)
    assert command(tmp_path, "--classes", 6) == 2 and "expected one label pickle *6way*.pkl" in capsys.readouterr().err
