"""IEMOCAP's released features in made trees of the same layout, with their traps; pickles that would run something."""

import os
import pickle

import numpy as np
import pytest

from mla_fast import cli, data, datasets
from mla_fast.datasets.npy import load_names
from mla_fast.datasets.pickles import load_plain

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


def mmin(root, labels, N=6, fold=1, **features):
    """A fold in MMIN's layout, whose training part has these labels and features."""
    generator = np.random.default_rng(0)
    for short in ("trn", "val", "tst"):
        arrays = {f"{folder}/{fold}/{short}": generator.normal(size=(N, d)) for folder, d in (("A", 4), ("V", 5), ("L", 6))}
        arrays[f"target/{fold}/{short}_label"] = np.asarray(labels) if short == "trn" else np.arange(N) % 4
        if short == "trn":
            arrays |= {f"{folder}/{fold}/trn": x for folder, x in features.items()}
        for name, array in arrays.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / f"{name}.npy", array)


def cpm(root, labels, N=6, fold=1, **features):
    """The same in CPM-Net's layout."""
    generator = np.random.default_rng(0)
    (root / str(fold)).mkdir(exist_ok=True)
    for short in ("trn", "val", "tst"):
        arrays = {name: generator.normal(size=(N, d)) for name, d in (("audio", 4), ("video", 5), ("text", 6))}
        more = {"label": np.asarray(labels), **features} if short == "trn" else {"label": np.arange(N) % 4}
        np.savez(root / str(fold) / f"{short}.npz", **(arrays | more))


def command(root, *options, kind="--iemocap"):
    return cli.main(["features", kind, str(root), "--output", str(root / "made.npz"), "--overwrite", *map(str, options)])


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


def without_end(kind, depth=60):
    found = kind()
    for _ in range(depth):
        found = kind((found, found))
    return found


@pytest.mark.filterwarnings("error")
def test_features_that_are_none_are_absent_and_counted(tmp_path, capsys):
    tree(tmp_path)
    features = tmp_path / "features"
    np.save(features / "manet_UTT" / f"{NAMES[0]}.npy", np.zeros((0, 5)))
    np.save(features / "manet_UTT" / f"{NAMES[1]}.npy", np.zeros(0))
    (features / "manet_UTT" / NAMES[2]).mkdir()
    np.save(features / "manet_UTT" / NAMES[2] / "0.npy", np.zeros((0, 5)))
    np.save(features / "manet_UTT" / NAMES[2] / "1.npy", np.ones((2, 5)))
    np.save(features / "wav2vec-large-c-UTT" / f"{NAMES[0]}.npy", np.array([1, np.nan, 2, 3]))
    np.save(features / "wav2vec-large-c-UTT" / f"{NAMES[1]}.npy", np.array([[np.inf] * 4, [-np.inf] * 4]))
    np.save(features / "wav2vec-large-c-UTT" / f"{NAMES[2]}.npy", np.array([1e300] * 4))
    np.save(features / "wav2vec-large-c-UTT" / f"{NAMES[3]}.npy", np.array(["1"] * 4))
    np.save(features / "deberta-large-4-UTT" / f"{NAMES[0]}.npy", np.full(6, np.nan))
    assert command(tmp_path) == 0
    said = capsys.readouterr().out
    assert "2 × manet_UTT: no frames" in said and "1 × without any features, left out" in said
    for i in range(3):
        assert f"damaged ({features / 'wav2vec-large-c-UTT' / NAMES[i]}.npy: not finite)" in said
    assert f"{NAMES[3]}.npy: not an array (expected a NumPy array of numbers, got <U1)" in said
    made = data.load_npz(tmp_path / "made.npz", ["audio", "text", "image"])
    assert made.present.tolist() == [[False, True, False], [False, True, True], [False, True, True], [True, True, True]]
    assert (made.inputs["image"][1] == 1).all() and all(x.isfinite().all() for x in made.inputs.values())


def test_a_width_of_its_own_is_named(tmp_path, capsys):
    tree(tmp_path)
    folder = tmp_path / "features" / "manet_UTT"
    (folder / NAMES[1]).mkdir()
    for i, d in enumerate((5, 5, 6)):
        np.save(folder / NAMES[1] / f"{i}.npy", np.zeros(d))
    assert command(tmp_path) == 2
    expected = f"{folder / NAMES[1] / '2.npy'}: expected features of one width, 5 as of {folder / NAMES[1] / '0.npy'}, got 6"
    assert expected in capsys.readouterr().err
    (folder / NAMES[1] / "2.npy").unlink()
    np.save(folder / f"{NAMES[3]}.npy", np.zeros(7))
    assert command(tmp_path) == 2
    assert f"image: {NAMES[3]}: expected features of one width, 5 as of {NAMES[0]}, got 7" in capsys.readouterr().err


LABELS = {
    "a fraction": ({"a": NAMES}, {"a": [0, 1, 2.5, 3, 1]}, "a: label 2: expected a whole number, got 2.5"),
    "a whole fraction": ({"a": NAMES}, {"a": [0, 1, 2.0, 3, 1]}, "a: label 2: expected a whole number, got 2.0"),
    "fractions": ({"a": NAMES}, {"a": np.array([0.0] * 5)}, "a: label 0: expected a whole number, got 0.0"),
    "a boolean": ({"a": NAMES}, {"a": [True] * 5}, "a: label 0: expected a whole number, got True"),
    "a text": ({"a": NAMES}, {"a": ["hap"] * 5}, "a: label 0: expected a whole number, got 'hap'"),
    "a list": ({"a": NAMES}, {"a": [[0]] * 5}, "a: label 0: expected a whole number, got list"),
    "an array": ({"a": NAMES}, {"a": [np.zeros(1, int)] * 5}, "a: label 0: expected a whole number, got ndarray"),
    "rows": ({"a": NAMES}, {"a": np.zeros((5, 1), int)}, "a: expected a list of labels, got ndarray"),
    "lists without end": ({"a": NAMES}, {"a": [without_end(list)] * 5}, "a: label 0: expected a whole number, got list"),
    "tuples without end": ({"a": NAMES}, {"a": without_end(tuple)}, "a: expected a label for each of 5 utterances, got 2"),
    "tuples without end as a dialog": ({without_end(tuple, 9): NAMES}, {}, "refused or damaged, .*, got tuple"),
    "names without end": ({"a": without_end(list)}, {"a": [0, 0]}, "a: utterance 0: expected a name, got list"),
    "a number for names": ({"a": 7}, {"a": 7}, "a: expected a list of utterances, got 7"),
    "a text for names": ({"a": "abc"}, {"a": [0, 0, 0]}, "a: expected a list of utterances, got 'abc'"),
    "a set for names": ({"a": {*NAMES}}, {"a": [0] * 5}, "a: expected a list of utterances, got set"),
    "a number for labels": ({"a": NAMES}, {"a": 7}, "a: expected a list of labels, got 7"),
    "no labels": ({"a": NAMES}, {}, "a: expected a label for each of 5 utterances, got 0"),
    "a number for a name": ({"a": [1]}, {"a": [0]}, "a: utterance 0: expected a name, got 1"),
    "a number for a dialog": ({7: NAMES}, {7: [0] * 5}, "dialog: expected a name, got 7"),
    "a long name": ({"a": ["a" * 10**6]}, {"a": [0]}, "a: utterance 0: expected a name, got 'aaa.*aaa'$"),
    "no dialogs": ([NAMES], {}, r"expected a list of \{dialog: utterances\}, \{dialog: labels\}, …, got list"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_label_pickle_of_other_content_is_named(tmp_path, kind):
    tree(tmp_path)
    names, labels, message = LABELS[kind]
    (tmp_path / "IEMOCAP_features_raw_4way.pkl").write_bytes(pickle.dumps([names, labels]))
    with pytest.raises(ValueError, match=rf"4way\.pkl: {message}") as caught:
        datasets.read_gcnet(tmp_path)
    assert len(str(caught.value)) < 600


def test_labels_of_any_integers_are_read_and_counted(tmp_path):
    tree(tmp_path)
    names = {b"a": tuple(map(str.encode, NAMES[:3])), "b": np.array(NAMES[3:]), "c": ["Ses01" + "a" * 200 + "_F1"]}
    labels = {b"a": (0, 10**5000, -1), "b": np.array([3, 1]), "c": [0]}
    (tmp_path / "IEMOCAP_features_raw_4way.pkl").write_bytes(pickle.dumps([names, labels]))
    (tmp_path / "._IEMOCAP_features_raw_4way.pkl").write_bytes(b"of macOS")
    arrays, said = datasets.read_gcnet(tmp_path)
    assert arrays["label"].tolist() == ["happy", "angry", "sad"] and arrays["dialog"].tolist() == ["a", "b", "b"]
    assert said == ["1 × label -1 is no class", "1 × label int is no class", "1 × name is no utterance of IEMOCAP"]


RIGHT = {
    "numbers": [0, 1, 2, 3, 1, 0],
    "numbers as floats": [0.0, 1.0, 2.0, 3.0, 1.0, 0.0],
    "a column": [[0], [1], [2], [3], [1], [0]],
    "one-hot": np.eye(4)[[0, 1, 2, 3, 1, 0]],
    "one-hot booleans": np.eye(4, dtype=bool)[[0, 1, 2, 3, 1, 0]],
}
WRONG = {
    "a fraction": ([0, 0.5, 1, 2, 3, 0], "row 1: expected a whole number of 0 … 3 as label, got 0.5"),
    "nearly whole": ([0, 1 - 1e-12, 1, 2, 3, 0], "row 1: expected a whole number of 0 … 3 as label, got 0.99"),
    "too large": ([[0], [1], [9], [1], [4], [0]], "row 2: expected a whole number of 0 … 3 as label, got 9"),
    "below zero": ([0, 1, 2, 3, 1, -1], "row 5: expected a whole number of 0 … 3 as label, got -1"),
    "not a number": ([np.nan] * 6, "row 0: expected a whole number of 0 … 3 as label, got nan"),
    "zeros": (np.eye(5)[:, :4][[0, 1, 2, 4, 1, 0]], "row 3: expected a single 1 among 4 as label, got 0.0, 0.0, 0.0, 0.0"),
    "two": (np.array([[1, 1, 0, 0]] * 6), "row 0: expected a single 1 among 4 as label, got 1, 1, 0, 0"),
    "probabilities": (np.full((6, 4), 0.25), "row 0: expected a single 1 among 4 as label, got 0.25"),
    "a sum of one": (np.array([[1, 1, -1, 0]] * 6), "row 0: expected a single 1 among 4 as label, got 1, 1, -1, 0"),
    "six columns": (np.eye(6), "expected labels of whole numbers .* or one-hot .N, 4., got float64 .6, 6."),
    "no columns": (np.zeros((6, 0)), "expected labels of whole numbers"),
    "texts": (["0"] * 6, "expected labels of whole numbers .*, got <U1 .6."),
    "booleans": ([True] * 6, "expected labels of whole numbers .*, got bool .6."),
    "single": (3, "expected labels of whole numbers .*, got int64 .."),
    "a single text": ("happy", "expected labels of whole numbers .*, got <U5 .."),
    "too few": ([0, 1], "expected numbers .N, d. or .N, T, d. of audio for N = 2 labels, got float.* .6, 4."),
}


@pytest.mark.parametrize("make, read", [(mmin, datasets.read_mmin), (cpm, datasets.read_cpm)])
@pytest.mark.parametrize("kind", [*RIGHT, *WRONG])
def test_labels_of_folds(tmp_path, kind, make, read):
    make(tmp_path, RIGHT[kind] if kind in RIGHT else WRONG[kind][0])
    if kind in RIGHT:
        assert read(tmp_path)[0]["label"].tolist() == [0, 1, 2, 3, 1, 0, *[0, 1, 2, 3, 0, 1] * 2]
    else:
        with pytest.raises(ValueError, match=rf"trn(_label\.npy|\.npz): {WRONG[kind][1]}"):
            read(tmp_path)


@pytest.mark.parametrize("make, kind", [(mmin, "--mmin"), (cpm, "--cpm")])
def test_folds_of_six_classes(tmp_path, capsys, make, kind):
    make(tmp_path, np.eye(6))
    assert command(tmp_path, "--classes", 6, kind=kind) == 0
    with np.load(tmp_path / "made.npz") as made:
        assert made["label"].tolist()[:6] == [*range(6)]
    make(tmp_path, range(6))
    assert command(tmp_path, "--classes", 6, kind=kind) == 0
    assert command(tmp_path, kind=kind) == 2 and "row 4: expected a whole number of 0 … 3" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make, read, names", [(mmin, datasets.read_mmin, "AV"), (cpm, datasets.read_cpm, ("audio", "video"))])
def test_rows_of_folds_that_are_not_finite_are_absent_and_counted(tmp_path, make, read, names):
    audio, video = np.ones((6, 3, 4)), np.ones((6, 5))
    audio[1, 2, 3], audio[2, :2, 0], video[4, 0] = np.nan, (np.inf, -np.inf), 1e300
    make(tmp_path, [0] * 6, **dict(zip(names, (audio, video), strict=True)))
    arrays, said = read(tmp_path)
    assert said == ["2 × audio: not finite", "1 × image: not finite"]
    assert arrays["present"][:6].tolist() == [[i not in (1, 2), True, i != 4] for i in range(6)]
    assert all(np.isfinite(arrays[modality]).all() for modality in ("audio", "text", "image"))
    assert not arrays["audio"][1].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make, read, name", [(mmin, datasets.read_mmin, "V"), (cpm, datasets.read_cpm, "video")])
@pytest.mark.parametrize("shape", [(6,), (), (5, 5), (6, 0, 5), (6, 0), (6, 1, 1, 5)])
def test_arrays_of_folds_of_other_shapes_are_named(tmp_path, make, read, name, shape):
    make(tmp_path, [0] * 6, **{name: np.zeros(shape)})
    with pytest.raises(ValueError, match=r"trn.*: expected numbers \[N, d\] or \[N, T, d\] of image for N = 6 labels, got float"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", ["U1", "c16"])
def test_arrays_of_folds_of_no_numbers_are_named(tmp_path, dtype):
    cpm(tmp_path, [0] * 6, video=np.ones((6, 5)).astype(dtype))
    with pytest.raises(ValueError, match=r"trn\.npz: expected numbers .* of image for N = 6 labels, got"):
        datasets.read_cpm(tmp_path)
    mmin(tmp_path, [0] * 6, V=np.ones((6, 5)).astype(dtype))
    with pytest.raises(ValueError, match=r"trn\.npy: not an array \(expected a NumPy array of numbers, got"):
        datasets.read_mmin(tmp_path)


def test_parts_of_other_widths_and_names_that_are_none_are_named(tmp_path):
    mmin(tmp_path, [0] * 6, V=np.zeros((6, 7)))
    with pytest.raises(ValueError, match="image: validation 0: expected features of one width, 7 as of train 0, got 5"):
        datasets.read_mmin(tmp_path)
    for names, message in (([1] * 6, "row 0: expected a name, got 1"), (["a"] * 5, "expected as many names as labels, 6, got 5")):
        np.save(tmp_path / "target/1/trn_int2name.npy", names)
        with pytest.raises(ValueError, match=f"trn_label.npy: {message}"):
            datasets.read_mmin(tmp_path)
    cpm(tmp_path, [0] * 6, name=[1.5] * 6)
    with pytest.raises(ValueError, match=r"trn\.npz: row 0: expected a name, got 1\.5"):
        datasets.read_cpm(tmp_path)
    cpm(tmp_path, [0] * 6, name=np.full(6, 2**32 - 1, np.uint32).view("U1"))
    with pytest.raises(ValueError, match=r"trn\.npz: expected names, got others"):
        datasets.read_cpm(tmp_path)


def test_a_damaged_npz_is_named(tmp_path, capsys):
    cpm(tmp_path, [0] * 6)
    path = tmp_path / "1" / "trn.npz"
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = [b"", b"no zip", whole[:100], whole[:-30], whole.replace(b"\x93NUMPY", b"\x93NUMPX")]
    contents += [(tmp_path / "array.npy").read_bytes(), pickle.dumps([1])]
    for content in contents:
        path.write_bytes(content)
        assert command(tmp_path, kind="--cpm") == 2
        said = capsys.readouterr().err
        assert f"error: {path}: " in said and "allow_pickle" not in said and len(said.splitlines()) == 1


def test_options_that_do_nothing_are_refused(tmp_path, capsys):
    for kind, option in (("--iemocap", "fold"), ("--mmin", "session"), ("--cpm", "session")):
        assert command(tmp_path, f"--{option}", 1, kind=kind) == 2
        assert f"{option}: expected with --" in (said := capsys.readouterr().err) and f"got --{option} 1" in said
    mmin(tmp_path, [0] * 6, fold=0)
    assert command(tmp_path, "--fold", 0, kind="--mmin") == 0


def test_a_file_that_is_there_stays(tmp_path, capsys):
    (tmp_path / "x.npz").write_text("precious")
    (tmp_path / "folder.npz").mkdir()
    for name in ("x.npz", "folder.npz"):
        assert cli.main(["features", "--iemocap", str(tmp_path), "--output", str(tmp_path / name)]) == 2
        assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "x.npz").read_text() == "precious"
