"""A study file: which options of an experiment vary, over what, and what is looked for.

An experiment is a module that a study names, like `experiments.inr`, with PRESETS, a dict of name -> (help, config),
and main(config) -> a dict of JSON values. A config is a frozen dataclass with the folder `out`. What else a module may
have:

    program(config) -> text      configs with one text differ in arrays alone, and are trained together by
    population(configs)          yields, after every epoch, for each config {"loss": float, "failed": reason or None,
                                 "results": dict}; a config may be None, an empty place. It leaves checkpoints in `out`,
                                 with which main(config) goes on to score.
    zoo_key(config) -> text      configs with one text read the same zoo, which
    fit_zoo(config)              writes to config.out / "zoo"; it is linked into the folders of all other trials.
    OBJECTIVE                    a number of its results that a study may look for, and "minimize" or "maximize": said
                                 to those who name none, where the results hold no best.selection_loss.
"""

import dataclasses
import difflib
import enum
import importlib
import itertools
import json
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

_RANGE = {"low", "high", "log", "step"}
# Options of a single run that a worker sets, or that would end or join others than the trial.
_HOW = {"out", "resume", "coordinator", "process", "compile_only"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a study file says."""

    experiment: str
    """The module of the experiment, like experiments.inr."""
    preset: str
    """The preset that sets all other options."""
    space: dict[str, Any]
    """The options that vary, by dotted name: a list of values, or a table with low, high and perhaps log or step."""
    name: str = ""
    """The name of the study; that of the file if it has none."""
    out: str = ""
    """The folder of all trials; runs/ and the name if it has none."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """How trials are drawn: all combinations, independently, or by Optuna's tree-structured Parzen estimator."""
    trials: int | None = None
    """The number of trials; a grid has its own."""
    seed: int = 0
    """The seed of the sampler."""
    objective: str = "best.selection_loss"
    """Where the results hold the number that is looked for, by dotted name."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Whether it is to be small or large."""
    columns: list[str] = dataclasses.field(default_factory=list)
    """Further numbers of the results that the report shows."""
    score: bool = True
    """Whether a trial runs the whole experiment; False for its training alone: the results "training" and "best"."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options that are the same for all trials."""


class Experiment(NamedTuple):
    """A module, and the config from which trials start."""

    module: Any
    base: Any

    @property
    def trains_together(self) -> bool:
        """Whether trials that differ in arrays alone share one program."""
        return hasattr(self.module, "population")

    def configure(self, options: Mapping[str, Any]) -> Any:
        """The config with some options changed, by dotted name.

        Raises:
          ValueError: If there is no such option, or a value does not fit it.
        """
        config = self.base
        for name, value in options.items():
            config = _replace(config, name.split("."), value, name)
        return config


def read(path: Path) -> Study:
    """Reads a study file.

    Raises:
      ValueError: If it is no such file.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a study in TOML; got: {error}.") from error
    try:
        values |= {"options": _flat(values.get("options", {})), "space": _flat(values.get("space", {}))}
        values.setdefault("name", path.stem)
        study = _replace_all(_EMPTY, values)
        return _checked(dataclasses.replace(study, out=study.out or f"runs/{study.name}"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load(study: Study) -> Experiment:
    """Imports the experiment of a study, with the current folder on the path.

    Raises:
      ValueError: If there is none, or a value of the study does not fit one of its options.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(study.experiment)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{study.experiment}.".startswith(f"{error.name}."):
            raise  # one of the packages that the experiment needs, whose message names the extra
        raise ValueError(
            f"The study names the experiment {study.experiment!r}; expected a module that can be imported, like "
            f"experiments.inr ({error}). Run in its folder, or set PYTHONPATH."
        ) from error
    if not (hasattr(module, "PRESETS") and hasattr(module, "main")):
        raise ValueError(f"{study.experiment} has no PRESETS and main(config); expected an experiment.")
    _known("preset", study.preset, module.PRESETS)
    experiment = Experiment(module, module.PRESETS[study.preset][1])
    experiment = Experiment(module, experiment.configure(study.options))
    for name, values in study.space.items():
        ends = [values["low"], values["high"]] if isinstance(values, dict) else values
        for value in ends:
            experiment.configure({name: value})
    if not study.score and not experiment.trains_together:
        raise ValueError(
            f"score is false, but {study.experiment} has no training that can be run alone; expected a module with "
            "population(configs). Leave score out."
        )
    if study.score and study.objective == _EMPTY.objective and hasattr(module, "OBJECTIVE"):
        objective, direction = module.OBJECTIVE
        raise ValueError(
            f"objective is {study.objective!r}, which the results of {study.experiment} lack; expected a number of "
            f'them. Write objective = "{objective}" and direction = "{direction}", or name another one.'
        )
    return experiment


def points(study: Study) -> list[dict[str, Any]]:
    """All combinations of a grid."""
    values = [_steps(entry) if isinstance(entry, dict) else entry for entry in study.space.values()]
    return [dict(zip(study.space, combination, strict=True)) for combination in itertools.product(*values)]


def encoded(value: Any) -> Any:
    """A value as Optuna keeps it: lists as JSON."""
    return json.dumps(value) if isinstance(value, list) else value


def decoded(study: Study, name: str, value: Any) -> Any:
    """The value of an option that Optuna keeps as `encoded`."""
    entry = study.space[name]
    return next((choice for choice in entry if encoded(choice) == value), value) if isinstance(entry, list) else value


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What two studies as JSON values disagree on, in words, option by option."""
    there, here = (_by_option(values) for values in (stored, wanted))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [f"{name} is {_said(there, name)} there and {_said(here, name)} here" for name in names]


def pick(results: Mapping[str, Any], name: str) -> Any:
    """A value of nested results by its dotted name; keys may hold dots themselves, and lists are indexed by numbers.

    Raises:
      ValueError: If there is no such value.
    """
    try:
        return _picked(results, name)
    except LookupError as error:
        raise ValueError(f"The results have no {name!r}; {str(error) or nearest(name, _numbers(results))}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice where a name is unknown."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names[:20])}."


def _picked(value: Any, rest: str) -> Any:
    if not rest:
        return value
    if isinstance(value, list):
        index, _, rest = rest.partition(".")
        if not index.lstrip("-").isdecimal() or not -len(value) <= int(index) < len(value):
            raise LookupError(f"{index!r} is no place in a list of {len(value)}.")
        return _picked(value[int(index)], rest)
    keys = value if isinstance(value, Mapping) else {}
    reason = LookupError()
    for key in sorted(keys):  # a shorter key may be the beginning of another one
        if rest == key or rest.startswith(f"{key}."):
            try:
                return _picked(keys[key], rest[len(key) + 1 :])
            except LookupError as error:
                reason = error
    raise reason


def _numbers(value: Any, prefix: str = "") -> list[str]:
    """The dotted names of all numbers in results; of lists, those of the last entry."""
    if isinstance(value, list):
        value = {"-1": value[-1]} if value else {}
    if isinstance(value, Mapping):
        inner = [_numbers(entry, f"{prefix}.{name}" if prefix else name) for name, entry in value.items()]
        return list(itertools.chain.from_iterable(inner))
    return [prefix] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _by_option(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a study, those of its tables by the dotted names of the options."""
    several = {name: values.get(name, {}) for name in ("options", "space")}
    flat = {f"{table}.{name}": value for table, entries in several.items() for name, value in entries.items()}
    return {**{name: value for name, value in values.items() if name not in several}, **flat}


def _said(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "not given"


# --- private: options -------------------------------------------------------------------------------------------------


def _known(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise ValueError(f"There is no {what} {name!r}; {nearest(name, names)}")


def _leaves(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all options."""
    names: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        names += _leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def _replace(config: Any, path: list[str], value: Any, name: str, whole: Any = None) -> Any:
    whole = config if whole is None else whole
    head, rest = path[0].replace("-", "_"), path[1:]
    if not dataclasses.is_dataclass(config) or head not in {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"There is no option {name!r}; {nearest(name.replace('-', '_'), _leaves(whole))}")
    inner = getattr(config, head)
    if rest:
        return dataclasses.replace(config, **{head: _replace(inner, rest, value, name, whole)})  # type: ignore[type-var]
    if dataclasses.is_dataclass(inner):
        inside = [leaf for leaf in _leaves(whole) if leaf.startswith(f"{name}.")]
        raise ValueError(f"{name!r} is a group of options; expected one of them, like {inside[0]!r}.")
    hint = typing.get_type_hints(type(config))[head]
    return dataclasses.replace(config, **{head: _convert(value, hint, name)})  # type: ignore[type-var]


def _convert(value: Any, hint: Any, name: str) -> Any:
    """A value of TOML as one of the type that an option is declared with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value == "none" and type(None) in arguments:
            return None
        return _convert_any(value, [kind for kind in arguments if kind is not type(None)], hint, name)
    if origin is Literal and value in arguments:
        return value
    if origin in (tuple, list) and isinstance(value, list):
        if origin is tuple and arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"{name} is {value!r}; expected {len(arguments)} values.")
        kinds = arguments if origin is tuple and arguments[-1] is not Ellipsis else itertools.repeat(arguments[0])
        return origin(_convert(entry, kind, name) for entry, kind in zip(value, kinds, strict=False))
    chosen = [member for member in _members(hint) if value in (member.value, member.name)]
    if chosen:
        return chosen[0]
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Any or (origin is dict and isinstance(value, dict)):
        return value
    choices = [member.value for member in _members(hint)] or (list(arguments) if origin is Literal else [])
    wanted = f"one of {choices}" if choices else _written(hint)
    raise ValueError(f"{name} is {value!r}; expected {wanted}.")


def _members(hint: Any) -> list[Any]:
    return list(hint) if isinstance(hint, enum.EnumMeta) else []


def _convert_any(value: Any, kinds: list[Any], hint: Any, name: str) -> Any:
    for kind in kinds:
        try:
            return _convert(value, kind, name)
        except ValueError:
            continue
    raise ValueError(f"{name} is {value!r}; expected {_written(hint)}.")


def _written(hint: Any) -> str:
    return (
        hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("None", '"none"')
    )


# --- private: study files ---------------------------------------------------------------------------------------------


_EMPTY = Study(experiment="", preset="", space={})


def _replace_all(study: Study, values: Mapping[str, Any]) -> Study:
    for name, value in values.items():
        study = _replace(study, [name], value, name)
    return study


def _checked(study: Study) -> Study:
    missing = [name for name in ("experiment", "preset", "space") if not getattr(study, name)]
    if missing:
        raise ValueError(f"the study lacks {', '.join(missing)}; expected all three.")
    both = sorted(study.options.keys() & study.space.keys())
    how = sorted(_HOW & {*study.options, *study.space})
    if both or how:
        raise ValueError(
            f"{both or how} cannot be set there; expected every option once, out above of [options], and none of the "
            "others that say how one run is started: workers start trials."
        )
    for name, entry in study.space.items():
        _check_entry(name, entry, study.sampler)
    if (study.sampler == "grid") != (study.trials is None) or (study.trials is not None and study.trials < 1):
        raise ValueError(
            f"trials is {study.trials} for the sampler {study.sampler!r}; expected a number >= 1 for random and tpe, "
            "and none for a grid, which has its own."
        )
    return study


def _check_entry(name: str, entry: Any, sampler: str) -> None:
    if isinstance(entry, list) and entry:
        repeated = [value for place, value in enumerate(entry) if value in entry[:place]]
        if repeated:
            raise ValueError(f"space.{name} has {repeated[0]!r} twice; expected every value once.")
        return
    if not isinstance(entry, dict) or not {"low", "high"} <= entry.keys() <= _RANGE or not entry["low"] < entry["high"]:
        raise ValueError(
            f"space.{name} is {entry!r}; expected a list of values, or a table with low < high and, if wanted, log or "
            "step."
        )
    if entry.get("log") and ("step" in entry or entry["low"] <= 0):
        raise ValueError(f"space.{name} is {entry!r}; expected low > 0 and no step with log.")
    if sampler == "grid" and "step" not in entry:
        raise ValueError(f"space.{name} is {entry!r}; expected a list of values or a step for a grid.")


def _steps(entry: Mapping[str, Any]) -> list[Any]:
    count = int((entry["high"] - entry["low"]) / entry["step"] + 1e-9) + 1
    return [entry["low"] + index * entry["step"] for index in range(count)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; a table with low and high is a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and not _RANGE & value.keys():
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}".replace("-", "_")] = value
    return flat
