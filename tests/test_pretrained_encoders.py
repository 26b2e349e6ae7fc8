"""M3AE and CAV-MAE against plain tensor operations in float64, CLIP against transformers, and weights in the released layouts."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mla_fast as mla
from mla_fast.encoders import CLIP, M3AE, CAVMAEAudio, convert_m3ae, load_cavmae, load_m3ae
from mla_fast.encoders.transformer import Block, positions_1d, positions_2d

f64 = torch.float64
TINY = (64, 2, 4)  # width, depth, heads
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # positions are float32


def gelu(x, how):
    if how == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def block_by_hand(x, state, prefix, heads, eps, how, padding=None):
    """As M3AE's source has it: logits of padding, where `padding` [N, T] is 1, become −1e7."""

    def linear(h, name):
        return torch.einsum("nti,oi->nto", h, state[f"{prefix}{name}.weight"]) + state[f"{prefix}{name}.bias"]

    h = linear(layer_norm(x, state[f"{prefix}norm1.weight"], state[f"{prefix}norm1.bias"], eps), "qkv")
    width = x.shape[2]
    out = []
    for head in range(heads):
        q, k, v = (h[:, :, part * width :][:, :, head * width // heads :][:, :, : width // heads] for part in range(3))
        logits = torch.einsum("nid,njd->nij", q, k) * (width // heads) ** -0.5
        if padding is not None:
            logits = torch.where(padding[:, None, :] > 0, -1e7, logits)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        out.append(torch.einsum("nij,njd->nid", weights / weights.sum(-1, keepdim=True), v))
    x = x + linear(torch.cat(out, -1), "proj")
    h = layer_norm(x, state[f"{prefix}norm2.weight"], state[f"{prefix}norm2.bias"], eps)
    return x + linear(gelu(linear(h, "fc1"), how), "fc2")


def position_by_hand(place, width):
    angles = [place * 10000 ** (-j / (width / 2)) for j in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def unlike_new(module):
    """In float64, with parameters that all matter."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = (noise * 0.1 + ("norm" in name and name.endswith("weight"))) if "pos_embed" not in name else p.data + noise
    return module.double()


def through_blocks(tokens, state, depth, heads, eps, how, padding=None):
    for i in range(depth):
        tokens = block_by_hand(tokens, state, f"blocks.{i}.", heads, eps, how, padding)
    return layer_norm(tokens, state["norm.weight"], state["norm.bias"], eps).mean(1)


@pytest.mark.parametrize("how", ["tanh", "none"])
@pytest.mark.parametrize("T", [1, 63])
def test_a_block_by_hand(T, how):
    block = unlike_new(Block(12, 3, 1e-3, how))
    x = torch.randn(2, T, 12, dtype=f64)
    padding = (torch.arange(T) > T // 2).expand(2, T)
    for visible, hidden in ((None, None), (~padding, padding)):
        expected = block_by_hand(x, block.state_dict(), "", 3, 1e-3, how, hidden)
        torch.testing.assert_close(block(x, visible), expected, rtol=1e-10, atol=1e-10)


def test_positions():
    torch.testing.assert_close(
        positions_1d(torch.tensor([1]), 4), torch.tensor([[0.84147, 0.0100, 0.5403, 0.99995]]), rtol=0, atol=1e-5
    )
    expected = [position_by_hand(column, 4) + position_by_hand(row, 4) for row in range(2) for column in range(3)]
    torch.testing.assert_close(positions_2d(2, 3, 8), torch.tensor(expected))


@pytest.mark.parametrize("gelu_as", ["tanh", "none"])
@pytest.mark.parametrize("patch_order", ["pretrained", "official"])
def test_images_of_m3ae_by_hand(patch_order, gelu_as):
    encoder = unlike_new(M3AE("image", TINY, image_size=48, patch_order=patch_order, gelu=gelu_as))
    state, x, positions = encoder.state_dict(), torch.randn(2, 3, 48, 48, dtype=f64), []
    tokens = [state["cls_token"].expand(2, 1, -1)]
    for row in range(3):
        for column in range(3):
            patch = x[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]  # [N, C, row, column]
            flat = (patch if patch_order == "official" else patch.permute(0, 2, 3, 1)).flatten(1)
            positions = position_by_hand(column, 32) + position_by_hand(row, 32)
            token = flat @ state["image_embedding.weight"].T + state["image_embedding.bias"] + torch.tensor(positions, dtype=f64)
            tokens.append(token[:, None] + state["encoder_image_type_embedding"])
    expected = through_blocks(torch.cat(tokens, 1), state, 2, 4, 1e-6, gelu_as)
    torch.testing.assert_close(encoder(x), expected, **CLOSE)


def text_by_hand(state, ids, padding):
    N, T = ids.shape
    positions = torch.tensor([position_by_hand(p, 64) for p in range(T)], dtype=f64)
    tokens = state["text_embedding.weight"][ids] + positions + state["encoder_text_type_embedding"]
    tokens = torch.cat([state["cls_token"].expand(N, 1, -1), tokens], 1)
    return through_blocks(tokens, state, 2, 4, 1e-6, "tanh", torch.cat([torch.zeros(N, 1), padding], 1))


def test_texts_of_m3ae_by_hand():
    encoder = unlike_new(M3AE("text", TINY, vocabulary=20, tokens=9))
    ids = torch.tensor([[5, 19, 3, 0, 0, 0, 0], [0] * 7, [1, 2, 3, 4, 5, 6, 7]])
    expected = text_by_hand(encoder.state_dict(), ids, (ids == 0).double())
    torch.testing.assert_close(encoder(ids), expected, **CLOSE)
    torch.testing.assert_close(encoder({"input_ids": ids, "attention_mask": (ids != 0).long()}), expected, **CLOSE)
    shown = text_by_hand(encoder.state_dict(), ids, torch.zeros(3, 7))  # what MLA's code does with a text that is missing
    assert (shown[1] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(shown[2], expected[2])


def test_both_towers_are_one_transformer():
    both = M3AE("both", TINY, vocabulary=20, image_size=32)
    for tower, x in (("image", torch.randn(2, 3, 32, 32)), ("text", torch.randint(1, 20, (2, 5)))):
        one = M3AE(tower, TINY, vocabulary=20, image_size=32)
        one.load_state_dict({name: t for name, t in both.state_dict().items() if name in one.state_dict()})
        assert torch.equal(one(x), both(x))
        assert one(x[:0]).shape == (0, 64)


def test_parameters_as_the_papers_count_them():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in (M3AE(), CAVMAEAudio())]
        widths = [M3AE("image", size).out_features for size in ("small", "base", "large")]
    assert sizes == [109_089_792, 85_647_360] and widths == [384, 768, 1024]


def test_cavmae_by_hand():
    encoder = unlike_new(CAVMAEAudio(48, TINY))
    state, x, tokens = encoder.state_dict(), torch.randn(2, 48, 128, dtype=f64), []
    for f in range(8):
        for t in range(3):
            patch = x[:, 16 * t : 16 * t + 16, 16 * f : 16 * f + 16].mT  # [N, frequency, time]
            tokens.append(torch.einsum("nft,oft->no", patch, state["patch_embed.weight"][:, 0]) + state["patch_embed.bias"])
    tokens = torch.stack(tokens, 1) + state["pos_embed"] + state["modality"]
    expected = through_blocks(tokens, state, 2, 4, 1e-5, "none")
    torch.testing.assert_close(encoder(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(encoder(x[:, None]), encoder(x)) and encoder(x[:0]).shape == (0, 64)


def test_cavmae_starts_at_fixed_positions():
    expected = [position_by_hand(t, 32) + position_by_hand(f, 32) for f in range(8) for t in range(2)]
    torch.testing.assert_close(CAVMAEAudio(32, TINY).pos_embed[0].detach(), torch.tensor(expected))


# Made files in the released layouts. The arrays are random; what is to be ignored is among them.


def flax_params(width=64, depth=2, vocabulary=20):
    def dense(i, o):
        return {"kernel": np.random.randn(i, o).astype("f4"), "bias": np.random.randn(o).astype("f4")}

    def norm():
        return {"scale": np.random.randn(width).astype("f4"), "bias": np.random.randn(width).astype("f4")}

    def block():
        mlp = {"fc1": dense(width, 4 * width), "fc2": dense(4 * width, width)}
        attention = {"Dense_0": dense(width, 3 * width), "Dense_1": dense(width, width)}
        return {"LayerNorm_0": norm(), "Attention_0": attention, "LayerNorm_1": norm(), "TransformerMLP_0": mlp}

    def vector():
        return np.random.randn(1, 1, width).astype("f4")

    return {
        "cls_token": vector(),
        "encoder_image_type_embedding": vector(),
        "encoder_text_type_embedding": vector(),
        "image_mask_embedding": vector(),
        "decoder_image_type_embedding": vector(),
        "text_embedding": {"embedding": np.random.randn(vocabulary, width).astype("f4")},
        "image_embedding": dense(768, width),
        "encoder": {**{f"Block_{i}": block() for i in range(depth)}, "LayerNorm_0": norm()},
        "decoder": {"Block_0": block(), "LayerNorm_0": norm()},
    }


def port_of(flax):
    """The same parameters as MLA's port to torch names them."""
    layers = {"LayerNorm_0": "layer_norm1", "LayerNorm_1": "layer_norm2", "fc1": "transformer_mlp.fc1"}
    layers |= {"fc2": "transformer_mlp.fc2", "Dense_0": "attention.qkv_linear", "Dense_1": "attention.fc"}
    state = {}
    for name, a in flax.items():
        t, parts = torch.from_numpy(a), name.split("/")
        leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}.get(parts[-1])
        t = t.T if parts[-1] == "kernel" else t
        if "Block_" in name:
            state[f"{parts[0]}.blocks.{parts[1][6:]}.{layers[parts[-2]]}.{leaf}"] = t
        elif parts[0] in ("encoder", "decoder"):
            state[f"{parts[0]}.layer_norm.{leaf}"] = t
        else:
            state[parts[0] + (f".{leaf}" if len(parts) > 1 else "")] = t
    return state


@pytest.fixture
def flax():
    np.random.seed(0)
    return dict(convert_m3ae.flatten(flax_params()))


@pytest.fixture
def written(flax, tmp_path):
    """{layout: file}, the same weights in each."""
    safetensors = pytest.importorskip("safetensors.torch")
    paths = {name: tmp_path / name for name in ("m.npz", "m.safetensors", "m.pth", "trained.pth", "part.pth")}
    np.savez(paths["m.npz"], **flax)
    safetensors.save_file({name: torch.from_numpy(a) for name, a in flax.items()}, paths["m.safetensors"])
    torch.save(port_of(flax), paths["m.pth"])
    torch.save({"model": {f"module.{name}": t for name, t in port_of(flax).items()}, "epoch": 3}, paths["trained.pth"])
    torch.save({f"module.mae_a.{name}": t for name, t in port_of(flax).items()}, paths["part.pth"])
    return paths


def test_m3ae_from_each_layout(flax, written):
    images, texts = torch.randn(2, 3, 32, 32), torch.randint(0, 20, (2, 5))
    features = []
    for name, path in written.items():
        encoder = load_m3ae(path, image_size=32, prefix="mae_a." if name == "part.pth" else "")
        assert len(encoder.blocks) == 2 and encoder.out_features == 64
        features.append((encoder(images), encoder(texts)))
    for image, text in features[1:]:
        assert torch.equal(image, features[0][0]) and torch.equal(text, features[0][1])
    state = {f"{k}": torch.from_numpy(a) for k, a in flax.items()}
    encoder = load_m3ae(written["m.npz"], "image", image_size=32, patch_order="official")
    assert encoder.patch_order == "official" and not hasattr(encoder, "text_embedding")
    assert torch.equal(encoder.blocks[1].qkv.weight, state["encoder/Block_1/Attention_0/Dense_0/kernel"].T)
    assert torch.equal(encoder.norm.weight, state["encoder/LayerNorm_0/scale"])


@pytest.mark.parametrize("spoil", ["missing", "renamed", "misshapen"])
@pytest.mark.parametrize("key", ["encoder/Block_1/TransformerMLP_0/fc2/kernel", "encoder/LayerNorm_0/bias", "cls_token"])
def test_a_key_that_does_not_fit_is_named(flax, tmp_path, key, spoil):
    value = flax.pop(key)
    if spoil == "renamed":
        flax[f"{key}s"] = value
    if spoil == "misshapen":
        flax[key] = np.concatenate([value, value], -1)
    np.savez(tmp_path / "m.npz", **flax)
    message = f"m.npz: {key}: expected .* got" if spoil == "misshapen" else f"m.npz: expected {key}, which is not there"
    if (key, spoil) == ("cls_token", "misshapen"):
        message = "m.npz: encoder_image_type_embedding: expected .*128.* got .*64"  # whose width it says
    with pytest.raises(ValueError, match=message + (f".*nearest name is {key}s" if spoil == "renamed" else "")):
        load_m3ae(tmp_path / "m.npz")


def cavmae_state(depth=2, width=64, frames=32):
    def linear(o, *i):
        return torch.randn(o, *i), torch.randn(o)

    state = {"mask_token": torch.randn(1), "norm.weight": torch.randn(width), "mlp_head.1.weight": torch.randn(5, width)}
    state |= {"modality_a": torch.randn(1, 1, width), "pos_embed_a": torch.randn(1, frames // 2, width)}
    state["patch_embed_a.proj.weight"], state["patch_embed_a.proj.bias"] = linear(width, 1, 16, 16)
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for block in [f"blocks_{branch}.{i}" for branch in "av" for i in range(depth)] + ["blocks_u.0"]:
        for name, shape in layers.items():
            state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"] = linear(*shape)
        for norm in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
            state[f"{block}.{norm}.weight"], state[f"{block}.{norm}.bias"] = torch.randn(width), torch.randn(width)
    state["norm_a.weight"], state["norm_a.bias"] = torch.randn(width), torch.randn(width)
    return state


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_cavmae_from_its_layout(tmp_path, prefix):
    state = cavmae_state()
    torch.save({f"{prefix}{name}": t for name, t in state.items()}, tmp_path / "audio.pth")
    encoder = load_cavmae(tmp_path / "audio.pth")
    assert encoder.frames == 32 and len(encoder.blocks) == 3
    assert torch.equal(encoder.blocks[0].norm1.weight, state["blocks_a.0.norm1.weight"])
    assert torch.equal(encoder.blocks[2].norm1.weight, state["blocks_u.0.norm1_a.weight"])
    assert torch.equal(encoder.blocks[2].qkv.weight, state["blocks_u.0.attn.qkv.weight"])
    assert torch.equal(encoder.norm.bias, state["norm_a.bias"])


@pytest.mark.parametrize("key", ["blocks_u.0.norm2_a.bias", "modality_a", "blocks_a.1.mlp.fc1.weight"])
def test_cavmae_misses_no_key(tmp_path, key):
    state = cavmae_state()
    del state[key]
    torch.save(state, tmp_path / "audio.pth")
    with pytest.raises(ValueError, match=f"audio.pth: expected {key}, which is not there"):
        load_cavmae(tmp_path / "audio.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_the_released_pickle_is_converted_where_torch_is_not(tmp_path):
    np.random.seed(1)
    params = flax_params()
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"state": {"params": {"params": params}}, "variant": {}}))
    with pytest.raises(ValueError, match="has to be converted first"):
        load_m3ae(tmp_path / "m.pkl")
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, convert_m3ae.__file__, tmp_path / "m.pkl", tmp_path / "m.npz"]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(tmp_path / "m.npz") as file:
        assert not [name for name in file.files if "decoder" in name or "mask" in name]
    encoder = load_m3ae(tmp_path / "m.npz", "text")
    assert torch.equal(encoder.cls_token, torch.from_numpy(params["cls_token"]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: M3AE("audio"), "tower: expected one of image, text, both, got 'audio'"),
        (lambda: M3AE(size="huge"), r"size: expected small, base, large or \(width, depth, heads\), got 'huge'"),
        (lambda: M3AE(size=(6, 1, 1)), "size: expected a width divisible by 4, got 6"),
        (lambda: M3AE(size=(8, 1, 3)), "heads: expected a divisor of the width 8, got 3"),
        (lambda: M3AE(image_size=50), "image_size: expected a multiple of 16, got 50"),
        (lambda: M3AE(patch_order="rows"), "patch_order: expected one of pretrained, official, got 'rows'"),
        (lambda: M3AE(size=TINY, gelu="erf"), "gelu: expected one of tanh, none, got 'erf'"),
        (lambda: CAVMAEAudio(100), "frames: expected a multiple of 16, got 100"),
        (lambda: CLIP("audio"), "tower: expected one of image, text, got 'audio'"),
        (
            lambda: M3AE("image", TINY)(torch.zeros(1, 3, 224, 224)),
            r"x: expected images.*256, 256\], got torch.float32 \[1, 3, 224",
        ),
        (lambda: M3AE("text", TINY)(torch.zeros(1, 3, 256, 256)), "x: expected tokens, int64 .* got torch.float32"),
        (lambda: M3AE("image", TINY)(torch.zeros(1, 3).long()), "x: expected images, .* got torch.int64"),
        (lambda: M3AE("text", TINY, tokens=2)(torch.ones(1, 3).long()), r"T ≤ 2, got torch.int64 \[1, 3\]"),
        (
            lambda: CAVMAEAudio(32, TINY)(torch.zeros(1, 128, 32)),
            r"x: expected .*\[N, 32, 128\], got torch.float32 \[1, 128, 32\]",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_clip_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    vision = transformers.CLIPVisionConfig(**small, image_size=64, patch_size=32)
    text = transformers.CLIPTextConfig(**small, vocab_size=50, max_position_embeddings=12, eos_token_id=49, bos_token_id=48)
    joint = {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "projection_dim": 16}
    both = transformers.CLIPModel(transformers.CLIPConfig(**joint)).eval()
    images, ids = torch.randn(3, 3, 64, 64), torch.tensor([[48, 5, 49, 49, 49], [48, 7, 8, 9, 49]])
    expected = {"image": both.get_image_features(pixel_values=images), "text": both.get_text_features(input_ids=ids)}
    for tower, config, x in (("image", vision, images), ("text", text, ids)):
        encoder = CLIP(tower, config).eval()
        encoder.model.load_state_dict({k: v for k, v in both.state_dict().items() if k in encoder.model.state_dict()})
        features = expected[tower] if isinstance(expected[tower], torch.Tensor) else expected[tower].pooler_output
        torch.testing.assert_close(encoder(x), features)
        assert encoder.out_features == 16
    torch.testing.assert_close(encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)}), encoder(ids))


def test_the_encoders_in_a_model_with_missing_texts():
    torch.manual_seed(0)
    encoders = {"audio": CAVMAEAudio(32, TINY), "text": M3AE("text", TINY, vocabulary=9)}
    model = mla.MultimodalModel(encoders, nn.Linear(64, 3))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), model.head)
    inputs = {"audio": torch.randn(3, 32, 128), "text": torch.tensor([[1, 2, 0], [0, 0, 0], [3, 4, 5]])}
    present = torch.tensor([[True, True], [True, False], [False, True]])
    losses = mla.alternating_step(model, optimizer, (inputs, torch.tensor([0, 1, 2]), present))
    assert all(loss.isfinite() for loss in losses.values())
    model.eval()
    fused = model.predict(inputs, present).logits
    torch.testing.assert_close(fused[1], model({"audio": inputs["audio"]})["audio"][1])
