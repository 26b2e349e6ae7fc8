"""What an installation says: of a checkout that hides it, of operators that were left out, of GPUs that it compiles for."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@source
def test_a_checkout_that_hides_an_installation_is_recognised(tmp_path):
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for place in (checkout, site):
        shutil.copytree(ROOT / "mla_fast", place / "mla_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (site / "mla_fast-0.1.0.dist-info").mkdir()
    (site / "mla_fast-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mla_fast\nVersion: 0.1.0\n")
    environment = os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": "0"}
    # without the finder of an editable installation, which would give both of them its operators
    without = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]"
    code = f"{without}; from mla_fast import cli; cli.main(['env'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    said = f"the checkout in {checkout} hides the mla_fast installed in {site / 'mla_fast'}: go to another folder"
    assert done.returncode == 0 and said in done.stdout
    elsewhere = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "hides" not in elsewhere.stdout and "the compiled extension did not load" in elsewhere.stdout
    assert "NOTE" in elsewhere.stdout and "the compiled operators are missing" in elsewhere.stdout


@source
def test_a_build_without_torch_says_loudly_what_it_leaves_out():
    code = "import runpy, sys; sys.modules['torch'] = None; print(runpy.run_path('setup.py', run_name='flags')['extensions']())"
    environment = os.environ | {"MLA_FAST_BUILD": "auto"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n" and "NO TORCH IN THE BUILD ENVIRONMENT" in done.stderr and "--no-build-isolation" in done.stderr


@source
@pytest.mark.parametrize(
    ("script", "archs"),
    [("printf '9.0\\n8.0\\n9.0\\n'", ["80", "90"]), ("echo '[N/A]'", []), ("echo 9.0; exit 9", []), (None, [])],
)
def test_gpus_at_hand_are_what_is_compiled_for(tmp_path, monkeypatch, script, archs):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "nvcc").write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\n'\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    monkeypatch.delenv("MLA_FAST_CUDA_ARCHS", raising=False)
    flags = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    assert flags["archs_at_hand"]() == archs
    if script is not None:
        expected = archs or ["75", "80", "90"]
        found = [flag.rpartition("code=")[2] for flag in flags["architecture_flags"](str(tmp_path / "nvcc"))]
        assert found == [*(f"sm_{arch}" for arch in expected), f"compute_{expected[-1]}"]


@source
@pytest.mark.parametrize(
    ("mode", "cuda", "compiled"), [("auto", None, 1), ("auto", "13.0", 2), ("cuda", None, 2), ("cpu", "13.0", 1)]
)
def test_cuda_is_compiled_for_a_torch_that_has_it_or_where_it_is_asked_for(tmp_path, monkeypatch, mode, cuda, compiled):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho sm_80\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("MLA_FAST_BUILD", mode)
    monkeypatch.setenv("MLA_FAST_CUDA_ARCHS", "80")
    monkeypatch.setattr("torch.version.cuda", cuda)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["extensions"]()
    assert [extension.name for extension in found] == ["mla_fast._C", "mla_fast._C_cuda"][:compiled]


def test_the_packages_that_a_user_reads_of_are_there():
    import mla_fast as mla

    assert mla.encoders.MLP and mla.data.digits and mla.callbacks.TensorBoard
