"""Published folders of INRs, one PyTorch checkpoint each, as their authors publish them.

Nothing is downloaded, and no file can run code.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import _bounded, architecture, io
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import tensors
from jax_scalegmn.zoo import _populations

__all__ = ["Split", "load", "split"]

# Paths, and labels if they are known, by part: {"train": {"path": [...], "label": [...]}, "val": ..., "test": ...}.
Split: TypeAlias = Mapping[str, Any]

_CIFAR_TEST = 50_000  # the number of CIFAR-10's first test image, counted after its training images


def load(
    split: str | os.PathLike[str] | Split,
    arch: Architecture,
    *,
    part: str,
    root: str | os.PathLike[str] | None = None,
) -> _populations.Zoo:
    """Reads the INRs of one part of a published data set, in the order of its split.

    The data sets are MNIST and Fashion-MNIST by Navon et al. (2023, arXiv 2301.12780), sg.siren((2, 32, 32, 1)), and
    CIFAR-10 by Zhou et al. (2023, arXiv 2302.14040), sg.siren((2, 32, 32, 3), offset=0.0). A network's label is that of
    the split. If the split has no labels, it is the one in the name of the folder, like 5 of
    mnist_png_training_5_0/checkpoints/model_final.pth and of randinit_smaller_5s/net0.pth; and if the name has none, as
    for Fashion-MNIST, the one in the file. 60,000 files take minutes; `zoo.save` the result to load it in seconds.

    Args:
      split: A JSON file like mnist_splits.json with the paths and labels of every part, {"train": {"path": [...],
        "label": [...]}, "val": ..., "test": ...}; a part may be the bare list of its paths, as for Fashion-MNIST. Or
        the content of such a file, like the result of `split`.
      arch: The architecture of all networks.
      part: "train", "validation" (also "val") or "test".
      root: The folder that contains the networks' folders. Of every path only the last three components, or two, are
        looked up there. None: the paths are used unchanged, relative to the split's file or the working folder.

    Returns:
      The zoo, with the record label (int32), the record image_index if every name ends in a number, and the settings
      source and part.

    Raises:
      FileNotFoundError: If the split or some of the networks are missing.
      ValueError: On a damaged split, a part that it lacks, a label that is not a number, or a file that is not a
        network of this architecture.

    >>> import pathlib, tempfile
    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch, root = sg.siren((2, 4, 1)), pathlib.Path(tempfile.mkdtemp())
    >>> path = root / "mnist_png_training_5_0" / "checkpoints" / "model_final.pth"
    >>> path.parent.mkdir(parents=True)
    >>> sg.io.tensors.write(path, sg.io.to_torch(arch, sg.network.init(arch, jax.random.key(0))))
    >>> zoo = sg.zoo.inr_folders.load({"train": [str(path)]}, arch, part="train")
    >>> len(zoo), zoo.records["label"].tolist()
    (1, [5])
    """
    base, parts = _read_split(split)
    part, paths, labels = _part(base, parts, part)
    files = _find(paths, base.parent if base else None, Path(root) if root is not None else None)
    params, numbers = _read_networks(arch, files, labels)
    records = {"label": numbers}
    indices = [_index_in_name(path) for path in files]
    if all(index is not None for index in indices):
        records["image_index"] = np.array(indices, np.int64)
    source = str(base if base else os.path.commonpath([path.parent for path in files]))
    return _populations.Zoo(arch, params, records, {"source": source, "part": part})


def split(root: str | os.PathLike[str], *, validation: int = 5000, seed: int = 0) -> dict[str, dict[str, list[Any]]]:
    """Makes a split for a folder of INRs that was published without one.

    For folders like mnist_png_training_5_0 and mnist_png_testing_7_12 (Navon et al. 2023, arXiv 2301.12780) the name
    tells training from testing networks; validation networks are drawn from the training networks. (Published splits of
    them were drawn without a seed.) For files like randinit_smaller_5s/net17.pth (CIFAR-10 by Zhou et al. 2023, arXiv
    2302.14040) the number tells it, as published: numbers from 50000 on are for testing, and the last ones below are
    for validation. Augmented copies, in folders like randinit_smaller_aug3_5s, are left out.

    Args:
      root: The folder that contains the networks' folders.
      validation: The number of training networks that become validation networks.
      seed: The seed of their choice.

    Returns:
      The parts "train", "val" and "test", each with the paths, which begin with `root`, and the labels: plain lists, as
      JSON holds them.

    Raises:
      FileNotFoundError: If there are no networks in such folders.
      ValueError: If a name tells no part or label, two networks of CIFAR-10 have one number, or there are not more
        training networks than `validation`.

    >>> import pathlib, tempfile
    >>> from jax_scalegmn.zoo import inr_folders
    >>> root = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("x_training_5_0", "x_training_6_1", "x_testing_7_2"):
    ...     (root / name / "checkpoints").mkdir(parents=True)
    ...     (root / name / "checkpoints" / "model_final.pth").touch()
    >>> {part: content["label"] for part, content in inr_folders.split(root, validation=0).items()}
    {'train': [5, 6], 'val': [], 'test': [7]}
    """
    root = Path(root)
    files = sorted(root.glob("*/checkpoints/model_final.pth"))
    by_number = not files
    files = files or _numbered_files(root)
    if not files:
        raise FileNotFoundError(
            f"{root}: expected folders like mnist_png_training_5_0/checkpoints with a model_final.pth, or like "
            "randinit_smaller_5s with net0.pth and further ones; got none. Pass the folder that contains them."
        )
    part_of = _numbered_part if by_number else _named_part
    train = [path for path in files if part_of(path) == "train"]
    if not 0 <= validation < len(train):
        raise ValueError(
            f"{root}: expected fewer validation than training networks, got {validation} of {len(train)}. Lower "
            "validation."
        )
    if by_number:
        _check_numbers_differ(root, files)
        held_out = set(train[len(train) - validation :])
    else:
        rows = np.random.default_rng(seed).permutation(len(train))[:validation]
        held_out = {train[row] for row in rows}
    parts = {
        "train": [path for path in train if path not in held_out],
        "val": [path for path in train if path in held_out],
        "test": [path for path in files if part_of(path) == "test"],
    }
    return {
        name: {
            "path": [path.as_posix() for path in paths],
            "label": [_label(path, _label_in_name(path), None) for path in paths],
        }
        for name, paths in parts.items()
    }


# --- private ------------------------------------------------------------------------------------------------------


def _read_networks(
    arch: Architecture, files: Sequence[Path], labels: Sequence[Any] | None
) -> tuple[dict[str, Any], np.ndarray]:
    """The params of all networks, every array with a leading axis [networks], and their labels."""
    numbers = np.empty(len(files), np.int32)
    stacks: list[np.ndarray] = []
    for row, path in enumerate(files):
        state_dict = tensors.read(path)
        numbers[row] = _label(path, labels[row] if labels else _label_in_name(path), state_dict.pop("label", None))
        try:
            leaves = jax.tree.leaves(io.from_torch(arch, state_dict))
        except ValueError as error:
            raise ValueError(f"{path}: {_bounded.one_line(error)}") from error
        stacks = stacks or [np.empty((len(files), *leaf.shape), leaf.dtype) for leaf in leaves]
        for stack, leaf in zip(stacks, leaves, strict=True):
            if leaf.dtype != stack.dtype:
                raise ValueError(
                    f"{path}: its tensors are {leaf.dtype}, those of {files[0]} {stack.dtype}; expected one precision "
                    "throughout. Load the files of each apart."
                )
            stack[row] = leaf
    structure = jax.tree.structure(architecture.abstract_params(arch))
    return jax.tree.unflatten(structure, [jnp.asarray(stack) for stack in stacks]), numbers


def _read_split(split: str | os.PathLike[str] | Split) -> tuple[Path | None, Split]:
    """The path of a split's file, None for a split that is not a file, and the split."""
    if isinstance(split, Mapping):
        return None, split
    path = Path(split)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such split; expected a JSON file like mnist_splits.json. Make one with "
            "inr_folders.split."
        )
    content = _bounded.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with the parts of the data set, got a {type(content).__name__}.")
    return path, content


def _part(base: Path | None, parts: Split, part: str) -> tuple[str, list[str], list[Any] | None]:
    """The part's name, its paths and its labels; None if the split has no labels."""
    where = str(base) if base else "split"
    name = "validation" if part == "val" else part
    if name not in ("train", "validation", "test"):
        raise ValueError(f"part is {part!r}; expected 'train', 'validation' or 'test'.")
    keys = [key for key in ("val" if name == "validation" else name, name) if key in parts]
    if not keys:
        raise ValueError(f"{where} has no part {part!r}; it has {_bounded.short(list(parts))}. Choose one of them.")
    content = parts[keys[0]]
    content = content if isinstance(content, Mapping) else {"path": content}
    paths, labels = content.get("path"), content.get("label")
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f"{where}: expected the paths of part {part!r} as a list of names, got {_bounded.short(paths)}."
        )
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(paths)):
        count = len(labels) if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise ValueError(
            f"{where}: part {part!r} has {len(paths)} paths and as labels {count}; expected a label for each path. The "
            "file is damaged: make it again."
        )
    return name, paths, labels


def _find(paths: Sequence[str], folder: Path | None, root: Path | None) -> list[Path]:
    """The files of all networks of a split."""
    files, missing = [], []
    for path in map(Path, paths):
        if root is not None:
            places = [root.joinpath(*path.parts[-3:]), root.joinpath(*path.parts[-2:])]
        else:
            places = [path] if folder is None else [folder / path, path]
        file = next((place for place in places if _is_file(place)), None)
        if file is None:
            missing.append(places[0])
        else:
            files.append(file)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} networks of the split are missing, the first is {str(missing[0])[:1000]}. "
            "Pass as `root` the folder that contains the networks' folders."
        )
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _tokens(path: Path) -> list[str] | None:
    """The words of the folder's name in name_part_label_index/checkpoints/file."""
    return path.parents[1].name.split("_") if path.parent.name == "checkpoints" else None


def _label_in_name(path: Path) -> str | None:
    tokens = _tokens(path)
    if tokens is not None:
        return tokens[-2] if len(tokens) > 1 else None
    match = re.search(r"_(\d+)s$", path.parent.name)
    return match[1] if match else None


def _index_in_name(path: Path) -> int | None:
    tokens = _tokens(path)
    match = re.search(r"\d{1,18}$", path.stem if tokens is None else tokens[-1])
    return int(match[0]) if match else None


def _is_class(value: Any) -> bool:
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int and 0 <= value < 2**32 else ""
    return re.fullmatch(r"\d{1,9}", text) is not None


def _label(path: Path, named: Any, stored: np.ndarray | None) -> int:
    """A network's label from the split or its name, and from its file, which must not disagree."""
    in_file = None if stored is None else stored.item() if not stored.ndim else stored[:9].tolist()
    given = [value for value in (named, in_file) if value is not None]
    if not given:
        raise ValueError(
            f"{path}: the network has no label: not in the split, nor in the name of its folder, nor in the file. Add "
            "the list 'label' to every part of the split."
        )
    for value in given:
        if not _is_class(value):
            raise ValueError(
                f"{path}: its label is {_bounded.short(value)}; expected the number of a class, like 5. Number the "
                "classes."
            )
    labels = [int(value) for value in given]
    if labels[0] != labels[-1]:
        raise ValueError(
            f"{path}: the split or the folder says label {labels[0]}, the file {labels[1]}. The split is of another "
            "data set, or in another order: make it again."
        )
    return labels[0]


def _numbered_files(root: Path) -> list[Path]:
    """The files of CIFAR-10's networks by their numbers, without augmented copies."""
    augmented = re.compile(r".*_aug\d+_\d+s")
    files = [path for path in root.glob("*_*s/net*.pth") if not augmented.fullmatch(path.parent.name)]
    return sorted(files, key=lambda path: (_index_in_name(path) or 0, path))


def _check_numbers_differ(root: Path, files: Sequence[Path]) -> None:
    numbers = [_index_in_name(path) for path in files]
    repeated = [path for path, number in zip(files[1:], numbers, strict=False) if _index_in_name(path) == number]
    if repeated:
        raise ValueError(
            f"{root}: {len(repeated)} networks have the number of another one, the first is {repeated[0]}. Pass a "
            "folder with the fits of one initialization alone."
        )


def _named_part(path: Path) -> str:
    tokens = set(_tokens(path) or ())
    parts = [part for part in ("train", "test") if tokens & {part, f"{part}ing"}]
    if len(parts) != 1:
        raise ValueError(
            f"{path}: expected 'training' or 'testing' in the name of the network's folder, got neither or both. "
            "Rename it, or write the split by hand."
        )
    return parts[0]


def _numbered_part(path: Path) -> str:
    number = _index_in_name(path)
    if number is None:
        raise ValueError(f"{path}: expected a name that ends in a number, like net17.pth. Rename it.")
    return "train" if number < _CIFAR_TEST else "test"
