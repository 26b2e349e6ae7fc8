"""Methods that MLA is compared with, one short module each with its paper and equations.

``METHODS`` has them by name. Each is a ``JointModel``, which documents the five hooks by which methods differ; ``fit_joint``
trains one, after ``prepare`` for those that learn something beforehand.
"""

from __future__ import annotations

from typing import Any

from mla_fast.baselines.agm import AGM
from mla_fast.baselines.bigated import BiGated
from mla_fast.baselines.concat import Concat
from mla_fast.baselines.film import FiLM
from mla_fast.baselines.fit import fit_joint, joint_accuracy, train_epoch
from mla_fast.baselines.g_blending import GBlending
from mla_fast.baselines.joint import JointModel, Setup
from mla_fast.baselines.late_fusion import LateFusion
from mla_fast.baselines.mlb import MLB
from mla_fast.baselines.mmpareto import MMPareto
from mla_fast.baselines.multi_loss import MultiLoss
from mla_fast.baselines.ogm import OGM, OGMGE
from mla_fast.baselines.pmr import PMR
from mla_fast.baselines.qmf import QMF
from mla_fast.baselines.reconboost import ReconBoost
from mla_fast.baselines.relearning import Relearning
from mla_fast.baselines.sum import Sum
from mla_fast.baselines.umt import UME, UMT

# The settings of MLAOptimizer that every comparison of methods includes, by the name of the method.
MLA_SETTINGS: dict[str, dict[str, Any]] = {
    "MLA rls": {"projection": "rls"},
    "MLA window": {"projection": "window", "target": "update"},
    "MLA none": {"projection": "none"},
}

METHODS: dict[str, type[JointModel]] = {
    "Sum": Sum,
    "Concat": Concat,
    "Late fusion": LateFusion,
    "UME": UME,
    "FiLM": FiLM,
    "BiGated": BiGated,
    "OGM": OGM,
    "OGM-GE": OGMGE,
    "AGM": AGM,
    "PMR": PMR,
    "QMF": QMF,
    "Multi-loss": MultiLoss,
    "G-Blending": GBlending,
    "MMPareto": MMPareto,
    "MLB": MLB,
    "ReconBoost": ReconBoost,
    "UMT": UMT,
    "Diagnosing & Re-learning": Relearning,
}

__all__ = [
    "METHODS",
    "MLA_SETTINGS",
    "Concat",
    "JointModel",
    "LateFusion",
    "Setup",
    "Sum",
    "fit_joint",
    "joint_accuracy",
    "train_epoch",
]
