"""``GraphedStep`` against ``alternating_step``: on the CPU with a stand-in for CUDA graphs, on a GPU with graphs."""

import copy
import warnings

import pytest
import torch
from helpers import CLASSES, everything, make_inputs, make_model, momentum_sgd, noisy_model, on_device
from torch import nn

import mla_fast as mla
from mla_fast import graph
from mla_fast.trainer_checks import obstacle_to_graphs

f64 = torch.float64
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class StandIn:
    """What a ``Recorder`` does, on the CPU: a capture moves no tensor, a replay nothing but tensors."""

    model, optimizer, captures, replays, fails = None, None, 0, 0, None

    def __init__(self, device):
        self.waits = ""

    def eager(self, function):
        return function(), StandIn.waiting

    def capture(self, function):
        if StandIn.fails is not None:
            raise RuntimeError(StandIn.fails)
        StandIn.captures += 1
        return StandInGraph(function)

    waiting = ""


class StandInGraph:
    def __init__(self, function):
        self.function, self.layers = function, StandIn.optimizer.layers
        tensors = self.tensors()
        before = [t.clone() for t in tensors]
        self.rates = [group["lr"] for group in StandIn.optimizer.param_groups]
        self.scheduled = [dict(layer.projection.scheduled) for layer in self.layers]
        self.steps = [layer.projection.step for layer in self.layers]
        self.outputs = function()
        self.squares = [layer.squares for layer in self.layers]
        for t, old in zip(tensors, before, strict=True):
            t.detach().copy_(old)

    def tensors(self):
        found = [*StandIn.model.state_dict().values(), StandIn.optimizer._account]
        found += [t for state in StandIn.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        for layer in self.layers:
            found += [t for t in vars(layer.projection).values() if isinstance(t, torch.Tensor)]
        return found

    def replay(self):
        """The function again as it was captured: with the same constants, and of Python's state nothing moved."""
        StandIn.replays += 1
        own = [(layer.projection.step, layer.projection.modality, layer.squares) for layer in self.layers]
        groups = StandIn.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for layer, step, scheduled in zip(self.layers, self.steps, self.scheduled, strict=True):
            layer.projection.step, layer.projection.scheduled = step, scheduled
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        self.outputs.copy_(self.function())
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for layer, (step, modality, squares), recorded in zip(self.layers, own, self.squares, strict=True):
            for old, new in zip(recorded, layer.squares, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
            layer.projection.step, layer.projection.modality, layer.squares = step, modality, squares
            layer.projection.scheduled = {}


@pytest.fixture
def stand_in(monkeypatch):
    on_device(monkeypatch)
    monkeypatch.setattr(graph, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(graph, "Recorder", StandIn)
    for name, value in (("captures", 0), ("replays", 0), ("fails", None), ("waiting", "")):
        monkeypatch.setattr(StandIn, name, value)
    return StandIn


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.0625, fused=True, capturable=True)


def capturable_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, capturable=True)


def sgd(parameters):
    return momentum_sgd(parameters, lr=0.125)  # which float32 has, as graphs have learning rates


def fused_sgd(parameters):
    return momentum_sgd(parameters, lr=0.125, fused=True)


class Counting(torch.optim.SGD):
    """With a count of its own that no replay would add to."""

    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1


def graphed_and_plain(make=sgd, model=make_model, dtype=f64, device="cpu", amp=None, **settings):
    """(a GraphedStep, its model and optimizer), (another model and optimizer that are equal)."""
    models = [model().to(device, dtype) for _ in range(2)]
    optimizers = [mla.MLAOptimizer(make(m.parameters()), m.head, **settings) for m in models]
    StandIn.model, StandIn.optimizer = models[0], optimizers[0]
    return (mla.GraphedStep(models[0], optimizers[0], amp=amp), models[0], optimizers[0]), (models[1], optimizers[1])


def batch(seed, N=7, dtype=f64, device="cpu", missing=False):
    generator = torch.Generator().manual_seed(seed)
    inputs = {m: x.to(device, dtype) for m, x in make_inputs(N, seed=seed).items()}
    target = torch.randint(CLASSES, (N,), generator=generator).to(device)
    if not missing:
        return inputs, target
    present = torch.rand(N, 3, generator=generator) < 0.5
    present[0], present[1] = True, False  # every modality has rows, and none has all
    return inputs, target, present


def on(device, b):
    return (b[0], *(t.to(device) for t in b[1:]))


def follow(step, plain, batches, device="cpu", **close):
    for b in batches:
        losses, expected = step(b), mla.alternating_step(*plain, on(device, b))
        torch.testing.assert_close(losses, expected, **({"rtol": 1e-11, "atol": 1e-11} | close))


def assert_alike(model, optimizer, other, plain, **close):
    close = {"rtol": 1e-11, "atol": 1e-11} | close
    torch.testing.assert_close(everything(model, optimizer), everything(other, plain), **close)
    got, expected = optimizer.diagnostics(), plain.diagnostics()
    assert got["skipped_nonfinite"] == expected["skipped_nonfinite"]
    for name, layer in expected["layers"].items():
        assert got["layers"][name] == pytest.approx(layer, rel=1e-4, nan_ok=True)


def test_a_loss_that_is_given_is_captured_and_trained_on_eagerly_where_rows_are_missing(stand_in):
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    (step, *ours), plain = graphed_and_plain()
    step.loss = loss
    with pytest.warns(UserWarning, match="loss= is a mean over rows"):
        for i in range(10):
            b = batch(i, missing=i > 7)
            torch.testing.assert_close(step(b), mla.alternating_step(*plain, b, loss=loss), rtol=1e-11, atol=1e-11)
    assert_alike(*ours, *plain)
    assert (stand_in.captures, stand_in.replays) == (1, 5)


@pytest.mark.parametrize("make", [sgd, fused_sgd])
@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("projection", ["rls", "window", "none"])
def test_it_is_alternating_step(stand_in, projection, target, make):
    (step, *ours), plain = graphed_and_plain(make, projection=projection, target=target)
    follow(step, plain, map(batch, range(8)))
    assert_alike(*ours, *plain)
    assert (stand_in.captures, stand_in.replays) == (1, 5)


def test_adam_counts_its_steps(stand_in):
    (step, *ours), plain = graphed_and_plain(fused_adam, dtype=torch.float32)
    follow(step, plain, (batch(i, dtype=torch.float32) for i in range(8)), rtol=1e-5, atol=1e-5)
    assert_alike(*ours, *plain, rtol=1e-4, atol=1e-5)
    assert stand_in.replays == 5


@pytest.mark.parametrize("make,captures", [(sgd, 2), (fused_sgd, 1)])
def test_learning_rate_and_alpha_change_by_step(stand_in, make, captures):
    """Fused, the learning rate is read where it is; otherwise the step is captured anew. Nobody else sees a tensor."""
    (step, *ours), plain = graphed_and_plain(make, alpha=lambda t: 1 / (1 + t))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 5, gamma=0.5) for o in (ours[1], plain[1])]
    for i in range(9):
        follow(step, plain, [batch(i)])
        for scheduler in schedulers:
            scheduler.step()
    assert_alike(*ours, *plain)
    assert stand_in.captures == captures and ours[1].param_groups[0]["lr"] == plain[1].param_groups[0]["lr"] == 0.0625


@pytest.mark.parametrize("head", [None, lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES))])
@pytest.mark.parametrize("projection", ["rls", "window"])
def test_samples_that_lack_modalities(stand_in, projection, head):
    def model():
        torch.manual_seed(4)
        return make_model(head=None if head is None else head())

    (step, *ours), plain = graphed_and_plain(model=model, projection=projection)
    batches = [batch(i, missing=True) for i in range(7)]
    for inputs, *_, present in batches:
        for i, x in enumerate(inputs.values()):
            x[~present[:, i]] = torch.nan  # which nobody reads
    follow(step, plain, batches)
    assert stand_in.replays == 4
    inputs, target, present = batch(9, missing=True)
    present[:, 1] = False  # another kind of batch, of two modalities
    follow(step, plain, [(inputs, target, present), batch(10, missing=True)])
    follow(step, plain, [(inputs, target, torch.zeros_like(present))])
    assert_alike(*ours, *plain)
    assert stand_in.replays == 5


def test_batch_norm_would_see_rows_that_are_not_there(stand_in):
    def model():
        own = noisy_model()
        for encoder in own.encoders.values():
            encoder[2] = nn.Identity()
        return own

    (step, *ours), plain = graphed_and_plain(model=model)
    with pytest.warns(UserWarning, match="samples lack modalities, and BatchNorm in the encoder of 'audio'") as said:
        follow(step, plain, [batch(i, missing=True) for i in range(5)])
    assert len(said) == 1
    follow(step, plain, map(batch, range(5)))  # all are there
    assert_alike(*ours, *plain)
    assert stand_in.replays == 2


def test_kinds_of_batches(stand_in):
    """A smaller last one has a graph of its own; there are so many and no more."""
    (step, *ours), plain = graphed_and_plain()
    follow(step, plain, [batch(i, N) for i in range(5) for N in (7, 3)])
    assert (stand_in.captures, stand_in.replays) == (2, 4)
    with pytest.warns(UserWarning, match="more than 4 kinds .* drop_last=True") as said:
        follow(step, plain, [batch(i, N) for i in range(2) for N in (4, 5, 6, 8)])
    assert len(said) == 1
    follow(step, plain, [batch(0)])
    assert_alike(*ours, *plain)
    assert stand_in.replays == 5


def test_a_loaded_state_is_captured_anew(stand_in):
    (step, model, optimizer), plain = graphed_and_plain(projection="window")
    follow(step, plain, map(batch, range(3)))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    follow(step, plain, map(batch, range(3, 6)))
    for m, o in ((model, optimizer), plain):
        m.load_state_dict(saved[0])
        o.load_state_dict(copy.deepcopy(saved[1]))
    follow(step, plain, map(batch, range(3, 8)))
    assert_alike(model, optimizer, *plain)
    assert (stand_in.captures, stand_in.replays) == (2, 5)
    model.encoders["text"].requires_grad_(False)
    plain[0].encoders["text"].requires_grad_(False)
    follow(step, plain, map(batch, range(8, 13)))
    assert_alike(model, optimizer, *plain)


def test_a_bad_step_is_counted_and_takes_nothing_with_it(stand_in):
    (step, *ours), plain = graphed_and_plain(fused_sgd)
    batches = [batch(i) for i in range(7)]
    batches[5][0]["image"][2, 1] = torch.nan
    follow(step, plain, batches, equal_nan=True)
    assert_alike(*ours, *plain)
    assert ours[1].diagnostics()["skipped_nonfinite"] == 1


def with_batch_norm():
    model = make_model()
    for modality, encoder in model.encoders.items():
        model.encoders[modality] = nn.Sequential(*encoder, nn.BatchNorm1d(5))
    return model


def test_a_bad_batch_that_is_replayed_leaves_running_statistics(stand_in):
    (step, *ours), plain = graphed_and_plain(fused_sgd, with_batch_norm)
    batches = [batch(i) for i in range(7)]
    batches[5][0]["image"][2, 1] = torch.nan
    follow(step, plain, batches, equal_nan=True)
    assert stand_in.replays == 4 and all(t.isfinite().all() for t in ours[0].state_dict().values())
    assert_alike(*ours, *plain)


def test_what_cannot_be_captured_is_trained_on_eagerly_and_says_so_once(stand_in, monkeypatch):
    def told(match, change=lambda step: None, **settings):
        (step, *ours), plain = graphed_and_plain(**settings)
        undo = change(step)
        with pytest.warns(UserWarning, match=match) as said:
            follow(step, plain, map(batch, range(6)), rtol=1e-2, atol=1e-2)
        assert len(said) == 1 and said[0].filename == __file__, [str(w.message) for w in said]
        if undo is not None:
            undo()
        assert_alike(*ours, *plain)

    told("step hooks", lambda step: step.optimizer.register_step_post_hook(lambda *_: None).remove)
    monkeypatch.setattr(StandIn, "waiting", "encoder.py:7")
    told("waits for the device: encoder.py:7")
    monkeypatch.setattr(StandIn, "waiting", "")
    monkeypatch.setattr(StandIn, "fails", "operation not permitted when stream is capturing")
    told("cannot be captured: operation not permitted")
    monkeypatch.setattr(StandIn, "fails", None)
    told("Counting keeps 'steps' on the host", make=Counting)
    assert stand_in.replays == 0


def test_modalities_of_any_name(stand_in):
    def odd():
        torch.manual_seed(0)
        return mla.MultimodalModel({name: nn.Linear(4, 5) for name in ("type", "a.b")}, nn.Linear(5, CLASSES))

    (step, model, optimizer), plain = graphed_and_plain(model=odd)
    inputs = {name: torch.randn(7, 4, dtype=f64) for name in model.modalities}
    follow(step, plain, [(inputs, torch.arange(7) % CLASSES)] * 5)
    assert stand_in.captures == 1 and stand_in.replays == 2
    assert_alike(model, optimizer, *plain)


def test_what_is_refused(monkeypatch):
    model = make_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head)
    with pytest.raises(ValueError, match="^cuda_graph: expected False where the model is on cpu"):
        mla.Trainer(model, optimizer, cuda_graph=True)
    with pytest.raises(ValueError, match="^model: expected on a GPU"):
        mla.GraphedStep(model, optimizer)
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "Recorder", StandIn)
    adamw = mla.MLAOptimizer(torch.optim.AdamW(model.parameters()), model.head)
    with pytest.raises(ValueError, match=r"^optimizer: expected AdamW\(…, capturable=True\)"):
        mla.GraphedStep(model, adamw)


def test_the_trainer(stand_in, tmp_path, monkeypatch):
    """Also in the middle of an epoch, and with a smaller last batch."""
    loader = torch.utils.data.DataLoader(list(range(3)), batch_size=None, collate_fn=lambda i: batch(i, 7 if i < 2 else 4))
    trained = []
    for cuda_graph in (True, False):
        (_, model, optimizer), _ = graphed_and_plain()
        trainer = mla.Trainer(model, optimizer, progress=False, cuda_graph=cuda_graph)
        trainer.fit(loader, epochs=4)
        trainer.save(tmp_path / "c.pt")
        trainer.resume(tmp_path / "c.pt")
        trainer.fit(loader, epochs=5)
        trained.append((everything(model, optimizer), trainer.history))
    torch.testing.assert_close(*trained, rtol=1e-11, atol=1e-11)
    assert stand_in.replays == 5 + 1
    (_, model, optimizer), _ = graphed_and_plain()
    with pytest.warns(UserWarning, match="cuda_graph: steps are taken eagerly: clip_norm was given"):
        mla.Trainer(model, optimizer, progress=False, cuda_graph=True, clip_norm=1.0).fit(loader, epochs=1)
    assert stand_in.replays == 6
    monkeypatch.setattr(mla.MLAOptimizer, "process_group", object())  # its ranks are told of an error in a batch, eagerly
    assert obstacle_to_graphs(model, optimizer, {}) == graph.OVER_RANKS


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def gpu_batch(seed, N=7, missing=False):
    inputs, *rest = batch(seed, N, torch.float32, "cuda", missing)
    return inputs, *rest


@needs_cuda
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("make", [sgd, fused_sgd, capturable_adam, fused_adam])
@pytest.mark.parametrize("projection,target", [("rls", "gradient"), ("window", "update"), ("rls", "update")])
def test_on_a_gpu(projection, target, make, missing):
    """A learning rate and an α that change, and a last batch that is smaller."""
    settings = {"projection": projection, "target": target, "alpha": lambda t: 1 + t}
    (step, *ours), plain = graphed_and_plain(make, dtype=torch.float32, device="cuda", **settings)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 4, gamma=0.7) for o in (ours[1], plain[1])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        for epoch in range(10):
            follow(step, plain, [gpu_batch(3 * epoch + i, 7 if i < 2 else 4, missing) for i in range(3)], "cuda", **CLOSE)
            for scheduler in schedulers:
                scheduler.step()
    assert_alike(*ours, *plain, **CLOSE)
    assert sum(not isinstance(found, int) for found in step._kinds.values()) == 2


@needs_cuda
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("streams", [False, True])
def test_streams_and_autocast_on_a_gpu(streams, amp):
    (step, *ours), plain = graphed_and_plain(fused_sgd, dtype=torch.float32, device="cuda", amp=amp)
    ours[0].streams = streams
    for i in range(8):
        b = gpu_batch(i)
        step(b), mla.alternating_step(*plain, b, amp=amp)
    assert_alike(*ours, *plain, **(CLOSE if amp is None else {"rtol": 1e-2, "atol": 1e-2}))
    assert any(not isinstance(found, int) for found in step._kinds.values())


@needs_cuda
def test_dropout_differs_in_every_replay_on_a_gpu():
    (step, model, _), _ = graphed_and_plain(fused_sgd, noisy_model, torch.float32, "cuda")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.head.weight)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    losses = {step(gpu_batch(0))["audio"].item() for _ in range(9)}
    assert len(losses) > 5


class Waiting(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        self.how(x)
        return x


@needs_cuda
@pytest.mark.parametrize("how", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()])
def test_an_encoder_that_waits_on_a_gpu(how):
    """The one is noticed in the warm-up, the other when it is captured."""

    def model():
        own = make_model()
        own.encoders["image"].append(Waiting(how))
        return own

    (step, *ours), plain = graphed_and_plain(fused_sgd, model, torch.float32, "cuda")
    with pytest.warns(UserWarning, match="cuda_graph: steps are taken eagerly: (something in the step waits|the step cannot)"):
        follow(step, plain, map(gpu_batch, range(6)), "cuda", **CLOSE)
    assert_alike(*ours, *plain, **CLOSE)


@needs_cuda
def test_the_trainer_on_a_gpu(tmp_path):
    loader = torch.utils.data.DataLoader(
        list(range(9)), batch_size=None, collate_fn=lambda i: batch(i, dtype=torch.float32, missing=True), pin_memory=True
    )
    trained = []
    for cuda_graph in (True, False):
        (_, model, optimizer), _ = graphed_and_plain(fused_sgd, dtype=torch.float32, device="cuda")
        trainer = mla.Trainer(model, optimizer, progress=False, cuda_graph=cuda_graph)
        trainer.fit(loader, epochs=2)
        trainer.save(tmp_path / "c.pt")
        trainer.resume(tmp_path / "c.pt")
        trainer.fit(loader, epochs=3)
        trained.append(everything(model, optimizer))
    torch.testing.assert_close(*trained, **CLOSE)


def test_what_is_added_and_grown_is_captured_anew_and_seen(stand_in):
    """A replay that still had the old head or the old encoders would end elsewhere."""
    models = []
    for graphed in (True, False):
        model = make_model(f64)
        optimizer = mla.MLAOptimizer(sgd(model.parameters()), model.head, target="update", bias="project")
        stand_in.model, stand_in.optimizer = model, optimizer
        step = mla.GraphedStep(model, optimizer) if graphed else lambda b, m=model, o=optimizer: mla.alternating_step(m, o, b)
        inputs = {m: x.double() for m, x in make_inputs(6).items()}
        for _ in range(6):
            step((inputs, torch.arange(6) % CLASSES))
        torch.manual_seed(3)
        model.add_modality("touch", nn.Sequential(nn.Linear(2, 5), nn.Tanh()).double(), optimizer=optimizer, classes=1)
        touch = torch.randn(6, 2, dtype=f64, generator=torch.Generator().manual_seed(1))
        for turn in range(7):
            step(({"touch": touch}, torch.full((6,), 2 if turn < 6 else CLASSES)))  # a class that only a replay sees
        model.add_classes(1, optimizer=optimizer)
        for _ in range(6):
            step(({"touch": touch}, torch.arange(6) % 2))
        models.append((model, optimizer))
    assert stand_in.captures == 3 and stand_in.replays > 6
    torch.testing.assert_close(*(everything(*pair) for pair in models), rtol=1e-9, atol=1e-12)
    seen = [model.seen_by(model.modalities) for model, _ in models]
    assert torch.equal(*seen) and seen[0][-1].tolist() == [True, True, True, True, False]
