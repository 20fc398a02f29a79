"""What the experiments on INRs share: their options, and the INRs of training, selection and scoring."""

import dataclasses
import enum
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jax_scalegmn as sg
from experiments import parts as fit_parts
from experiments import progress, runs
from jax_scalegmn import architecture, distributed, network, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.zoo import Zoo, inr_folders


class Initialization(enum.Enum):
    """How the INRs start: see `network.standard` and `network.near_zero`."""

    STANDARD = "standard"
    NEAR_ZERO = "near_zero"


INITIALIZATIONS = {Initialization.STANDARD: network.standard, Initialization.NEAR_ZERO: network.near_zero}


@dataclasses.dataclass(frozen=True)
class ZooConfig(runs.ImageConfig):
    """The INRs."""

    widths: tuple[int, ...] = (2, 16, 16, 1)
    """The number of neurons of every layer, inputs and outputs included."""
    w0: float = 30.0
    """The frequency of the sine."""
    offset: float = 0.5
    """The number added to the output: 0.5 as published for gray images, 0 for the INRs of CIFAR-10."""
    initialization: Initialization = Initialization.NEAR_ZERO
    """The distribution of the first weights."""
    steps: int = 300
    """The number of updates of every network."""
    learning_rate: float = 1e-3
    """The learning rate of Adam."""
    train_fits: int = 4
    """The number of independent fits of every training image; selection and scoring images get two."""
    part: int = 8192
    """The number of networks that are saved together, and in pieces of a few minutes before."""
    chunk: int = 128
    """The number of networks trained as one vmapped network."""


PUBLISHED = ZooConfig(
    size=(28, 28),
    widths=(2, 32, 32, 1),
    steps=1000,
    train_fits=1,
    selection_images=5000,
    scoring_images=10_000,
    chunk=32,
)
"""INRs of MNIST as in the papers, one of each image."""
SMALL = ZooConfig(
    size=(28, 28),
    widths=(2, 32, 32, 1),
    steps=300,
    learning_rate=4e-3,
    train_fits=2,
    train_images=4096,
    selection_images=256,
    scoring_images=500,
    part=1024,
    chunk=8,
)
"""8,192 of them that two cores fit in minutes."""
TINY = ZooConfig(
    widths=(2, 6, 6, 1), steps=60, train_fits=2, train_images=32, selection_images=8, scoring_images=8, chunk=16
)
"""A few small INRs, to try the machinery."""


@dataclasses.dataclass(frozen=True)
class Config(runs.RunConfig):
    """A run on INRs."""

    zoo: ZooConfig = ZooConfig()


def architecture_of(settings: ZooConfig) -> Architecture:
    """The architecture of the INRs."""
    return sg.siren(settings.widths, w0=settings.w0, offset=settings.offset)


def check_fits(settings: ZooConfig, train: images.Images, batch_size: int) -> None:
    """Checks, before any is fitted, that INRs of gray images are asked for, and enough of them for a batch.

    Raises:
      ValueError: If the widths are of no INR of gray images, or a batch is larger than the training networks.
    """
    if len(settings.widths) < 3 or (settings.widths[0], settings.widths[-1]) != (2, 1):
        raise ValueError(
            f"zoo.widths is {settings.widths}; expected 2 coordinates first, one or more hidden layers, and the 1 "
            "channel of gray images last, like 2 32 32 1."
        )
    check_batch(len(train.images) * settings.train_fits, batch_size)


def check_batch(networks: int, batch_size: int) -> None:
    """Checks that the training networks fill a batch.

    Raises:
      ValueError: If they do not.
    """
    if not 1 <= batch_size <= networks:
        raise ValueError(
            f"train.batch_size is {batch_size}; expected a number from 1 to {networks}, the training networks. Lower "
            "it, or raise zoo.train_images."
        )


# --- fitting ------------------------------------------------------------------------------------------------------


def fit_all(config: Config, given: Mapping[str, images.Images], interruption: progress.Interruption) -> dict[str, Zoo]:
    """The INRs of every split's images."""
    arch = architecture_of(config.zoo)
    return {split: fit_split(config, arch, split, given[split], interruption) for split in runs.SPLITS}


def fit_split(
    config: Config, arch: Architecture, split: str, given: images.Images, interruption: progress.Interruption
) -> Zoo:
    """The INRs of one split, fitted in parts; parts that a former run saved are read instead."""
    settings = config.zoo
    fits = settings.train_fits if split == "train" else 2
    image_index = np.tile(np.arange(len(given.images)), fits)
    parts = []
    with progress.bar(f"INRs for {split}", len(image_index), "networks") as advance:
        for number, first in enumerate(range(0, len(image_index), settings.part)):
            rows = image_index[first : first + settings.part]
            # Every part of every split starts from keys of its own.
            entropy = [config.seed, runs.SPLITS.index(split), number]
            fit_rows = functools.partial(
                _fit_rows,
                config,
                arch,
                given,
                rows,
                int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0]) // 2,
                advance,
            )
            plan = fit_parts.Plan(
                config.out / "zoo" / f"{split}-{number:04d}.safetensors",
                len(rows),
                settings.chunk * distributed.num_devices(runs.device_mesh(config)),
                settings.steps * given.images[0].size,
                "INRs",
            )
            parts.append(fit_parts.fit(config, plan, fit_rows, zoo.concatenate, interruption, advance))
            _check_fitted(parts[-1], plan.path)
            interruption.stop_if_requested(f"{first + len(rows)} of {len(image_index)} INRs for {split}")
    return zoo.concatenate(parts)


def _check_fitted(part: Zoo, path: Path) -> None:
    diverged = int((~np.isfinite(part.records["loss"])).sum())
    if diverged:
        raise FloatingPointError(
            f"{path}: the loss of {diverged} of {len(part)} INRs is infinite or NaN; expected finite ones. Lower "
            "zoo.learning_rate, and name another folder by --out."
        )


def _fit_rows(
    config: Config,
    arch: Architecture,
    given: images.Images,
    rows: np.ndarray,
    seed: int,
    advance: Callable[..., None],
    first: int,
    count: int,
) -> Zoo:
    """Some of the INRs of a part, whose images are the rows: the same as if all were fitted at once."""
    settings = config.zoo
    return zoo.fit_images(
        arch,
        given.images,
        given.labels,
        image_index=rows[first : first + count],
        seed=seed,
        first=first,
        learning_rate=settings.learning_rate,
        num_steps=settings.steps,
        initialization=INITIALIZATIONS[settings.initialization],
        networks_at_once=settings.chunk,
        progress=advance,
        mesh=runs.device_mesh(config),
    )


def zoo_key(config: Config) -> str:
    """Configs of which this text is the same fit the same INRs, once for all trials of a sweep."""
    settings = runs.plain(config)
    return json.dumps({name: settings.get(name) for name in ("zoo", "data", "seed", "zoo_path")})


def fit_zoo(config: Config) -> None:
    """Fits the INRs of a config, or what is left of them, into its folder."""
    given = runs.load_images(config, config.zoo)
    with runs.compilation(config), progress.Interruption() as interruption:
        fit_all(config, given, interruption)


# --- reading ------------------------------------------------------------------------------------------------------


def read(path: Path, settings: ZooConfig, seed: int) -> dict[str, Zoo]:
    """The INRs of training, selection and scoring in a zoo that somebody else made; no image is in two of them.

    Args:
      path: A folder of published INRs, or the JSON file of its split, as `zoo.inr_folders.load` reads them; a file of
        `zoo.save`; or the folder "zoo" of a former run.
      settings: Architecture of published INRs, and the largest number of images of each split.
      seed: The seed that divides a single file, or a folder without a split.

    Raises:
      ValueError: If the path is none of these, or its networks are no INRs or too few.
    """
    parts = _parts(path, settings, seed)
    for split, part in parts.items():
        inputs, outputs = (part.arch.neuron_layers[end].width for end in (0, -1))
        if (inputs, outputs) not in ((2, 1), (2, 3)):
            raise ValueError(
                f"{path}: its {split} networks {part.arch.name!r} map {inputs} inputs to {outputs} outputs; expected "
                "INRs, which map 2 coordinates to 1 or 3 channels. Name a zoo of INRs, or use experiments.cnn."
            )
        if part.arch != parts["train"].arch or "label" not in part.records:
            raise ValueError(
                f"{path}: its {split} networks are {part.arch.name!r} with the records {sorted(part.records)}; "
                f"expected {parts['train'].arch.name!r}, like those for training, and a record 'label'. Name a zoo "
                "of one architecture with labels."
            )
    if len(np.unique(parts["train"].records["label"])) < 2:
        raise ValueError(
            f"{path}: all training networks have one label; expected two labels or more. Name a larger zoo."
        )
    return parts


def pair_rows(networks: Zoo) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows of two independent fits of every image that has two or more; None where none has."""
    pairs = np.array([rows[:2] for rows in rows_by_image(networks) if len(rows) > 1], int).reshape(-1, 2)
    return (pairs[:, 0], pairs[:, 1]) if len(pairs) else None


def rows_by_image(networks: Zoo) -> list[list[int]]:
    """The rows of every image's fits; each network for itself where records do not say its image."""
    rows: dict[int, list[int]] = {}
    for row, image in enumerate(networks.records.get("image_index", np.arange(len(networks))).tolist()):
        rows.setdefault(image, []).append(row)
    return list(rows.values())


def describe(networks: Zoo) -> dict[str, Any]:
    """What a zoo holds and how good its fits are, as JSON values."""
    names = [architecture.describe(parameter.path) for parameter in networks.arch.parameters]
    described = {
        "networks": len(networks),
        "images": len(np.unique(networks.records.get("image_index", np.arange(len(networks))))),
        "scales": dict(zip(names, _scales(networks), strict=True)),
    }
    if "psnr" in networks.records:
        psnr = networks.records["psnr"]
        described["psnr_db"] = {str(q): float(np.percentile(psnr, q)) for q in (5, 50, 95)}
    return described | networks.settings


# --- private ------------------------------------------------------------------------------------------------------


def _scales(networks: Zoo) -> list[float]:
    """`zoo.scales` as numbers for a person, computed on the host."""
    values = jax.tree.map(
        np.asarray, jax.vmap(lambda params: architecture.unpack(networks.arch, params))(networks.params)
    )
    return [float(np.sqrt(np.square(value, dtype=float).mean())) for value in values]


def _parts(path: Path, settings: ZooConfig, seed: int) -> dict[str, Zoo]:
    if path.is_file() and path.suffix != ".json":
        return _divided(path, zoo.load(path), settings, seed)
    saved = {split: sorted(path.glob(f"{split}-*.safetensors")) for split in runs.SPLITS}
    if all(saved.values()):
        parts = {split: zoo.concatenate([zoo.load(file) for file in files]) for split, files in saved.items()}
        return {split: _first_images(part, split, settings) for split, part in parts.items()}
    found = [path] if path.is_file() else sorted(path.glob("*.json"))
    if len(found) == 1:
        return _published(path, found[0], settings)
    if any(path.glob("*/checkpoints/model_final.pth")) or any(path.glob("*_*s/net*.pth")):
        return _published(path, inr_folders.split(path, validation=settings.selection_images, seed=seed), settings)
    raise ValueError(
        f"{path}: expected a folder of published INRs with at most one JSON file of their split, a file of zoo.save, "
        f"or the folder 'zoo' of a former run of experiments.inr; got {_kind(path)}. Name one of them by --zoo."
    )


def _published(path: Path, split: Any, settings: ZooConfig) -> dict[str, Zoo]:
    names = {"train": "train", "selection": "validation", "scoring": "test"}
    arch = architecture_of(settings)
    try:
        parts = {name: _published_part(split, arch, part) for name, part in names.items()}
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{path}: expected published INRs {'-'.join(map(str, settings.widths))}; got: {error} "
            "Name their widths by --zoo.widths and their offset by --zoo.offset."
        ) from error
    return {name: _first_images(part, name, settings) for name, part in parts.items()}


def _published_part(split: Any, arch: Architecture, part: str) -> Zoo:
    """The networks of one part, which a split's file names by paths of its author's machine or of ours."""
    try:
        return inr_folders.load(split, arch, part=part)
    except FileNotFoundError:
        if not isinstance(split, Path):
            raise
        return inr_folders.load(split, arch, part=part, root=split.parent)


def _first_images(part: Zoo, split: str, settings: ZooConfig) -> Zoo:
    """The networks of as many images as the options allow."""
    most = {"train": settings.train_images, "selection": settings.selection_images, "scoring": settings.scoring_images}
    image = part.records.get("image_index", np.arange(len(part)))
    return part[np.isin(image, np.unique(image)[: most[split]])]


def _divided(path: Path, whole: Zoo, settings: ZooConfig, seed: int) -> dict[str, Zoo]:
    """One zoo as three: images drawn for scoring and selection, the others for training."""
    image = whole.records.get("image_index", np.arange(len(whole)))
    order = np.random.default_rng(seed).permutation(np.unique(image))
    held_out = settings.selection_images + settings.scoring_images
    if len(order) <= held_out:
        raise ValueError(
            f"{path}: its networks draw {len(order)} images; expected more than the {settings.selection_images} for "
            f"selection and {settings.scoring_images} for scoring. Lower zoo.selection_images or zoo.scoring_images."
        )
    scoring, selection, train = np.split(order, [settings.scoring_images, held_out])
    chosen = {"train": train[: settings.train_images], "selection": selection, "scoring": scoring}
    return {split: whole[np.isin(image, chosen[split])] for split in runs.SPLITS}


def _kind(path: Path) -> str:
    if not path.is_dir():
        return "no file and no folder"
    names = sorted(file.name for file in path.iterdir())
    return f"a folder with {len(names)} entries, like {names[:5]}"
