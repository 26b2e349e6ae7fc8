"""Standardisation in float64 and feature by feature, against NumPy and exact integers."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from mla_fast import data
from mla_fast.data import MultimodalDataset


def dataset(present=None, **inputs):
    N = len(next(iter(inputs.values())))
    mask = None if present is None else torch.as_tensor(present)
    return MultimodalDataset(
        {m: torch.as_tensor(np.asarray(x) if isinstance(x, list) else x) for m, x in inputs.items()},
        torch.arange(N) % 2,
        present=mask,
    )


@pytest.mark.parametrize("N", [2, 63, 513])
@pytest.mark.parametrize(
    ("shape", "layout", "axes"),
    [
        ((5,), None, (0,)),
        ((5,), "features", (0,)),
        ((3, 4, 2), "image", (0, 2, 3)),
        ((3, 4, 2), None, (0, 2, 3)),
        ((4, 3), None, None),
        ((4, 3), "image", None),
        ((4, 3), "sequence", (0, 1)),
        ((), None, None),
    ],
)
def test_each_feature_and_channel_by_its_own(N, shape, layout, axes):
    random = np.random.default_rng(N)
    x = random.normal(size=(N, *shape)) * random.uniform(1e-3, 1e3, shape[-1:]) + random.uniform(-1e6, 1e6, shape[-1:])
    mean, std = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
    layouts = None if layout is None else {"a": layout}
    kept = json.loads(json.dumps(data.statistics(dataset(a=x), layouts=layouts)))
    got = data.apply_statistics(dataset(a=x), kept).inputs["a"]
    assert got.dtype == torch.float32 and torch.equal(got, data.standardize(dataset(a=x), layouts=layouts)[0][0].inputs["a"])
    np.testing.assert_allclose(got.numpy(), (x - mean) / std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per", ["feature", "array"])
@pytest.mark.parametrize("base", [1.7e9, 1_700_000_000, 1_700_000_000_000_000_000, -(2**63)])
def test_steps_of_one_on_top_of_a_large_value_stay_apart(per, base):
    steps = np.arange(63)
    x = (steps + base if isinstance(base, float) else steps.astype(np.int64) + np.int64(base))[:, None]
    (train,), _ = data.standardize(dataset(a=x), per=per)
    np.testing.assert_array_equal(train.inputs["a"][:, 0].numpy(), ((steps - 31) / steps.std()).astype(np.float32))


def test_integers_of_any_size_are_subtracted_without_overflow():
    ends = [-(2**63), 2**63 - 1, 0, 2**62 + 1]
    x = torch.tensor(ends)[:, None]
    statistics = data.statistics(dataset(a=x))["a"]
    mean = Fraction(sum(ends), 4)
    std = float(sum((e - mean) ** 2 for e in ends) / 4) ** 0.5
    np.testing.assert_allclose(statistics[0][0] + statistics[2][0], float(mean), rtol=1e-6, atol=2048)
    got = data.apply_statistics(dataset(a=x), {"a": statistics}).inputs["a"][:, 0]
    np.testing.assert_allclose(got.numpy(), [float(e - mean) / std for e in ends], rtol=1e-6)
    far = dataset(a=torch.tensor([[-(2**63)]]))  # below a base near the other end
    got = data.apply_statistics(far, {"a": ([0.0], [float(2**32)], [2**63 - 1])}).inputs["a"]
    assert got.item() == -float(2**32)


def test_floats_by_the_statistics_of_integers_and_the_other_way():
    kept = data.statistics(dataset(a=torch.arange(9)[:, None] + 1000))
    assert data.apply_statistics(dataset(a=torch.tensor([[1004.5]])), kept).inputs["a"].item() == pytest.approx(
        0.5 / np.std(range(9))
    )
    kept = data.statistics(dataset(a=torch.arange(9.0)[:, None]))
    assert data.apply_statistics(dataset(a=torch.tensor([[4]])), kept).inputs["a"].item() == 0


@pytest.mark.parametrize("value", [0.1, 1e6 + 1 / 3, -7])
def test_a_column_with_one_value_is_centred_and_told(value):
    x = torch.stack([torch.arange(7, dtype=torch.float64), torch.full((7,), value, dtype=torch.float64)], 1)
    x = x.long() if isinstance(value, int) else x
    train, other = dataset(a=x), dataset(a=x + 2)
    (train_set, other_set), statistics = data.standardize(train, other)
    assert train_set.inputs["a"][:, 1].tolist() == [0] * 7 and statistics["a"][1][1] == 1
    torch.testing.assert_close(other_set.inputs["a"][:, 1], torch.full((7,), 2.0))
    assert data.constant_features(train, {"a": "features"}) == {"a": [1]}
    images = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4).repeat(1, 3, 1, 1)
    images[:, 1] = 5
    assert data.constant_features(dataset(a=images, b=images[:, 0]), {"a": "image", "b": "image"}) == {"a": [1]}


def test_absent_rows_decide_nothing():
    x = np.array([[1.0, 2], [np.nan, 1e300], [3, 2]])
    (train,), statistics = data.standardize(dataset(a=x, b=x[:, :1], present=[[True, False], [False, False], [True, False]]))
    assert statistics == {"a": ([2.0, 2.0], [1.0, 1.0]), "b": (0, 1)}
    assert train.inputs["a"][[0, 2]].tolist() == [[-1, 0], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.float16])
def test_any_dtype_of_a_data_set_of_ones_own(dtype):
    x = torch.tensor([[0, 1], [1, 1], [1, 0], [1, 1]]).to(dtype)
    expected = (x.numpy().astype(float) - [0.75, 0.75]) / np.sqrt(3 / 16)
    np.testing.assert_allclose(data.standardize(dataset(a=x))[0][0].inputs["a"].numpy(), expected, rtol=1e-6)


def test_not_at_all_and_tokens():
    tokens = torch.arange(6).view(3, 2)
    both = dataset(a=tokens.double() / 3, b=tokens)
    kept = json.loads(json.dumps(data.statistics(both, "none", {"a": "features", "b": "tokens"})))
    got = data.apply_statistics(both, kept).inputs
    assert torch.equal(got["a"], (tokens.double() / 3).float()) and got["b"] is both.inputs["b"]
    assert data.statistics(both, layouts={"b": "tokens"})["b"] is None


def test_the_two_numbers_of_older_checkpoints():
    got = data.apply_statistics(dataset(a=torch.tensor([[1, 5]]), b=torch.ones(1, 2, 3, 4)), {"a": [1.0, 2.0], "b": [3.0, 0.5]})
    assert got.inputs["a"].tolist() == [[0, 2]] and (got.inputs["b"] == -4).all()


@pytest.mark.parametrize("x", [[[1e308], [-1e308]], [[1e-200], [2e-200]]])
def test_what_float64_does_not_hold_is_refused(x):
    with pytest.raises(ValueError, match=r"^inputs\['a'\]: expected values whose mean and deviation float64 holds"):
        data.statistics(dataset(a=x))


def test_what_float32_does_not_hold_is_refused():
    with pytest.raises(
        ValueError, match=r"^inputs\['a'\]: expected values that float32 holds when standardised, row 1 has others"
    ):
        data.apply_statistics(dataset(a=[[1.0], [1e300]]), {"a": (0, 1)})


def test_statistics_of_other_shapes_and_kinds_are_refused():
    for shape in ((3, 4), (3, 3, 5), (3, 4, 5, 6)):
        with pytest.raises(ValueError, match=r"^statistics\['a'\]: expected those of \["):
            data.apply_statistics(dataset(a=torch.zeros(shape)), {"a": ([0.0] * 7, [1.0] * 7)})
    with pytest.raises(ValueError, match="^per: expected one of feature, array, none, got 'column'"):
        data.statistics(dataset(a=[[1.0]]), "column")
