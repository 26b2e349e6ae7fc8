"""What the axes of an array mean: found where dtype and shape leave no doubt, otherwise asked for."""

import pytest
import torch
from helpers import assert_bitwise
from torch import nn

import mla_fast as mla
from mla_fast import data
from mla_fast.encoders import MLP, MeanEmbedding, SequenceCNN, SmallCNN, encoder_for

TOKENS = torch.tensor([[3, 7, 0], [1, 0, 0]])


def dataset(present=None, **inputs):
    return data.MultimodalDataset(inputs, torch.arange(len(next(iter(inputs.values())))) % 2, present=present)


@pytest.mark.parametrize(
    ("x", "layout"),
    [
        (torch.rand(2), "features"),
        (torch.arange(2), "features"),
        (torch.rand(2, 3), "features"),
        (torch.ones(2, 3, dtype=torch.uint8) * 7, "features"),
        (torch.ones(2, 3, dtype=torch.bool), "features"),
        (TOKENS.clamp(max=1), "features"),
        (TOKENS - 1, "features"),
        (TOKENS[:, :1], "features"),
        (torch.rand(2, 5, 7), "image"),
        (TOKENS[:, :, None], "image"),
        (torch.rand(2, 3, 28, 17), "image"),
        (torch.rand(2, 1, 28, 1), "image"),
        (torch.rand(2, 16, 28, 28), "image"),
    ],
)
def test_found(x, layout):
    assert data.find_layouts(dataset(a=x)) == {"a": layout}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_that_may_be_tokens_are_asked_for(dtype):
    with pytest.raises(ValueError, match=r"^'a': .* may be tokens \[N, T\] \(--layout a=tokens\) or features .*a=features"):
        data.find_layouts(dataset(a=TOKENS.to(dtype)))
    for layout in ("tokens", "features"):
        assert data.find_layouts(dataset(a=TOKENS.to(dtype), b=torch.rand(2, 3)), {"a": layout}) == {"a": layout, "b": "features"}


@pytest.mark.parametrize("shape", [(28, 17, 3), (28, 17, 5), (28, 17, 16), (64, 32, 8), (28, 17, 1), (6, 1, 4)])
def test_images_whose_channels_seem_to_be_last_are_asked_for(shape):
    x = torch.rand(2, *shape)
    with pytest.raises(ValueError, match=r"^'a': .* may be images \[N, H, W, C\] \(--layout a=channels_last\) or .*a=image"):
        data.find_layouts(dataset(a=x))
    with pytest.raises(ValueError, match="^shape: expected channels first"):
        encoder_for(shape, 4)
    arranged = data.arrange(dataset(a=x), {"a": "channels_last"}).inputs["a"]
    assert torch.equal(arranged, x.permute(0, 3, 1, 2)) and arranged.is_contiguous()
    assert encoder_for(arranged.shape[1:], 4, "channels_last")(arranged).shape == (2, 4)
    assert encoder_for(shape, 4, "image")(x).shape == (2, 4)


def test_absent_rows_decide_nothing():
    present = torch.tensor([[True], [False]])
    x = torch.tensor([[0, 1, 1], [-1, 2**40, 9]])
    assert data.find_layouts(dataset(present, a=x)) == {"a": "features"}
    with pytest.raises(ValueError, match="may be tokens"):
        data.find_layouts(dataset(present, a=torch.tensor([[3, 1, 1], [-1, 2, 9]])))
    arranged = data.arrange(dataset(present, a=x), {"a": "tokens"})
    assert torch.equal(arranged.inputs["a"], x) and data.vocabulary(arranged, {"a": "tokens"}) == {"a": 2}


@pytest.mark.parametrize(
    ("x", "layout", "message"),
    [
        (torch.rand(2, 3), "tokens", "expected integers as tokens, got torch.float32"),
        (TOKENS - 1, "tokens", r"expected tokens from 0 \(padding\) to 9999999, got -1"),
        (TOKENS + 10**7, "tokens", r"expected tokens from 0 \(padding\) to 9999999, got 10000007"),
        (TOKENS[:, 0], "tokens", r"expected integers \[N, T\] as tokens, .* got \[2\]"),
        (torch.rand(2, 3), "sequence", r"expected \[N, T, F\] as sequence, .* got \[2, 3\]"),
        (torch.rand(2, 3, 4), "channels_last", r"expected \[N, H, W, C\] as channels_last, .* got \[2, 3, 4\]"),
        (torch.rand(2, 3, 4), "features", r"expected \[N\] or \[N, F\] as features, .* got \[2, 3, 4\]"),
        (torch.rand(2, 3), "image", r"expected \[N, H, W\] or \[N, C, H, W\] as image, .* got \[2, 3\]"),
        (torch.rand(2, 0, 3), "sequence", r".* with at least one value, got \[2, 0, 3\]"),
    ],
)
def test_what_does_not_fit_its_layout_is_refused(x, layout, message):
    with pytest.raises(ValueError, match=f"^'a': {message}"):
        data.arrange(dataset(a=x), {"a": layout})


def test_other_shapes_names_and_layouts_are_refused():
    with pytest.raises(ValueError, match=r"^'a': expected \[N\], .* got \[2, 1, 1, 1, 1\]"):
        data.find_layouts(dataset(a=torch.rand(2, 1, 1, 1, 1)))
    with pytest.raises(ValueError, match="^layout: expected modalities among a, got b"):
        data.find_layouts(dataset(a=TOKENS), {"b": "tokens"})
    with pytest.raises(ValueError, match="^layout: expected features, tokens, .* got 'text'"):
        data.find_layouts(dataset(a=TOKENS), {"a": "text"})


def test_one_value_a_sample_is_a_column():
    assert data.arrange(dataset(a=torch.arange(2)), {"a": "features"}).inputs["a"].tolist() == [[0], [1]]


def test_each_layout_has_its_encoder():
    kinds = {
        "features": ((5,), MLP),
        "tokens": ((5,), MeanEmbedding),
        "sequence": ((5, 3), SequenceCNN),
        "image": ((5, 3), SmallCNN),
    }
    for layout, (shape, kind) in kinds.items():
        assert isinstance(encoder_for(shape, 4, layout, 9), kind)


class TestMeanEmbedding:
    @pytest.mark.parametrize("N", [1, 63, 513])
    @pytest.mark.parametrize("T", [1, 7])
    def test_the_mean_of_what_is_not_padding(self, N, T):
        encoder = MeanEmbedding(9, 5, width=6).double()
        x = torch.randint(9, (N, T), generator=torch.Generator().manual_seed(N))
        table, rows = encoder.embedding.weight, []
        for sample in x:
            kept = [table[token] for token in sample.tolist() if token]
            mean = torch.stack(kept).mean(0) if kept else torch.zeros(6, dtype=torch.float64)
            rows.append((encoder.layer.weight @ mean + encoder.layer.bias).relu())
        torch.testing.assert_close(encoder(x), torch.stack(rows))

    def test_padding_more_changes_nothing_and_is_not_learned(self):
        encoder = MeanEmbedding(9, 5)
        torch.testing.assert_close(encoder(TOKENS), encoder(torch.cat([TOKENS, torch.zeros_like(TOKENS)], 1)))
        encoder(TOKENS).sum().backward()
        assert not encoder.embedding.weight.grad[0].any() and encoder.embedding.weight.grad[7].any()

    @pytest.mark.parametrize("x", [TOKENS.float(), TOKENS[0], TOKENS[None]])
    def test_refuses_other_inputs(self, x):
        with pytest.raises(TypeError, match=r"^x: expected tokens, int64 \[N, T\], got"):
            MeanEmbedding(9, 5)(x)

    def test_refuses_an_empty_vocabulary(self):
        with pytest.raises(ValueError, match="^vocabulary: expected at least 1, got 0"):
            encoder_for((3,), 5, "tokens")


class TestSequenceCNN:
    @pytest.mark.parametrize("N", [0, 1, 63])
    @pytest.mark.parametrize("T", [1, 2, 63])
    def test_any_length(self, N, T):
        encoder = SequenceCNN(3, 5)
        features = encoder(torch.randn(N, T, 3))
        assert features.shape == (N, 5) and (features >= 0).all()
        features.sum().backward()
        assert all(p.grad is not None for p in encoder.parameters())

    @pytest.mark.parametrize("T", [1, 4, 63])
    def test_is_what_it_says(self, T):
        encoder, x = SequenceCNN(3, 5).double(), torch.randn(2, T, 3, dtype=torch.float64)
        h = x
        for convolution in (encoder.convolutions[0], encoder.convolutions[2]):
            half = convolution.weight.shape[2] // 2
            padded = nn.functional.pad(h, (0, 0, half, half))
            windows = torch.stack([padded[:, t : t + 2 * half + 1].flatten(1) for t in range(T)], 1)  # [N, T, width F]
            h = (windows @ convolution.weight.permute(0, 2, 1).flatten(1).T + convolution.bias).relu()
        torch.testing.assert_close(encoder(x), encoder.layer(h.mean(1)).relu())

    @pytest.mark.parametrize("shape", [(2, 4), (2, 4, 2), (2, 0, 3), (2, 1, 4, 3)])
    def test_refuses_other_inputs(self, shape):
        with pytest.raises(ValueError, match=r"^x: expected \[N, T, 3\] with T ≥ 1, got"):
            SequenceCNN(3, 5)(torch.zeros(shape))


def test_absent_tokens_are_not_looked_up():
    torch.manual_seed(0)
    model = mla.MultimodalModel({"text": MeanEmbedding(8, 5), "sound": SequenceCNN(2, 5)}, nn.Linear(5, 3))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.head)
    x = {"text": TOKENS.repeat(2, 1), "sound": torch.randn(4, 6, 2)}
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    poisoned = {"text": torch.where(present[:, :1], x["text"], 2**40), "sound": x["sound"]}
    assert_bitwise(tuple(model.predict(poisoned, present)), tuple(model.predict(x, present)))
    losses = mla.alternating_step(model, optimizer, (poisoned, torch.tensor([0, 1, 2, 0]), present))
    assert all(loss.isfinite() for loss in losses.values())
