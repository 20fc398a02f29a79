"""Published folders of INRs, PyTorch checkpoints each, from the files that their authors give out.

Nothing is downloaded, and no file can run code.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_scalegmn import architecture, io
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import tensors
from jax_scalegmn.zoo import _populations

__all__ = ["Split", "load", "split"]

# Paths, and labels where they are known, by part: {"train": {"path": [...], "label": [...]}, "val": ..., "test": ...}.
Split: TypeAlias = Mapping[str, Any]

CIFAR_TEST = 50_000  # where CIFAR-10's test images begin, counted behind its training images


def load(
    split: str | os.PathLike[str] | Split,
    arch: Architecture,
    *,
    part: str,
    root: str | os.PathLike[str] | None = None,
) -> _populations.Zoo:
    """The INRs of one part of a published data set, in the order of its split.

    MNIST and Fashion-MNIST by Navon et al. (2023, arXiv 2301.12780): siren((2, 32, 32, 1)). CIFAR-10 by Zhou et al.
    (2023, arXiv 2302.14040): siren((2, 32, 32, 3), offset=0.0). A network's label is that of the split; of a split
    without labels that in the name of its folder, like 5 of mnist_png_training_5_0/checkpoints/model_final.pth and of
    randinit_smaller_5s/net0.pth; and where the folder has none, as of Fashion-MNIST, the one in the file.

    Args:
      split: a JSON file like mnist_splits.json, with the paths and labels of every part, {"train": {"path": [...],
        "label": [...]}, "val": ..., "test": ...}; a part may be the bare list of its paths, as of Fashion-MNIST. Or
        what such a file holds, as `split` returns it.
      arch: of all the networks.
      part: "train", "validation" (also "val") or "test".
      root: the folder in which the folders of the networks stand; of every path only the last three components, or
        two, are looked up there. None: the paths as they are, relative to the file of the split or the working folder.

    Returns:
      The zoo, with the record label (int32), the record image_index where every name ends in a number, and the
      settings source and part. Reading 60,000 files takes minutes, `zoo.load` of what `zoo.save` wrote seconds.

    Raises:
      FileNotFoundError: if there is no such split, or networks are missing.
      ValueError: on a damaged split, a part that it lacks, a label that is no number, or a file that is not a network
        of this architecture.
    """
    base, parts = _read_split(split)
    part, listed, labels = _part(base, parts, part)
    files = _find(listed, base.parent if base else None, Path(root) if root is not None else None)
    numbers = np.empty(len(files), np.int32)
    stacks: list[np.ndarray] = []
    for row, path in enumerate(files):
        state_dict = tensors.read(path)
        numbers[row] = _label(path, labels[row] if labels else _label_in_name(path), state_dict.pop("label", None))
        try:
            leaves = jax.tree.leaves(io.from_torch(arch, state_dict))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        stacks = stacks or [np.empty((len(files), *leaf.shape), leaf.dtype) for leaf in leaves]
        for stack, leaf in zip(stacks, leaves, strict=True):
            if leaf.dtype != stack.dtype:
                raise ValueError(
                    f"{path}: its tensors are {leaf.dtype}, those of {files[0]} {stack.dtype}; expected one precision "
                    "throughout. Load the files of each apart."
                )
            stack[row] = leaf
    params = jax.tree.unflatten(
        jax.tree.structure(architecture.pack(arch, arch.parameters)), [jnp.asarray(stack) for stack in stacks]
    )
    indices = [_index_in_name(path) for path in files]
    records = {"label": numbers}
    if all(index is not None for index in indices):
        records["image_index"] = np.array(indices, np.int64)
    source = str(base if base else os.path.commonpath([path.parent for path in files]))
    return _populations.Zoo(arch, params, records, {"source": source, "part": part})


def split(root: str | os.PathLike[str], *, validation: int = 5000, seed: int = 0) -> dict[str, dict[str, list[Any]]]:
    """A split, as `load` reads it, of a folder of INRs that came without one.

    Of folders like mnist_png_training_5_0 and mnist_png_testing_7_12 (Navon et al. 2023, arXiv 2301.12780) the name
    says whether a network is for training or testing; the validation networks are drawn from the former. Published
    splits of them were drawn at random and without a seed. Of files like randinit_smaller_5s/net17.pth (CIFAR-10 by
    Zhou et al. 2023, arXiv 2302.14040) the number says it, as published: the last ones of the first 50000 are for
    validation, what lies behind for testing. Folders of their augmented copies, like randinit_smaller_aug3_5s, are
    left out.

    Args:
      root: the folder in which the folders of the networks stand.
      validation: how many of the training networks are for validation.
      seed: of their choice.

    Returns:
      Paths that begin with `root` and labels of the parts "train", "val" and "test"; plain lists, strings and numbers.

    Raises:
      FileNotFoundError: if there are no networks in such folders.
      ValueError: if a name does not tell the part or the label, two networks of CIFAR-10 have one number, or there are
        not more training networks than `validation`.
    """
    root = Path(root)
    files = sorted(root.glob("*/checkpoints/model_final.pth"))
    by_number = not files
    if by_number:
        augmented = re.compile(r".*_aug\d+_\d+s")
        files = [path for path in root.glob("*_*s/net*.pth") if not augmented.fullmatch(path.parent.name)]
        files = sorted(files, key=lambda path: (_index_in_name(path) or 0, path))
    if not files:
        raise FileNotFoundError(
            f"{root}: expected folders like mnist_png_training_5_0/checkpoints with a model_final.pth, or like "
            "randinit_smaller_5s with net0.pth and further ones; got none. Pass the folder in which they stand."
        )
    of_part: dict[str, list[Path]] = {"train": [], "test": []}
    for path in files:
        of_part[_numbered_part(path) if by_number else _named_part(path)].append(path)
    count = len(of_part["train"])
    if not 0 <= validation < count:
        raise ValueError(
            f"{root}: expected fewer validation than training networks, got {validation} of {count}. Lower validation."
        )
    if by_number:
        numbers = [_index_in_name(path) for path in files]
        repeated = [path for path, number in zip(files[1:], numbers, strict=False) if _index_in_name(path) == number]
        if repeated:
            raise ValueError(
                f"{root}: {len(repeated)} networks have the number of another one, the first is {repeated[0]}. Pass a "
                "folder with the fits of one initialization alone."
            )
        drawn = np.arange(count - validation, count)
    else:
        drawn = np.random.default_rng(seed).permutation(count)[:validation]
    held_out = set(drawn.tolist())
    parts = {
        "train": [path for row, path in enumerate(of_part["train"]) if row not in held_out],
        "val": [path for row, path in enumerate(of_part["train"]) if row in held_out],
        "test": of_part["test"],
    }
    return {
        name: {
            "path": [path.as_posix() for path in paths],
            "label": [_label(path, _label_in_name(path), None) for path in paths],
        }
        for name, paths in parts.items()
    }


# --- private ------------------------------------------------------------------------------------------------------


def _read_split(split: str | os.PathLike[str] | Split) -> tuple[Path | None, Split]:
    """The file of a split, where it is one, and the split."""
    if isinstance(split, Mapping):
        return None, split
    path = Path(split)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no split there; expected a JSON file like mnist_splits.json. Make one with inr_folders.split."
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # also where the bytes are no text
        raise ValueError(f"{path}: expected JSON, got a file that is none ({error}). Get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with the parts of the data set, got a {type(content).__name__}.")
    return path, content


def _part(base: Path | None, parts: Split, part: str) -> tuple[str, list[str], list[Any] | None]:
    """The part's name, its paths and, where the split has them, its labels."""
    where = str(base) if base else "split"
    name = "validation" if part == "val" else part
    if name not in ("train", "validation", "test"):
        raise ValueError(f"part is {part!r}; expected 'train', 'validation' or 'test'.")
    found = [key for key in ("val" if name == "validation" else name, name) if key in parts]
    if not found:
        raise ValueError(f"{where} has no part {part!r}; it has {list(parts)}. Choose one of them.")
    content = parts[found[0]]
    content = content if isinstance(content, Mapping) else {"path": content}
    paths, labels = content.get("path"), content.get("label")
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: expected the paths of part {part!r} as a list of names, got {str(paths)[:100]!r}.")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(paths)):
        count = len(labels) if isinstance(labels, list) else f"a {type(labels).__name__}"
        raise ValueError(
            f"{where}: part {part!r} has {len(paths)} paths and as labels {count}; expected a label for each path. The "
            "file is damaged: make it again."
        )
    return name, paths, labels


def _find(paths: Sequence[str], folder: Path | None, root: Path | None) -> list[Path]:
    """The files of a split, all of them."""
    found, missing = [], []
    for path in map(Path, paths):
        if root is not None:
            places = [root.joinpath(*path.parts[-3:]), root.joinpath(*path.parts[-2:])]
        else:
            places = [path] if folder is None else [folder / path, path]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            missing.append(places[0])
        else:
            found.append(file)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} networks of the split are missing, the first is {missing[0]}. Pass as "
            "`root` the folder in which the folders of the networks stand."
        )
    return found


def _tokens(path: Path) -> list[str] | None:
    """Of name_part_label_index/checkpoints/file the words of the folder's name."""
    return path.parents[1].name.split("_") if path.parent.name == "checkpoints" else None


def _label_in_name(path: Path) -> str | None:
    tokens = _tokens(path)
    if tokens is not None:
        return tokens[-2] if len(tokens) > 1 else None
    found = re.search(r"_(\d+)s$", path.parent.name)
    return found[1] if found else None


def _index_in_name(path: Path) -> int | None:
    tokens = _tokens(path)
    found = re.search(r"\d{1,18}$", path.stem if tokens is None else tokens[-1])
    return int(found[0]) if found else None


def _label(path: Path, named: Any, stored: np.ndarray | None) -> int:
    """A network's label from the split or its name, and from its file, which must not disagree."""
    given = [value for value in (named, None if stored is None else stored.tolist()) if value is not None]
    if not given:
        raise ValueError(
            f"{path}: the network has no label in the split, the name of its folder or the file. Add the list 'label' "
            "to every part of the split."
        )
    for value in given:
        if type(value) not in (int, str) or not re.fullmatch(r"\d{1,9}", str(value).strip()):
            raise ValueError(
                f"{path}: its label is {value!r}; expected the number of a class, like 5. Number the classes."
            )
    labels = [int(value) for value in given]
    if labels[0] != labels[-1]:
        raise ValueError(
            f"{path}: the split or the folder says label {labels[0]}, the file {labels[1]}. The split is of another "
            "data set, or in another order: make it again."
        )
    return labels[0]


def _named_part(path: Path) -> str:
    tokens = set(_tokens(path) or ())
    parts = [part for part in ("train", "test") if tokens & {part, f"{part}ing"}]
    if len(parts) != 1:
        raise ValueError(
            f"{path}: expected 'training' or 'testing' in the name of the network's folder, got neither or both. "
            "Rename it, or write the split yourself."
        )
    return parts[0]


def _numbered_part(path: Path) -> str:
    number = _index_in_name(path)
    if number is None:
        raise ValueError(f"{path}: expected a name that ends in a number, like net17.pth. Rename it.")
    return "train" if number < CIFAR_TEST else "test"
