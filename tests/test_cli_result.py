"""What the command line says beside accuracy."""

import numpy as np
import pytest

from mla_fast.cli import main
from mla_fast.cli_result import notes


def result(majority=0.25, **accuracy):
    return {"accuracy": accuracy, "majority": majority, "samples": 120}


def test_a_rare_class_is_said():
    found = notes(result(119 / 120, a=119 / 120, fused=119 / 120))
    assert "right for 99.2 %: look at macro-F1" in found[0] and "not learned" in found[1] and len(found) == 2


def test_fused_below_the_best_modality_is_said_with_a_remedy():
    (note,) = notes(result(sensor=1.0, noise=0.25, average=0.9, fused=0.958))
    assert note.startswith("fused (95.8 %) is below sensor alone (100.0 %)") and "--modalities sensor" in note


@pytest.mark.parametrize("missing", [float("nan"), 0.5])
def test_there_is_nothing_to_say_where_all_is_well(missing):
    assert notes(result(a=missing, b=0.8, average=0.9, fused=0.9)) == []
    assert notes(result(a=0.9, b=0.5, average=0.9, fused=0.88)) == []  # within the noise
    assert notes(result(a=1.0, b=0.5, average=0.8, fused=0.8), complete=False) == []  # of other samples
    assert notes(result(majority=1.0, a=0.8, fused=0.8)) == ["there is one class in these samples: accuracy says little"]


def test_a_run_prints_them_and_an_interaction(tmp_path, capsys):
    generator = np.random.default_rng(0)
    label = np.array(["healthy"] * 114 + ["ill"] * 6)
    path = tmp_path / "d.npz"
    np.savez(path, a=generator.normal(size=(120, 3)), b=generator.normal(size=(120, 5)), label=label)
    options = ["train", "--data", str(path), "--modalities", "a,b", "--epochs", "1", "--output", str(tmp_path / "run")]
    assert main([*options, "--interaction", "4"]) == 0
    out = capsys.readouterr().out
    assert "macro-F1" in out and "fused accuracy by class, %: healthy " in out and "without_interaction" in out
    assert "note: answering always the most frequent class is right for 95.8 %" in out
    assert main(["eval", str(tmp_path / "run" / "checkpoint.pt")]) == 0
    assert capsys.readouterr().out.count("interaction") == 2
    with pytest.raises(SystemExit):
        main([*options, "--interaction", "-1", "--overwrite"])
    assert "argument --interaction: expected a whole number of at least 0, got '-1'" in capsys.readouterr().err
