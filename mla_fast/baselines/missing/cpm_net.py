"""CPM-Net, cross partial multi-view networks: Zhang, Han, Cui, Fu, Zhou and Hu, NeurIPS 2019."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mla_fast.baselines.missing.checks import check_number, check_training, check_whole
from mla_fast.baselines.missing.fitted import NO_CLASS, FittedModel
from mla_fast.baselines.missing.parts import FEATURES, Inputs, visible

CHECKPOINTS, STEPS = 2, 5
LR, LATENT_LR = 1e-3, 1e-2


class CPMNet(FittedModel):
    """Find for each sample a latent h_n from which linear decoders f_m make what is visible of it, and classes can be told.

        L_rec = Σ_n Σ_m s_nm ‖f_m(h_n) − x_nm‖²
        L_cls = Σ_n max(0, [c* ≠ y_n] + F_{n,c*} − F_{n,y_n}),  F_nc = mean of h_n·h_j over j ≠ n of class c,  c* = argmax F_n

    There is no encoder. A round of training is 5 steps of Adam of the decoders on L_rec and 5 of the latents on L_rec + λ L_cls,
    on all samples at once; there are as many rounds as epochs, and two places at which a run can be evaluated.
    Predictions are optimised, too: 5 `test_rounds` steps of fresh latents on L_rec, the decoders fixed, without labels; then F_nc
    to the training latents. So a prediction costs about what training costs, and the model keeps the training latents.

    Where a class has no sample but n F is 0, and a class without any is neither c* nor predicted. All fresh latents start from
    one drawn vector: no prediction depends on its batch.
    """

    grid = {"weight": (1.0, 0.1, 10.0)}
    target: Tensor

    def __init__(self, widths: Mapping[str, int], classes: int, weight: float = 1.0, test_rounds: int = 300):
        super().__init__(widths, classes)
        check_number("weight", weight)
        check_whole("test_rounds", test_rounds)
        self.weight, self.test_rounds, self.lr = weight, test_rounds, LR
        self.decoders = nn.ModuleList(nn.Linear(FEATURES, d) for d in widths.values())
        self.latents = nn.Parameter(torch.zeros(0, FEATURES))
        self.start = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.register_buffer("target", torch.zeros(0, dtype=torch.long))
        self.register_load_state_dict_pre_hook(_take_size)  # type: ignore[no-untyped-call]

    def begin(
        self,
        inputs: Inputs,
        target: Tensor,
        present: Tensor | None = None,
        *,
        epochs: int = 100,
        lr_factor: float = 1.0,
        weight_decay: float = 0.0,
    ) -> int:
        check_training(epochs, lr_factor, weight_decay)
        self.x, self.available = self.check(inputs, target, present)
        self.lr = LR * lr_factor
        self.target, self.rounds, self.passes = target.long(), epochs, 2 * STEPS * epochs
        like = next(iter(self.x.values()))
        self.latents.data = nn.init.xavier_uniform_(like.new_empty(len(target), FEATURES))
        self.start.data = nn.init.xavier_uniform_(like.new_empty(len(target), FEATURES))[0].clone()
        self.of_decoders = torch.optim.Adam(self.decoders.parameters(), self.lr, weight_decay=weight_decay, fused=True)
        self.of_latents = torch.optim.Adam([self.latents], LATENT_LR * lr_factor, fused=True)
        return min(CHECKPOINTS, epochs)

    def get_extra_state(self) -> Tensor:
        """Return the rate at which the latents of predictions are found, which depends on ``begin``."""
        return torch.tensor(self.lr, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        self.lr = float(state)

    def train_epoch(self, epoch: int) -> None:
        self.check_begun()
        calls = min(CHECKPOINTS, self.rounds)
        for _ in range(self.rounds * epoch // calls, self.rounds * (epoch + 1) // calls):
            for _ in range(STEPS):
                self.of_decoders.zero_grad()
                self.reconstruction(self.latents.detach()).backward()
                self.of_decoders.step()
            for _ in range(STEPS):
                self.of_latents.zero_grad()
                loss = self.reconstruction(self.latents) + self.weight * clustering(self.latents, self.target, self.classes)
                (self.latents.grad,) = torch.autograd.grad(loss, [self.latents])
                self.of_latents.step()

    def reconstruction(self, h: Tensor) -> Tensor:
        """Return L_rec of the training set's latents [N, 128]."""
        errors = []
        for decoder, x, here in zip(self.decoders, self.x.values(), self.available, strict=True):
            errors.append((decoder(h) - x).square().sum(1).masked_fill(~here, 0).sum())
        return torch.stack(errors).sum()

    def forward(self, inputs: Inputs, present: Tensor | None = None) -> Tensor:
        seen = visible(self.widths, inputs, present, self.start.dtype, cast=True)
        if not len(self.target):
            raise ValueError("latents: CPM-Net expects begin(…) or fit(…) before a prediction")
        h = self.infer(*seen)
        return class_means(self.latents.detach(), self.target, self.classes, h)

    @torch.no_grad()
    def infer(self, x: Inputs, available: Tensor) -> Tensor:
        """Return latents [N, 128] that Adam finds for L_rec, by its gradient 2 Σ_m s_m (W_mᵀ W_m h − W_mᵀ (x_m − b_m))."""
        h = nn.Parameter(self.start.expand(available.shape[1], -1).clone())
        adam = torch.optim.Adam([h], self.lr, fused=True)
        pulls, metrics = [], []
        parameters = list(self.decoders.parameters())
        for W, b, values, here in zip(parameters[::2], parameters[1::2], x.values(), available, strict=True):
            pulls.append(((values - b) @ W).masked_fill(~here[:, None], 0))
            metrics.append(W.T @ W)
        pull = torch.stack(pulls).sum(0)
        for _ in range(STEPS * self.test_rounds):
            seen = [(h @ G).masked_fill(~here[:, None], 0) for G, here in zip(metrics, available, strict=True)]
            h.grad = 2 * (torch.stack(seen).sum(0) - pull)
            adam.step()
        return h.detach()


def _take_size(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Make room for as many training latents as a state has that is about to be loaded; one of old has no rate, which was LR."""
    assert isinstance(model, CPMNet)
    if (saved := state.get(f"{prefix}latents")) is not None:
        model.latents.data = model.latents.new_zeros(saved.shape)
        model.target = model.target.new_zeros(len(saved))
        state.setdefault(f"{prefix}_extra_state", LR)


def class_means(latents: Tensor, target: Tensor, classes: int, h: Tensor) -> Tensor:
    """Return F [N, C], the mean of h·h_j over the latents h_j [K, s] of each class, −1e9 for a class without any."""
    members = nn.functional.one_hot(target, classes).to(latents)  # [K, C]
    return (h @ (latents.T @ members / members.sum(0).clamp_min(1))).masked_fill(members.sum(0) == 0, NO_CLASS)


def clustering(h: Tensor, target: Tensor, classes: int) -> Tensor:
    """Return L_cls of latents h [N, s] and their classes [N]."""
    members = nn.functional.one_hot(target, classes).to(h)
    counts = members.sum(0) - members  # of the others [N, C]
    own = h.square().sum(1, keepdim=True) * members
    similarity = (h @ (h.T @ members) - own) / counts.clamp_min(1)
    best = similarity.detach().masked_fill(members.sum(0) == 0, -math.inf).argmax(1, keepdim=True)
    margin = (best[:, 0] != target).to(h) + similarity.gather(1, best)[:, 0] - similarity.gather(1, target[:, None])[:, 0]
    return margin.relu().sum()
