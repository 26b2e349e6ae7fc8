"""The small encoders: shapes, ReLU at the end, and what they refuse."""

import pytest
import torch
from torch import nn

from mla_fast.encoders import MLP, SmallCNN, encoder_for


@pytest.mark.parametrize("shape", [(1,), (7,), (16, 16), (14, 14), (3, 28, 17), (1, 1), (4, 4), (2, 1, 9), (1, 63, 5)])
@pytest.mark.parametrize("N", [1, 3])
def test_features_of_any_sample(shape, N):
    encoder = encoder_for(shape, 12)
    features = encoder(torch.randn(N, *shape))
    assert features.shape == (N, 12) and (features >= 0).all()
    features.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_the_shape_chooses_the_encoder():
    assert isinstance(encoder_for([5], 3), MLP)
    assert isinstance(encoder_for([5, 6], 3), SmallCNN) and isinstance(encoder_for(torch.zeros(2, 5, 6).shape, 3), SmallCNN)


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4)])
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"shape: expected a sample \[F\], \[H, W\] or \[C, H, W\], got "):
        encoder_for(shape, 3)


def test_configuration_b():
    convolutions = [m for m in SmallCNN((16, 16), 64).modules() if isinstance(m, nn.Conv2d)]
    described = [(c.kernel_size, c.stride, c.out_channels) for c in convolutions]
    assert described == [((5, 5), (2, 2), 8), ((3, 3), (2, 2), 16)]


def test_images_without_channels_are_images_with_one():
    flat, channel = SmallCNN((9, 8), 4), SmallCNN((1, 9, 8), 4)
    channel.load_state_dict(flat.state_dict())
    x = torch.randn(2, 9, 8)
    assert torch.equal(flat(x), channel(x[:, None]))


def test_features_of_a_sample_do_not_depend_on_its_batch():
    encoder = encoder_for((8, 8), 4).double()
    x = torch.randn(5, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(encoder(x)[2:3], encoder(x[2:3]))


@pytest.mark.parametrize("hidden", [(), (5,), [5, 6]])
def test_mlp_widths(hidden):
    layers = [m for m in MLP(3, 4, hidden) if isinstance(m, nn.Linear)]
    assert [m.in_features for m in layers] == [3, *hidden] and [m.out_features for m in layers] == [*hidden, 4]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(0, 3), "in_features: expected at least 1, got 0"),
        (lambda: MLP(3, 0), "out_features: expected at least 1, got 0"),
        (lambda: MLP(3, 3, (4, 0)), "hidden: expected at least 1, got 0"),
        (lambda: SmallCNN((8, 8), 0), "out_features: expected at least 1, got 0"),
        (lambda: SmallCNN((8, 0), 3), r"shape: expected .* each at least 1, got \(8, 0\)"),
        (lambda: SmallCNN((8,), 3), r"shape: expected \(H, W\) or \(C, H, W\), .* got \(8,\)"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shape", [(2, 8, 9), (2, 1, 8, 8), (8, 8), (2, 8)])
def test_refuses_other_images(shape):
    with pytest.raises(ValueError, match=r"x: expected \[N, 8, 8\], got "):
        SmallCNN((8, 8), 3)(torch.zeros(shape))
