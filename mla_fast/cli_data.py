"""The data of ``mla-fast train`` and ``mla-fast eval``: read as options or a checkpoint say, described, split."""

from __future__ import annotations

from typing import Any

import torch

from mla_fast import data
from mla_fast.data.dataset import listed
from mla_fast.data.reading import open_arrays, read_labelled, read_unlabelled
from mla_fast.data.standardization import feature_axis

OTHERWISE = {"tokens": "features", "sequence": "image", "channels_last": "image"}
FAR = 5  # deviations between the means of a feature in two data sets, beyond which its units must differ


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a checkpoint with what older versions did not write: they read every array in one way."""
    layouts = {name: "features" if len(shape) == 1 else "image" for name, shape in config["encoders"].items()}
    older: dict[str, Any] = {"layouts": layouts, "vocabulary": {}, "standardize": "array", "class_names": None, "interaction": 0}
    older |= {"validation": None, "encoder": {}, "label_smoothing": 0.0, "class_weights": None, "threads": None}
    return older | {"protocol": "independent" if config.get("missing") else None} | config


def read_for_training(config: dict[str, Any]) -> tuple[data.MultimodalDataset, dict[str, str]]:
    """Return the data set and what its arrays are in the file; add to `config` how they are read and what encoders they need."""
    dataset, arrays = _read(config)
    try:
        config["layouts"] = data.find_layouts(dataset, config["layouts"])
        dataset = data.arrange(dataset, config["layouts"])
    except ValueError as error:
        raise ValueError(f"{config['data']}: {error}") from None
    config["encoders"] = {name: list(x.shape[1:]) for name, x in dataset.inputs.items()}
    config["vocabulary"] = data.vocabulary(dataset, config["layouts"])
    config["classes"], config["class_names"] = _classes(dataset, config), dataset.class_names
    return _masked(dataset, config), arrays


def read_for_evaluation(config: dict[str, Any]) -> tuple[data.MultimodalDataset, dict[str, str]]:
    """Return the same of data to evaluate on; raise ValueError where they do not fit what was trained on."""
    dataset, arrays = _read({**config, "class_names": class_names(config)})
    return _masked(_fitting(dataset, config), config), arrays


def read_for_prediction(config: dict[str, Any]) -> tuple[data.MultimodalDataset, dict[str, str]]:
    """Return the same of data without labels, of those modalities that the file has."""
    tokens = [name for name, layout in config["layouts"].items() if layout == "tokens"]
    dataset, arrays = read_unlabelled(config["data"], config["modalities"], tokens=tokens)
    return _fitting(dataset, config), arrays


def class_names(config: dict[str, Any]) -> list[str]:
    """Return the names of the classes that were trained on, numbers where they have none."""
    return config["class_names"] or [str(i) for i in range(config["classes"])]


def _fitting(dataset: data.MultimodalDataset, config: dict[str, Any]) -> data.MultimodalDataset:
    """Return the data set arranged; raise ValueError where it does not fit what was trained on."""
    try:
        dataset = data.arrange(dataset, config["layouts"])
    except ValueError as error:
        raise ValueError(f"{config['data']}: {error}") from None
    for name, x in dataset.inputs.items():
        varies = config["layouts"][name] in ("tokens", "sequence")  # in T
        expected, got = config["encoders"][name], list(x.shape[1:])
        if expected[varies:] != got[varies:] or len(expected) != len(got):
            raise ValueError(f"{config['data']}: {name!r}: expected samples {expected}, got {got}")
    for name, size in data.vocabulary(dataset, config["layouts"]).items():
        if size > config["vocabulary"][name]:
            highest = config["vocabulary"][name] - 1
            raise ValueError(f"{config['data']}: {name!r}: expected tokens up to {highest}, as in training, got {size - 1}")
    return dataset


def read_for_addition(
    config: dict[str, Any], name: str, layouts: dict[str, str]
) -> tuple[data.MultimodalDataset, dict[str, str]]:
    """Return the data of a modality that is new to a run, and put into the run's `config` how it is read and what is new."""
    one = {**config, "modalities": [name], "layouts": layouts, "class_names": None}
    (dataset, _), known = _read(one), config["class_names"]
    if known is not None and dataset.class_names is None and not all(of.isdigit() for of in known):
        raise ValueError(
            f"{config['data']}: {config['label']!r}: expected names as in the run before, {listed(known, 10)}, got numbers"
        )
    if known is not None:
        own = dataset.class_names or [str(i) for i in range(dataset.classes)]
        one["class_names"] = [*known, *(of for of in own if of not in known)]
    elif dataset.class_names is not None:
        names = listed(dataset.class_names, 10)
        raise ValueError(f"{config['data']}: {config['label']!r}: expected numbers from 0 as in the run before, got {names}")
    dataset, arrays = read_for_training(one)
    for part in ("layouts", "encoders", "vocabulary"):
        config[part] = {**config[part], **one[part]}
    config["classes"], config["class_names"] = max(config["classes"], one["classes"]), one["class_names"]
    return dataset, arrays


def available(config: dict[str, Any], *, missing_ok: bool = False) -> dict[str, Any]:
    """Return the config with those of its modalities that are in the file of its data, where some were added from other files."""
    if not config.get("additions") and not missing_ok:
        return config
    arrays, objects = open_arrays(config["data"], config["modalities"])
    there = [name for name in config["modalities"] if name in {*arrays, *objects}]
    if not there and not missing_ok:
        names = ", ".join(map(repr, config["modalities"]))
        raise ValueError(
            f"{config['data']}: expected an array of some modality, {names}; there are: {', '.join(arrays) or 'none'}"
        )
    return {**config, "modalities": there, "layouts": {name: config["layouts"][name] for name in there}}


def _read(config: dict[str, Any]) -> tuple[data.MultimodalDataset, dict[str, str]]:
    tokens = [name for name, layout in config["layouts"].items() if layout == "tokens"]
    names = config.get("class_names")
    return read_labelled(config["data"], config["modalities"], config["label"], tokens=tokens, class_names=names)


def _masked(dataset: data.MultimodalDataset, config: dict[str, Any]) -> data.MultimodalDataset:
    rate = config.get("missing", 0.0)
    return data.with_missing(dataset, rate, config["seed"], config["protocol"]) if rate else dataset


def _classes(dataset: data.MultimodalDataset, config: dict[str, Any]) -> int:
    """Return the number of classes; raise ValueError if there is only one, or if the labels cannot be class numbers."""
    label, found = f"{config['data']}: {config['label']!r}", len(dataset.target.unique())
    if found < 2:
        only = dataset.target[0] if dataset.class_names is None else dataset.class_names[0]
        raise ValueError(f"{label}: expected at least two classes, got {only} alone")
    if found == len(dataset):
        raise ValueError(f"{label}: expected classes that samples have in common, got another in each of {found} rows")
    if dataset.classes > 10**5 > len(dataset):
        raise ValueError(f"{label}: expected classes numbered from 0, got {found} of them up to {dataset.classes - 1}")
    return dataset.classes


def split(dataset: data.MultimodalDataset, config: dict[str, Any]) -> tuple[data.MultimodalDataset, data.MultimodalDataset]:
    """Return (train, test) as the options say; what ``hold_out`` takes of train is still in it."""
    if config["test_where"] is not None:
        return data.split_where(dataset, config["test_where"])
    return data.random_split(dataset, config["test_fraction"], config["seed"])


def hold_out(
    train: data.MultimodalDataset, config: dict[str, Any]
) -> tuple[data.MultimodalDataset, data.MultimodalDataset | None]:
    """Return (train, validation) of the training part, as ``--validation`` says: a fraction, or FIELD=VALUES."""
    how = config["validation"]
    if how is None:
        return train, None
    try:
        return data.split_where(train, how) if "=" in how else data.random_split(train, float(how), config["seed"])
    except ValueError as error:
        raise ValueError(f"--validation: {error}") from None


def print_reading(
    dataset: data.MultimodalDataset, arrays: dict[str, str], config: dict[str, Any], *, training: bool = False
) -> None:
    """Print a line for each array that is used: what it is in the file, how it is read, and in training how to say otherwise."""
    width, kinds = max(map(len, arrays)), max(map(len, arrays.values()))
    read = {name: _how(dataset, arrays[name], name, config, training) for name in dataset.modalities}
    names = config["class_names"]
    if config["label"] in arrays:
        what = ", numbered from 0" if names is None else f": {listed(names, 10)}"
        read[config["label"]] = f"{config['classes']} classes{what}"
    if "present" in arrays:
        named = "modalities" in arrays and "modalities" not in dataset.modalities
        order = "as the array 'modalities' names them" if named else "in the order of --modalities"
        read["present"] = f"which rows have each modality, {order}"
    print(f"read from {config['data']}" + (" (--layout and --standardize read otherwise)" if training else ""))
    for name, how in read.items():
        print(f"  {name:{width}}  {arrays[name]:{kinds}}  {how}")
    if dataset.present is not None and (nothing := int((~dataset.present.any(1)).sum())):
        print(f"note: {nothing} of {len(dataset)} rows have none of these modalities: nothing is trained or tested on them")
    if config.get("missing") and dataset.present is not None:
        away = 1 - dataset.present.double().mean().item()
        print(f"taken away: {100 * away:.1f} % of {dataset.present.numel()} entries ({config['protocol']} protocol)")


def _how(dataset: data.MultimodalDataset, array: str, name: str, config: dict[str, Any], training: bool) -> str:
    layout, x = config["layouts"][name], dataset.inputs[name]
    by = {"none": "not standardised", "array": "standardised as a whole"}.get(config["standardize"])
    if by is None:
        by = "standardised as a whole" if feature_axis(x, layout) is None else "standardised feature by feature"
        by = by.replace("feature", "channel") if x.dim() == 4 else by
    how = f"tokens below {config['vocabulary'][name]}" if layout == "tokens" else f"{layout.replace('_', ' ')}, {by}"
    if array.startswith("uint8") and layout != "tokens":
        how = how.replace(",", " / 255,", 1)
    if layout == "image":
        other: str | None = "sequence" if x.dim() == 3 else "channels_last"
    else:
        other = OTHERWISE.get(layout, "tokens" if "int" in array and x.dim() == 2 and x.shape[1] > 1 else None)
    return f"{how} (otherwise: --layout {name}={other})" if training and other is not None else how


def print_constant(train: data.MultimodalDataset, constant: dict[str, list[int]], config: dict[str, Any]) -> None:
    """Print which features have one value in training, as a survey has found."""
    for name, columns in constant.items():
        kind = "channels" if train.inputs[name].dim() == 4 else "features"
        count = train.inputs[name].shape[feature_axis(train.inputs[name], config["layouts"][name]) or 0]
        print(f"note: {len(columns)} of {count} {kind} of {name!r} have one value in training: {listed(columns, 8)}")


def note_other_units(standardized: data.MultimodalDataset, config: dict[str, Any]) -> None:
    """Print a note for each modality with features so far from those in training that their units must differ."""
    for name in standardized.modalities:
        rows = next(standardized.chunks(name), torch.empty(0)).double()  # all that is in memory, else the first
        if config["statistics"][name] is None or config["standardize"] == "none" or not len(rows):
            continue
        axis = feature_axis(rows, config["layouts"][name]) if config["standardize"] == "feature" else None
        means = rows.mean().view(1) if axis is None else rows.movedim(axis, 0).flatten(1).mean(1)
        far = int(means.abs().argmax())
        if means[far].abs() > FAR:
            which = f"{name!r}" if axis is None else f"{'channel' if rows.dim() == 4 else 'feature'} {far} of {name!r}"
            print(f"note: {which} has a mean {means[far].abs():.3g} deviations from that in training: are the units the same?")
