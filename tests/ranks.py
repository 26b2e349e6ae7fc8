"""Real processes to train in: each runs a function of its rank and hands back what it returns."""

import contextlib
import io
import multiprocessing
import os
import socket
import traceback

import torch
import torch.distributed as dist

# One process imports everything once, and the ranks are its copies.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "mla_fast", "helpers", "mla_fast.cli", "matplotlib.figure"])


def _rank(function, rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        torch.save({"result": function(rank, world)}, out)
    except BaseException:
        torch.save({"error": traceback.format_exc()}, out)
        os._exit(1)  # without waiting for the others, who may wait for this one
    dist.destroy_process_group()


def run_ranks(function, world, folder, timeout=120):
    """[function(rank, world) for every rank], each in a process of its own; `function` is a module's."""
    outs = [folder / f"{rank}.pt" for rank in range(world)]
    processes = [CONTEXT.Process(target=_rank, args=(function, r, world, folder / "store", outs[r])) for r in range(world)]
    return _results(processes, outs, timeout)


def _results(processes, outs, timeout):
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    stuck = [r for r, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    results = [torch.load(out, weights_only=False) if out.exists() else {"error": "nothing"} for out in outs]
    errors = [f"rank {r}: {result['error']}" for r, result in enumerate(results) if "error" in result]
    assert not errors and not stuck, "\n".join([*errors, f"stuck: {stuck}"])
    return [result["result"] for result in results]


def _command(argv, environment, out):
    """A rank of the command line, as torchrun would have started it; `argv` may differ between ranks."""
    from mla_fast import cli_output
    from mla_fast.cli import main

    os.environ |= environment
    torch.set_num_threads(1)
    said, failed = io.StringIO(), io.StringIO()
    cli_output.write_report = lambda *_: None  # pictures take longest
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
        status = main(argv)
    torch.save({"result": (status, said.getvalue(), failed.getvalue())}, out)


def run_command(argvs, folder, timeout=60, **environment):
    """[(exit status, stdout, stderr) of each rank] of ``mla-fast`` with the arguments of each, with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": str(len(argvs))}
    outs = [folder / f"{port} {rank}.pt" for rank in range(len(argvs))]
    processes = []
    for rank, (argv, out) in enumerate(zip(argvs, outs, strict=True)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(argvs))}
        processes.append(CONTEXT.Process(target=_command, args=(list(map(str, argv)), common | own | environment, out)))
    return _results(processes, outs, timeout)
