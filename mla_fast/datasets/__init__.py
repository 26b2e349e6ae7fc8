"""The paper's data sets, decoded lazily from what is on disk: ``({modality: tensor}, label, present)`` of each sample."""

from mla_fast.datasets.cache import prepare
from mla_fast.datasets.clip_food101 import ClipFood101
from mla_fast.datasets.crema_d import CremaD
from mla_fast.datasets.files import DecodeError
from mla_fast.datasets.food101 import Food101
from mla_fast.datasets.iemocap import IEMOCAP
from mla_fast.datasets.iemocap_features import read_cpm, read_gcnet, read_mmin
from mla_fast.datasets.kinetics_sounds import KineticsSounds
from mla_fast.datasets.lazy import Entry, Found, LazyDataset
from mla_fast.datasets.loader import Loader
from mla_fast.datasets.mvsa import MVSA

__all__ = [
    "IEMOCAP",
    "MVSA",
    "ClipFood101",
    "CremaD",
    "DecodeError",
    "Entry",
    "Food101",
    "Found",
    "KineticsSounds",
    "LazyDataset",
    "Loader",
    "prepare",
    "read_cpm",
    "read_gcnet",
    "read_mmin",
]
