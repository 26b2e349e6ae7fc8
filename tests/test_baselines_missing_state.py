"""What methods for missing modalities learn is in their state: a model that loads it predicts, and trains on, alike."""

import copy
import io

import pytest
import torch
from test_baselines_missing import BATCHED, FITTED, TEACHERS, C, batch, fit, make

from mla_fast.baselines import Setup, fit_joint
from mla_fast.baselines.missing import MISSING_METHODS

TAUGHT = ["MMIN", "IF-MMIN", "TATE"]
OPTIONS = {  # of the constructor, none its default
    **{"CCA": {"k": 2}, "DCCA": {"k": 3}, "DCCAE": {"k": 3}, "CPM-Net": {"weight": 0.5, "test_rounds": 7}},
    **{"AE": {"weight": 0.3}, "CRA": {"weight": 0.3}, "TATE": {"weight": 0.3}},
    **{"MMIN": {"imagination": 2.0, "cycle": 1.0}, "IF-MMIN": {"invariance": 2.0}},
}


def trained(name, given):
    """A model that was trained a little with other settings than the default ones."""
    model = make(name, **OPTIONS.get(name, {}))
    torch.manual_seed(3)
    if name in FITTED:
        model.fit(*given[:3], epochs=20, lr_factor=3.0, weight_decay=1e-3)
        return model
    if name not in TEACHERS:
        model.prepare(Setup([given], [given], lambda m, epochs: fit(m, [given], epochs), 2))
    optimizer, scheduler = model.optimizer(2, 3.0, 1e-3)
    fit_joint(model, optimizer, [given], 2, scheduler=scheduler)
    return model.eval()


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", [*MISSING_METHODS, *TEACHERS])
def test_a_model_that_is_loaded_predicts_alike(name):
    given = batch(samples=63)
    model, other = trained(name, given), make(name, **OPTIONS.get(name, {}))
    before = torch.get_rng_state()
    other.load_state_dict(saved(model))
    assert torch.equal(torch.get_rng_state(), before)
    if name in BATCHED or name in TEACHERS:
        other.eval()
    inputs, _, present, *_ = given
    for x, here in ((inputs, present), ({"image": torch.randn(5, 7, dtype=torch.float64)}, None)):
        with torch.no_grad():
            assert torch.equal(other(x, here), model(x, here))


@pytest.mark.parametrize("name", [*BATCHED, *TEACHERS])
def test_a_model_that_is_loaded_trains_on_alike(name):
    given = batch(samples=63)
    model, other = trained(name, given).train(), make(name, **OPTIONS.get(name, {}))
    other.load_state_dict(saved(model))
    results = []
    for each in (model, other):
        optimizer, scheduler = each.optimizer(3)
        results.append([torch.tensor(fit_joint(each, optimizer, [given], 3, scheduler=scheduler)), *each.state_dict().values()])
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


@pytest.mark.parametrize("name", TAUGHT)
def test_a_state_keeps_the_teacher_and_none_is_needed(name):
    given = batch(samples=63)
    model, whole = trained(name, given), copy.deepcopy(trained(name, given))
    state = saved(model)
    teacher = model.teacher.model.state_dict()
    assert {key for key in state if key.startswith("teacher.")} == {f"teacher.{key}" for key in teacher}
    nested = torch.nn.ModuleList([make(name)])
    nested.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert all(torch.equal(value, teacher[key]) for key, value in nested[0].teacher.model.state_dict().items())
    assert not any(p.requires_grad for p in nested[0].teacher.model.parameters()) and not nested[0].teacher.model.training
    assert not any("teacher" in key for key, _ in nested.named_parameters())
    bare, kept = {key: value for key, value in state.items() if "teacher" not in key}, whole.teacher
    whole.load_state_dict(bare)  # as of a model of old, or of one that was not prepared
    assert whole.teacher is kept
    other = make(name)
    other.load_state_dict(bare)
    with pytest.raises(ValueError, match="teacher: .* expects prepare"):
        other.loss(*given)


def test_cpm_net_keeps_the_rate_of_its_predictions():
    given = batch(samples=63)
    model, other = trained("CPM-Net", given), trained("CPM-Net", given)
    state = saved(model)
    old = {key: value for key, value in state.items() if "extra" not in key}
    assert len(old) == len(state) - 1 and all(isinstance(value, torch.Tensor) for value in state.values())
    for given_state, lr in ((state, 1e-3 * 3.0), (old, 1e-3)):
        other.load_state_dict(given_state)
        assert other.lr == lr
    other.load_state_dict({}, strict=False)
    assert other.lr == 1e-3


@pytest.mark.parametrize("name", FITTED)
def test_what_is_not_fitted_neither_predicts_nor_trains(name):
    masked, target, present, *_ = batch(samples=63)
    model, other = make(name), make(name)
    other.load_state_dict(saved(model))
    for each in (model, other):
        with pytest.raises(ValueError, match=r"^(classifier: \w+ expects fit|latents: CPM-Net expects begin)"):
            each(masked, present)
        with pytest.raises(ValueError, match=r"^training set: \w+ expects begin\(…\) before train_epoch\(…\), got none"):
            each.train_epoch(0)
    model.fit(masked, target, present, epochs=1)
    other.load_state_dict(saved(model))
    with pytest.raises(ValueError, match="^training set: "):
        other.train_epoch(0)
    assert other(masked, present).shape == (63, C)
