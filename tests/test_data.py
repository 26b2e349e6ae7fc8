"""Data sets: indexing, files that are right and files that are not, splits, standardisation, and the demo's two data sets."""

import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from mla_fast import data
from mla_fast.data import MultimodalDataset


def make(N=13, classes=3, **fields):
    """Rows that can be told apart: sample i has i in every entry."""
    rows = torch.arange(N, dtype=torch.float32)
    inputs = {"audio": rows[:, None].expand(N, 4).clone(), "image": rows[:, None, None].expand(N, 2, 3).clone()}
    return MultimodalDataset(inputs, torch.arange(N) % classes, {name: np.asarray(column) for name, column in fields.items()})


class TestMultimodalDataset:
    def test_says_what_it_holds(self):
        dataset = make(speaker=np.arange(13))
        assert (len(dataset), dataset.modalities, dataset.classes) == (13, ("audio", "image"), 3)
        assert repr(dataset) == "MultimodalDataset(13 samples, 3 classes, audio [4], image [2, 3], fields speaker)"

    def test_one_sample(self):
        inputs, target = make()[4]
        assert inputs["audio"].tolist() == [4] * 4 and inputs["image"].shape == (2, 3) and target.item() == 1

    @pytest.mark.parametrize(
        "index", [slice(2, 5), [2, 3, 4], torch.tensor([2, 3, 4]), np.array([2, 3, 4]), (torch.arange(13) - 3).abs() < 2]
    )
    def test_a_batch(self, index):
        inputs, target = make()[index]
        assert inputs["audio"][:, 0].tolist() == [2, 3, 4] == inputs["image"][:, 1, 2].tolist()
        assert target.tolist() == [2, 0, 1]

    def test_an_empty_list_is_an_empty_batch(self):
        assert len(make()[[]][1]) == 0

    def test_iterates_over_all_samples(self):
        assert [int(target) for _, target in make(5)] == [0, 1, 2, 0, 1]

    @pytest.mark.parametrize("rows", [[7, 2], torch.tensor([7, 2]), np.array([7, 2])])
    def test_subset_by_indices_keeps_order_and_fields(self, rows):
        subset = make(speaker=np.arange(13) * 10).subset(rows)
        assert subset.inputs["audio"][:, 0].tolist() == [7, 2] and subset.fields["speaker"].tolist() == [70, 20]

    def test_subset_by_mask(self):
        mask = torch.arange(13) > 10
        assert make().subset(mask).target.tolist() == [2, 0] == make().subset(mask.numpy()).target.tolist()

    def test_subset_refuses_nothing_and_a_mask_of_another_length(self):
        with pytest.raises(ValueError, match="mask_or_indices: expected to select at least one sample"):
            make().subset(torch.zeros(13, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"mask_or_indices: expected a mask \[13\], got \[12\]"):
            make().subset(torch.ones(12, dtype=torch.bool))

    def test_uint8_target_becomes_int64(self):
        assert MultimodalDataset({"a": torch.zeros(2, 1)}, torch.tensor([0, 255], dtype=torch.uint8)).target.tolist() == [0, 255]

    @pytest.mark.parametrize(
        ("inputs", "target", "fields", "error", "message"),
        [
            ({}, [0], {}, ValueError, "inputs: expected at least one modality"),
            ({"a": [[1.0]]}, [0, 1], {}, ValueError, r"inputs\['a'\]: expected \[2, ...\] to match target, got \[1, 1\]"),
            ({"a": 1.0}, [0], {}, ValueError, r"inputs\['a'\]: expected \[1, ...\] to match target, got \[\]"),
            ({"a": [[1.0]]}, [0], {"f": [1, 2]}, ValueError, r"fields\['f'\]: expected \[1, ...\] to match target, got \[2\]"),
            ({"a": [[1.0]]}, [0.0], {}, TypeError, "target: expected an integer tensor .* got torch.float32"),
            ({"a": [[1.0]]}, [True], {}, TypeError, "target: expected an integer tensor .* got torch.bool"),
            ({"a": [[1.0]]}, [-1], {}, ValueError, "target: expected classes from 0, got -1"),
            ({"a": [[1.0]]}, [[0]], {}, ValueError, r"target: expected \[N\] .* got \[1, 1\]"),
        ],
    )
    def test_refuses(self, inputs, target, fields, error, message):
        with pytest.raises(error, match=message):
            MultimodalDataset({m: torch.tensor(x) for m, x in inputs.items()}, torch.tensor(target), fields)

    def test_refuses_what_is_empty_or_no_tensor(self):
        with pytest.raises(ValueError, match="target: expected .* at least one sample"):
            MultimodalDataset({"a": torch.zeros(0, 1)}, torch.zeros(0, dtype=torch.long))
        with pytest.raises(TypeError, match="target: expected an integer tensor .* got list"):
            MultimodalDataset({"a": torch.zeros(1, 1)}, [0])
        with pytest.raises(TypeError, match=r"inputs\['a'\]: expected a tensor .* got ndarray"):
            MultimodalDataset({"a": np.zeros((1, 1))}, torch.tensor([0]))


class TestLoader:
    @pytest.mark.parametrize("batch_size", [1, 5, 13, 100])
    def test_in_order(self, batch_size):
        batches = list(data.loader(make(), batch_size))
        assert torch.cat([inputs["audio"][:, 0] for inputs, _ in batches]).tolist() == list(range(13))
        assert len(batches[0][1]) == min(batch_size, 13) and len(data.loader(make(), batch_size)) == len(batches)

    def test_shuffled_each_epoch_anew_and_repeatably(self):
        loader = data.loader(make(), 4, shuffle=True)
        torch.manual_seed(0)
        first, second = ([int(i) for inputs, _ in loader for i in inputs["audio"][:, 0]] for _ in range(2))
        torch.manual_seed(0)
        assert [int(i) for inputs, _ in loader for i in inputs["audio"][:, 0]] == first != second
        assert sorted(first) == list(range(13)) == sorted(second)

    def test_inputs_and_target_stay_together(self):
        for inputs, target in data.loader(make(), 4, shuffle=True):
            for x in inputs.values():
                assert torch.equal(x.flatten(1)[:, 0] % 3, target.float())

    def test_refuses_a_batch_size_of_zero(self):
        with pytest.raises(ValueError, match="batch_size"):
            data.loader(make(), 0)


def save(path, **arrays):
    arrays = {"audio": np.full((6, 4), 255, np.uint8), "text": np.arange(18.0).reshape(6, 3), "label": np.arange(6)} | arrays
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


class TestLoadNpz:
    def test_modalities_label_and_fields(self, tmp_path):
        names = np.array(["a", "b"])
        path = save(tmp_path / "d.npz", speaker=np.arange(6), name=np.array(list("uvwxyz")), speaker_names=names)
        dataset = data.load_npz(path, ["audio", "text"])
        assert dataset.inputs["audio"].dtype == torch.float32 and dataset.inputs["text"].dtype == torch.float64
        assert (dataset.inputs["audio"] == 1).all() and dataset.inputs["text"].max() == 17
        assert dataset.target.tolist() == list(range(6)) and set(dataset.fields) == {"speaker", "name"}

    def test_another_label_and_a_string_path(self, tmp_path):
        path = save(tmp_path / "d.npz", genre=np.array([0, 1, 0, 1, 0, 1], np.uint8), label=None)
        assert data.load_npz(str(path), ("audio",), label="genre").classes == 2

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere.npz: no such file"):
            data.load_npz(tmp_path / "nowhere.npz", ["audio"])

    @pytest.mark.parametrize("content", [b"", b"not an archive", b"\x80\x04K\x01.", b"PK\x03\x04 and no more"])
    def test_foreign_file(self, tmp_path, content):
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"d\.npz: not a \.npz file"):
            data.load_npz(tmp_path / "d.npz", ["audio"])

    def test_single_array(self, tmp_path):
        np.save(tmp_path / "d.npy", np.zeros(3))
        with pytest.raises(ValueError, match=r"d\.npy: not a \.npz file"):
            data.load_npz(tmp_path / "d.npy", ["audio"])

    def test_a_zip_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(ValueError, match=r"d\.npz: cannot read array 'readme\.txt': it is not a NumPy array"):
            data.load_npz(tmp_path / "d.npz", ["audio"])

    def test_cut_short_anywhere(self, tmp_path):
        whole = save(tmp_path / "d.npz").read_bytes()
        for size in range(0, len(whole), 37):
            (tmp_path / "short.npz").write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"short\.npz: "):
                data.load_npz(tmp_path / "short.npz", ["audio"])

    def test_damaged_inside(self, tmp_path):
        np.savez(tmp_path / "d.npz", audio=np.ones((6, 400)), label=np.arange(6))
        content = bytearray((tmp_path / "d.npz").read_bytes())
        content[1000] ^= 0xFF  # within the numbers of `audio`: the checksum tells
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"d\.npz: cannot read array 'audio'"):
            data.load_npz(tmp_path / "d.npz", ["audio"])

    def test_never_unpickles(self, tmp_path):
        path = save(tmp_path / "d.npz", speaker=np.array([None] * 6, dtype=object))
        for asked in ({"modalities": ["audio", "speaker"]}, {"modalities": ["audio"], "label": "speaker"}):
            with pytest.raises(ValueError, match=r"d\.npz: 'speaker': expected numbers or names, got Python objects"):
                data.load_npz(path, **asked)
        dataset = data.load_npz(path, ["audio"])  # which nobody has asked for
        assert "speaker" not in dataset.fields
        with pytest.raises(ValueError, match=r"where: no field 'speaker'.*arrays of Python objects"):
            data.split_where(dataset, "speaker=1")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"audio": None}, "no array 'audio'; there are: text, label"),
            ({"audio": None, "label": None}, "no array 'audio', 'label'; there are: text"),
            ({"label": np.arange(5)}, r"of one length N .* got audio \[6, 4\], text \[6, 3\], label \[5\]"),
            ({"text": np.zeros((7, 3))}, r"of one length N .* text \[7, 3\]"),
            ({"label": np.array(3)}, r"of one length N .* label \[\]"),
            ({"text": np.array([["a"]] * 6)}, "'text': expected numbers, got dtype <U1"),
            ({"text": np.zeros((6, 3), complex)}, "'text': expected numbers, got dtype complex128"),
            ({"label": np.arange(6.0) + 0.5}, "'label': expected classes, as whole numbers, row 0 has 0.5"),
            (
                {"label": np.zeros(6, complex)},
                "'label': expected integers, whole numbers, booleans or names, got dtype complex128",
            ),
            ({"label": np.array(list("abcdef"))}, "'label': expected classes .* another label in each of 6 rows"),
            ({"label": np.arange(6) - 1}, "'label': expected classes from 0, got -1"),
            ({"label": np.zeros((6, 2), int)}, r"'label': expected \[N\] .* got \[6, 2\]"),
            ({"audio": np.zeros((0, 4)), "text": np.zeros((0, 3)), "label": np.zeros(0, int)}, r"at least one sample, got \[0\]"),
        ],
    )
    def test_refuses(self, tmp_path, changed, message):
        with pytest.raises(ValueError, match=r"d\.npz: .*" + message):
            data.load_npz(save(tmp_path / "d.npz", **changed), ["audio", "text"])

    def test_refuses_modalities_that_are_none_a_string_or_the_label(self, tmp_path):
        path = save(tmp_path / "d.npz")
        with pytest.raises(ValueError, match="modalities: expected at least one"):
            data.load_npz(path, [])
        with pytest.raises(TypeError, match="modalities: expected a sequence of names, got the string 'audio'"):
            data.load_npz(path, "audio")
        with pytest.raises(ValueError, match="label: expected another key"):
            data.load_npz(path, ["audio", "label"])


class TestSplitWhere:
    @pytest.mark.parametrize("where", ["speaker=2,4", " speaker = 4 , 2 ", "speaker=2,4,2"])
    def test_by_integers(self, where):
        train, test = data.split_where(make(speaker=np.arange(13, dtype=np.uint8) % 5), where)
        assert test.fields["speaker"].tolist() == [2, 4, 2, 4, 2] and test.inputs["audio"][:, 0].tolist() == [2, 4, 7, 9, 12]
        assert not {2, 4} & set(train.fields["speaker"].tolist()) and len(train) == 8

    def test_by_strings_and_negative_numbers(self):
        dataset = make(3, name=["theo", "lucas", "theo"], offset=[-1, 0, 1])
        assert data.split_where(dataset, "name=theo")[1].target.tolist() == [0, 2]
        assert data.split_where(dataset, "offset=-1")[1].target.tolist() == [0]

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ("take=1", "no field 'take'; there are: speaker, wide, weight"),
            ("speaker", 'expected "field=value" or "field=value,value", got \'speaker\''),
            ("speaker=", "expected .* got 'speaker='"),
            ("=2", "expected .* got '=2'"),
            ("speaker=1,,2", "expected .* got 'speaker=1,,2'"),
            ("", "expected .* got ''"),
            ("speaker=1,9", "no sample has speaker=9; speaker is one of: 0, 1, 2"),
            ("speaker=one", "no sample has speaker=one"),
            ("speaker=0,1,2", "selects all 13 samples for testing, none is left to train on"),
            ("wide=1", r"expected a field \[N\] of integers or strings, 'wide' is int64 \[13, 2\]"),
            ("weight=1", r"expected a field \[N\] of integers or strings, 'weight' is float64 \[13\]"),
        ],
    )
    def test_refuses(self, where, message):
        dataset = make(speaker=np.arange(13) % 3, wide=np.zeros((13, 2), dtype=np.int64), weight=np.ones(13))
        with pytest.raises(ValueError, match="where: .*" + message):
            data.split_where(dataset, where)

    def test_without_fields(self):
        with pytest.raises(ValueError, match="where: no field 'speaker'; there are: none"):
            data.split_where(make(), "speaker=1")


class TestRandomSplit:
    @pytest.mark.parametrize("N", [4, 13, 200, 1797])
    @pytest.mark.parametrize("fraction", [0.25, 0.5, 1 / 3, 0.6])
    def test_every_sample_on_one_side_each_class_in_proportion(self, N, fraction):
        dataset = make(N)
        train, test = data.random_split(dataset, fraction, seed=3)
        assert len(test) == round(N * fraction)
        assert sorted(torch.cat([train.inputs["audio"][:, 0], test.inputs["audio"][:, 0]]).tolist()) == list(range(N))
        share = len(test) / N * dataset.target.bincount(minlength=3)
        assert ((test.target.bincount(minlength=3) - share).abs() <= 1).all()

    def test_the_seed_decides(self):
        (_, a), (_, b), (_, c) = (data.random_split(make(200), 0.25, seed) for seed in (0, 0, 1))
        assert torch.equal(a.inputs["audio"], b.inputs["audio"]) and not torch.equal(a.inputs["audio"], c.inputs["audio"])

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        data.random_split(make(), 0.25, 0)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, 0.01, 0.99, float("nan")])
    def test_refuses(self, fraction):
        with pytest.raises(ValueError, match="test_fraction: expected to leave samples on both sides of 13, got "):
            data.random_split(make(), fraction, 0)


class TestStandardize:
    def test_by_the_statistics_of_train(self):
        generator = torch.Generator().manual_seed(0)
        parts = []
        for N, shift in ((500, 3.0), (40, 7.0)):
            x = {"a": shift + 2 * torch.randn(N, 5, generator=generator), "b": torch.rand(N, 2, 2, generator=generator)}
            parts.append(MultimodalDataset(x, torch.zeros(N, dtype=torch.long), {"row": np.arange(N)}))
        (train, test), statistics = data.standardize(*parts)
        assert [len(part) for part in statistics["a"]] == [5, 5] and statistics["b"] == data.statistics(parts[0], "array")["b"]
        for modality, moments in statistics.items():
            own = train.inputs[modality] if modality == "a" else train.inputs[modality].flatten()
            assert own.mean(0).abs().max() < 1e-5 and (own.std(0, correction=0) - 1).abs().max() < 1e-5
            mean, std = map(torch.tensor, moments)
            torch.testing.assert_close(test.inputs[modality] * std + mean, parts[1].inputs[modality])
        assert test.fields["row"].tolist() == list(range(40)) and test.inputs["a"].dtype == torch.float32
        assert parts[0].inputs["a"].mean() > 2  # the argument is as it was

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.0])
    def test_a_constant_modality(self, value):
        constant = MultimodalDataset({"a": torch.full((7, 3), value)}, torch.zeros(7, dtype=torch.long))
        other = MultimodalDataset({"a": torch.full((2, 3), value + 2)}, torch.zeros(2, dtype=torch.long))
        (train, test), statistics = data.standardize(constant, other)
        assert statistics["a"][1] == [1, 1, 1] and train.inputs["a"].abs().max() <= 1e-6 * max(1, abs(value))
        torch.testing.assert_close(test.inputs["a"], torch.full((2, 3), 2.0), rtol=1e-3, atol=0)

    def test_all_become_float32(self):
        inputs = {"a": torch.arange(6, dtype=torch.float64)[:, None], "b": torch.arange(6)[:, None]}
        (train,), _ = data.standardize(MultimodalDataset(inputs, torch.zeros(6, dtype=torch.long)))
        assert [x.dtype for x in train.inputs.values()] == [torch.float32, torch.float32]

    def test_a_modality_that_nobody_has(self):
        present = torch.tensor([[True, False]] * 5)
        dataset = MultimodalDataset({"a": torch.rand(5, 2), "b": torch.full((5, 3), torch.nan)}, torch.arange(5), {}, present)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert data.statistics(dataset)["b"] == (0, 1)

    def test_statistics_survive_json(self):
        dataset = make()
        kept = {modality: list(values) for modality, values in data.statistics(dataset).items()}
        again = data.apply_statistics(dataset, kept)
        assert torch.equal(again.inputs["image"], data.standardize(dataset)[0][0].inputs["image"])

    def test_refuses_a_modality_without_statistics(self):
        other = MultimodalDataset({"text": torch.zeros(1, 1)}, torch.tensor([0]))
        with pytest.raises(ValueError, match="statistics: expected those of text, got audio, image"):
            data.standardize(make(), other)


class TestDigits:
    def test_three_views_of_the_same_digits(self):
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
        train, test = data.digits(seed=1)
        assert (len(train), len(test), train.classes, test.classes) == (1348, 449, 10, 10)
        assert {m: x.shape[1] for m, x in train.inputs.items()} == {"pixels": 64, "fourier": 40, "profile": 46}
        for x in train.inputs.values():
            assert x.dtype == torch.float32 and abs(x.mean()) < 1e-4 and abs(x.std() - 1) < 1e-3
        profile = train.inputs["profile"].double()
        sums = [part.sum(1) for part in profile.split([8, 8, 15, 15], 1)]
        # Rows, columns and both sets of diagonals add up to the same total; standardised, the longer ones are shifted alike.
        torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=1e-4)
        torch.testing.assert_close(sums[2], sums[3], rtol=0, atol=1e-4)

    def test_says_how_to_get_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r'pip install "mla_fast\[demo\]"'):
            data.digits()


class TestSparseCoding:
    def test_directions_are_orthonormal(self):
        M = data.sparse_coding_directions(4)
        assert M.shape == (2, 100, 10)
        torch.testing.assert_close(M.mT @ M, torch.eye(10).expand(2, 10, 10), atol=1e-5, rtol=0)

    def test_is_what_the_recipe_says(self):
        directions = data.sparse_coding_directions(7)
        dataset = data.sparse_coding(20000, 0.3, 1, directions=directions)
        assert {m: tuple(x.shape) for m, x in dataset.inputs.items()} == {"r0": (20000, 100), "r1": (20000, 100)}
        sufficient = torch.from_numpy(dataset.fields["sufficient"])
        assert sufficient.any(1).all()
        # P(sufficient) = 1 − μ, plus half of the μ² where neither was.
        torch.testing.assert_close(sufficient.double().mean(0), torch.full((2,), 0.7 + 0.045).double(), atol=0.015, rtol=0)
        for r, x in enumerate(dataset.inputs.values()):
            z = x @ directions[r]  # the noise in it is N(0, 0.1)
            true = z.gather(1, dataset.target[:, None])[:, 0]
            assert true[sufficient[:, r]].min() > 0.5 and true[~sufficient[:, r]].max() < 0.5
            assert abs(true[sufficient[:, r]].mean() - 1.25) < 0.01
            others = z.scatter(1, dataset.target[:, None], 0).sum(1).mean() / 9
            assert abs(others - 2 / 10 * 0.15) < 0.002
            assert abs((x - z @ directions[r].T).pow(2).sum(1).mean() / 90 - 0.01) < 1e-4

    def test_all_sufficient_and_one_each(self):
        assert data.sparse_coding(50, 0, 0).fields["sufficient"].all()
        assert (data.sparse_coding(50, 1, 0).fields["sufficient"].sum(1) == 1).all()

    def test_the_seed_decides(self):
        a, b, c = (data.sparse_coding(5, 0.3, seed) for seed in (0, 0, 1))
        assert torch.equal(a.inputs["r1"], b.inputs["r1"]) and not torch.equal(a.inputs["r1"], c.inputs["r1"])

    def test_directions_default_to_those_of_the_seed(self):
        dataset = data.sparse_coding(500, 0, 9)
        z = dataset.inputs["r0"] @ data.sparse_coding_directions(9)[0]
        assert (z.argmax(1) == dataset.target).all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 0.3, 0), "samples: expected at least 1, got 0"),
            ((5, 1.5, 0), "mu: expected a probability, got 1.5"),
            ((5, float("nan"), 0), "mu: expected a probability, got nan"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            data.sparse_coding(*arguments)

    def test_refuses_directions_of_another_shape(self):
        with pytest.raises(ValueError, match=r"directions: expected \[M, d, K\], got \[100, 10\]"):
            data.sparse_coding(5, 0.3, 0, directions=torch.zeros(100, 10))


class TestMissing:
    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.7, 0.99])
    @pytest.mark.parametrize("M", [1, 2, 3])
    def test_every_sample_keeps_one_and_the_rate_is_what_it_says(self, rate, M):
        present = data.missing_mask(20_000, M, rate, seed=3)
        assert present.any(1).all() and torch.equal(present, data.missing_mask(20_000, M, rate, seed=3))
        missing = rate - rate**M / M  # of M, one is kept where all would go
        assert abs((~present).float().mean().item() - missing) < 0.01
        assert (present.float().mean(0) - present.float().mean()).abs().max() < 0.02

    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.7, 0.99])
    @pytest.mark.parametrize("N, M", [(1, 2), (63, 2), (513, 3), (20_000, 4)])
    def test_cpm_keeps_one_and_meets_the_rate(self, rate, N, M):
        present = data.cpm_mask(N, M, rate, seed=3)
        assert present.any(1).all() and torch.equal(present, data.cpm_mask(N, M, rate, seed=3))
        missing = min(rate, 1 - 1 / M)
        assert abs((~present).double().mean().item() - missing) <= 0.5 / (N * M) + 1e-9
        if rate >= 1 - 1 / M:
            assert (present.sum(1) == 1).all()
        if N > 1000:
            assert (present.float().mean(0) - present.float().mean()).abs().max() < 0.02

    @pytest.mark.parametrize("draw", data.PROTOCOLS.values())
    @pytest.mark.parametrize("arguments", [(5, 2, 1.0, 0), (5, 2, -0.1, 0), (5, 0, 0.5, 0), (-1, 2, 0.5, 0)])
    def test_bad_rates(self, draw, arguments):
        with pytest.raises(ValueError, match="^(rate|N, M): expected"):
            draw(*arguments)

    def test_protocols_by_name(self):
        whole = data.MultimodalDataset({m: torch.zeros(40, 1) for m in "ab"}, torch.zeros(40, dtype=torch.long))
        for name, draw in data.PROTOCOLS.items():
            assert torch.equal(data.with_missing(whole, 0.3, 7, name).present, draw(40, 2, 0.3, 7))
        with pytest.raises(ValueError, match="^protocol: expected one of independent, cpm, got 'gcnet'"):
            data.with_missing(whole, 0.3, 7, "gcnet")

    def test_a_masked_data_set(self, tmp_path):
        present = data.missing_mask(30, 2, 0.5, seed=0)
        audio = torch.randn(30, 3).masked_fill(~present[:, :1], torch.nan)
        arrays = {"audio": audio.numpy(), "image": torch.rand(30, 2, 2).numpy(), "label": np.arange(30) % 3}
        np.savez(tmp_path / "masked.npz", **arrays, present=present.numpy())
        dataset = data.load_npz(tmp_path / "masked.npz", ["audio", "image"])
        assert "missing" in repr(dataset) and torch.equal(dataset.present, present) and "present" not in dataset.fields
        (train,), statistics = data.standardize(dataset)
        assert statistics["audio"][0] == pytest.approx(audio[present[:, 0]].double().mean(0).tolist())
        inputs, target, here = dataset.subset([3, 5])[:]
        assert torch.equal(here, present[[3, 5]]) and torch.equal(train[4][2], present[4])
        both = data.with_missing(dataset, 0.5, 0).present
        drawn = data.missing_mask(len(dataset), len(dataset.modalities), 0.5, 0)
        for row, own, other in zip(both, present, drawn, strict=True):
            assert torch.equal(row, own & other if (own & other).any() else own)
        names = np.array(["video", *arrays][: 1 + len(dataset.modalities)])
        wide = np.concatenate([np.zeros((30, 1), bool), present.numpy()], 1)
        np.savez(tmp_path / "named.npz", **arrays, present=wide, modalities=names)
        for order in (dataset.modalities, dataset.modalities[::-1], dataset.modalities[1:]):
            mask = data.load_npz(tmp_path / "named.npz", order).present
            assert torch.equal(mask, present[:, [dataset.modalities.index(m) for m in order]])
        np.savez(tmp_path / "named.npz", **arrays, present=wide, modalities=np.array(["a", "b", "c"]))
        with pytest.raises(ValueError, match="named.npz: present has columns for a, b, c, and none for "):
            data.load_npz(tmp_path / "named.npz", dataset.modalities)
        for bad in (present.numpy()[:, :1], present.float().numpy()):
            np.savez(tmp_path / "bad.npz", **arrays, present=bad)
            with pytest.raises(ValueError, match="expected present to be bool"):
                data.load_npz(tmp_path / "bad.npz", ["audio", "image"])
        with pytest.raises(ValueError, match="^present: expected bool"):
            data.MultimodalDataset(dataset.inputs, dataset.target, present=present[:4])
