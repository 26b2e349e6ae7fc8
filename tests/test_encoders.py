"""The encoders: shapes, features that are not negative, ResNet-18 against a computation of its own, and what they refuse."""

import copy

import pytest
import torch
from helpers import assert_bitwise
from torch import nn

import mla_fast as mla
from mla_fast.encoders import MLP, BasicBlock, ResNet18, SmallCNN, encoder_for

f64 = torch.float64


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
        (lambda: ResNet18(0), "channels: expected at least 1, got 0"),
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


def convolved(x, weight, stride):
    """The sum over the kernel's places, padded by half of its width."""
    side = weight.shape[2]
    x = nn.functional.pad(x, 4 * [side // 2])
    H, W = ((n - side) // stride + 1 for n in x.shape[2:])
    places = ((a, b) for a in range(side) for b in range(side))
    shifted = ((weight[:, :, a, b], x[:, :, a : a + stride * H : stride, b : b + stride * W : stride]) for a, b in places)
    return sum(torch.einsum("oc,nchw->nohw", w, part) for w, part in shifted)


def normalised(x, state, name, training):
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]


def block_by_hand(x, state, prefix, stride, training):
    h = convolved(x, state[f"{prefix}conv1.weight"], stride)
    h = normalised(h, state, f"{prefix}bn1", training).clamp(min=0)
    h = normalised(convolved(h, state[f"{prefix}conv2.weight"], 1), state, f"{prefix}bn2", training)
    if f"{prefix}downsample.0.weight" in state:
        x = normalised(convolved(x, state[f"{prefix}downsample.0.weight"], stride), state, f"{prefix}downsample.1", training)
    return (h + x).clamp(min=0)


def resnet_by_hand(x, state, training):
    h = normalised(convolved(x, state["conv1.weight"], 2), state, "bn1", training).clamp(min=0)
    h = nn.functional.pad(h, (1, 1, 1, 1))  # zeros win over nothing after a ReLU
    h = h.unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            h = block_by_hand(h, state, f"layer{layer}.{block}.", 2 if layer > 1 and block == 0 else 1, training)
    return h.mean((2, 3))


def unlike_new(module):
    """In float64, with BatchNorm that has been somewhere."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
            for t in (m.bias, m.running_mean):
                nn.init.normal_(t, 0, 0.2)
    return module.double()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("before", "channels", "stride"), [(3, 3, 1), (3, 5, 1), (2, 4, 2), (4, 4, 2)])
def test_a_block_by_hand(before, channels, stride, training):
    block = unlike_new(BasicBlock(before, channels, stride)).train(training)
    x = torch.randn(2, before, 7, 6, dtype=f64)
    expected = block_by_hand(x, block.state_dict(), "", stride, training)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet_by_hand(channels, training):
    encoder = unlike_new(ResNet18(channels)).train(training)
    x = torch.randn(2, channels, 65, 34, dtype=f64)
    expected = resnet_by_hand(x, encoder.state_dict(), training)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-9, atol=1e-9)


def test_resnet_takes_frames_and_images_without_channels():
    encoder = unlike_new(ResNet18(1)).eval()
    x = torch.randn(3, 33, 20, dtype=f64)
    features = encoder(x)
    assert features.shape == (3, ResNet18.out_features) and (features >= 0).all()
    assert torch.equal(encoder(x[:, None]), features)
    torch.testing.assert_close(encoder(x[:, None, None].expand(-1, 4, -1, -1, -1)), features)
    torch.testing.assert_close(encoder(x[None, :, None]), features.mean(0, keepdim=True))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 3, 1, 5), (2, 1, 3, 31, 2)])
def test_resnet_learns_from_any_size(shape):
    encoder = ResNet18(3 if len(shape) > 3 else 1)
    features = encoder(torch.randn(shape))
    assert features.shape == (2, 512)
    features.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("shape", [(0, 17, 9), (0, 1, 17, 9), (0, 2, 1, 17, 9)])
def test_resnet_learns_nothing_from_no_rows(shape):
    encoder = ResNet18(1)
    before = {name: t.clone() for name, t in encoder.state_dict().items() if "num_batches" not in name}
    features = encoder(torch.zeros(shape))
    assert features.shape == (0, 512)
    features.sum().backward()
    assert all(not p.grad.any() for p in encoder.parameters())
    assert_bitwise({name: t for name, t in encoder.state_dict().items() if "num_batches" not in name}, before)


def test_resnet_starts_as_he_et_al_say():
    encoder = ResNet18(3)
    for m in encoder.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] ** 2
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05) and m.bias is None


def test_resnet_has_the_names_of_torchvision():
    def bn(name):
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["conv1.weight", *bn("bn1")]
    for layer in (1, 2, 3, 4):
        for block in (f"layer{layer}.0", f"layer{layer}.1"):
            names += [f"{block}.conv1.weight", *bn(f"{block}.bn1"), f"{block}.conv2.weight", *bn(f"{block}.bn2")]
        if layer > 1:
            names += [f"layer{layer}.0.downsample.0.weight", *bn(f"layer{layer}.0.downsample.1")]
    encoder = ResNet18(3)
    assert set(encoder.state_dict()) == set(names)
    assert sum(p.numel() for p in encoder.parameters()) == 11_689_512 - (512 + 1) * 1000  # torchvision's, without its fc
    weights = {**copy.deepcopy(encoder.state_dict()), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    other = ResNet18(3)
    assert other.load_state_dict(weights, strict=False).missing_keys == []
    assert_bitwise(other.state_dict(), encoder.state_dict())


def test_resnets_in_a_model():
    model = mla.MultimodalModel({"audio": ResNet18(1), "video": ResNet18(3)}, nn.Linear(ResNet18.out_features, 6))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), model.head)
    inputs = {"audio": torch.randn(4, 33, 33), "video": torch.randn(4, 2, 3, 32, 32)}
    present = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    losses = mla.alternating_step(model, optimizer, (inputs, torch.tensor([0, 1, 5, 2]), present))
    assert losses.keys() == inputs.keys() and all(loss.isfinite() for loss in losses.values())
    assert model.predict(inputs, present).logits.shape == (4, 6)


WRONG = ((8, 8), (2, 2, 8, 8), (2, 3, 2, 8, 8), (2, 0, 3, 8, 8), (2, 0, 1, 8, 8), (1, 2, 3, 1, 8, 8))


@pytest.mark.parametrize(("channels", "shape"), [(1, shape) for shape in WRONG] + [(3, shape) for shape in (*WRONG, (2, 8, 8))])
def test_resnet_refuses_other_inputs(channels, shape):
    flat = r"\[N, H, W\], " if channels == 1 else ""
    expected = rf"x: expected {flat}\[N, {channels}, H, W\] or \[N, T, {channels}, H, W\], where only N may be 0, got \["
    with pytest.raises(ValueError, match=expected):
        ResNet18(channels)(torch.zeros(shape))
