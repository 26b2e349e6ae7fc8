"""Each method's first training step against the same step written out in NumPy; worked examples of what is particular to it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from mla_fast.baselines import METHODS, Setup, fit_joint, ogm, qmf
from mla_fast.baselines.joint import unimodal_losses

N, S, C, LR = 5, 3, 4, 0.1
WIDTHS = {"audio": 2, "image": 6}
TEACHERS = {"audio": np.linspace(-1, 1, S * 2).reshape(S, 2), "image": np.linspace(1, -2, S * 6).reshape(S, 6)}
INDEX = torch.tensor([4, 0, 2, 1, 3])


def make(method):
    """A model on encoders that are a bias-free linear map, its inputs and labels; all float64."""
    torch.manual_seed(0)
    encoders = {m: nn.Linear(width, S, bias=False) for m, width in WIDTHS.items()}
    model = METHODS[method](encoders, S, C).double()
    inputs = {m: torch.randn(N, width, dtype=torch.float64) for m, width in WIDTHS.items()}
    return model, inputs, torch.tensor([0, 3, 1, 3, 2])


def prepare(model, batch, epochs=1):
    """The model after what it learns beforehand on one batch, which is also held out; its number of epochs."""

    def fit(model, epochs):
        fit_joint(model, torch.optim.SGD(model.parameters(), lr=LR), [batch], epochs)

    return model.prepare(Setup([batch], [batch], fit, epochs))


def arrays(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def delta(z, y):
    """∂(mean cross-entropy)/∂z"""
    return (softmax(z) - np.eye(C)[y]) / len(y)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def forward(p, inputs):
    """Inputs and features of both modalities."""
    a, v = (inputs[m].numpy() for m in WIDTHS)
    return a, v, a @ p["encoders.audio.weight"].T, v @ p["encoders.image.weight"].T


def of_encoders(d_a, d_v, a, v):
    return {"encoders.audio.weight": d_a.T @ a, "encoders.image.weight": d_v.T @ v}


def sum_gradients(p, inputs, y):
    a, v, h_a, h_v = forward(p, inputs)
    h, W = h_a + h_v, p["head.weight"]
    d = delta(h @ W.T + p["head.bias"], y)
    return {"head.weight": d.T @ h, "head.bias": d.sum(0), **of_encoders(d @ W, d @ W, a, v)}


def concat_gradients(p, inputs, y):
    a, v, h_a, h_v = forward(p, inputs)
    h, W = np.concatenate([h_a, h_v], 1), p["head.weight"]
    d = delta(h @ W.T + p["head.bias"], y)
    return {"head.weight": d.T @ h, "head.bias": d.sum(0), **of_encoders(d @ W[:, :S], d @ W[:, S:], a, v)}


def late_fusion_gradients(p, inputs, y):
    a, v, h_a, h_v = forward(p, inputs)
    found, d_h = {}, []
    for i, h in enumerate((h_a, h_v)):
        W = p[f"heads.{i}.weight"]
        d = delta(h @ W.T + p[f"heads.{i}.bias"], y)
        found |= {f"heads.{i}.weight": d.T @ h, f"heads.{i}.bias": d.sum(0)}
        d_h.append(d @ W)
    return found | of_encoders(*d_h, a, v)


def film_gradients(p, inputs, y):
    a, v, h_a, h_v = forward(p, inputs)
    F, W = p["film.weight"], p["head.weight"]
    made = h_a @ F.T + p["film.bias"]
    gamma, beta = made[:, :S], made[:, S:]
    o = gamma * h_v + beta
    d = delta(o @ W.T + p["head.bias"], y)
    d_o = d @ W
    d_made = np.concatenate([d_o * h_v, d_o], 1)
    found = {"head.weight": d.T @ o, "head.bias": d.sum(0), "film.weight": d_made.T @ h_a, "film.bias": d_made.sum(0)}
    return found | of_encoders(d_made @ F, d_o * gamma, a, v)


def bigated_gradients(p, inputs, y):
    a, v, h_a, h_v = forward(p, inputs)
    U, V, W = p["gate.weight"], p["value.weight"], p["head.weight"]
    gate, value = sigmoid(h_a @ U.T + p["gate.bias"]), h_v @ V.T + p["value.bias"]
    o = gate * value
    d = delta(o @ W.T + p["head.bias"], y)
    d_o = d @ W
    d_u, d_value = d_o * value * gate * (1 - gate), d_o * gate
    found = {"head.weight": d.T @ o, "head.bias": d.sum(0), "gate.weight": d_u.T @ h_a, "gate.bias": d_u.sum(0)}
    found |= {"value.weight": d_value.T @ h_v, "value.bias": d_value.sum(0)}
    return found | of_encoders(d_u @ U, d_value @ V, a, v)


def ogm_ge_gradients(p, inputs, y):
    """Without the noise, which its test takes away."""
    a, v, h_a, h_v = forward(p, inputs)
    W, b = p["head.weight"], p["head.bias"]
    s_a, s_v = (softmax(h @ w.T + b / 2)[range(N), y].sum() for h, w in ((h_a, W[:, :S]), (h_v, W[:, S:])))
    k_a = 1 - math.tanh(0.1 * s_a / s_v) if s_a > s_v else 1
    k_v = 1 - math.tanh(0.1 * s_v / s_a) if s_v > s_a else 1
    found = concat_gradients(p, inputs, y)
    found["encoders.audio.weight"] = k_a * found["encoders.audio.weight"]
    found["encoders.image.weight"] = k_v * found["encoders.image.weight"]
    return found


def agm_gradients(p, inputs, y):
    """k multiplies what flows back through each modality's share; the bias is shared by halves. τ is 0 at the first step."""
    a, v, h_a, h_v = forward(p, inputs)
    W, b = p["head.weight"], p["head.bias"]
    phi = [h @ w.T + b / 2 for h, w in ((h_a, W[:, :S]), (h_v, W[:, S:]))]
    S_a, S_v = (-np.log(softmax(z)[range(N), y]).mean() for z in phi)
    k_a, k_v = math.exp(1 - math.exp(S_v - S_a)), math.exp(1 - math.exp(S_a - S_v))
    d = delta(phi[0] + phi[1], y)
    found = {"head.weight": np.concatenate([k_a * d.T @ h_a, k_v * d.T @ h_v], 1), "head.bias": (k_a + k_v) / 2 * d.sum(0)}
    return found | of_encoders(k_a * d @ W[:, :S], k_v * d @ W[:, S:], a, v)


def pmr_gradients(p, inputs, y):
    """Prototypes are the class means of the batch itself, which is the first tenth."""
    a, v, h_a, h_v = forward(p, inputs)
    found = concat_gradients(p, inputs, y)
    pulls, scores = [], []
    for h, x in ((h_a, a), (h_v, v)):
        c = np.stack([h[y == label].mean(0) for label in range(C)])
        apart = h[:, None] - c[None]  # [N, C, s]
        length = np.sqrt((apart**2).sum(-1))
        d = delta(-length, y)
        inverse = np.divide(1, length, out=np.zeros_like(length), where=length > 1e-12)
        pulls.append((-(d * inverse)[..., None] * apart).sum(1).T @ x)
        scores.append(softmax(-length)[range(N), y].sum())
    weaker = int(scores[1] < scores[0])
    found[f"encoders.{list(WIDTHS)[weaker]}.weight"] += pulls[weaker]
    return found


def multi_loss_parts(p, inputs, y):
    """Of the joint head and of the modalities' own."""
    parts = [concat_gradients(p, inputs, y), late_fusion_gradients(p, inputs, y)]
    return [{name: part.get(name, np.zeros_like(value)) for name, value in p.items()} for part in parts]


def multi_loss_gradients(p, inputs, y):
    joint, own = multi_loss_parts(p, inputs, y)
    return {name: joint[name] + own[name] for name in p}


def g_blending_gradients(p, inputs, y):
    """With the weights that its test sets: .5 and .2 of the modalities, .3 of the joint head."""
    joint, own = multi_loss_parts(p, inputs, y)
    weight = {"encoders.audio.weight": 0.5, "encoders.image.weight": 0.2, "heads.0": 0.5, "heads.1": 0.2, "head.": 0}
    return {name: 0.3 * joint[name] + next(w for key, w in weight.items() if name.startswith(key)) * own[name] for name in p}


def mmpareto_gradients(p, inputs, y):
    joint, own = multi_loss_parts(p, inputs, y)
    found = multi_loss_gradients(p, inputs, y)
    for modality in WIDTHS:
        name = f"encoders.{modality}.weight"
        g_j, g_u = joint[name], own[name]
        dot = (g_j * g_u).sum()
        w = 0.5 if dot >= 0 else min(max(((g_u**2).sum() - dot) / ((g_j - g_u) ** 2).sum(), 0), 1)
        d = 2 * (w * g_j + (1 - w) * g_u)
        found[name] = 1.5 * d * max(1, np.linalg.norm(g_j + g_u) / np.linalg.norm(d))
    return found


def mlb_gradients(p, inputs, y):
    a, v, *h = forward(p, inputs)
    s = [softmax(x @ p[f"heads.{i}.weight"].T + p[f"heads.{i}.bias"])[range(N), y].sum() for i, x in enumerate(h)]
    found = multi_loss_gradients(p, inputs, y)
    for i, modality in enumerate(WIDTHS):
        rho = s[1 - i] / s[i]
        k = 1 + math.tanh(0.5 * (rho - 1))  # β − 1 is 1 by default
        for name in (f"encoders.{modality}.weight", f"heads.{i}.weight", f"heads.{i}.bias"):
            found[name] = k * found[name]
    return found


def reconboost_gradients(p, inputs, y):
    """Rectification, which a single epoch is."""
    a, v, h_a, h_v = forward(p, inputs)
    logits = sum(h @ p[f"heads.{i}.weight"].T + p[f"heads.{i}.bias"] for i, h in enumerate((h_a, h_v)))
    d = delta(p["beta"] * logits, y)
    found, d_h = {"beta": (d * logits).sum()}, []
    for i, h in enumerate((h_a, h_v)):
        found |= {f"heads.{i}.weight": p["beta"] * d.T @ h, f"heads.{i}.bias": p["beta"] * d.sum(0)}
        d_h.append(p["beta"] * d @ p[f"heads.{i}.weight"])
    return found | of_encoders(*d_h, a, v)


def umt_gradients(p, inputs, y):
    """The teachers are the encoders after a step with a head of their own, which ``alone`` has."""
    a, v, h_a, h_v = forward(p, inputs)
    found = concat_gradients(p, inputs, y)
    for (modality, teacher), h, x in zip(TEACHERS.items(), (h_a, h_v), (a, v), strict=True):
        found[f"encoders.{modality}.weight"] += (10 * 2 / (N * S) * (h - x @ teacher.T)).T @ x
    return found


def qmf_gradients(p, inputs, y):
    """∂L/∂z_m = δ_m + w_m δ + (δ·z_m + λ ∂rank/∂w) ∂w/∂z_m with ∂w/∂z_m = 0.1 softmax(z_m)."""
    a, v, h_a, h_v = forward(p, inputs)
    logits = [h @ p[f"heads.{i}.weight"].T + p[f"heads.{i}.bias"] for i, h in enumerate((h_a, h_v))]
    w = [0.1 * np.log(np.exp(z).sum(1)) for z in logits]
    d_fused = delta(sum(w_m[:, None] * z for w_m, z in zip(w, logits, strict=True)), y)
    found, d_h = {}, []
    for i, (z, h) in enumerate(zip(logits, (h_a, h_v), strict=True)):
        losses = -np.log(softmax(z)[range(N), y])
        kappa = (losses - losses.min()) / (losses.max() - losses.min())
        d_w = np.zeros(N)
        for n in range(N):
            following = (n + 1) % N
            gap = kappa[n] - kappa[following]
            if np.sign(gap) * (w[i][n] - w[i][following]) + abs(gap) > 0:
                d_w[n] += 0.1 * np.sign(gap) / N
                d_w[following] -= 0.1 * np.sign(gap) / N
        d_w += (d_fused * z).sum(1)
        d = delta(z, y) + w[i][:, None] * d_fused + d_w[:, None] * 0.1 * softmax(z)
        found |= {f"heads.{i}.weight": d.T @ h, f"heads.{i}.bias": d.sum(0)}
        d_h.append(d @ p[f"heads.{i}.weight"])
    return found | of_encoders(*d_h, a, v)


GRADIENTS = {
    "Sum": sum_gradients,
    "Concat": concat_gradients,
    "Late fusion": late_fusion_gradients,
    "FiLM": film_gradients,
    "BiGated": bigated_gradients,
    "OGM-GE": ogm_ge_gradients,
    "QMF": qmf_gradients,
    "UME": late_fusion_gradients,
    "OGM": ogm_ge_gradients,
    "AGM": agm_gradients,
    "PMR": pmr_gradients,
    "Multi-loss": multi_loss_gradients,
    "G-Blending": g_blending_gradients,
    "MMPareto": mmpareto_gradients,
    "MLB": mlb_gradients,
    "ReconBoost": reconboost_gradients,
    "UMT": umt_gradients,
    "Diagnosing & Re-learning": concat_gradients,
}


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_the_one_written_out(method, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model, inputs, target = make(method)
    before = arrays(model)
    gradients = GRADIENTS[method](before, inputs, target.numpy())
    assert gradients.keys() == before.keys()
    batch = (inputs, target, None, INDEX)
    prepare(model, batch)
    if method == "UMT":
        with torch.no_grad():
            for modality, weight in TEACHERS.items():
                model.teachers.model.encoders[modality].weight.copy_(torch.from_numpy(weight))
    if method == "G-Blending":
        model.weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    fit_joint(model, torch.optim.SGD(model.parameters(), lr=LR), [batch], 1)
    for name, after in arrays(model).items():
        np.testing.assert_allclose(after, before[name] - LR * gradients[name], rtol=0, atol=1e-13, err_msg=name)
        assert np.abs(gradients[name]).max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_what_is_absent_neither_counts_nor_learns(method):
    model, inputs, target = make(method)
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True], [False, True]])
    spoiled = {m: x.masked_fill(~present[:, [i]], torch.nan) for i, (m, x) in enumerate(inputs.items())}
    gradients = []
    state = copy.deepcopy(model)
    for values in (inputs, spoiled):
        model = copy.deepcopy(state)
        torch.manual_seed(0)  # of noise and of teachers' heads
        prepare(model, (values, target, present, INDEX))
        model.begin_epoch(0)
        model.gradients(model.loss(values, target, present, INDEX))
        gradients.append([p.grad.clone() for p in model.parameters()])
    for clean, with_nan in zip(*gradients, strict=True):
        assert torch.equal(clean, with_nan)
    alone = model(inputs, present)
    assert torch.equal(alone, model(spoiled, present)) and alone.isfinite().all()
    torch.testing.assert_close(alone[2:3], model({"audio": inputs["audio"][2:3]}))
    torch.testing.assert_close(alone[[1, 4]], model({"image": inputs["image"][[1, 4]]}))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "PMR"])
def test_three_modalities_in_the_order_of_the_model(method):
    torch.manual_seed(0)
    widths = {"audio": 2, "image": 6, "text": 4}
    model = METHODS[method]({m: nn.Linear(width, S) for m, width in widths.items()}, S, C)
    inputs = {m: torch.randn(N, width) for m, width in widths.items()}
    logits = model(inputs)
    assert logits.shape == (N, C) and torch.equal(logits, model(dict(reversed(inputs.items()))))
    prepare(model, (inputs, torch.tensor([0, 3, 1, 3, 2]), None, INDEX))
    model.begin_epoch(0)
    model.gradients(model.loss(inputs, torch.tensor([0, 3, 1, 3, 2]), None, INDEX))
    assert all(p.grad.norm() > 0 for p in model.encoders.parameters())


def test_alone_is_the_sub_head_the_shared_head_or_its_own():
    for method in ("Sum", "Concat", "Late fusion"):
        model, inputs, _ = make(method)
        h = model.encoders["image"](inputs["image"])
        p = dict(model.named_parameters())
        W, b = {
            "Sum": lambda p: (p["head.weight"], p["head.bias"]),
            "Concat": lambda p: (p["head.weight"][:, S:], p["head.bias"]),
            "Late fusion": lambda p: (p["heads.1.weight"], p["heads.1.bias"]),
        }[method](p)
        torch.testing.assert_close(model({"image": inputs["image"]}), h @ W.T + b)


def test_ogm_coefficients_worked_out():
    k = ogm.modulation(torch.tensor([0.6, 0.3], dtype=torch.float64), 0.5)
    torch.testing.assert_close(k, torch.tensor([1 - math.tanh(1.0), 1.0], dtype=torch.float64))  # ρ = 2 and 1/2
    k = ogm.modulation(torch.tensor([0.2, 0.8, 0.5], dtype=torch.float64), 0.1)
    expected = [1, 1 - math.tanh(0.1 * 0.8 / 0.35), 1]  # ρ = 0.2 / 0.65, 0.8 / 0.35 and 1
    torch.testing.assert_close(k, torch.tensor(expected, dtype=torch.float64))


def test_ogm_noise_has_the_deviation_of_the_gradient():
    model, inputs, target = make("OGM-GE")
    weight = model.encoders["image"].weight
    torch.manual_seed(1)
    drawn = []
    for _ in range(400):
        model.zero_grad()
        clean = torch.autograd.grad(model.loss(inputs, target), weight)[0]
        model.gradients(model.loss(inputs, target))
        drawn.append(weight.grad - model.coefficients[1] * clean)
    deviation = clean.std(correction=0).item()
    assert torch.stack(drawn).std().item() == pytest.approx(deviation, rel=0.05)
    assert model.head.weight.grad is not None and abs(torch.stack(drawn).mean().item()) < 0.1 * deviation


def test_qmf_confidence_and_fusion_worked_out():
    logits = torch.tensor([[[math.log(3), 0.0]], [[math.log(9), 0.0]]], dtype=torch.float64)  # [2, 1, 2]
    w = [0.1 * math.log(4), 0.1 * math.log(10)]
    torch.testing.assert_close(qmf.confidence(logits)[:, 0], torch.tensor(w, dtype=torch.float64))
    fused = qmf.weighted(logits, torch.tensor([[True], [True]]))
    torch.testing.assert_close(fused, torch.tensor([[w[0] * math.log(3) + w[1] * math.log(9), 0]], dtype=torch.float64))
    fused = qmf.weighted(logits, torch.tensor([[True], [False]]))
    torch.testing.assert_close(fused, torch.tensor([[w[0] * math.log(3), 0]], dtype=torch.float64))


def test_qmf_regulariser_worked_out():
    w, kappa = torch.tensor([0.9, 0.2, 0.4]), torch.tensor([1.0, 0.0, 0.5])
    # (1, 2): the larger loss has 0.7 more confidence, and should have 1 less: 1.7. (2, 3): −(0.2 − 0.4) + 0.5 = 0.7.
    # (3, 1): −(0.4 − 0.9) + 0.5 = 1.
    assert qmf.rank_loss(w, kappa).item() == pytest.approx((1.7 + 0.7 + 1.0) / 3)
    assert qmf.rank_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])).item() == 0
    assert qmf.rank_loss(w, torch.ones(3)).item() == 0  # no order, nothing to enforce
    assert qmf.rank_loss(w[:0], kappa[:0]).item() == 0


def test_qmf_remembers_the_mean_loss_of_each_sample():
    model = METHODS["QMF"]({m: nn.Linear(width, S) for m, width in WIDTHS.items()}, S, 2).double()
    everyone = torch.ones(2, 1, dtype=torch.bool)

    def see(sample, p_right, here=everyone):
        logits = torch.tensor([[[math.log(p), math.log(1 - p)]] for p in p_right], dtype=torch.float64)
        model.remember(logits, here, torch.tensor([0]), torch.tensor([sample]))

    see(0, (0.5, 0.5))
    see(3, (0.25, 0.125))
    see(0, (0.5, 0.125))
    see(2, (0.9, 0.5), torch.tensor([[False], [True]]))
    # Bits: of audio sample 0 has 1 on average and 3 has 2; of image 0 has 2, 3 has 3 and 2 has 1. Sample 1 was not seen.
    expected = torch.tensor([[0, 0, 0, 1], [0.5, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(model.mean_losses(), expected)


def test_unimodal_losses_are_means_over_who_is_there():
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]] * 2, dtype=torch.float64)
    here = torch.tensor([[True, False], [True, True]])
    expected = [math.log(4 / 3), (math.log(4 / 3) + math.log(2)) / 2]
    found = unimodal_losses(logits, here, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert unimodal_losses(logits, torch.zeros_like(here), torch.tensor([0, 1])).tolist() == [0, 0]
