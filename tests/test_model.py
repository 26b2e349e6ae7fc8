"""``MultimodalModel``: its parts together are what they are one by one."""

import copy
import sys
import warnings

import pytest
import torch
from helpers import ALTERNATION, assert_bitwise, make_inputs, make_model, noisy_model
from torch import nn

import mla_fast as mla
from mla_fast import streams


def with_statistics():
    """A noisy model with running statistics that are not those of any batch below."""
    model = noisy_model()
    model(make_inputs(20, seed=0))
    return model


def test_forward_is_encoder_then_head():
    model, inputs = make_model(), make_inputs(modalities=("text", "audio"))
    inputs["text"] = inputs["text"][:2]
    logits = model(inputs)
    assert tuple(logits) == ("text", "audio")
    for modality, x in inputs.items():
        assert torch.equal(logits[modality], model.head(model.encoders[modality](x)))


@pytest.mark.parametrize("modalities", [ALTERNATION, ("text", "audio", "image"), ("text", "audio"), ("image",)])
@pytest.mark.parametrize("N", [0, 1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_predict_is_the_fusion_of_the_parts(modalities, N, masked):
    model, inputs = with_statistics(), make_inputs(N, modalities)
    present = torch.rand(N, 3, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    fused = model.predict(inputs, present)
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
    columns = [ALTERNATION.index(m) for m in modalities]
    expected = mla.entropy_fusion(list(logits.values()), None if present is None else present[:, columns])
    torch.testing.assert_close(tuple(fused), tuple(expected), rtol=1e-6, atol=1e-6)
    assert fused.weights.shape == (N, len(modalities)) and not fused.logits.requires_grad


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_absent_inputs_are_not_read(poison):
    model, inputs = with_statistics(), make_inputs()
    present = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)) > 0.4
    clean = model.predict({m: x.where(present[:, i, None], 0) for i, (m, x) in enumerate(inputs.items())}, present)
    dirty = model.predict({m: x.where(present[:, i, None], poison) for i, (m, x) in enumerate(inputs.items())}, present)
    assert_bitwise(tuple(dirty), tuple(clean))


def test_a_prediction_does_not_see_its_batch():
    model, inputs = with_statistics(), make_inputs()
    whole, alone = model.predict(inputs), model.predict({m: x[2:3] for m, x in inputs.items()})
    torch.testing.assert_close(whole.logits[2:3], alone.logits)


@pytest.mark.parametrize("failing", [False, True])
def test_predict_leaves_every_mode_and_statistic_as_it_was(failing):
    """A part that was put into evaluation mode on purpose, say a pretrained encoder, stays there."""
    model, inputs = with_statistics(), make_inputs()
    model.train()
    model.encoders["image"].eval()
    modes, before = [m.training for m in model.modules()], {k: t.clone() for k, t in model.state_dict().items()}
    if failing:
        with pytest.raises(RuntimeError):
            model.predict(inputs | {"text": torch.ones(6, 99)})
    else:
        model.predict(inputs)
    assert [m.training for m in model.modules()] == modes
    assert_bitwise(dict(model.state_dict()), before)


def test_modalities_keep_their_order():
    assert make_model().modalities == ALTERNATION


def refused(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()


@pytest.mark.parametrize("side_by_side", [False, True])
def test_an_unknown_modality_is_refused(side_by_side):
    model = make_model()
    model.streams = side_by_side
    for call in (model.forward, model.predict):
        refused("modality", lambda call=call: call({"video": torch.ones(2, 4)}))


def test_samples_of_unlike_number_are_refused():
    inputs = make_inputs()
    refused("inputs", lambda: make_model().predict(inputs | {"text": inputs["text"][:3]}))
    refused("inputs", lambda: make_model().predict({}))


@pytest.mark.parametrize(
    "present", [torch.ones(6, 3), torch.ones(5, 3, dtype=torch.bool), torch.ones(6, 2, dtype=torch.bool)], ids=["float", "N", "M"]
)
@pytest.mark.parametrize("modalities", [ALTERNATION, ("text", "audio")])
def test_a_mask_that_does_not_fit_is_refused(present, modalities):
    refused("present", lambda: make_model().predict(make_inputs(modalities=modalities), present))


def test_a_model_without_modalities_is_refused():
    refused("encoders", lambda: mla.MultimodalModel({}, nn.Linear(2, 2)))


@pytest.mark.parametrize("encoder", [nn.Unflatten(1, (2, 2)), nn.Flatten(0)], ids=["three dimensions", "one"])
def test_features_that_are_no_rows_are_refused(encoder):
    model = mla.MultimodalModel({"audio": encoder}, nn.Linear(4, 2))
    refused("features", lambda: model({"audio": torch.ones(3, 4)}))


@pytest.mark.parametrize("what", [lambda x: (x, x), lambda x: x.long()], ids=["tuple", "integers"])
def test_features_that_are_no_floating_tensor_are_refused(what):
    class Encoder(nn.Module):
        def forward(self, x):
            return what(x)

    with pytest.raises(
        TypeError, match="^features: expected a floating tensor from the encoder of 'audio', got (tuple|torch.int64)"
    ):
        mla.MultimodalModel({"audio": Encoder()}, nn.Linear(4, 2)).predict({"audio": torch.ones(3, 4)})


class Returns(nn.Module):
    """A head that returns something else than logits."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(5, 3), what

    def forward(self, h):
        return self.what(self.layer(h))


@pytest.mark.parametrize(
    ("what", "error", "got"),
    [
        (lambda z: {"logits": z}, TypeError, "dict with logits"),
        (lambda z: z[..., None], ValueError, r"\[6, 3, 1\]"),
        (lambda z: z[:, 0], ValueError, r"\[6\]"),
        (lambda z: z[1:], ValueError, r"\[5, 3\]"),
        (lambda z: z.argmax(1), TypeError, r"torch.int64 \[6\]"),
    ],
)
def test_what_is_no_logits_is_refused(what, error, got):
    model = make_model(head=Returns(what))
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters()), model.head)
    inputs = make_inputs(modalities=["audio"])
    for call in (
        lambda: model(inputs),
        lambda: model.predict(inputs),
        lambda: mla.alternating_step(model, optimizer, (inputs, torch.zeros(6, dtype=torch.int64))),
        lambda: mla.Trainer(model, optimizer).evaluate([(inputs, torch.zeros(6, dtype=torch.int64))]),
    ):
        with pytest.raises(error, match=rf"^head: expected (floating )?logits \[6, C\] from Returns, got {got}"):
            call()


class Doubled(mla.MultimodalModel):
    def forward(self, inputs):
        return {modality: 2 * z for modality, z in super().forward(inputs).items()}


class Tempered(mla.MultimodalModel):
    def logits(self, modality, features):
        return 2 * super().logits(modality, features)


def test_a_forward_that_predict_does_not_call_is_said_once():
    model = make_model()
    model.__class__ = Doubled
    trainer = mla.Trainer(model, mla.MLAOptimizer(torch.optim.SGD(model.parameters()), model.head), progress=False)
    for call in (
        lambda: model.predict(make_inputs()),
        lambda: trainer.evaluate([(make_inputs(), torch.zeros(6, dtype=torch.int64))]),
    ):
        model._said_forward = False
        with pytest.warns(
            UserWarning, match="^Doubled.forward: predict and evaluate do not call it; override features or logits"
        ):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()


@pytest.mark.parametrize("masked", [False, True])
def test_predict_calls_logits_where_a_subclass_has_its_own(masked):
    model, inputs = make_model(), make_inputs()
    model.__class__ = Tempered
    present = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    expected = mla.entropy_fusion(list(model.eval()(inputs).values()), present)
    torch.testing.assert_close(tuple(model.predict(inputs, present)), tuple(expected), rtol=1e-6, atol=1e-6)


def test_side_by_side_every_stream_waits_for_what_was_before_and_is_waited_for(monkeypatch):
    """On streams that only take notes: (stream, what it does)."""
    notes, current = [], []

    class Stream:
        def __init__(self, device):
            self.number = len(current)
            current.append(self)

        def record_event(self):
            notes.append((self.number, "record"))
            return "event"

        def wait_event(self, event):
            notes.append((self.number, event))

        def wait_stream(self, other):
            notes.append((self.number, f"wait for {other.number}"))

        def __enter__(self):
            running.append(self)

        def __exit__(self, *_):
            running.pop()

    class Result:
        def record_stream(self, stream):
            notes.append((stream.number, "uses a result"))

    def work(fails=False):
        notes.append((running[-1].number, "work"))
        if fails:
            raise RuntimeError
        return Result()

    running = [Stream(None)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: running[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(streams, "_stream", lambda current, number: Stream(current))
    done = streams.run_on_streams({"a": work, "b": work, "c": work}, torch.device("cuda"))
    assert list(done) == ["a", "b", "c"] and running == current[:1]
    other = [(1, "event"), (1, "work"), (0, "wait for 1"), (0, "uses a result")]
    third = [(2, "event"), (2, "work"), (0, "wait for 2"), (0, "uses a result")]
    assert notes == [(0, "record"), (0, "work"), *other, *third]
    with pytest.raises(RuntimeError):
        streams.run_on_streams({"a": work, "b": lambda: work(fails=True)}, torch.device("cuda"))
    assert notes[-1] == (0, "wait for 3") and running == current[:1]


@pytest.mark.parametrize("shared", [False, True])
def test_encoders_that_share_parameters_take_turns(shared, monkeypatch):
    calls, one = [], nn.Linear(4, 3)
    monkeypatch.setattr(
        "mla_fast.model.run_on_streams", lambda jobs, device: calls.append(device) or {m: job() for m, job in jobs.items()}
    )
    other = one if shared else nn.Linear(4, 3)
    mla.MultimodalModel({"a": one, "b": other}, nn.Linear(3, 2), streams=True).predict(dict.fromkeys("ab", torch.rand(5, 4)))
    assert len(calls) == (not shared)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("masked", [False, True])
def test_predict_on_streams_is_predict(masked):
    model, inputs = with_statistics(), make_inputs()
    present = torch.rand(6, 3) > 0.4 if masked else None
    expected = model.predict(inputs, present)
    for encoder in model.encoders.values():
        encoder.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**6))
    model.streams = True
    for _ in range(3):
        torch.testing.assert_close(tuple(model.predict(inputs, present)), tuple(expected), rtol=1e-6, atol=1e-6)


def test_inputs_that_are_none_are_refused():
    model, x = make_model(), torch.ones(2, 4)
    for call in (
        lambda: model(x),
        lambda: model.predict(x),
        lambda: model.predict([x]),
        lambda: model({"audio": None}),
        lambda: model.predict({"audio": torch.tensor(1.0)}),
    ):
        with pytest.raises(TypeError, match="^inputs"):
            call()
    refused("present", lambda: model.predict({"audio": x}, [[True, True, True]] * 2))
    refused("present", lambda: model.predict({"audio": x}, {"audio": torch.ones(2, dtype=torch.bool)}))


def test_an_encoder_that_is_replaced_is_looked_at_anew():
    model = make_model()
    assert not model.shared_parameters
    model.encoders["image"] = model.encoders["audio"]
    assert model.shared_parameters and copy.deepcopy(model).shared_parameters
    model.encoders["image"] = nn.Linear(6, 5)
    assert not model.shared_parameters


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_an_encoders_own_error_says_whose_it_is():
    model, batch = make_model(), make_inputs() | {"image": torch.ones(6, 7)}
    optimizer, target = mla.MLAOptimizer(torch.optim.SGD(model.parameters()), model.head), torch.zeros(6, dtype=torch.int64)
    for call in (
        lambda: model(batch),
        lambda: model.predict(batch),
        lambda: mla.alternating_step(model, optimizer, (batch, target)),
    ):
        with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
            call()
        assert raised.value.__notes__ == ["in the encoder of 'image', which was given torch.float32 [6, 7]"]
