"""Multimodal data sets, in memory or larger: reading, splitting, standardising, missing modalities, and the built-in sets."""

from mla_fast.data.built_in import digits, sparse_coding, sparse_coding_directions
from mla_fast.data.column import Column
from mla_fast.data.dataset import MultimodalDataset, loader
from mla_fast.data.layout import LAYOUTS, arrange, find_layouts, vocabulary
from mla_fast.data.missing import PROTOCOLS, cpm_mask, missing_mask, with_missing
from mla_fast.data.reading import load, load_npz
from mla_fast.data.splits import random_split, rows_where, split_where
from mla_fast.data.standardization import (
    Statistics,
    Survey,
    apply_statistics,
    constant_features,
    standardize,
    statistics,
    survey,
)

__all__ = [
    "LAYOUTS",
    "PROTOCOLS",
    "Column",
    "MultimodalDataset",
    "Statistics",
    "Survey",
    "apply_statistics",
    "arrange",
    "constant_features",
    "cpm_mask",
    "digits",
    "find_layouts",
    "load",
    "load_npz",
    "loader",
    "missing_mask",
    "random_split",
    "rows_where",
    "sparse_coding",
    "sparse_coding_directions",
    "split_where",
    "standardize",
    "statistics",
    "survey",
    "vocabulary",
    "with_missing",
]
