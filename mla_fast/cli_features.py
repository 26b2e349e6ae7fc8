"""``mla-fast features``: features that others have published, as one ``.npz`` for train and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from mla_fast import datasets
from mla_fast.cli_options import add, count, positive
from mla_fast.files import replacing


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of ``mla-fast``."""
    p = commands.add_parser("features", help="make an .npz of IEMOCAP's released features")
    source = p.add_mutually_exclusive_group(required=True)
    help = "folder of GCNet's release: features/{wav2vec…,deberta…,manet…} and the label pickle"
    source.add_argument("--iemocap", type=Path, help=help)
    source.add_argument("--mmin", type=Path, help="folder of MMIN's folds: {A,V,L}/FOLD/{trn,val,tst}.npy and target/FOLD")
    source.add_argument("--cpm", type=Path, help="folder of CPM-Net's folds: FOLD/{trn,val,tst}.npz")
    add(p, "--classes", positive, 4, "how many emotions are told apart", choices=(4, 6))
    help = "session of GCNet's release whose utterances are the test part (default: 5)"
    add(p, "--session", positive, None, help, choices=range(1, 6))
    add(p, "--fold", count, None, "number of the fold of MMIN or CPM-Net (default: 1)")
    p.add_argument("--output", type=Path, required=True, help="the .npz to write")
    p.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    p.set_defaults(command=features)


def features(arguments: argparse.Namespace) -> None:
    """Write the arrays and print what they are and what was left out."""
    if arguments.output.suffix != ".npz":
        raise ValueError(f"output: expected a file .npz, got {arguments.output}")
    if arguments.output.exists() and (arguments.output.is_dir() or not arguments.overwrite):
        cure = "" if arguments.output.is_dir() else "; --overwrite replaces it"
        raise FileExistsError(f"--output: {arguments.output} is there already{cure}")
    root = arguments.iemocap or arguments.mmin or arguments.cpm
    if not root.is_dir():
        raise FileNotFoundError(f"root: expected a folder, got {root}, which is none")
    if arguments.iemocap is not None:
        _refuse("fold", arguments.fold, "--mmin or --cpm")
        arrays, said = datasets.read_gcnet(root, arguments.classes, arguments.session or 5)
    else:
        _refuse("session", arguments.session, "--iemocap")
        read = datasets.read_mmin if arguments.mmin is not None else datasets.read_cpm
        arrays, said = read(root, 1 if arguments.fold is None else arguments.fold, arguments.classes)
    with replacing(arguments.output, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    for name, array in arrays.items():
        print(f"  {name:10}  {array.dtype} {list(array.shape)}")
    for line in said:
        print(f"note: {line}")
    print(f"wrote {len(arrays['label'])} utterances to {arguments.output}")


def _refuse(name: str, typed: int | None, where: str) -> None:
    if typed is not None:
        raise ValueError(f"{name}: expected with {where} alone, where it does something, got --{name} {typed}")
