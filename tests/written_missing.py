"""Methods for missing modalities written out in NumPy: their networks, losses and, by complex steps, their gradients.

Every function here is analytic between its kinks, so that Im f(p + i h d) / h is the derivative along d to rounding: nothing is
subtracted, and h is so small that no kink lies between p and p + i h d.
"""

import copy
import itertools
import math

import numpy as np

WIDTHS = {"audio": 3, "image": 7, "text": 5}
STEP = 1e-30


class Written:
    """Networks of a model in NumPy, from its parameters."""

    def __init__(self, model):
        self.p = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def towards(self, directions):
        """The networks at p + i h d, for {name: d}."""
        there = copy.copy(self)
        there.p = {name: p + 1j * STEP * directions[name] if name in directions else p for name, p in self.p.items()}
        return there

    def linear(self, name, x):
        y = x @ self.p[f"{name}.weight"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def mlp(self, name, x):
        for layer in (0, 3):
            x = np.maximum(self.linear(f"{name}.{layer}", x), 0)
        return self.linear(f"{name}.6", x)

    def stack(self, name, x, slope):
        layers = sorted({int(key[len(name) + 1 :].split(".")[0]) for key in self.p if key.startswith(f"{name}.")})
        for layer in layers[:-1]:
            x = self.linear(f"{name}.{layer}", x)
            x = np.where(x > 0, x, slope * x)
        return self.linear(f"{name}.{layers[-1]}", x)

    def features(self, inputs, here):
        x = {m: np.where(here[:, [i]], inputs[m].numpy(), 0) for i, m in enumerate(WIDTHS)}
        return np.concatenate([self.mlp(f"encoders.{m}", x[m]) for m in WIDTHS], 1)

    def cascade(self, name, h, blocks, s=None):
        codes, x = [], h
        for i in range(blocks):
            codes.append(self.stack(f"{name}.encoders.{i}", x if s is None else x + s, 0.01))
            x = self.stack(f"{name}.decoders.{i}", codes[-1], 0.0) + (x if s is None else 0)
        return self.linear(f"{name}.transition.2", np.maximum(self.linear(f"{name}.transition.0", x), 0)), np.hstack(codes)

    def shared(self, h):
        parts = []
        for x in np.split(h, len(WIDTHS), 1):
            x = self.linear("invariant.0", x)
            x = self.linear("invariant.2", np.where(x > 0, x, 0.01 * x))
            parts.append(np.where(x > 0, x, 0.01 * x))
        return np.concatenate(parts, 1)

    def norm(self, name, x):
        return normalized(x, -1) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def transformer(self, name, x):
        d = x.shape[-1]
        both = x @ self.p[f"{name}.self_attn.in_proj_weight"].T + self.p[f"{name}.self_attn.in_proj_bias"]
        q, k, v = (part.reshape(*x.shape[:2], 4, d // 4).swapaxes(1, 2) for part in np.split(both, 3, -1))
        mixed = softmax(q @ k.swapaxes(2, 3) / math.sqrt(d // 4)) @ v
        x = self.norm(f"{name}.norm1", x + self.linear(f"{name}.self_attn.out_proj", mixed.swapaxes(1, 2).reshape(x.shape)))
        hidden = np.maximum(self.linear(f"{name}.linear1", x), 0)
        return self.norm(f"{name}.norm2", x + self.linear(f"{name}.linear2", hidden))

    def tokens(self, h, here):
        h = np.split(h, len(WIDTHS), 1)
        tag = np.concatenate([here.all(1, keepdims=True), ~here], 1).astype(float)
        pairs = {frozenset(pair): i for i, pair in enumerate(itertools.combinations(range(3), 2))}
        rows = []
        for m in range(3):
            others = [self.linear(f"shared.{pairs[frozenset((m, u))]}", h[m]) for u in range(3) if u != m]
            rows.append(np.concatenate([*others, tag], 1))
        return np.stack(rows, 1), tag


def normalized(x, axis):
    x = x - x.mean(axis, keepdims=True)
    return x / np.sqrt((x * x).mean(axis, keepdims=True) + 1e-5)


def length(z):
    """|z| of real z, continued."""
    return np.where(z.real < 0, -z, z)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropies(z, y):
    return -np.log(softmax(z)[range(len(y)), y])


def reconstruction(net, r, here, full):
    total = 0
    for i, m in enumerate(WIDTHS):
        apart = net.mlp(f"decoders.{i}", r) - full[m].numpy()
        total += (apart**2).mean(1)[~here[:, i]].sum()
    return total


def ae_loss(model, net, x, y, here, full):
    r = np.maximum(net.stack("autoencoder", net.features(x, here), 0.01), 0)
    return cross_entropies(net.mlp("classifier", r), y).mean() + 0.2 * reconstruction(net, r, here, full)


def cra_loss(model, net, x, y, here, full):
    r, _ = net.cascade("autoencoder", net.features(x, here), 2)
    return cross_entropies(net.mlp("classifier", r), y).mean() + 0.8 * reconstruction(net, r, here, full)


def mmin_loss(model, net, x, y, here, full):
    h = net.features(x, here)
    r, codes = net.cascade("forth", h, 5)
    t = Written(model.teacher.model).features(full, ~here)
    returned, _ = net.cascade("back", r, 5)
    fixed = model.fixed  # h, of which this term has no gradient
    terms = 4 * ((r - t) ** 2).mean() + 2 * ((returned - (h if fixed is None else fixed)) ** 2).mean()
    return cross_entropies(net.mlp("classifier", codes), y).mean() + terms


def if_mmin_loss(model, net, x, y, here, full):
    h = net.features(x, here)
    s = net.shared(h)
    r, codes = net.cascade("forth", h, 5, s)
    teacher, everything = Written(model.teacher.model), np.ones_like(here)
    t, common = teacher.features(full, ~here), teacher.shared(teacher.features(full, everything))
    terms = ((r - t) ** 2).mean() + ((s - common) ** 2).mean()
    return cross_entropies(net.mlp("classifier", codes), y).mean() + terms


def teacher_loss(model, net, x, y, here, full):
    h = net.features(full, np.ones_like(here))
    return cross_entropies(net.mlp("classifier", h), y).mean()


def invariant_teacher_loss(model, net, x, y, here, full):
    h = net.features(full, np.ones_like(here))
    s = net.shared(h)
    moments = []
    for each in np.split(s, len(WIDTHS), 1):
        centred = each - each.mean(0)
        moments.append([each.mean(0), *((centred**k).mean(0) for k in (2, 3, 4, 5))])
    pairs = list(itertools.combinations(moments, 2))
    apart = sum(np.sqrt(((a - b) ** 2).sum()) for one, other in pairs for a, b in zip(one, other, strict=True))
    return cross_entropies(net.mlp("classifier", np.hstack([h, s])), y).mean() + apart / len(pairs)


def tate_teacher_loss(model, net, x, y, here, full):
    return tate_loss(model, net, full, y, np.ones_like(here), full)


def tate_loss(model, net, x, y, here, full):
    def apart(a, b):
        p, q = softmax(a), softmax(b)
        return ((p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1)).mean(1).sum()

    tokens, tag = net.tokens(net.features(x, here), here)
    E = net.transformer("encoder", tokens)
    D = net.transformer("decoder", E)
    score = net.linear("pooling.score", net.linear("pooling.value", E) / (1 + np.exp(-net.linear("pooling.gate", E))))
    g = (softmax(score.swapaxes(1, 2)).swapaxes(1, 2) * E).sum(1)
    penalty = apart(D, tokens) + length(tag - 1 / (1 + np.exp(-g[:, -4:]))).mean()
    if model.teacher is not None:
        teacher, everything = Written(model.teacher.model), np.ones_like(here)
        penalty += apart(E, teacher.transformer("encoder", teacher.tokens(teacher.features(full, everything), everything)[0]))
    z = net.linear("classifier.1", net.linear("classifier.0", g))
    return cross_entropies(z, y).sum() + 0.1 * penalty


LOSSES = {
    "AE": ae_loss,
    "CRA": cra_loss,
    "MMIN": mmin_loss,
    "MMIN's teacher": teacher_loss,
    "IF-MMIN": if_mmin_loss,
    "IF-MMIN's teacher": invariant_teacher_loss,
    "TATE": tate_loss,
    "TATE's teacher": tate_teacher_loss,
}


def batch_norm_mlp(net, name, x):
    """Linear, BatchNorm of a training batch and ReLU, twice or more, and a Linear."""
    layers = sorted({int(key[len(name) + 1 :].split(".")[0]) for key in net.p if key.startswith(f"{name}.")})
    for linear, norm in zip(layers[:-1:2], layers[1:-1:2], strict=True):
        x = normalized(net.linear(f"{name}.{linear}", x), 0) * net.p[f"{name}.{norm}.weight"] + net.p[f"{name}.{norm}.bias"]
        x = np.maximum(x, 0)
    return net.linear(f"{name}.{layers[-1]}", x)


def correlation_gradient(x, y, ridge=1e-3, floor=1e-3):
    """The gradients with respect to x and y [N, k] of Σ_i √(σ_i² + floor), T = S_11^-½ S_12 S_22^-½ (Andrew et al., ICML 2013).

    With T = U diag(σ) Vᵀ and w_i = σ_i / √(σ_i² + floor):  ∇_12 = S_11^-½ U w Vᵀ S_22^-½,  ∇_11 = -½ S_11^-½ U w σ Uᵀ S_11^-½.
    """
    n = len(x) - 1
    x, y = x - x.mean(0), y - y.mean(0)
    roots = []
    for v in (x, y):
        values, vectors = np.linalg.eigh(v.T @ v / n + ridge * np.eye(v.shape[1]))
        roots.append(vectors @ np.diag(values**-0.5) @ vectors.T)
    U, sigma, Vh = np.linalg.svd(roots[0] @ (x.T @ y / n) @ roots[1], full_matrices=False)
    w = sigma / np.sqrt(sigma**2 + floor)
    across = roots[0] @ (U * w) @ Vh @ roots[1]
    of_x = roots[0] @ (U * (w * sigma)) @ U.T @ roots[0]
    of_y = roots[1] @ (Vh.T * (w * sigma)) @ Vh @ roots[1]
    return (y @ across.T - x @ of_x) / n, (x @ across - y @ of_y) / n


def clustering_gradient(h, y, classes):
    """CPM-Net's L_cls of latents h [N, s] of classes y, and its gradient, sample by sample."""
    loss, gradient = 0.0, np.zeros_like(h)
    for n in range(len(h)):
        members = [[j for j in range(len(h)) if j != n and y[j] == c] for c in range(classes)]
        similarity = np.array([np.mean([h[n] @ h[j] for j in of]) if of else 0.0 for of in members])
        best = int(similarity.argmax())
        margin = (best != y[n]) + similarity[best] - similarity[y[n]]
        if margin > 0:
            loss += margin
            for c, sign in ((best, 1), (y[n], -1)):
                for j in members[c]:
                    gradient[n] += sign * h[j] / len(members[c])
                    gradient[j] += sign * h[n] / len(members[c])
    return loss, gradient
