"""What the comparison measures and says, against NumPy and by hand."""

import csv
import html.parser
import math
import re

import numpy as np
import pytest
import torch

from mla_fast import data
from mla_fast.compare import report
from mla_fast.compare.findings import cheapest, findings, ties
from mla_fast.compare.measures import all_scores, measure, predict, scores
from mla_fast.compare.statistics import by_method, difference, estimate, leader


def expected_scores(logits, y):
    z = logits.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    predicted, confidence, C = p.argmax(1), p.max(1), p.shape[1]
    f1, support = [], []
    for c in sorted(set(predicted) | set(y)):
        hit = ((predicted == c) & (y == c)).sum()
        f1.append(2 * hit / ((predicted == c).sum() + (y == c).sum()))
        support.append((y == c).sum())
    ece = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - (predicted == y)[inside].mean())
    return {
        "accuracy": (predicted == y).mean(),
        "nll": -np.log(p[range(len(y)), y]).mean(),
        "macro_f1": np.mean(f1),
        "weighted_f1": np.average(f1, weights=support),
        "ece": ece,
        "confusion": [[int(((y == i) & (predicted == j)).sum()) for j in range(C)] for i in range(C)],
    }


@pytest.mark.parametrize("N", [1, 63, 513])
def test_scores_are_those_of_numpy(N):
    generator = torch.Generator().manual_seed(N)
    logits, y = 2 * torch.randn(N, 4, generator=generator), torch.randint(4, (N,), generator=generator)
    found, expected = all_scores(logits, y), expected_scores(logits, y.numpy())
    assert found.pop("confusion") == expected.pop("confusion")
    assert found == pytest.approx(expected, abs=1e-6)


def test_scores_worked_out():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(9)], [math.log(3), 0.0]])
    found = all_scores(logits, torch.tensor([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["confusion"] == [[1, 0], [1, 1]]
    assert found["nll"] == pytest.approx((math.log(4 / 3) + math.log(10 / 9) + math.log(4)) / 3)
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx((2 * abs(0.75 - 0.5) + abs(0.9 - 1)) / 3, abs=1e-6)  # two samples at .75, one at .9


def test_logits_that_are_not_finite_know_nothing():
    found = scores(torch.tensor([[math.nan, 1.0], [math.inf, 0.0]]), torch.tensor([1, 1]))
    assert found == {"accuracy": 0.0, "nll": pytest.approx(math.log(2))}


class Reads:
    """A learner that knows the class from modality "a" and guesses class 0 without it; "b" counts for nothing."""

    model = torch.nn.Linear(1, 1)

    def logits(self, inputs, present):
        N = len(next(iter(inputs.values())))
        z = 10 * inputs["a"] if "a" in inputs else torch.zeros(N, 3)
        return z if present is None else z * present[:, :1]


def make_test_set(present=None):
    y = torch.arange(90) % 3
    one_hot = torch.nn.functional.one_hot(y, 3).float()
    return data.MultimodalDataset({"a": one_hot, "b": one_hot.clone()}, y, present=present)


def test_alone_use_and_missing_of_one_that_reads_a_single_modality():
    found = measure(Reads(), make_test_set(), [0.0, 0.6], 3)
    assert found["accuracy"] == 1 and found["alone"] == {"a": 1, "b": pytest.approx(1 / 3)}
    assert found["use"]["b"] == 0 and found["use"]["a"] == pytest.approx(2 / 3, abs=0.1)
    gone = ~data.missing_mask(90, 2, 0.6, 3)[:, 0]
    wrong = (gone & (make_test_set().target != 0)).double().mean().item()
    assert found["missing"] == {"0": 1, "0.6": pytest.approx(1 - wrong)}


def test_what_the_data_lack_stays_away():
    present = torch.ones(90, 2, dtype=torch.bool)
    present[::2, 0], present[1::2, 1] = False, False
    test = make_test_set(present)
    found = measure(Reads(), test, [0.5], 0)
    assert found["alone"]["a"] == 1 and found["missing"]["0.5"] == found["accuracy"]  # nothing more can go
    assert len(predict(Reads(), test)) == 90


def test_estimates_and_differences_by_hand():
    assert estimate([0.5]) == (0.5, None) and estimate([0.5, 0.5]) == (0.5, (0.5, 0.5))
    sample = [0.1, 0.2, 0.4, 0.3, 0.8]
    draws = np.random.default_rng(1).choice(sample, (20000, 5)).mean(1)
    assert estimate(sample).interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)
    gap = difference({0: 0.9, 1: 0.8, 2: 0.7, 9: 0.1}, {0: 0.8, 1: 0.8, 2: 0.9, 4: 0.0})
    assert gap.estimate.mean == pytest.approx(-1 / 30) and gap[1:] == (1, 1, 1)
    assert difference({0: 1.0}, {1: 1.0}) is None


def make_runs(method, accuracies, seconds=1.0, validation=None, alone=(0.9, 0.8), use=(0.4, 0.4)):
    return [
        {
            **{"method": method, "seed": seed, "trial": 0, "epoch": 1, "options": {"lr_factor": 1.0}},
            "validation": {"accuracy": validation or accuracy, "nll": 1.0},
            "test": {
                **{"accuracy": accuracy, "nll": 0.5, "macro_f1": accuracy, "ece": 0.1, "confusion": [[3, 1], [0, 4]]},
                **{
                    "alone": dict(zip("ab", alone, strict=True)),
                    "use": dict(zip("ab", use, strict=True)),
                    "missing": {"0.3": 0.5},
                },
            },
            "cost": {"seconds": seconds, "seconds_before": 0.1, "passes": 20, "passes_before": 0.0, "peak_mb": None},
            "samples": {"train": 9, "validation": 3, "test": 4},
        }
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_best_is_chosen_on_validation_and_ties_are_named():
    groups = by_method([*make_runs("Sum", [0.9, 0.91, 0.92]), *make_runs("QMF", [0.99, 0.99, 0.99], 2.0, validation=0.5)])
    assert leader(groups) == "Sum" and ties(groups, "Sum") == ["QMF"] and cheapest(groups, ["QMF", "Sum"]) == "Sum"
    said = findings(groups)
    assert said[0].startswith("Sum is best on the validation part and reaches 91.0 [9")
    assert said[1] == "All tie: no interval of its paired differences lies above zero. So take the cheapest, Sum, 1.0 s a run."
    groups = by_method([*make_runs("Sum", [0.9, 0.91, 0.92]), *make_runs("QMF", [0.8, 0.81, 0.82])])
    assert findings(groups)[1].endswith("Take Sum.") and ties(groups, "Sum") == []


@pytest.mark.parametrize(
    ("together", "expected"), [(0.9, "Modalities act on each other: FiLM"), (0.63, "No sign that modalities act")]
)
def test_interaction_is_said_where_training_together_wins(together, expected):
    groups = by_method([*make_runs("FiLM", [together, together + 0.01]), *make_runs("UME", [0.6, 0.61])])
    assert findings(groups)[-1].startswith(expected)


def test_drowning_is_said_of_a_modality_that_is_neither_learned_nor_used():
    apart = make_runs("UME", [0.9, 0.91])
    drowned = [*make_runs("Concat", [0.9, 0.9], alone=(0.9, 0.3), use=(0.8, 0.1)), *apart]
    assert [text[:30] for text in findings(by_method(drowned)) if "drown" in text] == ["b drowns in training together:"]
    used = [*make_runs("Concat", [0.9, 0.9], alone=(0.9, 0.3), use=(0.8, 0.4)), *apart]
    assert findings(by_method(used))[-1] == "No modality drowns inside Concat, compared with UME."


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sections, self.pictures, self.rows, self.outside, self.at = [], {}, 0, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "section":
            self.at = attributes["id"]
            self.sections.append(self.at)
        if tag == "svg":
            self.pictures[self.at] = self.pictures.get(self.at, 0) + 1
        self.rows += tag == "tr" and self.at == "ranking"
        self.outside += [
            v for name, v in attributes.items() if name in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))
        ]
        self.outside += [tag] if tag in ("script", "link", "img", "iframe") else []


def test_the_page_and_the_csv_have_their_parts(tmp_path):
    found = [*make_runs("Concat", [0.9, 0.92]), *make_runs("MLA <b>", [0.95, 0.93]), *make_runs("UME", [0.9, 0.9])]
    settings = {"data": "x", "group": "speaker", "missing": [0.3], "trials": 2}
    said = report.write(found, settings, tmp_path)
    assert said.splitlines()[2].split("|")[1].strip() == "MLA <b>"  # the best on the test part comes first
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.sections == ["findings", "ranking", "alone", "use", "missing", "cost", "confusion", "protocol"]
    assert page.pictures == {"ranking": 1, "alone": 1, "use": 1, "missing": 1, "cost": 1, "confusion": 1}
    assert page.rows == 4 and not page.outside and not re.search(r"@import|url\((?!#)", text)
    assert "MLA &lt;b&gt;" in text and "MLA <b>" not in text
    assert "Take" in text or "tie" in text
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[0]["method"] == "MLA <b>" and float(rows[0]["accuracy"]) == 0.95
    assert {"alone_a", "use_b", "missing_0.3", "seconds", "option_lr_factor", "validation_accuracy"} <= rows[0].keys()
    report.write(found, {**settings, "missing": []}, tmp_path)
    assert "missing" not in Page((tmp_path / "report.html").read_text()).sections
