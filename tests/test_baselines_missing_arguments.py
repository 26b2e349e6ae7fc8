"""Arguments that methods for missing modalities cannot use are refused by name, whichever the method."""

import contextlib
import math
import re

import numpy as np
import pytest
import torch
from test_baselines_missing import BATCHED, FITTED, TEACHERS, C, batch, make, prepared
from written_missing import WIDTHS

from mla_fast.baselines.missing import MISSING_METHODS, cpm_net

EVERY = [*BATCHED, *TEACHERS]
MAKES = MISSING_METHODS | TEACHERS
WEIGHTS = [
    *[("AE", "weight"), ("CRA", "weight"), ("MMIN", "imagination"), ("MMIN", "cycle"), ("IF-MMIN", "invariance")],
    *[("CPM-Net", "weight"), ("TATE", "weight")],
]


@contextlib.contextmanager
def refused(message, kind=ValueError):
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        yield


@pytest.mark.parametrize("name", EVERY)
class TestFull:
    def test_other_shapes(self, name):
        *given, full = batch(samples=12)
        model = prepared(name, (*given, full))
        for shape in ((1, 3), (7, 3), (13, 3), (12, 4), (12, 1), (12, 3, 2), (12,), (3,), ()):
            expected = "full['audio']: expected torch.float64 [12, 3] like inputs['audio']"
            with refused(f"{expected}, got torch.float64 {list(shape)}"):
                model.loss(*given, full | {"audio": torch.zeros(shape, dtype=torch.float64)})
        with refused("full['audio']: expected torch.float64 [12, 3] like inputs['audio'], got torch.float64 [1, 3]"):
            model.loss(*given, {m: x[:1] for m, x in full.items()})

    def test_other_dtypes(self, name):
        *given, full = batch(samples=12)
        model = prepared(name, (*given, full))
        for dtype in (torch.float32, torch.float16, torch.int64, torch.bool):
            with refused(f"full['text']: expected torch.float64 [12, 5] like inputs['text'], got {dtype} [12, 5]"):
                model.loss(*given, full | {"text": torch.zeros(12, 5, dtype=dtype)})
        with refused("full['text']: expected torch.float64 [12, 5] like inputs['text'], got ndarray"):
            model.loss(*given, full | {"text": np.zeros((12, 5))})
        inputs, *rest = given
        model, single = model.float(), {m: x.float() for m, x in inputs.items()}
        with refused("full['audio']: expected torch.float32 [12, 3] like inputs['audio'], got torch.float64 [12, 3]"):
            model.loss(single, *rest, full)

    def test_other_modalities(self, name):
        *given, full = batch(samples=12)
        model = prepared(name, (*given, full))
        with refused("full: expected the modalities audio, image, text, got audio, image, text, smell"):
            model.loss(*given, full | {"smell": full["audio"]})
        with refused("full: expected a dict {modality: tensor}, got torch.float64 [12, 3]", TypeError):
            model.loss(*given, full["audio"])
        inputs, *rest = given
        others = {m: x for m, x in inputs.items() if m != "audio"}
        assert model.loss(others, *rest, full).isfinite()
        with refused("full['audio']: expected torch.float64 [12, 3] like the inputs, got torch.float64 [1, 3]"):
            model.loss(others, *rest, full | {"audio": full["audio"][:1]})

    def test_samples_of_more_dimensions(self, name):
        inputs, target, present, index, full = batch(samples=12)
        model = prepared(name, (inputs, target, present, index, full)).eval()
        expected = model.loss(inputs, target, present, index, full)
        deep = [{m: x[:, :, None] for m, x in values.items()} for values in (inputs, full)]
        assert torch.equal(model.loss(deep[0], target, present, index, deep[1]), expected)
        assert torch.equal(model.loss(deep[0], target, present, index, full), expected)


@pytest.mark.parametrize("name", EVERY)
def test_a_target_that_is_no_classes(name):
    inputs, target, present, index, full = batch(samples=12)
    model = prepared(name, (inputs, target, present, index, full))
    minus = target.index_fill(0, torch.tensor([5]), -100)
    for bad, got in (
        *[(target + 1, "4"), (target - 1, "-1"), (minus, "-100"), (target.float(), "torch.float32 [12]")],
        *[(target.int(), "torch.int32 [12]"), (target.bool(), "torch.bool [12]"), (target[:, None], "torch.int64 [12, 1]")],
        *[(target[:7], "torch.int64 [7]"), (target[0], "torch.int64 []"), (target.tolist(), "list"), (None, "NoneType")],
    ):
        with refused(f"target: expected whole numbers, int64 [12], of 4 classes from 0, got {got}"):
            model.loss(inputs, bad, present, index, full)


@pytest.mark.parametrize("name", FITTED)
def test_a_training_set_s_target_that_is_no_classes(name):
    masked, target, present, *_ = batch(samples=40)
    for bad, got in (
        *[(target[:, None], "torch.int64 [40, 1]"), (target.bool(), "torch.bool [40]"), (target.tolist(), "list")],
        *[
            (target.numpy(), "ndarray"),
            (target.to(torch.complex64), "torch.complex64 [40]"),
            (target - 1, "classes [-1, 0, 1, 2]"),
        ],
    ):
        with refused(f"target: expected whole numbers [40] of two or more of 4 classes from 0, got {got}"):
            make(name).fit(masked, bad, present)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("name", FITTED)
def test_labels_of_any_whole_numbers_are_those_of_int64(name, dtype):
    masked, target, present, *_ = batch(samples=40)
    found = []
    for y in (target, target.to(dtype)):
        model = make(name)
        torch.manual_seed(3)
        model.fit(masked, y, present, epochs=2)
        found.append(model(masked, present))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_inputs_in_another_dtype_than_the_model(name, dtype):
    inputs, target, present, index, full = batch(samples=12)
    model = prepared(name, (inputs, target, present, index, full)).float()
    other, true = ({m: x.to(dtype) for m, x in values.items()} for values in (inputs, full))
    with refused(f"inputs['audio']: expected torch.float32 like the model, got {dtype} [12, 3]"):
        model(other, present)
    with refused(f"inputs['audio']: expected torch.float32 like the model, got {dtype} [12, 3]"):
        model.loss(other, target, present, index, true)
    one = {m: x.to(dtype if m == "text" else torch.float32) for m, x in inputs.items()}
    with refused(f"inputs['text']: expected torch.float32 like the model, got {dtype} [12, 5]"):
        model(one, present)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_takes_inputs_that_it_casts(name):
    inputs, target, present, index, full = batch(samples=12)
    model = prepared(name, (inputs, target, present, index, full)).float()
    half, true = ({m: x.bfloat16() for m, x in values.items()} for values in (inputs, full))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(half, present).isfinite().all() and model.loss(half, target, present, index, true).isfinite()
        with refused("inputs['audio']: expected torch.float32 like the model, got torch.float64 [12, 3]"):
            model(inputs, present)


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_takes_any_floating_point_numbers(name):
    masked, target, present, *_ = batch(samples=40)
    single = {m: x.float() for m, x in masked.items()}
    found = []
    for inputs in (single, {m: x.double() for m, x in single.items()}):
        model = make(name).float()
        torch.manual_seed(3)
        model.fit(inputs, target, present, epochs=2)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        found.append(model(inputs, present))
    assert torch.equal(*found) and found[0].dtype == torch.float32
    half = {m: x.half() for m, x in masked.items()}
    make(name).float().fit(half, target, present, epochs=1)
    with refused("inputs['audio']: expected finite numbers in what is not missing, row 0 has others"):
        model({"audio": torch.full((1, 3), 1e300, dtype=torch.float64)})


@pytest.mark.parametrize("name", MISSING_METHODS)
def test_inputs_that_are_no_tensors(name):
    model = make(name)
    with refused("inputs: expected a dict {modality: tensor}, got torch.float64 [1, 3]", TypeError):
        model(torch.zeros(1, 3, dtype=torch.float64))
    for x, got in ((np.zeros((1, 3)), "ndarray"), (None, "NoneType"), (torch.tensor(1.0), "torch.float32 []")):
        with refused(f"inputs['audio']: expected a tensor [N, …], got {got}", TypeError):
            model({"audio": x})
    with refused("present: expected bool [1, 3], got ndarray", TypeError):
        model({"audio": torch.zeros(1, 3, dtype=torch.float64)}, np.ones((1, 3), bool))


@pytest.mark.parametrize("name", [*FITTED, *EVERY])
@pytest.mark.parametrize(
    ("option", "value", "kind", "expected"),
    [
        *[("epochs", value, ValueError, "a whole number of at least 1") for value in (0, -3)],
        *[("epochs", value, TypeError, "a whole number of at least 1") for value in (2.0, 1.5, True, "2", None)],
        *[("lr_factor", value, ValueError, "a finite number of at least 0") for value in (-1.0, math.nan, math.inf)],
        *[("weight_decay", value, ValueError, "a finite number of at least 0") for value in (-1e-3, math.nan, math.inf)],
        *[("weight_decay", value, TypeError, "a finite number of at least 0") for value in (None, "0")],
    ],
)
def test_options_of_training(name, option, value, kind, expected):
    masked, target, present, *_ = batch(samples=40)
    model = make(name)
    with refused(f"{option}: expected {expected}, got {value!r}", kind):
        if name in FITTED:
            model.fit(masked, target, present, **{option: value})
        else:
            model.optimizer(**({"epochs": 2} | {option: value}))
    assert name != "CPM-Net" or model.lr == cpm_net.LR


@pytest.mark.parametrize("name", MAKES)
class TestConstructors:
    def test_classes(self, name):
        least = 2 if name in FITTED else 1  # one class is what joint models take, and no fit does
        for classes, kind in ((least - 1, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError), (None, TypeError)):
            with refused(f"classes: expected a whole number of at least {least}, got {classes!r}", kind):
                MAKES[name](WIDTHS, classes)
        if least == 1:
            assert MAKES[name](WIDTHS, 1)({"audio": torch.zeros(2, 3)}).shape == (2, 1)

    def test_widths(self, name):
        for d in (3.0, 2.5, "3", True, None):
            with refused(f"widths['image']: expected a whole number of at least 1, got {d!r}", TypeError):
                MAKES[name]({"audio": 3, "image": d}, C)
        for key in ("", 1):
            with refused(f"widths: expected names of modalities that are strings and not empty, got {key!r}"):
                MAKES[name]({"audio": 3, key: 2}, C)
        with refused("widths: expected a dict {modality: the numbers of a sample}, got (int, int)", TypeError):
            MAKES[name]([3, 7], C)
        MAKES[name]({"audio": np.int64(3), "image": 2}, np.int64(C))


@pytest.mark.parametrize("name", EVERY)
def test_dropout(name):
    for p, kind in ((-0.1, ValueError), (1.5, ValueError), (math.nan, ValueError), ("0", TypeError), (None, TypeError)):
        with refused(f"dropout: expected a number from 0 to 1, got {p!r}", kind):
            MAKES[name](WIDTHS, C, dropout=p)


@pytest.mark.parametrize(("name", "option"), WEIGHTS)
def test_weights(name, option):
    for value in (-1.0, -1e-9, math.nan, math.inf, -math.inf):
        with refused(f"{option}: expected a finite number of at least 0, got {value!r}"):
            MAKES[name](WIDTHS, C, **{option: value})
    for value in ("1", None, True, [1.0]):
        with refused(f"{option}: expected a finite number of at least 0, got {value!r}", TypeError):
            MAKES[name](WIDTHS, C, **{option: value})
    for value in (0, 0.0, 2, np.float32(0.5)):
        assert getattr(MAKES[name](WIDTHS, C, **{option: value}), option) == value


@pytest.mark.parametrize(("name", "option"), [("CCA", "k"), ("DCCA", "k"), ("DCCAE", "k"), ("CPM-Net", "test_rounds")])
def test_whole_numbers(name, option):
    for value, kind in (
        (0, ValueError),
        (-2, ValueError),
        (2.5, TypeError),
        (3.0, TypeError),
        (True, TypeError),
        (math.nan, TypeError),
    ):
        with refused(f"{option}: expected a whole number of at least 1, got {value!r}", kind):
            MAKES[name](WIDTHS, C, **{option: value})


@pytest.mark.parametrize("name", EVERY)
def test_values_of_a_target_are_looked_at_on_the_cpu_alone(name):
    """Stands in for a device: what asks for the target's values there would wait for it."""
    inputs, target, present, index, full = batch(samples=12)
    model = prepared(name, (inputs, target, present, index, full))
    expected = model.loss(inputs, target, present, index, full).item()

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

        def aminmax(self, *_, **__):
            raise AssertionError("waited")

    assert model.loss(inputs, target.as_subclass(Elsewhere), present, index, full).item() == expected
