"""One run of an experiment in its folder, with the images and the options that all experiments share."""

import contextlib
import dataclasses
import enum
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, PartitionSpec

from experiments import options, ownership, progress, report, tables, watch, xla_flags
from jax_scalegmn import distributed, io, training, zoo
from jax_scalegmn.io import images


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How many images are used for what."""

    train_images: int | None = None
    """The largest number of training images; None for all that selection and, with the digits, scoring leave."""
    selection_images: int = 100
    """The number of images on which the best epoch is selected."""
    scoring_images: int = 297
    """The number of images on which the results are measured."""
    size: tuple[int, int] | None = None
    """The height and width that the images must have; None for any."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training of a model."""

    batch_size: int = 64
    """The number of networks in a batch."""
    epochs: int = 32
    """The number of passes over the training networks."""
    learning_rate: float = 8e-3
    """The learning rate after the warm-up."""
    warmup_steps: int = 200
    """The number of steps over which the learning rate rises to its value."""
    cosine: bool = True
    """Whether the learning rate falls to 0 along a cosine until the last epoch; False as published."""
    weight_decay: float = 0.01
    """The weight decay of AdamW."""
    clip_norm: float = 10.0
    """The largest norm of a gradient; longer ones are scaled down to it."""
    micro_batch: int | None = 16
    """The number of networks differentiated at a time, which bounds the memory; None for the whole batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for matrices with AdamW for the rest, of which 1e-2 is a good rate."""

    def make_optimizer(self, networks: int) -> optax.GradientTransformation:
        """Makes the optimizer for epochs over this number of networks."""
        return training.make_optimizer(
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps(networks),
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            optimizer=self.optimizer,
        )

    def decay_steps(self, networks: int) -> int | None:
        """The step at which the cosine ends for epochs over this number of networks; None for no cosine."""
        return networks // self.batch_size * self.epochs if self.cosine else None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has. Options of an unfinished run must stay the same when it is resumed."""

    out: Path
    """The folder of the run."""
    data: Path | None = None
    """An npz file of gray images, a folder of MNIST or Fashion-MNIST IDX files, or an archive of CIFAR-10; None for
    scikit-learn's digits."""
    resume: bool = False
    """Continue in a folder that already holds a run."""
    seed: int = 0
    """The seed of every random number of the run."""
    compilation_cache: bool = True
    """Whether compiled programs are kept in your cache folder, so that another run starts sooner. The variable
    JAX_COMPILATION_CACHE_DIR names another folder."""
    quick_compilation: bool = False
    """Whether programs are compiled with few optimizations, which takes less time than it costs in runs of seconds."""
    every_minutes: float | None = None
    """The most minutes between two checkpoints. One is saved at each epoch that is the best so far, at the end, and
    where a run is interrupted; None for one at every epoch."""
    mesh: int | None = None
    """The number of devices, of all processes, over which networks are fitted and batches are divided; -1 for all of
    them, None for one device, or with several processes for all."""
    cpu_devices: int | None = None
    """The number of devices that JAX makes of a CPU. On two cores two of them are faster than one that uses both. The
    run is then computed on the CPU, by all of them unless `mesh` says otherwise."""
    coordinator: str | None = None
    """The address of process 0, like 10.0.0.1:1234, in each of several processes. A TPU pod slice and Slurm need none
    of the three: they are found."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """The number of this process, from 0."""
    compile_only: str | None = None
    """A TPU topology like v5e:8x8: the programs are compiled for it, their costs shown, and nothing is run. It needs
    libtpu, and no TPU."""


SPLITS = ("train", "selection", "scoring")
# Options that say how and where to run, not what; a folder may be moved or copied.
HOW = (
    "out",
    "resume",
    "compilation_cache",
    "quick_compilation",
    "every_minutes",
    "mesh",
    "cpu_devices",
    "coordinator",
    "processes",
    "process",
    "compile_only",
)
_OWN = ("process",)  # options that differ between processes
# A user's own folder and limits stay.
_JAX_DEFAULTS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


# --- the run ------------------------------------------------------------------------------------------------------


def join(config: RunConfig) -> None:
    """Checks the numbers of the options, and joins the processes of the run, before JAX is used.

    Raises:
      SystemExit: If they are not all there in a minute, or have other options.
      ValueError: If a number is out of its range, there are not as many devices as the mesh has, or JAX was used before
        CPU devices are made.
    """
    options.check(config)
    xla_flags.add(xla_flags.PATIENT)
    if config.quick_compilation:
        xla_flags.add(xla_flags.QUICK)
    if config.cpu_devices is not None:
        _make_cpu_devices(config.cpu_devices)
    try:
        distributed.initialize(config.coordinator, config.processes, config.process)
        distributed.check_same({"experiment": _experiment(config)}, what="experiments")
        distributed.check_same({name: value for name, value in _flat(plain(config)).items() if name not in _OWN})
    except (TimeoutError, ValueError) as error:
        raise SystemExit(str(error)) from error
    progress.console.quiet = not distributed.is_writer()
    device_mesh(config)


def _make_cpu_devices(number: int) -> None:
    if number >= (os.cpu_count() or 1):  # each has a core to itself
        xla_flags.add({"xla_cpu_multi_thread_eigen": "false"})
    try:
        jax.config.update("jax_num_cpu_devices", number)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:
        raise ValueError(
            f"cpu_devices is {number}, and JAX has {jax.device_count()} devices already; expected a program that has "
            "not used JAX yet. Start the experiment by itself."
        ) from error


class OnDevices(Protocol):
    """Options of a run that say on how many devices it is computed."""

    @property
    def mesh(self) -> int | None: ...

    @property
    def cpu_devices(self) -> int | None: ...


def device_mesh(config: OnDevices) -> Mesh | None:
    """The devices over which the run shares out networks; None for one device."""
    several = config.cpu_devices is not None or jax.process_count() > 1
    size = config.mesh if config.mesh is not None else (-1 if several else None)
    return None if size is None else distributed.mesh({"data": size})


def refuse_topology(config: RunConfig, other: str, what: str) -> None:
    """Checks that an experiment without programs of its own is not to be compiled for a topology.

    Args:
      config: The options of the run.
      other: The experiment that has these programs.
      what: What the other one does.

    Raises:
      ValueError: If `config.compile_only` is given.
    """
    if config.compile_only is not None:
        raise ValueError(
            f"compile_only is {config.compile_only!r}; expected none: this experiment has no programs of its own. "
            f"{other}, which {what}, takes --compile-only."
        )


def check_batch(config: OnDevices, batch_size: int, name: str = "train.batch_size") -> None:
    """Checks, before a zoo is fitted, that the devices of the run divide a batch.

    Args:
      config: The options of the run.
      batch_size: The number of networks in a batch.
      name: The option that says it.

    Raises:
      ValueError: If they do not, or if there are not as many devices.
    """
    devices = distributed.num_devices(device_mesh(config))
    if batch_size % devices:
        raise ValueError(
            f"{name} is {batch_size} and the mesh has {devices} devices on 'data'; expected a multiple of {devices}, "
            f"like {-(-batch_size // devices) * devices}."
        )


def save_zoo(networks: zoo.Zoo, path: Path) -> None:
    """Writes a zoo, in one of several processes."""
    if distributed.is_writer():
        zoo.save(networks, path)


def on_host(networks: zoo.Zoo) -> zoo.Zoo:
    """A zoo that was fitted over a mesh, whole in every process."""
    params = jax.tree.map(jnp.asarray, distributed.gather(networks.params))
    return dataclasses.replace(networks, params=params)


class Run:
    """One run in its folder: claimed at the start, interrupted cleanly, timed, and reported at the end.

        with runs.Run(config) as run:
            with run.timed("zoo"):
                ...
            return run.finish(results, "Merging INRs", sections, result_tables)

    Inside the `with`, JAX keeps compiled programs where the options say so, SIGINT and SIGTERM stop the run at the next
    `run.interruption.stop_if_requested`, and no other run can have the folder. Of several processes one owns the folder
    and writes; where another one is lost, this one ends with status 75.

    Raises:
      SystemExit: If the folder holds a run already and may not be resumed, there is none to resume, or another run goes
        on in it.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.interruption = progress.Interruption()
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> "Run":
        self._start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            stack.enter_context(compilation(self.config))
            _claim_together(self.config, stack)
            stack.enter_context(self.interruption)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self._exit.close()
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            _end_without_the_others(error)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of a `with` block to those of this name in the results."""
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def finish(
        self,
        results: Mapping[str, Any],
        title: str,
        sections: Callable[[Mapping[str, Any]], Iterable[str]],
        result_tables: Callable[[Mapping[str, Any]], Sequence[tables.Table]],
    ) -> dict[str, Any]:
        """Writes results.json and report.html, shows the tables, and returns the results.

        Args:
          results: JSON values; options, environment and times are added.
          title: The heading of the report.
          sections: The results -> the sections of the report, as HTML.
          result_tables: The results -> the tables for the terminal.
        """
        seconds = results.get("seconds", {}) | self._seconds | {"total": time.perf_counter() - self._start}
        whole = {"config": plain(self.config), "environment": environment(), **results, "seconds": seconds}
        out = self.config.out
        if distributed.is_writer():
            write_json(out / "results.json", whole)
            report.write(out / "report.html", title, sections(whole))
        for table in result_tables(whole):
            progress.console.print(tables.terminal(table))
        progress.console.print(f"Report: {out / 'report.html'}, numbers: {out / 'results.json'}")
        return whole


def claim(config: RunConfig) -> None:
    """Makes the folder of the run, or checks that a run in it may continue."""
    path = config.out / "config.json"
    mine = {name: value for name, value in plain(config).items() if name not in HOW} | {"contents": _contents(config)}
    if path.exists():
        if not config.resume:
            raise SystemExit(
                f"{config.out} already holds a run. Continue it with --resume, or name another folder by --out."
            )
        theirs = read_json(path)
        if theirs is None:
            write_json(path, mine)
            return
        _check_contents(config, mine.pop("contents"), theirs.pop("contents", {}))
        names = [name for name in {**mine, **theirs} if name not in HOW]
        differences = [f"{n}: {theirs.get(n)} then, {mine.get(n)} now" for n in names if theirs.get(n) != mine.get(n)]
        if differences:
            raise SystemExit(
                f"{config.out} holds a run with other options ({'; '.join(differences)}). Use the same ones."
            )
        return
    check_resumable(config)
    write_json(path, mine)


def _contents(config: RunConfig) -> dict[str, str]:
    """By the name of an option what the files hold that it names: the networks of a run are fitted to them."""
    found = {}
    for name in ("data", "zoo_path"):
        path = getattr(config, name, None)
        if path is not None and path.exists() and (path.is_file() or name == "data"):  # folders of networks are large
            digest = hashlib.sha256()
            for file in [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file()):
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            found[name] = digest.hexdigest()
    return found


def _check_contents(config: RunConfig, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    """Refuses to continue on other data; runs of older versions do not say what theirs were."""
    changed = [name for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        path = getattr(config, changed[0])
        raise SystemExit(
            f"{config.out} holds a run on other data: {path} has changed since. Bring back the file, or name another "
            "folder by --out."
        )


def check_resumable(config: RunConfig) -> None:
    """Refuses to resume where there is no run, before a folder is made."""
    if config.resume and not (config.out / "config.json").exists():
        raise SystemExit(
            f"{config.out} holds no run to resume. Name the folder of one by --out, or leave out --resume."
        )


def read_json(path: Path) -> Any:
    """The JSON values of a file; None where there is none, or where it is damaged, which is said."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        rebuilding(path, error)
        return None


def read_part(path: Path) -> zoo.Zoo | None:
    """The networks that a former run saved; None where there are none, or the file is damaged, which is said."""
    if not path.exists():
        return None
    try:
        return zoo.load(path)
    except ValueError as error:
        rebuilding(path, error)
        return None


def rebuilding(path: Path, error: Exception) -> None:
    """Says that a file of the run is damaged, and made again."""
    cause = str(error).removeprefix(f"{path}: ")
    progress.console.print(f"{path} is damaged and made again: {cause}"[:1000], markup=False, soft_wrap=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON values as a file, atomically, a list of numbers on one line; NaN and infinities are refused.

    One of several processes writes it.
    """
    text = re.sub(
        r"\[\n[^\[\]{}\"]*\]",
        lambda numbers: re.sub(r"\n\s*", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]"),
        json.dumps(value, indent=1, allow_nan=False),
    )
    if not distributed.is_writer():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_path(path, overwrite=True) as written:
        written.write_text(text)


def numbers(values: Any) -> list[Any]:
    """An array as JSON values, with the digits that tell its float32 numbers apart instead of those of a float64."""
    values = np.asarray(values)
    return np.array(values.astype(str), dtype=np.float64).tolist() if values.dtype == np.float32 else values.tolist()


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


# --- images and networks ------------------------------------------------------------------------------------------


def load_images(config: RunConfig, settings: ImageConfig) -> dict[str, images.Images]:
    """The images of training, selection and scoring; no image is in two of them.

    Files bring their own test images, which are used for scoring; of the digits some are set apart.
    """
    if config.data is None:
        given = images.digits()
        held_out = settings.scoring_images
    else:
        given, scoring = images.load(config.data)
        held_out = 0
        if len(scoring.images) < settings.scoring_images:
            raise ValueError(
                f"{config.data}: expected {settings.scoring_images} test images for scoring, got "
                f"{len(scoring.images)}. Lower zoo.scoring_images."
            )
    _check_size(config, settings, given)
    order = np.random.default_rng(config.seed).permutation(len(given.images))
    rest = len(order) - settings.selection_images - held_out
    count = rest if settings.train_images is None else settings.train_images
    if not 1 <= count <= rest:
        raise ValueError(
            f"zoo.train_images is {count}; of {len(order)} images {rest} are left next to {settings.selection_images} "
            f"for selection and {held_out} for scoring. Lower one of the three."
        )
    selected = order[rest : rest + settings.selection_images]
    if config.data is None:
        scoring = _rows(given, order[rest + settings.selection_images :])
    else:
        rows = np.random.default_rng(config.seed).permutation(len(scoring.images))
        scoring = _rows(scoring, rows[: settings.scoring_images])
    return dict(zip(SPLITS, (_rows(given, order[:count]), _rows(given, selected), scoring), strict=True))


def unread_images(config: RunConfig, settings: ImageConfig) -> images.Images:
    """Training images for programs that are compiled and not run.

    Without `--data` these are black ones of ten classes, of the size and number that the options say, or as many as
    MNIST has; scikit-learn's digits where they say no size.
    """
    if config.data is not None or settings.size is None:
        return load_images(config, settings)["train"]
    count = settings.train_images or 60_000
    black = np.broadcast_to(np.float32(0), (count, *settings.size))  # takes no memory
    return images.Images(black, np.arange(count) % 10)


def keys(seed: int) -> Iterator[jax.Array]:
    """A thousand independent keys."""
    # As numbers of the host: iterating over an array of keys compiles a program of a thousand outputs.
    rows = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), 1000)))
    return (jax.random.wrap_key_data(row) for row in rows)


def by_rows(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """A function of stacks as one compiled program; over a mesh each device computes it on its share of the rows.

    Args:
      fn: (stacks) -> arrays [networks, ...], each row of which depends on that row of the stacks alone.
      mesh: The devices; None for one.

    Returns:
      The function of stacks [networks, ...]. Over a mesh it returns NumPy arrays, the same in every process.
    """
    if mesh is None:
        return jax.jit(fn)
    rows = PartitionSpec("data")
    program = jax.jit(
        jax.shard_map(lambda stacks: fn(*stacks), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    )

    def whole(*stacks: Any) -> Any:
        stacks = distributed.gather(stacks)
        count = len(jax.tree.leaves(stacks)[0])
        computed = distributed.gather(program(distributed.shard_rows(stacks, mesh).tree))
        return jax.tree.map(lambda leaf: leaf[:count], computed)

    return whole


def one_each(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """A function of one row that each device of a mesh computes on a row of its own, by one program.

    A row is computed as by the function alone, in its time: nothing is vmapped.

    Args:
      fn: (one row of the stacks, *what all rows share) -> a pytree of arrays.
      mesh: The devices; None for one.

    Returns:
      (stacks of as many rows as there are devices, or of fewer, *what all rows share) -> the results as NumPy arrays
      with a leading axis, the same in every process.
    """
    if mesh is None:
        alone = jax.jit(fn)
        return lambda rows, *shared: _one_row(distributed.gather(alone(_no_row(rows), *shared)))
    rows = PartitionSpec("data")
    program = jax.jit(
        jax.shard_map(
            lambda row, shared: _one_row(fn(_no_row(row), *shared)),
            mesh=mesh,
            in_specs=(rows, PartitionSpec()),
            out_specs=rows,
            check_vma=False,
        )
    )

    def each(stacks: Any, *shared: Any) -> Any:
        count = len(jax.tree.leaves(stacks)[0])
        placed = distributed.shard_rows(stacks, mesh).tree
        computed = distributed.gather(program(placed, distributed.replicate(shared, mesh)))
        return jax.tree.map(lambda leaf: leaf[:count], computed)

    return each


def in_chunks(fn: Callable[..., Any], size: int, mesh: Mesh | None = None) -> Callable[..., Any]:
    """A function of one network as a function of stacks, compiled once, whatever number of networks it gets.

    Args:
      fn: The function of one row of each of its arguments.
      size: The number of rows computed at a time, by all devices together, each of which has a whole number of them;
        the last chunk is filled up with rows that are dropped again.
      mesh: The devices that share the rows; None for one.

    Returns:
      (stacks) -> NumPy arrays [networks, ...]; every argument is a pytree of arrays [networks, ...].
    """
    compiled = by_rows(jax.vmap(fn), mesh)
    devices = distributed.num_devices(mesh)
    size = -(-size // devices) * devices

    def whole(*stacks: Any) -> Any:
        stacks = jax.tree.map(np.asarray, stacks)
        count = len(jax.tree.leaves(stacks)[0])
        parts = []
        for first in range(0, count, size):
            rows = np.arange(first, first + size) % count
            chunk = compiled(*jax.tree.map(lambda leaf, rows=rows: leaf[rows], stacks))
            parts.append(jax.tree.map(lambda leaf, left=count - first: np.asarray(leaf)[:left], chunk))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    return whole


# --- private ------------------------------------------------------------------------------------------------------


def _no_row(stacks: Any) -> Any:
    """Stacks of one row without their leading axis."""
    return jax.tree.map(lambda leaf: leaf[0], stacks)


def _one_row(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _claim_together(config: RunConfig, stack: contextlib.ExitStack) -> None:
    """Owns and claims the folder in one process; all go on, or all end with its reason."""
    refusal, is_new = None, False
    if distributed.is_writer():
        is_new = not (config.out / "config.json").exists()
        try:
            check_resumable(config)
            stack.enter_context(ownership.owned(config.out))
            claim(config)
        except SystemExit as error:
            refusal = str(error)
    refusal = distributed.every_process(refusal)[0]
    if refusal is not None:
        raise SystemExit(refusal)
    seen = distributed.every_process(ownership.written(config.out))
    blind = [number for number, text in enumerate(seen) if text != seen[0]]
    if blind:
        if is_new:
            (config.out / "config.json").unlink()  # so that the same folder can be used once all see it
        raise SystemExit(
            f"{config.out.absolute()}: process {blind[0]} does not see what process 0 wrote there; expected a folder "
            "that all processes share. Name one by --out."
        )


def _experiment(config: RunConfig) -> str:
    """The module of an experiment, also where it is the program."""
    module = sys.modules[type(config).__module__]
    return module.__name__ if module.__spec__ is None else module.__spec__.name


def _end_without_the_others(error: BaseException) -> None:
    """Ends this process where another one is lost: at once, since an orderly end would wait for all."""
    who = f"Process {jax.process_index()} of {jax.process_count()}"
    print(watch.farewell(who, str(error).splitlines()[0][:300]), file=sys.stderr, flush=True)
    os._exit(progress.AGAIN)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def compilation(config: RunConfig) -> Iterator[None]:
    """JAX compiles as the options say, and keeps the programs, until the run ends."""
    wanted: dict[str, Any] = {"jax_disable_most_optimizations": config.quick_compilation}
    if config.compilation_cache:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        own = {
            "jax_compilation_cache_dir": str(home / "jax_scalegmn" / "programs"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        wanted |= {name: value for name, value in own.items() if jax.config.values[name] == _JAX_DEFAULTS[name]}
    before, collections = {name: jax.config.values[name] for name in wanted}, gc.get_threshold()
    _configure(wanted)
    gc.set_threshold(200_000, 100, 1000)  # JAX's traced programs are many small objects that stay
    try:
        yield
    finally:
        _configure(before)
        gc.set_threshold(*collections)


def _configure(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    if "jax_compilation_cache_dir" in values:  # JAX decides at its first program whether there is a cache
        compilation_cache.reset_cache()


def _check_size(config: RunConfig, settings: ImageConfig, given: images.Images) -> None:
    size = given.images.shape[1:3]
    if settings.size is not None and size != tuple(settings.size):
        expected, got = (" x ".join(map(str, several)) for several in (settings.size, size))
        source, cure = (
            ("scikit-learn's digits", "Name a file of images by --data")
            if config.data is None
            else (config.data, "Name another file by --data, or allow this one by --zoo.size None")
        )
        raise ValueError(f"{source}: expected images of {expected} pixels, got {got}. {cure}.")


def _rows(given: images.Images, rows: np.ndarray) -> images.Images:
    return images.Images(given.images[rows], given.labels[rows])
