"""Odd and damaged ``.npz`` files: each is read to the bit as plain NumPy reads it, or refused by name."""

import io
import random
import zipfile

import numpy as np
import pytest
import torch

from mla_fast import data

N = 6
A = np.arange(18, dtype=np.float64).reshape(N, 3) / 7 + 1.7e9
B = np.arange(24, dtype=np.int64).reshape(N, 4) - 5
LABEL = np.arange(N) % 2
MASK = np.array([[True, False], [True, True], [False, True]] * 2)  # of a, b
SWAPPED = MASK[:, ::-1]  # of b, a
HUGE = np.where(MASK[:, :1], np.arange(N, dtype=np.uint64)[:, None], np.uint64(2**64 - 1))
ABSENT = np.where(MASK[:, :1], A, np.nan)
IMAGES = np.arange(N * 20, dtype=np.uint8).reshape(N, 4, 5)
NOTHING = np.array([None] * N, dtype=object)
DAMAGED = np.array([b"\xff\xfe", b"a"])


def write(path, arrays):
    arrays = {"a": A, "b": B, "label": LABEL} | arrays
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# (what is in the file, what plain NumPy makes of it)
RIGHT = {
    "float64 a second apart": ({}, {}),
    "Fortran order": ({"a": np.asfortranarray(A), "b": np.asfortranarray(B)}, {}),
    "big-endian": ({"a": A.astype(">f8"), "b": B.astype(">i2")}, {"b": B.astype(np.int16)}),
    "big-endian in Fortran order": ({"a": np.asfortranarray(A.astype(">f4"))}, {"a": A.astype(np.float32)}),
    "float16": ({"a": (A - 1.7e9).astype(np.float16)}, {"a": (A - 1.7e9).astype(np.float16).astype(np.float32)}),
    "long double": ({"a": A.astype(np.longdouble) / 3}, {"a": (A.astype(np.longdouble) / 3).astype(np.float64)}),
    "int8": ({"b": B.astype(np.int8)}, {"b": B.astype(np.int8)}),
    "uint16": ({"b": (B + 65000).astype(np.uint16)}, {"b": (B + 65000).astype(np.int32)}),
    "uint32": ({"b": (B + 2**32 - 30).astype(np.uint32)}, {"b": B + 2**32 - 30}),
    "uint64": ({"b": (B + 2**62).astype(np.uint64)}, {"b": B + 2**62}),
    "nanoseconds": ({"b": B + 1_700_000_000_000_000_000}, {"b": B + 1_700_000_000_000_000_000}),
    "booleans": ({"a": A > A.mean()}, {"a": (A > A.mean()).astype(np.float32)}),
    "images": ({"a": np.asfortranarray(IMAGES)}, {"a": IMAGES.astype(np.float32) / np.float32(255)}),
    "one column": ({"a": A[:, 0]}, {"a": A[:, 0]}),
    "a mask": ({"present": MASK}, {"present": MASK}),
    "its columns named by bytes": ({"present": SWAPPED, "modalities": np.array([b"b", b"a"])}, {"present": MASK}),
    "by big-endian strings": ({"present": SWAPPED, "modalities": np.array(["b", "a"], ">U4")}, {"present": MASK}),
    "by bytes beyond ASCII, one more": (
        {"present": np.column_stack([SWAPPED[:, 0], MASK]), "modalities": np.array(["ä".encode(), b"a", b"b"])},
        {"present": MASK},
    ),
    "a mask in Fortran order": ({"present": np.asfortranarray(MASK)}, {"present": MASK}),
    "absent rows of NaN": ({"a": ABSENT, "present": MASK}, {"a": ABSENT, "present": MASK}),
    "absent rows beyond int64": ({"a": HUGE, "present": MASK}, {"a": HUGE.astype(np.int64), "present": MASK}),
    "labels of bytes": ({"label": np.array([b"no", b"yes"])[LABEL]}, {"names": ["no", "yes"]}),
    "big-endian labels from 1": ({"label": (LABEL + 1).astype(">u8")}, {"names": ["1", "2"]}),
    "labels from 1 with a gap": ({"label": LABEL * 4 + 3}, {"names": ["3", "7"]}),
    "labels −1 and 1": ({"label": LABEL * 2.0 - 1}, {"names": ["-1", "1"]}),
    "whole labels in a column": ({"label": LABEL[:, None].astype(np.float32)}, {}),
    "boolean labels": ({"label": LABEL.astype(bool)}, {"names": ["False", "True"]}),
    "classes without samples": ({"label": LABEL * 3}, {"target": LABEL * 3}),
    "objects that nobody asked for": ({"c": NOTHING, "d": np.array({})}, {}),
    "other arrays of all kinds": ({"c": np.zeros(N, [("x", int)]), "d": np.array("2020", "M8[Y]"), "e": np.zeros((0, 2))}, {}),
    "fields of bytes": ({"c": np.array([b"u", b"v"] * 3), "d": np.array([b"\xff"] * N)}, {"fields": {"c": ["u", "v"] * 3}}),
}


@pytest.mark.parametrize("case", RIGHT)
def test_read_as_plain_numpy_reads_it(tmp_path, case):
    arrays, expected = RIGHT[case]
    dataset = data.load_npz(write(tmp_path / "odd.npz", arrays), ["a", "b"])
    for name, stored in (("a", A), ("b", B)):
        array = expected.get(name, stored)
        got = dataset.inputs[name].numpy()
        assert got.dtype == array.dtype and got.flags.c_contiguous
        np.testing.assert_array_equal(got, array)
    assert dataset.target.tolist() == expected.get("target", LABEL).tolist()
    assert dataset.class_names == expected.get("names")
    if "present" in expected:
        assert dataset.present.tolist() == expected["present"].tolist()
    else:
        assert dataset.present is None
    for name, values in expected.get("fields", {}).items():
        assert dataset.fields[name].tolist() == values


REFUSED = {
    "unsigned beyond int64": ({"b": B.astype(np.uint64)}, r"'b': expected integers below 2\^63, got 18446744073709551615"),
    "complex": ({"a": A + 1j}, "'a': expected numbers, got dtype complex128"),
    "strings": ({"a": A.astype(str)}, "'a': expected numbers, got dtype <U"),
    "dates": ({"a": np.zeros((N, 1), "M8[s]")}, r"'a': expected numbers, got dtype datetime64\[s\]"),
    "records": ({"a": np.zeros(N, [("x", float)])}, "'a': expected numbers, got dtype"),
    "objects": ({"a": NOTHING}, "'a': expected numbers or names, got Python objects"),
    "not finite": ({"a": np.where(np.arange(N)[:, None] == 3, np.inf, A)}, "'a': expected finite values, row 3 has others"),
    "a long double too large": ({"a": A.astype(np.longdouble) * np.longdouble("1e4000")}, "'a': expected finite values, row 0"),
    "another length": ({"b": B[:5]}, r"expected arrays of one length N .* b \[5, 4\]"),
    "a mask of objects": ({"present": NOTHING}, "'present': expected numbers or names, got Python objects"),
    "a mask of numbers": (
        {"present": MASK.astype(np.uint8)},
        r"expected present to be bool \[6, 2\] \(samples, a, b\), got uint8",
    ),
    "a mask of another shape": ({"present": MASK.T}, r"expected present to be bool \[6, 2\]"),
    "columns named by objects": (
        {"present": MASK, "modalities": np.array(["b", "a"], object)},
        "'modalities': expected .* objects",
    ),
    "by numbers": ({"present": MASK, "modalities": np.arange(2)}, r"'modalities': expected the names .* got int64 \[2\]"),
    "in a table": (
        {"present": MASK, "modalities": np.array([["b", "a"]])},
        r"'modalities': expected the names .* got <U1 \[1, 2\]",
    ),
    "by one string": ({"present": MASK, "modalities": np.array("b,a")}, r"'modalities': expected the names .* got <U3 \[\]"),
    "by bytes that are no text": ({"present": MASK, "modalities": DAMAGED}, "'modalities': expected bytes in UTF-8"),
    "by a name twice": ({"present": MASK, "modalities": np.array(["a", "a"])}, "'modalities': expected each name once, got a, a"),
    "by other names": ({"present": MASK, "modalities": np.array([b"a", b"c"])}, "present has columns for a, c, and none for b"),
    "labels of objects": ({"label": NOTHING}, "'label': expected numbers or names, got Python objects"),
    "labels between classes": ({"label": LABEL / 2}, "'label': expected classes, as whole numbers, row 1 has 0.5"),
    "labels that are not there": ({"label": np.where(LABEL, np.nan, 0)}, "'label': expected classes, as whole .* row 1 has nan"),
    "labels without a name": ({"label": np.array(["", "x"])[LABEL]}, "'label': expected a name in every row, row 0 has none"),
    "labels that are no text": ({"label": DAMAGED[LABEL]}, "'label': expected bytes in UTF-8"),
    "labels by column": ({"label": np.eye(2)[LABEL]}, r"'label': expected \[N\] or \[N, 1\] .* got \[6, 2\]"),
    "negative labels": ({"label": LABEL - 1}, "'label': expected classes from 0, got -1"),
    "labels beyond int64": (
        {"label": LABEL.astype(np.uint64) * np.uint64(2**64 - 1)},
        "'label': expected classes from 0, got 1844",
    ),
    "a label of each row's own": ({"label": np.arange(N) + 10}, "'label': expected classes that samples have in common"),
    "dates as labels": ({"label": np.zeros(N, "M8[s]")}, "'label': expected integers, whole numbers, booleans or names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, case):
    arrays, message = REFUSED[case]
    with pytest.raises(ValueError, match=r"odd\.npz: .*" + message):
        data.load_npz(write(tmp_path / "odd.npz", arrays), ["a", "b"])


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(A).replace(b"(6, 3)", b"(6, 2)"), "cannot read array 'a': expected 96 bytes for float64 .* got 48 more"),
        (npy(A).replace(b"(6, 3)", b"(7, 3)"), "cannot read array 'a'"),
        (npy(A).replace(b"'<f8'", b"'<f9'"), "cannot read array 'a'"),
        (npy(A).replace(b"(6, 3)", b"(6,-3)"), "cannot read array 'a'"),
        (npy(A)[:-1], "cannot read array 'a'"),
        (npy(A).replace(b"NUMPY", b"numpy"), "cannot read array 'a': it is not a NumPy array"),
        (b"", "cannot read array 'a': it is not a NumPy array"),
    ],
)
def test_a_member_that_is_not_what_its_header_says(tmp_path, content, message):
    path = write(tmp_path / "odd.npz", {"a": None})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=r"odd\.npz: " + message):
        data.load_npz(path, ["a", "b"])


def test_two_members_of_one_name(tmp_path):
    path = write(tmp_path / "odd.npz", {})
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.npy", npy(A + 1))
    with pytest.raises(ValueError, match=r"odd\.npz: expected one array of each name, got two of 'a'"):
        data.load_npz(path, ["a", "b"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_bit_flipped_anywhere_is_noticed_or_does_not_matter(tmp_path, save):
    """In the archive's directory, too, where zipfile overlooks damage that hides a member: the mask, say."""
    names = np.array([b"b", b"a"])
    save(tmp_path / "whole.npz", a=A, b=B, label=LABEL, present=SWAPPED, modalities=names, junk=NOTHING)
    whole = (tmp_path / "whole.npz").read_bytes()
    refused, draw = 0, random.Random(0)
    directory = whole.index(b"PK\1\2")
    for place in [*range(directory, len(whole), 3), *(draw.randrange(directory) for _ in range(150))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / "odd.npz").write_bytes(damaged)
        try:
            dataset = data.load_npz(tmp_path / "odd.npz", ["a", "b"])
        except ValueError as error:
            assert "odd.npz: " in str(error)
            refused += 1
        else:
            assert torch.equal(dataset.inputs["a"], torch.from_numpy(A)) and torch.equal(dataset.inputs["b"], torch.from_numpy(B))
            assert dataset.present.tolist() == MASK.tolist() and dataset.target.tolist() == LABEL.tolist()
    assert refused > 150


def test_tokens_of_uint8_stay_integers(tmp_path):
    path = write(tmp_path / "odd.npz", {"a": IMAGES[:, 0]})
    assert torch.equal(data.load_npz(path, ["a"], tokens=["a"]).inputs["a"], torch.from_numpy(IMAGES[:, 0].astype(np.int64)))


def test_labels_of_other_data_are_matched_by_name(tmp_path):
    path = write(tmp_path / "odd.npz", {"label": np.array([b"dog", b"cat", b"dog"] * 2)})
    dataset = data.load_npz(path, ["a"], class_names=["ape", "cat", "dog"])
    assert dataset.target.tolist() == [2, 1, 2] * 2 and dataset.classes == 3 and dataset.subset([1]).class_names[1] == "cat"
    numbered = data.load_npz(write(path, {"label": np.array([[2.0], [1.0]] * 3)}), ["a"], class_names=["0", "1", "2"])
    assert numbered.target.tolist() == [2, 1] * 3  # and not 1, 0
    with pytest.raises(ValueError, match=r"odd\.npz: 'label': expected the classes ape, cat, got 1, 2"):
        data.load_npz(path, ["a"], class_names=["ape", "cat"])
    with pytest.raises(ValueError, match="^class_names: expected a name for each class up to 1, got ape"):
        data.MultimodalDataset({"a": torch.zeros(2, 1)}, torch.arange(2), class_names=["ape"])


@pytest.mark.parametrize("speakers", [np.array([b"ann", b"bob"] * 3), np.array(["ann", "bob"] * 3, ">U3")])
def test_rows_by_a_field_of_names(tmp_path, speakers):
    dataset = data.load_npz(write(tmp_path / "odd.npz", {"speaker": speakers}), ["a"])
    assert data.rows_where(dataset, "speaker=bob").tolist() == [False, True] * 3
    dataset.fields["speaker"] = speakers  # as it is in a data set of one's own
    assert data.rows_where(dataset, "speaker=bob").tolist() == [False, True] * 3


def test_a_field_of_bytes_that_are_no_text_is_refused_when_asked_for(tmp_path):
    dataset = data.load_npz(write(tmp_path / "odd.npz", {"speaker": DAMAGED[LABEL]}), ["a"])
    with pytest.raises(ValueError, match="^where: 'speaker': expected bytes in UTF-8"):
        data.rows_where(dataset, "speaker=a")
