"""A run that is killed, with no chance to tidy up, at moments that nobody chose."""

import os
import random
import signal
import time

import pytest
import torch
from helpers import CLASSES, assert_bitwise, everything, exhaustive, make_inputs, momentum_sgd, noisy_model
from ranks import CONTEXT
from torch.utils.data import DataLoader

import mla_fast as mla
from mla_fast.checkpoint import read_checkpoint

EPOCHS = 16


def train(path, epochs=EPOCHS):
    """From the checkpoint at `path` on, if it is there: dropout, shuffling, a scheduler and a scaler, a checkpoint each batch."""
    torch.set_num_threads(1)
    inputs, target = make_inputs(60), torch.randint(CLASSES, (60,), generator=torch.Generator().manual_seed(2))
    loader = DataLoader([({m: x[i] for m, x in inputs.items()}, target[i]) for i in range(60)], 4, shuffle=True)
    model = noisy_model()
    optimizer = mla.MLAOptimizer(momentum_sgd(model.parameters()), model.head)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=20)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    trainer = mla.Trainer(model, optimizer, scheduler=scheduler, scaler=scaler, amp=torch.float16, seed=0, progress=False)
    if path.exists():
        trainer.resume(path)
    trainer.fit(loader, epochs, checkpoint=path, checkpoint_every=1)
    return trainer


def kill_again_and_again(path, kills):
    """Copies of this process, which has done everything once, train until they are killed."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a backward pass would start threads, which no copy has
    moments = random.Random()
    for _ in range(2):  # the second time as fast as the copies will be
        begun = time.perf_counter()
        train(path.with_name(f"{begun}.pt"), epochs=1)
    epoch = time.perf_counter() - begun
    for _ in range(kills):
        child = os.fork()
        if not child:
            train(path)
            os._exit(0)
        time.sleep(moments.uniform(0, 3 * epoch))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            saved = read_checkpoint(path)  # never unreadable
            with open(path.with_name("reached"), "a") as file:
                print(saved["epoch"], saved["batches"], file=file)


@pytest.mark.parametrize("kills", [4, *exhaustive(12)])
def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, kills):
    expected = train(tmp_path / "whole.pt")
    path = tmp_path / "killed" / "c.pt"
    process = CONTEXT.Process(target=kill_again_and_again, args=(path, kills))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    reached = [tuple(map(int, line.split())) for line in path.with_name("reached").read_text().splitlines()]
    assert reached == sorted(reached) and len(set(reached)) > kills // 4, reached
    resumed = train(path)
    assert resumed.history == expected.history
    assert_bitwise(everything(resumed.model, resumed.optimizer), everything(expected.model, expected.optimizer))
    assert resumed.scaler.state_dict() == expected.scaler.state_dict()
    assert torch.equal(torch.get_rng_state(), read_checkpoint(tmp_path / "whole.pt")["ranks"][0]["random"]["torch"])
