"""``mla-fast features``: features that others have published, as one ``.npz`` for train and compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from mla_fast import datasets


def add_command(commands: Any) -> None:
    """Add the command to the subparsers of ``mla-fast``."""
    p = commands.add_parser("features", help="make an .npz of IEMOCAP's released features")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--iemocap", type=Path, help="GCNet's release: features/{wav2vec…,deberta…,manet…} and the label pickle")
    source.add_argument("--mmin", type=Path, help="MMIN's folds: {A,V,L}/FOLD/{trn,val,tst}.npy and target/FOLD")
    source.add_argument("--cpm", type=Path, help="CPM-Net's folds: FOLD/{trn,val,tst}.npz")
    p.add_argument("--classes", type=int, choices=(4, 6), default=4)
    help = "of GCNet's release, whose utterances are the test part (default: 5)"
    p.add_argument("--session", type=int, choices=range(1, 6), help=help)
    p.add_argument("--fold", type=int, help="of MMIN's or CPM-Net's (default: 1)")
    p.add_argument("--output", type=Path, required=True, help="the .npz")
    p.set_defaults(command=features)


def features(arguments: argparse.Namespace) -> None:
    """Write the arrays and print what they are and what was left out."""
    if arguments.output.suffix != ".npz":
        raise ValueError(f"output: expected a file .npz, got {arguments.output}")
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
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    beside = arguments.output.with_name(f".{arguments.output.name}")
    with beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    beside.replace(arguments.output)
    for name, array in arrays.items():
        print(f"  {name:10}  {array.dtype} {list(array.shape)}")
    for line in said:
        print(f"note: {line}")
    print(f"wrote {len(arrays['label'])} utterances to {arguments.output}")


def _refuse(name: str, typed: int | None, where: str) -> None:
    if typed is not None:
        raise ValueError(f"{name}: expected with {where} alone, where it does something, got --{name} {typed}")
