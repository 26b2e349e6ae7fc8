"""What the README shows under "Put it under your training" runs as it stands there, and learns."""

import itertools
import os
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, WIDTHS
from ranks import CONTEXT
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import mla_fast as mla

README = Path(__file__).parents[1] / "README.md"


def example(title):
    """The block of code after the bold `title`."""
    section = README.read_text().split("## Put it under your training")[1].split("\n## ")[0]
    code = re.search(rf"\*\*{title}\*\*.*?```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 15
    return code


def surroundings():
    """What the reader has: encoders, a head, a data set of separable classes."""
    torch.manual_seed(0)
    target = torch.arange(48) % CLASSES
    inputs = {m: F.one_hot(target, width).float() + 0.1 * torch.randn(48, width) for m, width in WIDTHS.items()}
    dataset = [({m: x[i] for m, x in inputs.items()}, target[i]) for i in range(48)]
    encoders, head = {m: nn.Sequential(nn.Linear(width, 8), nn.Tanh()) for m, width in WIDTHS.items()}, nn.Linear(8, CLASSES)
    model = mla.MultimodalModel(encoders, head)
    names = {"torch": torch, "F": F, "mla": mla, "DataLoader": DataLoader, "DistributedSampler": DistributedSampler}
    names |= {"device": "cpu", "encoders": encoders, "head": head, "model": model, "inputs": inputs, "target": target}
    return names | {"dataset": dataset, "loader": DataLoader(dataset, batch_size=16, shuffle=True)}


def loss(names):
    """The mean of all modalities' over everything."""
    model, inputs = mla.MultimodalModel(names["encoders"], names["head"]), names["inputs"]
    with torch.no_grad():
        return sum(F.cross_entropy(z.float(), names["target"]).item() for z in model(inputs).values()) / len(inputs)


def run(title, times=1, **more):
    names = surroundings() | more
    before = loss(names)
    for _ in range(times):
        exec(compile(example(title), str(README), "exec"), names)
    assert loss(names) < before
    return names


def test_a_loop_of_your_own():
    names = run("A loop of your own", times=20)
    assert names["optimizer"].diagnostics()["layers"]["head"]["steps"] >= 6


def test_accumulation():
    names = surroundings()
    optimizer = mla.MLAOptimizer(torch.optim.SGD(names["model"].parameters(), lr=0.1), names["model"].head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = run(
            "Accumulation",
            times=20,
            model=names["model"],
            encoders=names["encoders"],
            head=names["head"],
            optimizer=optimizer,
            itertools=itertools,
        )
    assert optimizer.diagnostics()["layers"]["head"]["steps"] == 20 * 3  # three batches of 16 are one group


def block(line):
    """The block of code with this in it."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if line in code]
    return found


def test_modalities_that_some_samples_lack_in_a_loop_of_your_own():
    names = surroundings()
    optimizer = mla.MLAOptimizer(torch.optim.SGD(names["model"].parameters(), lr=0.1), names["model"].head)
    names |= {"optimizer": optimizer} | dict(zip(("audio", "image"), list(names["inputs"].values())[:2], strict=True))
    prediction, training = block("plan = mla.dispatch"), block("targets = plan.pack")
    before, first, second = loss(names), *names["model"].modalities[:2]
    names["model"] = mla.MultimodalModel({"audio": names["encoders"][first], "image": names["encoders"][second]}, names["head"])
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        names["present"] = torch.rand(48, 2, generator=generator) > 0.4
        names["present"][:, 1] &= step != 5
        exec(compile(prediction, str(README), "exec"), names)
        assert names["fused"].logits.shape == (48, CLASSES)
        exec(compile(training, str(README), "exec"), names)
    assert loss(names) < before and optimizer.diagnostics()["skipped_empty"] == 1


def test_an_interaction_in_a_loop_of_your_own():
    names = surroundings()
    interaction = mla.Interaction(8, CLASSES, tuple(WIDTHS), rank=4)
    model = names["model"] = mla.MultimodalModel(names["encoders"], names["head"], interaction=interaction)
    names["optimizer"] = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model.head)
    before, r = [p.detach().clone() for p in model.head.parameters()], interaction.out.weight.detach().clone()
    for _ in range(5):
        exec(compile(block("model.interaction.loss(h, z, target)"), str(README), "exec"), names)
    assert all(map(torch.equal, model.head.parameters(), before)) and not torch.equal(interaction.out.weight, r)


def test_fabric():
    fabric = pytest.importorskip("lightning_fabric")
    names = run("Lightning Fabric", Fabric=fabric.Fabric)
    assert names["optimizer"].diagnostics()["layers"]["head"]["steps"] == 18


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    names = run("Accelerate", Accelerator=accelerate.Accelerator)
    assert names["optimizer"].layers[0].projection.rows.keys() == WIDTHS.keys()
    assert names["prepared"].optimizer is names["optimizer"]


def torchrun(function, folder):
    """function() in two processes in `folder`, with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=process, args=(function, rank, port, folder)) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in processes] == [0, 0]


def process(function, rank, port, folder):
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} | place
    os.chdir(folder)
    torch.set_num_threads(1)
    function()
    torch.distributed.destroy_process_group()


def several_processes():
    run("Several processes")


def test_several_processes(tmp_path):
    torchrun(several_processes, tmp_path)
    assert mla.checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 2


def fabric_on_two():
    import lightning_fabric

    def on_two(**settings):
        return lightning_fabric.Fabric(**settings | {"devices": 2, "strategy": "ddp"})

    names = run("Lightning Fabric", Fabric=on_two)
    assert names["fabric"].world_size == 2
    assert names["optimizer"].diagnostics()["layers"]["head"]["steps"] == 12  # 48 samples: 2 batches of 3 modalities and 2 epochs
    weights = [torch.empty_like(names["head"].weight) for _ in range(2)]
    torch.distributed.all_gather(weights, names["head"].weight.detach())
    assert torch.equal(*weights)
    names["trainer"].save("checkpoint.pt")


@pytest.mark.exhaustive
def test_fabric_on_two_devices(tmp_path):
    pytest.importorskip("lightning_fabric")
    torchrun(fabric_on_two, tmp_path)
    saved = mla.checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    mla.MultimodalModel(surroundings()["encoders"], nn.Linear(8, CLASSES)).load_state_dict(saved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph():
    names = surroundings()
    model = names["model"].cuda()
    inputs, target = {m: x.cuda() for m, x in names["inputs"].items()}, names["target"].cuda()
    optimizer = mla.MLAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), model.head)
    twin = surroundings()["model"].cuda()
    twin_optimizer = mla.MLAOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, fused=True), twin.head)
    names |= {"model": model, "optimizer": optimizer, "loader": [(inputs, target)] * 6}
    exec(compile(example("CUDA graphs"), str(README), "exec"), names)
    for _ in range(6):
        mla.alternating_step(twin, twin_optimizer, (inputs, target))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
