"""Throughput: ``python -m bench.throughput [--threads 1,2] [--output out.jsonl] [--quick] [--compile]``.

What ``bench.throughput.ops`` and ``bench.throughput.step`` measure, on each number of threads and to one file, and then each
contender at its own best number; both have more to choose from.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bench.throughput import ops, speed, step
from bench.throughput.cases import CPU_OR_GPU


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.throughput", description="operators, inference and whole training steps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=CPU_OR_GPU.type)
    parser.add_argument("--threads", type=ops.integers, help="by default one and as many as there are cores; on a GPU one")
    parser.add_argument("--quick", action="store_true", help="a fifth of a second per operator, three rounds of slow steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more rival of the operators; minutes")
    parser.add_argument("--output", type=Path, default=Path("throughput.jsonl"), help="append JSONL here")
    arguments = parser.parse_args(argv)
    counts = arguments.threads or sorted({1, os.cpu_count() if arguments.device == "cpu" else 1})
    compiled, failed = ["--compile"] * arguments.compile, []
    for threads in counts:
        common = ["--device", arguments.device, "--threads", str(threads), "--output", str(arguments.output)]
        for bench, options, quick in ((ops, compiled, ["--seconds", "0.2"]), (step, [], ["--quick"])):
            try:
                bench.main(common + options + quick * arguments.quick)
            except SystemExit as error:  # what fails in one does not keep the other from being measured
                failed.append(str(error))
    print("\n" + "\n\n".join(speed.tables(speed.Throughput(arguments.output))))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
