"""What the experiments share: the folder of a run, its images, its INRs and the options of its training."""

import dataclasses
import enum
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments import progress
from jax_scalegmn import architecture, io, network, training, zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.zoo import Zoo


class Initialization(enum.Enum):
    """How the INRs start: see `network.standard` and `network.near_zero`."""

    STANDARD = "standard"
    NEAR_ZERO = "near_zero"


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How many images serve for what."""

    train_images: int | None = None
    """At most so many training images; None for all but those for selection and, in digits, scoring."""
    selection_images: int = 100
    scoring_images: int = 297


@dataclasses.dataclass(frozen=True)
class ZooConfig(ImageConfig):
    """The INRs."""

    widths: tuple[int, ...] = (2, 16, 16, 1)
    w0: float = 30.0
    initialization: Initialization = Initialization.NEAR_ZERO
    steps: int = 300
    learning_rate: float = 1e-3
    train_fits: int = 4
    """Independent fits of every training image; selection and scoring images get two."""
    part: int = 8192
    """Networks fitted by one call and saved together: what an interruption can lose."""
    chunk: int = 128
    """Networks trained side by side inside a call."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training of a model."""

    batch_size: int = 64
    epochs: int = 32
    learning_rate: float = 8e-3
    warmup_steps: int = 200
    cosine: bool = True
    """Whether the learning rate falls to 0 along a cosine until the last epoch; False as published."""
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    micro_batch: int | None = 16
    """Networks differentiated at a time, for less memory and fuller caches; None for the whole batch."""

    def make_optimizer(self, networks: int) -> optax.GradientTransformation:
        """The optimizer for epochs over so many networks."""
        return training.make_optimizer(
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=networks // self.batch_size * self.epochs if self.cosine else None,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has. Options of an unfinished run must stay the same when it is resumed."""

    out: Path
    data: Path | None = None
    """An npz file of gray images, a folder of MNIST or Fashion-MNIST IDX files, or an archive of CIFAR-10; None for
    scikit-learn's digits."""
    resume: bool = False
    """Go on in a folder that holds a run already."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A run on INRs."""

    zoo: ZooConfig = ZooConfig()


SPLITS = ("train", "selection", "scoring")


# --- the folder of a run ------------------------------------------------------------------------------------------


def claim(config: RunConfig) -> None:
    """Makes the folder of the run, or checks that a run in it may go on."""
    path = config.out / "config.json"
    mine = plain(dataclasses.replace(config, resume=False))
    if path.exists():
        if not config.resume:
            raise SystemExit(f"{config.out} holds a run already. Go on with --resume, or name another folder by --out.")
        theirs = json.loads(path.read_text())
        if theirs != mine:
            differences = [f"{k}: {theirs.get(k)} then, {v} now" for k, v in mine.items() if theirs.get(k) != v]
            raise SystemExit(
                f"{config.out} holds a run with other options ({'; '.join(differences)}). Use the same ones."
            )
        return
    if config.resume:
        raise SystemExit(
            f"{config.out} holds no run to resume. Name the folder of one by --out, or leave out --resume."
        )
    write_json(path, mine)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON values as a file, atomically; NaN and infinities are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.replacing(path, overwrite=True) as written:
        written.write_text(json.dumps(value, indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """A configuration as JSON values."""

    def convert(leaf: Any) -> Any:
        return leaf.value if isinstance(leaf, enum.Enum) else str(leaf)

    return json.loads(json.dumps(dataclasses.asdict(value), default=convert))


def environment() -> dict[str, str]:
    """The device and the versions that numbers were measured with."""
    packages = ("jax", "jaxlib", "flax", "optax", "jraph", "orbax-checkpoint", "numpy")
    return {
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


# --- data and zoo -------------------------------------------------------------------------------------------------


def load_images(config: RunConfig, settings: ImageConfig) -> dict[str, images.Images]:
    """The images of training, selection and scoring; no image is in two of them.

    Files bring their own test images, which serve for scoring; of the digits some are set apart.
    """
    if config.data is None:
        given = images.digits()
        held_out = settings.scoring_images
    else:
        given, scoring = images.load(config.data)
        held_out = 0
    order = np.random.default_rng(config.seed).permutation(len(given.images))
    rest = len(order) - settings.selection_images - held_out
    count = rest if settings.train_images is None else settings.train_images
    if not 1 <= count <= rest:
        raise ValueError(
            f"zoo.train_images is {count}; of {len(order)} images {rest} are left beside {settings.selection_images} "
            f"for selection and {held_out} for scoring. Lower one of the three."
        )
    selected = order[rest : rest + settings.selection_images]
    if config.data is None:
        scoring = _rows(given, order[rest + settings.selection_images :])
    else:
        rows = np.random.default_rng(config.seed).permutation(len(scoring.images))
        scoring = _rows(scoring, rows[: settings.scoring_images])
    return dict(zip(SPLITS, (_rows(given, order[:count]), _rows(given, selected), scoring), strict=True))


def fit_zoo(
    config: Config, arch: Architecture, split: str, given: images.Images, interruption: progress.Interruption
) -> Zoo:
    """The INRs of one split, fitted in parts; parts that a former run saved are read instead."""
    settings = config.zoo
    fits = settings.train_fits if split == "train" else 2
    image_index = np.tile(np.arange(len(given.images)), fits)
    parts = []
    with progress.bar(f"INRs for {split}", len(image_index), "networks") as advance:
        for number, first in enumerate(range(0, len(image_index), settings.part)):
            path = config.out / "zoo" / f"{split}-{number:04d}.safetensors"
            rows = image_index[first : first + settings.part]
            if path.exists():
                parts.append(zoo.load(path))
                advance(len(rows), "read")
                continue
            # Every part of every split starts from keys of its own.
            entropy = [config.seed, SPLITS.index(split), number]
            seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0]) // 2
            part = zoo.fit_images(
                arch,
                given.images,
                given.labels,
                image_index=rows,
                seed=seed,
                learning_rate=settings.learning_rate,
                num_steps=settings.steps,
                initialization=getattr(network, settings.initialization.value),
                chunk=settings.chunk,
                progress=advance,
            )
            zoo.save(part, path)
            parts.append(part)
            interruption.stop_if_requested(f"{first + len(rows)} of {len(image_index)} INRs for {split}")
    return zoo.concatenate(parts)


def describe_zoo(one: Zoo) -> dict[str, Any]:
    """What a zoo holds and how good its fits are, as JSON values."""
    psnr = one.records["psnr"]
    names = [architecture.describe(parameter.path) for parameter in one.arch.parameters]
    return {
        "networks": len(one),
        "images": len(np.unique(one.records["image_index"])),
        "psnr_db": {str(q): float(np.percentile(psnr, q)) for q in (5, 50, 95)},
        "scales": dict(zip(names, zoo.scales(one), strict=True)),
    } | one.settings


# --- private ------------------------------------------------------------------------------------------------------


def _rows(given: images.Images, rows: np.ndarray) -> images.Images:
    return images.Images(given.images[rows], given.labels[rows])
