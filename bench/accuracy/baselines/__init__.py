"""The methods that MLA is compared with, one short module for each but Sum and Concat, which are in ``mla_fast.baselines``."""

from bench.accuracy.baselines.bigated import BiGated
from bench.accuracy.baselines.film import FiLM
from bench.accuracy.baselines.late_fusion import LateFusion
from bench.accuracy.baselines.ogm_ge import OGMGE
from bench.accuracy.baselines.qmf import QMF
from mla_fast.baselines import Concat, JointModel, Sum

BASELINES: dict[str, type[JointModel]] = {
    "Sum": Sum,
    "Concat": Concat,
    "Late fusion": LateFusion,
    "FiLM": FiLM,
    "BiGated": BiGated,
    "OGM-GE": OGMGE,
    "QMF": QMF,
}
