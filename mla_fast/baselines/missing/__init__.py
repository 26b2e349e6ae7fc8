"""Methods made for missing modalities, the rows of the paper's Table 2, at feature level.

``MISSING_METHODS`` has them by name. Those that are trained batch by batch are a ``MissingModel``, those that are fitted to a
whole training set a ``FittedModel``; both are made of the modalities' widths: ``AE({"audio": 512, "text": 1024}, classes=4)``.
"""

from __future__ import annotations

from mla_fast.baselines.missing.autoencoder import AE, CRA
from mla_fast.baselines.missing.cca import CCA, DCCA, DCCAE
from mla_fast.baselines.missing.cpm_net import CPMNet
from mla_fast.baselines.missing.fitted import FittedModel
from mla_fast.baselines.missing.if_mmin import IFMMIN
from mla_fast.baselines.missing.mmin import MMIN
from mla_fast.baselines.missing.parts import MissingModel
from mla_fast.baselines.missing.tate import TATE

MISSING_METHODS: dict[str, type[MissingModel] | type[FittedModel]] = {
    "CCA": CCA,
    "DCCA": DCCA,
    "DCCAE": DCCAE,
    "AE": AE,
    "CRA": CRA,
    "MMIN": MMIN,
    "IF-MMIN": IFMMIN,
    "CPM-Net": CPMNet,
    "TATE": TATE,
}

__all__ = [
    "AE",
    "CCA",
    "CRA",
    "DCCA",
    "DCCAE",
    "IFMMIN",
    "MISSING_METHODS",
    "MMIN",
    "TATE",
    "CPMNet",
    "FittedModel",
    "MissingModel",
]
