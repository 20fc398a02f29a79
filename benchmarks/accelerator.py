"""What an accelerator is asked: rates, training steps, zoo fitting, matchings, and the autoencoder of MNIST INRs.

    python -m benchmarks.accelerator --data mnist.npz              # nine minutes or less on one GPU
    python -m benchmarks.accelerator --sections rates zoo          # some sections alone
    python -m benchmarks.accelerator --tiny --out tiny.jsonl       # small sizes, to try it on any machine

Every measurement is one JSON line, appended to `--out` as soon as it is there, with the device, the versions and the
command. A measurement that fails leaves a line with its error, one that no time is left for a line that says so, and
the others go on. Each section has a process of its own: it is ended where it takes too long, like a compiler that
tries many variants, and begun again after a measurement that it did not survive. Float32 products run at JAX's default
precision, on recent NVIDIA cards that of TensorFloat-32; the rates at the highest precision are next to them.
"""

import dataclasses
import functools
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_scalegmn as sg
from benchmarks import cnn, inr, matching, timing
from experiments import inr as experiment
from experiments import inr_zoo, progress, runs
from experiments.inr_zoo import ZooConfig
from jax_scalegmn import zoo
from jax_scalegmn.architecture import Architecture
from jax_scalegmn.io import images
from jax_scalegmn.zoo import Zoo

GRACE = 20.0  # the seconds that a measurement may go on after the time of its section
Section = Literal["rates", "zoo", "matching", "inr", "cnn", "mnist"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how long."""

    out: Path = Path("benchmarks/results/accelerator.jsonl")
    """The file that receives the lines."""
    sections: tuple[Section, ...] = ("rates", "zoo", "matching", "inr", "cnn", "mnist")
    """What to measure, in this order."""
    data: Path | None = None
    """MNIST, in any form that `experiments.inr` reads, for the section `mnist`; with `--tiny`, None for digits."""
    minutes: float = 9.0
    """The number of minutes after which all has ended."""
    minutes_mnist: float = 2.5
    """The number of minutes set apart for the section `mnist`, the fitting of its INRs included."""
    processes: bool = True
    """Whether each section has a process of its own. Without it nothing ends a measurement that takes long."""
    tiny: bool = False
    """Whether everything is measured at small sizes, to try it without an accelerator."""


class Sizes(NamedTuple):
    """The sizes of all sections, and the seconds after which a section begins no other measurement."""

    product: int
    copied_mib: int
    repeats: int
    pairs: int
    matched: tuple[Architecture, ...]
    inr: inr.Config
    cnn: cnn.Config
    mnist: experiment.Config
    fitted_at_once: int
    seconds: dict[str, float]


# A measurement: what it is of, and the function that takes it.
Case = tuple[str, Callable[[], Iterable[dict[str, Any]]]]
# (what to measure, its section, the first case, the time until which to begin, the command, the number of the case that
# has begun) -> nothing: rows are appended to the file.
Measure = Callable[[Config, Section, int, float, str, Any], None]


def main(
    config: Config, command: str = "python -m benchmarks.accelerator", *, measure: Measure | None = None
) -> list[dict[str, Any]]:
    """Measures section after section; prints every row as a JSON line, appends it to `config.out`, and returns all.

    Args:
      config: What to measure.
      command: The command that the lines name.
      measure: The function that measures a section; None for `measure_section`.
    """
    measure, sizes = measure or measure_section, _tiny() if config.tiny else _full()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    before = len(_lines(config.out))
    end = time.time() + 60 * config.minutes
    for number, section in enumerate(config.sections):
        apart = 60 * config.minutes_mnist if "mnist" in config.sections[number + 1 :] else 0.0
        until = min(end - apart - GRACE, time.time() + sizes.seconds.get(section, 60 * config.minutes_mnist))
        if config.processes:
            _in_processes(config, section, until, command, measure)
        else:
            measure(config, section, 0, until, command, types.SimpleNamespace())
    return [json.loads(line) for line in _lines(config.out)[before:]]


def measure_section(config: Config, section: Section, first: int, until: float, command: str, begun: Any) -> None:
    """Takes the measurements of a section from one of them on, and appends their lines to the file.

    Args:
      config: What to measure.
      section: The section.
      first: The number of its first case.
      until: The time, in seconds since 1970, after which no other case begins.
      command: The command that the lines name.
      begun: An object whose `value` becomes the number of the case that has begun.
    """
    local = time.perf_counter() + until - time.time()
    for number, (name, measure) in enumerate(_cases(config, section, local)):
        if number < first:
            continue
        begun.value = number
        about = {"section": section, "case": name, "command": command, "environment": runs.environment()}
        if time.time() >= until:
            _keep(config, about | {"skipped": "no time was left"})
            continue
        try:
            for row in measure():
                _keep(config, about | row | _device_peak())
        except Exception as error:  # whatever a driver, a compiler or the memory objects to: the others go on
            _keep(config, about | {"error": f"{type(error).__name__}: {error}"[:1000]})


def _in_processes(config: Config, section: Section, until: float, command: str, measure: Measure) -> None:
    """Takes the measurements of a section in another process, and in a further one where it does not survive one."""
    # This process uses no device, whose memory the others need.
    spawn, names, first = multiprocessing.get_context("spawn"), [name for name, _ in _cases(config, section, 0.0)], 0
    about = {"section": section, "command": command}
    while first < len(names) and time.time() < until:
        begun = spawn.Value("i", first)
        process = spawn.Process(target=measure, args=(config, section, first, until, command, begun), daemon=True)
        process.start()
        process.join(max(0.0, until + GRACE - time.time()))
        late = process.is_alive()
        process.kill()
        process.join()
        if not late and process.exitcode == 0:
            return
        first = begun.value + 1
        how = f"was ended {GRACE:.0f} s after the time of its section" if late else "did not survive it"
        reason = f"The process {how} (exit code {process.exitcode})."
        _keep(config, about | {"case": names[first - 1], "error": reason})
    for name in names[first:]:
        _keep(config, about | {"case": name, "skipped": "no time was left"})


# --- sections -----------------------------------------------------------------------------------------------------


def rates(config: Config, sizes: Sizes, until: float) -> Iterator[Case]:
    """The rates of large matrix products, and of a pass over an array."""

    def product(dtype: str, precision: str | None) -> Iterator[dict[str, Any]]:
        call, gflop = timing.matmul(sizes.product, dtype, precision)
        seconds = timing.in_turn({"matmul": call}, repeats=sizes.repeats)["matmul"]
        yield {
            "benchmark": "matmul",
            "size": sizes.product,
            "dtype": dtype,
            "precision": precision or "default",
            "tflop_per_second": gflop / seconds["median_s"] / 1000,
            **seconds,
        }

    def copy() -> Iterator[dict[str, Any]]:
        array = jnp.ones((sizes.copied_mib, 2**18), jnp.float32)
        call = functools.partial(jax.jit(lambda x: x + 1), array)
        seconds = timing.in_turn({"copy": call}, repeats=sizes.repeats)["copy"]
        moved = 2 * array.nbytes / seconds["median_s"]
        yield {"benchmark": "memory", "mib": sizes.copied_mib, "gb_per_second": moved / 1e9, **seconds}

    for dtype, precision in (("float32", None), ("float32", "highest"), ("bfloat16", None)):
        yield f"{dtype} {precision or 'default'}", functools.partial(product, dtype, precision)
    yield "memory", copy


def fit_zoos(config: Config, sizes: Sizes, until: float) -> Iterator[Case]:
    """The fitting of INRs, by the number of them that are fitted at once."""
    for chunk in sizes.inr.zoo_chunks:
        yield f"{chunk} at once", lambda chunk=chunk: [inr.zoo_row(sizes.inr, chunk)]


def match(config: Config, sizes: Sizes, until: float) -> Iterator[Case]:
    """Vmapped weight matchings, the assignments solved on the device and on the host."""

    def measure(arch: Architecture, name: str, solve: Any) -> Iterator[dict[str, Any]]:
        row = matching.matching_row("batch", arch, sizes.pairs, {name: solve}, sizes.repeats, most_seconds=5.0)
        parts = {key: row.pop(key)[name] for key in ("seconds", "compile_s", "peak_mib")}
        each = parts["seconds"]["median_s"] / sizes.pairs
        yield {"benchmark": "matching", "solver": name, "ms_per_pair": 1000 * each, **row, **parts}

    for arch in sizes.matched:
        for name, solve in matching.SOLVERS.items():
            yield f"{arch}, {name}", functools.partial(measure, arch, name, solve)


def train_on_inrs(config: Config, sizes: Sizes, until: float) -> Iterator[Case]:
    """Encoder forward and training step of the autoencoder of INRs, all networks of a batch at once."""
    for batch_size in sizes.inr.batch_sizes:
        for dtype in sizes.inr.dtypes:
            yield f"{dtype}, {batch_size}", functools.partial(inr.model_rows, sizes.inr, batch_size, dtype)


def train_on_cnns(config: Config, sizes: Sizes, until: float) -> Iterator[Case]:
    """Encoder forward and training step of the autoencoder of CNNs, all networks of a batch at once."""
    for batch_size in sizes.cnn.batch_sizes:
        whole = dataclasses.replace(sizes.cnn, micro_batches=(batch_size,))
        for dtype in sizes.cnn.dtypes:
            for activation in sizes.cnn.activations:
                measure = functools.partial(cnn.autoencoder_rows, whole, activation, batch_size, dtype)
                yield f"{activation}, {dtype}, {batch_size}", measure


def train_on_mnist(config: Config, sizes: Sizes, until: float) -> Iterator[Case]:
    """The preset `mnist` of `experiments.inr` on as many INRs, and for as many epochs, as the time allows."""

    def measure() -> Iterator[dict[str, Any]]:
        if config.data is None and not config.tiny:
            raise ValueError("The section mnist has no images; expected a file or folder of MNIST. Name it by --data.")
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, progress.Interruption() as interruption:
            settings = dataclasses.replace(sizes.mnist, out=Path(folder), data=config.data)
            given = runs.load_images(settings, settings.zoo)
            arch = inr_zoo.architecture_of(settings.zoo)
            selection = inr_zoo.fit_split(settings, arch, "selection", given["selection"], interruption)
            share = 0.3 * (until - begin)
            train = _fit_until(settings.zoo, arch, given["train"], sizes.fitted_at_once, begin + share)
            fitted = time.perf_counter()
            limited = dataclasses.replace(settings.train, minutes=max(0.0, until - fitted) / 60)
            settings = dataclasses.replace(settings, train=limited)
            zoos = {"train": train, "selection": selection}
            trained = experiment.fit_autoencoder(settings, zoos, given["train"], interruption)
        yield {
            "benchmark": "mnist",
            "network": str(arch),
            "train_networks": len(train),
            "selection_networks": len(selection),
            "zoo_steps": settings.zoo.steps,
            "median_psnr_db": float(np.median(train.records["psnr"])),
            "zoo_seconds": fitted - begin,
            "training_seconds": time.perf_counter() - fitted,
            "parameters": trained.parameters,
            "train": runs.plain(settings.train),
            "curve": _curve(trained.history, float(given["train"].images.var())),
        }

    yield "mnist", measure


SECTIONS: dict[str, Callable[[Config, Sizes, float], Iterator[Case]]] = {
    "rates": rates,
    "zoo": fit_zoos,
    "matching": match,
    "inr": train_on_inrs,
    "cnn": train_on_cnns,
    "mnist": train_on_mnist,
}


# --- private ------------------------------------------------------------------------------------------------------


def _cases(config: Config, section: Section, until: float) -> Iterator[Case]:
    return SECTIONS[section](config, _tiny() if config.tiny else _full(), until)


def _keep(config: Config, row: dict[str, Any]) -> None:
    line = json.dumps(row, allow_nan=False)
    print(line, flush=True)
    with config.out.open("a") as file:
        file.write(line + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _full() -> Sizes:
    """The published sizes."""
    preset = experiment.PRESETS["mnist"][1]
    return Sizes(
        product=8192,
        copied_mib=4096,
        repeats=5,
        pairs=4096,
        matched=(sg.mlp((16, 32, 32, 10)), sg.siren((2, 32, 32, 1))),
        inr=inr.Config(
            batch_sizes=(128, 512, 32),
            micro_batches=(),
            zoo_networks=8192,
            zoo_steps=200,
            zoo_chunks=(128, 1024, 4096),
            matmul_size=8192,
            dtypes=("float32", "bfloat16"),
        ),
        cnn=cnn.Config(
            activations=("relu",), batch_sizes=(64, 256), matmul_size=8192, dtypes=("float32", "bfloat16"), repeats=5
        ),
        # All networks of a batch at once, which an accelerator's memory holds; constant learning rate, as published.
        mnist=dataclasses.replace(
            preset,
            zoo=dataclasses.replace(preset.zoo, selection_images=512, chunk=1024),
            train=dataclasses.replace(preset.train, micro_batch=None, cosine=False),
        ),
        fitted_at_once=4096,
        seconds={"rates": 40, "zoo": 60, "matching": 60, "inr": 150, "cnn": 100},
    )


def _tiny() -> Sizes:
    return Sizes(
        product=64,
        copied_mib=1,
        repeats=1,
        pairs=3,
        matched=(sg.mlp((2, 3, 2)),),
        inr=inr.Config((2,), (), (2, 3, 1), 4, 4, 1, 0.0, 1, 4, 2, (2,), 64, ("bfloat16",)),
        cnn=cnn.Config(
            channels=(1, 2),
            side=4,
            activations=("relu",),
            features=3,
            num_layers=1,
            batch_sizes=(2,),
            images_per_step=2,
            repeats=1,
            matmul_size=64,
        ),
        mnist=dataclasses.replace(
            experiment.PRESETS["tiny"][1],
            zoo=ZooConfig(
                widths=(2, 3, 1), steps=3, train_fits=1, train_images=8, selection_images=4, scoring_images=4, chunk=4
            ),
            model=dataclasses.replace(experiment.PRESETS["tiny"][1].model, features=4),
            train=experiment.TrainConfig(4, epochs=2, warmup_steps=2, micro_batch=None, orbit_weight=0.0),
        ),
        fitted_at_once=4,
        seconds=dict.fromkeys(SECTIONS, 600.0),
    )


def _device_peak() -> dict[str, float]:
    """The largest memory in use since the process began, where the device counts it."""
    statistics = jax.devices()[0].memory_stats() or {}
    return {"device_peak_mib": statistics["peak_bytes_in_use"] / 2**20} if "peak_bytes_in_use" in statistics else {}


def _fit_until(settings: ZooConfig, arch: Architecture, given: images.Images, at_once: int, until: float) -> Zoo:
    """INRs of the first images, one group of them after the other while there is time: at least one group."""
    parts = []
    for first in range(0, len(given.images), at_once):
        rows = np.arange(first, min(first + at_once, len(given.images)))
        part = zoo.fit_images(
            arch,
            given.images,
            given.labels,
            image_index=rows,
            seed=first,
            learning_rate=settings.learning_rate,
            num_steps=settings.steps,
            initialization=inr_zoo.INITIALIZATIONS[settings.initialization],
            networks_at_once=at_once,
        )
        parts.append(part)
        if time.perf_counter() >= until:
            break
    return zoo.concatenate(parts)


def _curve(history: list[dict[str, float]], variance: float) -> list[dict[str, float]]:
    """Reconstruction on the selection networks against the seconds of training, epoch by epoch."""
    seconds = np.cumsum([epoch["seconds"] for epoch in history])
    return [
        {
            "step": epoch["step"],
            "seconds": float(spent),
            "reconstruction": epoch["selection_reconstruction"],
            "share_of_variance": epoch["selection_reconstruction"] / variance,
        }
        for epoch, spent in zip(history, seconds, strict=True)
    ]


if __name__ == "__main__":
    main(tyro.cli(Config), shlex.join(["python", "-m", "benchmarks.accelerator", *sys.argv[1:]]))
