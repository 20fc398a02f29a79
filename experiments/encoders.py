"""What the experiments share that compare encoders of networks: one size, one training, one way of scoring.

Every encoder is trained with several seeds on one zoo, and scored on the networks of another, plain and moved by random
elements of their group. Every finished pair of encoder and seed is a file.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from experiments import autoencoders, compile_only, progress, report, runs
from experiments.tables import Table
from jax_scalegmn import architecture, distributed, models, symmetry, training
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.types import Key, LossFn
from jax_scalegmn.zoo import Zoo


@dataclasses.dataclass(frozen=True)
class TrainConfig(runs.TrainConfig):
    """The training, the same for all encoders: chosen for the scale-equivariant one, not for each of the others."""

    augment: bool = False
    """Whether every network of every batch is moved by a random element of its whole group."""


class Config(Protocol):
    """What a run says about its trainings."""

    @property
    def mesh(self) -> int | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def seeds(self) -> int: ...

    @property
    def copies(self) -> int: ...

    @property
    def encoders(self) -> tuple[str, ...]: ...

    @property
    def train(self) -> TrainConfig: ...


# (features, width of hidden layers) -> the model.
Make: TypeAlias = Callable[[int, int], nn.Module]


class Encoder(NamedTuple):
    """One of the encoders, with what it was matched by."""

    label: str
    model: nn.Module
    features: int | None
    hidden: int
    parameters: int


class Task(NamedTuple):
    """What encoders learn of networks, and how they are scored.

    Attributes:
      loss: (model, train=) -> the loss of one row, like `losses.classification`.
      target: A zoo -> the target of every network, [networks].
      read: What a model outputs, [copies, latent] -> its predictions [copies].
      selection: Numbers of an epoch on the selection networks and their sign, 1 where more is better; the first that
        differ tell which of two epochs is better.
      note: An epoch's numbers for a person, as a template of `str.format`.
      score: (predictions [networks], those of moved copies [networks, copies], the zoo) -> the measures.
      measures: The names of the measures.
    """

    loss: Callable[..., LossFn]
    target: Callable[[Zoo], Any]
    read: Callable[[Any], Any]
    selection: Mapping[str, int]
    note: str
    score: Callable[[np.ndarray, np.ndarray, Zoo], dict[str, Any]]
    measures: tuple[str, ...]


def check(config: Config, known: Iterable[str]) -> None:
    """Checks the number of seeds, and the encoders that a run names.

    Raises:
      ValueError: If there are no seeds, or the encoders are none, unknown or named twice.
    """
    names = config.encoders
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"encoders are {names}; expected one or more of {tuple(known)}, none of them twice.")
    if config.seeds < 1:
        raise ValueError(f"seeds is {config.seeds}; expected a number >= 1.")


# --- size ---------------------------------------------------------------------------------------------------------


def gmn(
    arch: Architecture,
    latent: int,
    scales: tuple[float, ...] | None,
    settings: autoencoders.ScaleGMNConfig,
    **options: Any,
) -> Make:
    """Makes encoders by a ScaleGMN with the symmetry of `arch`; `options` come before those of the settings."""
    chosen = settings.options() | options
    chosen.pop("features")
    chosen.pop("hidden", None)
    if all(layer.scaling is Scaling.PERMUTATION for layer in arch.neuron_layers):
        for name in ("canonical", "io", "encoding_features", "message_layers", "update_layers"):
            chosen.pop(name)  # of no meaning without signs and scales

    def make(features: int, hidden: int) -> nn.Module:
        return models.Encoder(models.ScaleGMN(arch, features, hidden=hidden, **chosen), latent, scales=scales)

    return make


def match(
    make: Mapping[str, Make],
    names: Iterable[str],
    labels: Mapping[str, str],
    arch: Architecture,
    size: int,
    tolerance: float,
) -> dict[str, Encoder]:
    """Encoders with as many parameters as the first of `make`, of `size` features and hidden layers of that width.

    Args:
      make: How to make every encoder.
      names: Those that are wanted.
      labels: What people call them.
      arch: The architecture of the networks that they read.
      size: The features of the first encoder.
      tolerance: The largest relative difference in the number of parameters.

    Raises:
      ValueError: If no width of an encoder comes within the tolerance.
    """
    example = architecture.abstract_params(arch)
    first = next(iter(make))
    target = models.num_parameters(make[first](size, size), example)
    found = {}
    for name in names:
        encoder = _nearest(labels[name], make[name], example, size, target, tolerance)
        if abs(encoder.parameters / target - 1) > tolerance:
            raise ValueError(
                f"The {labels[name]} encoder has {encoder.parameters} parameters at best for the {labels[first]} one's "
                f"{target}, which model.tolerance={tolerance:g} does not allow. Change model.features, or raise the "
                "tolerance."
            )
        found[name] = encoder
    return found


def _nearest(label: str, make: Make, example: Any, size: int, target: int, tolerance: float) -> Encoder:
    """The size itself where it has as many parameters as the target.

    Otherwise the features and the hidden width together as near as possible, and then the hidden width alone.
    """

    def encoder(features: int, hidden: int) -> Encoder:
        model = make(features, hidden)
        own = features if isinstance(model, models.Encoder) else None
        return Encoder(label, model, own, hidden, models.num_parameters(model, example))

    same = encoder(size, size)
    if same.parameters == target:
        return same
    width = models.match_size(lambda width: make(width, width), example, target)
    found = []
    for features in [width, *({width - 1, width + 1} - {0})]:
        hidden = models.match_size(functools.partial(make, features), example, target)
        found.append(encoder(features, hidden))
        if abs(found[-1].parameters / target - 1) <= tolerance:
            return found[-1]
    return min(found, key=lambda encoder: abs(encoder.parameters - target))


def autoencoder(
    config: autoencoders.ModelConfig, whole: models.Autoencoder, kind: str = "equivariant"
) -> models.Autoencoder:
    """An autoencoder, or a baseline of the same decoder and size whose encoder knows less.

    Args:
      config: The options of the scale-equivariant autoencoder.
      whole: The scale-equivariant autoencoder.
      kind: "equivariant"; or "permutation", whose encoder follows permutations alone, as neural graphs do, with
        features by which both have as many parameters, as nearly as whole numbers allow.
    """
    if kind == "equivariant":
        return whole
    arch, features = whole.encoder.arch, config.features
    permutations = architecture.restrict(arch, Scaling.PERMUTATION)
    latent = whole.encoder.latent or features
    make = gmn(permutations, latent, whole.encoder.scales, config)
    example = architecture.abstract_params(arch)
    target = models.num_parameters(whole.encoder, example)
    encoder = _nearest(kind, make, example, features, target, tolerance=0.01).model
    return models.Autoencoder(encoder, whole.decoder)


# --- training and scoring -----------------------------------------------------------------------------------------


def train_pairs(
    config: Config,
    task: Task,
    encoders: Mapping[str, Encoder],
    zoos: Mapping[str, Zoo],
    folder: Path,
    interruption: progress.Interruption,
    *,
    description: str = "Trainings",
) -> dict[str, list[dict[str, Any]]]:
    """What every encoder reaches with every seed; pairs that a former run left in the folder are read instead."""
    pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in encoders}
    total = len(encoders) * config.seeds
    with progress.bar(description, total * config.train.epochs, "epochs") as advance:

        def after_epoch(pair: str, note: str) -> None:
            advance(1, f"{pair}: {note}")
            finished = sum(
                (folder / f"{name}-{seed}.json").exists() for name in encoders for seed in range(config.seeds)
            )
            interruption.stop_if_requested(f"{finished} of {total} pairs of encoder and seed")

        for name, encoder in encoders.items():
            program = None
            for seed in range(config.seeds):
                path = folder / f"{name}-{seed}.json"
                pair = _read_pair(path, task)
                if pair is not None:
                    advance(config.train.epochs, "read")
                else:
                    program = program or _program(config, task, encoder, zoos)
                    shown = functools.partial(after_epoch, f"{encoder.label}, seed {seed}")
                    pair = _train_pair(config, task, program, seed, zoos, shown)
                    runs.write_json(path, pair)
                pairs[name].append(pair)
    return pairs


class Program(NamedTuple):
    """What the trainings of one encoder share, so that its seeds are compiled once."""

    mesh: Mesh | None
    init: Callable[[Key], training.State]
    step: training.Step
    validate: Callable[[Any, Any], Any]
    predict: Callable[[Any, Any, Any], Any]


def _program(config: Config, task: Task, encoder: Encoder, zoos: Mapping[str, Zoo]) -> Program:
    settings, model, arch, mesh = config.train, encoder.model, zoos["train"].arch, runs.device_mesh(config)
    tx = settings.make_optimizer(len(zoos["train"]))
    validate = training.make_evaluation(task.loss(model, train=False), mesh=mesh)

    def predict(row: Any, variables: Any) -> Any:
        """Predictions [1 + copies]: of a network as it is, then of its moved copies."""
        params, keys = row
        moved = jax.vmap(lambda key: symmetry.act(arch, symmetry.random(arch, key), params))(keys)
        copies = jax.tree.map(lambda own, others: jnp.concatenate([own[None], others]), dict(params), moved)
        return task.read(jax.vmap(functools.partial(model.apply, variables))(copies))

    mapped = distributed.make_map(predict, mesh, rows_at_once=16)
    loss = train_loss(settings, task, model, arch)
    step = training.make_step(loss, tx, micro_batch=settings.micro_batch, mesh=mesh)
    example = jax.tree.map(lambda leaf: leaf[0], zoos["train"].params)
    init = functools.partial(training.init, model, tx, example)
    return Program(mesh, init, step, validate, lambda variables, stack, keys: mapped(((stack, keys),), variables))


def train_loss(settings: TrainConfig, task: Task, model: nn.Module, arch: Architecture) -> LossFn:
    """The loss of a model in training, on networks that are moved where the settings say so."""
    loss = task.loss(model)
    return augmented(arch, loss) if settings.augment else loss


def training_steps(
    mesh: Mesh, settings: TrainConfig, task: Task, encoders: Mapping[str, Encoder], arch: Architecture, dtype: Any
) -> Iterator[compile_only.Program]:
    """The training step of every encoder, to be compiled and not run; targets have that dtype."""
    row = compile_only.params_of(arch), jax.ShapeDtypeStruct((), dtype)
    for encoder in encoders.values():
        loss = train_loss(settings, task, encoder.model, arch)
        yield compile_only.training_step(mesh, encoder.label, encoder.model, loss, settings, row)


def augmented(arch: Architecture, loss_fn: LossFn) -> LossFn:
    """A loss of (variables, (params, target), key) at a random member of the network's orbit."""

    def moved(variables: Any, row: Any, key: Any) -> Any:
        element_key, key = jax.random.split(key)
        params, target = row
        element = symmetry.random(arch, element_key)
        return loss_fn(variables, (symmetry.act(arch, element, params), target), key)

    return moved


def _train_pair(
    config: Config,
    task: Task,
    program: Program,
    seed: int,
    zoos: Mapping[str, Zoo],
    after_epoch: Callable[[str], None],
) -> dict[str, Any]:
    """Trains with one seed and scores the epoch that is best on the selection networks."""
    start = time.perf_counter()
    settings = config.train
    data = {split: (one.params, jnp.asarray(task.target(one))) for split, one in zoos.items()}
    state = program.init(jax.random.fold_in(jax.random.key(config.seed), seed))
    epochs = training.fit(
        program.step,
        state,
        data["train"],
        batch_size=settings.batch_size,
        num_epochs=settings.epochs,
        mesh=program.mesh,
    )
    selected = data["selection"] if program.mesh is None else distributed.shard_rows(data["selection"], program.mesh)
    trained = len(zoos["train"]) // settings.batch_size * settings.batch_size
    history: list[dict[str, float]] = []
    best: tuple[float, ...] = (-math.inf,)
    variables = None
    begin = time.perf_counter()
    for epoch in epochs:
        state, metrics = jax.block_until_ready(epoch)
        seconds = time.perf_counter() - begin
        selection = program.validate(state.variables, selected)
        numbers = _numbers(metrics, selection, f"epoch {len(history) + 1} of seed {seed}")
        history.append({**numbers, "seconds": seconds})
        reached = tuple(sign * numbers[name] for name, sign in task.selection.items())
        if reached > best:  # copied, since the next epoch takes the buffers
            best, best_epoch = reached, len(history)
            variables = jax.tree.map(np.array, distributed.gather(state.variables))
        after_epoch(task.note.format(**numbers))
        begin = time.perf_counter()
    copy_keys = jax.random.split(jax.random.key(config.seed + 1), (len(zoos["scoring"]), config.copies))
    predicted = np.asarray(program.predict(variables, zoos["scoring"].params, copy_keys))
    criterion = next(iter(task.selection))
    return {
        "seed": seed,
        "best_epoch": best_epoch,
        criterion: history[best_epoch - 1][criterion],
        **task.score(predicted[:, 0], predicted[:, 1:], zoos["scoring"]),
        "networks_per_second": trained / statistics.median(epoch["seconds"] for epoch in history),
        "seconds": time.perf_counter() - start,
        "history": history,
    }


def _numbers(metrics: Mapping[str, Any], selection: Mapping[str, Any], where: str) -> dict[str, float]:
    """The numbers of one epoch."""
    numbers = {f"train_{name}": float(value) for name, value in metrics.items()}
    numbers |= {f"selection_{name}": float(value) for name, value in selection.items()}
    if not math.isfinite(numbers["selection_loss"]):
        raise FloatingPointError(
            f"The selection loss is {numbers['selection_loss']} after {where}: training diverged. Lower "
            "train.learning_rate."
        )
    return numbers


def _read_pair(path: Path, task: Task) -> dict[str, Any] | None:
    """What a former run stored; None where it stored nothing, or the file is damaged, which is said."""
    pair = runs.read_json(path)
    needed = {"seed", "best_epoch", "seconds", "history", "networks_per_second", *task.measures}
    if pair is None or (isinstance(pair, dict) and needed <= pair.keys()):
        return pair
    missing = sorted(needed - pair.keys()) if isinstance(pair, dict) else "everything"
    runs.rebuilding(path, ValueError(f"it lacks {missing} of a finished training"))
    return None


# --- results ------------------------------------------------------------------------------------------------------


def summary(encoder: Encoder, pairs: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> dict[str, Any]:
    """What one encoder reaches over its seeds, as JSON values."""
    return {
        "label": encoder.label,
        "parameters": encoder.parameters,
        "features": encoder.features,
        "hidden": encoder.hidden,
        **{name: spread([pair[name] for pair in pairs]) for name in (*measures, "networks_per_second")},
        "seconds": sum(pair["seconds"] for pair in pairs),
        "seeds": list(pairs),
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """The mean and standard deviation; None where a value is undefined, or there is only one."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if len(known) == len(values) else None
    deviation = statistics.stdev(known) if len(known) == len(values) > 1 else None
    return {"mean": mean, "std": deviation, "values": list(values)}


def text(measure: Mapping[str, Any], digits: int, factor: float = 1.0) -> str:
    """The mean ± standard deviation of `spread` as text; "-" where it is undefined."""
    if measure["mean"] is None:
        return "-"
    mean = f"{factor * measure['mean']:.{digits}f}"
    return mean if measure["std"] is None else f"{mean} ± {factor * measure['std']:.{digits}f}"


def table(
    title: str, encoders: Mapping[str, Any], measures: Mapping[str, str], digits: int, factor: float = 1.0
) -> Table:
    """The table of summaries, with the measures under their headings."""
    cells = []
    for encoder in encoders.values():
        reached = [text(encoder[measure], digits, factor) for measure in measures]
        speed = text({"mean": encoder["networks_per_second"]["mean"], "std": None}, 0)
        cells.append([encoder["label"], f"{encoder['parameters']:,}", *reached, speed])
    return Table(title, ("encoder", "parameters", *measures.values(), "networks/s"), cells)


def curves(encoders: Mapping[str, Any], measure: str, label: str, *, log: bool = False) -> str:
    """A chart of a number of every epoch on the selection networks: the seeds' mean and range."""
    lines = []
    for encoder in encoders.values():
        reached = np.array([[epoch[measure] for epoch in pair["history"]] for pair in encoder["seeds"]])
        epochs = np.arange(1, reached.shape[1] + 1).tolist()
        bounds = [reached.min(0).tolist(), reached.max(0).tolist()]
        lines.append(report.Line(encoder["label"], epochs, reached.mean(0).tolist(), *bounds))
    return report.chart(lines, x="epoch", y=label, log=log)
