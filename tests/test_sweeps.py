"""Sweeps: studies are read and refused, trials are told once, and workers may die at any moment."""

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import swept

import jax_scalegmn as sg
from experiments import classify, cnn, generalization, inr, runs
from jax_scalegmn import training, zoo
from jax_scalegmn.cli import _interruption, _study, _sweep, _sweep_options, _trials, _work
from jax_scalegmn.cli._trials import Queue

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("JAX_SCALEGMN_KILLS", "10"))
SEED = int(os.environ.get("JAX_SCALEGMN_SEED", "1"))
GRID = """
experiment = "swept"
preset = "small"
score = false
[space]
train.learning_rate = [0.01, 0.1, 0.3]
train.seed = [0, 1]
"""


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    """SQLite returns before the disk has what it writes: that matters where a machine loses its power, not a kill."""

    def connected(connection, _):
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connected)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current folder, with the storage there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    return "sqlite:///s.db"


def write(text, name="study.toml"):
    Path(name).write_text(text)
    return name


def run(*words):
    return sg.cli.main(["sweep", *words])


def swept_study(text, url, *words, name="study.toml"):
    """Makes a study and runs it to its end, and returns its trials by number."""
    assert run("make", write(text, name), "--storage", url) == 0
    assert run("work", "--storage", url, "--trials-per-program", "4", "--heartbeat", "1", *words) == 0
    return trials(url)


def trials(url):
    return {one.identity: one for one in Queue(url, None).attempts()}


def objectives(url):
    return {number: one.last.value for number, one in trials(url).items()}


# --- studies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "studies").glob("*.toml")), ids=lambda path: path.name)
def test_every_study_of_the_repository_fits_its_experiment(path):
    study = _study.read(path)
    experiment = _study.load(study)
    configs = [experiment.configure(point) for point in _study.points(study)]
    assert len({repr(config) for config in configs}) == len(configs) > 1


def test_options_get_the_types_of_the_experiment(place):
    study = _study.read(Path(write(GRID + "[options]\nkind = 'absolute'\nwidths = [3, 4, 2]\nminutes = 2")))
    config = _study.load(study).configure({"train.learning_rate": 1, "minutes": "none"})
    assert config.kind is swept.Kind.ABSOLUTE
    assert config.widths == (3, 4, 2)
    assert config.minutes is None
    assert type(config.train.learning_rate) is float
    assert _study.load(study).base.minutes == 2.0


EXPERIMENTS = ["aligners", "classify", "cnn", "cnn_zoo", "edit", "generalization", "inr", "merging", "merging_zoo"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_option_of_every_experiment_can_be_named_in_a_study(name):
    """With its default value, as TOML writes it."""
    module = importlib.import_module(f"experiments.{name}")
    for _, base in module.PRESETS.values():
        experiment, plain = _study.Experiment(module, base), runs.plain(base)
        leaves = _study._leaves(base)
        assert {"seed", "out"} < set(leaves)
        for leaf in leaves:
            value = functools.reduce(lambda values, key: values[key], leaf.split("."), plain)
            again = experiment.configure({leaf.replace("_", "-"): "none" if value is None else value})
            assert again == base, leaf


def test_results_are_picked_by_dotted_names():
    results = {"a": {"b.c": [{"d": 1}, {"d": 2}]}, "a.b": 3}
    assert _study.pick(results, "a.b.c.-1.d") == 2
    assert _study.pick(results, "a.b") == 3
    with pytest.raises(ValueError, match=r"The results have no 'a\.b\.c\.2\.d'; '2' is no place in a list of 2"):
        _study.pick({"a": results["a"]}, "a.b.c.2.d")
    with pytest.raises(ValueError, match=r"The results have no 'objektive'; did you mean 'objective'\?"):
        _study.pick({"objective": 1}, "objektive")
    with pytest.raises(ValueError, match=r"did you mean 'encoders\.query\.accuracy\.mean'\?"):
        _study.pick({"encoders": {"query": {"accuracy": {"mean": 0.5, "values": []}}}}, "encoders.query.acuracy.mean")


BAD_STUDIES = {
    "no TOML": ("experiment =", r"expected a study in TOML; got: "),
    "unknown key": (GRID.replace("score", "scores"), r"There is no option 'scores'; did you mean 'score'\?"),
    "missing": ("preset = 'small'\n[space]\nseed = [1]", r"the study lacks experiment; expected all three"),
    "unknown option": (
        GRID.replace("learning_rate", "learning_rat"),
        r"no option 'train\.learning_rat'; did you mean "
        r"'train\.learning_rate'\?",
    ),
    "group": (GRID.replace("train.seed", "train"), r"TOML|'train' is a group"),
    "type": (GRID.replace("[0, 1]", "[0.5]"), r"train\.seed is 0\.5; expected int"),
    "enum": (GRID + "kind = ['cube']", r"kind is 'cube'; expected one of \['square', 'absolute'\]"),
    "preset": (GRID.replace("small", "smal"), r"There is no preset 'smal'; did you mean 'small'\?"),
    "module": (GRID.replace("swept", "no_such_module"), r"names the experiment 'no_such_module'; expected a module"),
    "no experiment": (GRID.replace("swept", "json"), r"json has no PRESETS and main\(config\)"),
    "both": (GRID + "[options]\ntrain.seed = 1", r"\['train\.seed'\] cannot be set there; expected every option once"),
    "out": (GRID + "out = ['a', 'b']", r"\['out'\] cannot be set there; expected every option once, out above of"),
    "how": (GRID + "[options]\nresume = true", r"\['resume'\] cannot be set there; .* how one run is started"),
    "twice": (
        GRID.replace("[0, 1]", "[0, 1, 0]"),
        r"study\.toml: space\.train\.seed has 0 twice; expected every value o",
    ),
    "zero trials": (
        "sampler = 'tpe'\ntrials = 0\n" + GRID,
        r"trials is 0 for the sampler 'tpe'; expected a number >= 1",
    ),
    "range": (GRID + "minutes = {low = 2, high = 1}", r"space\.minutes is .*; expected a list of values, or a table"),
    "grid of a range": (
        GRID + "minutes = {low = 1, high = 2}",
        r"space\.minutes is .*; expected a list of values or a",
    ),
    "log": (GRID + "minutes = {low = 0, high = 2, log = true}", r"space\.minutes is .*; expected low > 0 and no step"),
    "trials of a grid": ("trials = 3\n" + GRID, r"trials is 3 for the sampler 'grid'; expected a number >= 1 for rand"),
    "no trials": ("sampler = 'tpe'\n" + GRID, r"trials is None for the sampler 'tpe'"),
    "sampler": ("sampler = 'best'\n" + GRID, r"sampler is 'best'; expected one of \['grid', 'random', 'tpe'\]"),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
def test_a_bad_study_is_refused_in_one_sentence(place, capsys, name):
    text, message = BAD_STUDIES[name]
    assert run("make", write(text), "--storage", place) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)
    assert not Path("s.db").exists()


def test_another_study_of_the_same_name_is_refused_by_what_differs(place, capsys):
    for _ in range(2):  # making the same one again changes nothing
        assert run("make", write(GRID), "--storage", place) == 0
    assert len(trials(place)) == 6
    other = GRID.replace("[0, 1]", "[0, 2]").replace("small", "other")
    assert run("make", write(other), "--storage", place) == 2
    said = capsys.readouterr().err
    assert "preset is small there and other here" in said
    assert "space.train.seed is [0, 1] there and [0, 2] here" in said
    assert "learning_rate" not in said
    capsys.readouterr()
    assert run("make", write(other, "other.toml"), "--storage", place) == 0
    assert f"Run them: jax-scalegmn sweep work --storage {place} --study other\n" in capsys.readouterr().out
    assert run("status", "--storage", place) == 2
    assert (
        "--study is None; expected the name of a study in sqlite:///s.db: it has other, study."
        in capsys.readouterr().err
    )
    assert run("status", "--storage", place, "--study", "other") == 0


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_that_is_complete_gets_more_trials(place, capsys, sampler):
    """Those that a study of this number has from the beginning."""
    few = GRID.replace("[space]", f"sampler = '{sampler}'\ntrials = 3\n[space]").replace(
        "[0.01, 0.1, 0.3]", "{low=1, high=2}"
    )
    found = swept_study(few, place)
    assert len(found) == 3
    capsys.readouterr()
    assert len(swept_study(few.replace("trials = 3", "trials = 5"), place)) == 5
    assert "study study: 2 more, 5 trials in all. Run them: jax-scalegmn" in capsys.readouterr().out
    assert {one.state for one in trials(place).values()} == {"COMPLETE"}
    assert all(trials(place)[number].last.value == one.last.value for number, one in found.items())
    assert run("make", write(few.replace("trials = 3", "trials = 5")), "--storage", place) == 0
    assert "study study: is there already, with 5 trials. Run them" in capsys.readouterr().out
    assert run("make", write(few), "--storage", place) == 2
    assert "trials is 5 there and 3 here. Name as many trials, or more." in capsys.readouterr().err
    if sampler == "random":
        whole = "sqlite:///whole.db"
        assert run("make", write(few.replace("trials = 3", "trials = 5")), "--storage", whole) == 0
        options = [[one.last.params for one in trials(url).values()] for url in (place, whole)]
        assert options[0] == options[1]


@pytest.mark.parametrize("name", ["classify", "cnn", "edit", "generalization", "merging"])
def test_a_study_without_an_objective_is_refused_before_anything_runs(place, capsys, name):
    text = f"experiment = 'experiments.{name}'\npreset = 'tiny'\n[space]\nseed = [0, 1]\n"
    assert run("make", write(text), "--storage", place) == 2
    said = capsys.readouterr().err
    assert f"objective is 'best.selection_loss', which the results of experiments.{name} lack" in said
    line = re.search(r'objective = ".*?" and direction = "\w+"', said)[0].replace(" and ", "\n")
    assert run("make", write(f"{line}\n{text}"), "--storage", place) == 0


@pytest.mark.slow
def test_several_who_make_a_study_at_once_make_it_once_and_add_its_trials_once(place):
    text = GRID.replace("[space]", "sampler = 'random'\ntrials = 3\n[space]").replace(
        "[0.01, 0.1, 0.3]", "{low=1, high=2}"
    )
    together = threading.Barrier(6)

    def make(study):
        together.wait()
        return _trials.make(study, place)

    few, more = (_study.read(Path(write(text.replace("= 3", f"= {count}")))) for count in (3, 5))
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(make, [few] * 6))
        assert sorted(one.new for one in made) == [0, 0, 0, 0, 0, 3]
        made = list(pool.map(make, [more] * 6))
    assert sorted(one.new for one in made) == [0, 0, 0, 0, 0, 2]
    assert len(trials(place)) == 5


def test_the_lock_of_a_killed_maker_is_taken_over(place, monkeypatch):
    monkeypatch.setattr(_trials, "_LOCK_SECONDS", 0.5)
    optuna.create_study(study_name=f"study{_trials._LOCKED}", storage=place)
    assert run("make", write(GRID), "--storage", place) == 0
    assert [summary.study_name for summary in optuna.get_all_study_summaries(place)] == ["study"]
    assert len(trials(place)) == 6


def test_the_folder_of_a_new_storage_is_made(place):
    assert run("make", write(GRID), "--storage", "sqlite:///runs/deep/s.db") == 0
    assert Path("runs/deep/s.db").exists()


def test_storages_that_cannot_be_used_are_refused(place, capsys, monkeypatch):
    write(GRID)
    for url, message in (
        ("sqlite:///none.db", "There is no none.db; expected a storage with a study."),
        ("postgres//x", "--storage is 'postgres//x'; expected a URL like sqlite:///s.db"),
        ("oracle://me:secret@host/x", "--storage is a oracle database, whose driver is not installed; expected one"),
        ("nosuch://me:secret@host/x", "--storage is 'nosuch://me:***@host/x'; expected a URL like sqlite:///s.db"),
    ):
        assert run("status", "--storage", url) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("make", "study.toml", "--storage", place) == 2
    assert "expected the extra 'sweep'. Run pip install \"jax-scalegmn[sweep]\"." in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "refused"), [("nfs4", True), ("fuse.sshfs", True), ("ext4", False), ("tmpfs", False)])
def test_sqlite_on_a_network_file_system_is_refused(tmp_path, kind, refused):
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\n"
    url = f"sqlite:///{tmp_path}/s.db"
    if refused:
        with pytest.raises(ValueError, match=rf"s\.db is on a {kind} file system, .*; expected a local disk"):
            _trials.check_place(url, mounts)
    else:
        _trials.check_place(url, mounts)
    _trials.check_place("postgresql://user@host/name", mounts)


@pytest.mark.parametrize(
    "line", ["server:/x {place} nfs4 rw 0 0", "auto {place} autofs rw 0 0\nserver:/x {place} nfs rw 0 0"]
)
def test_a_network_file_system_is_found_with_blanks_in_its_path_and_where_it_is_mounted_on_demand(tmp_path, line):
    share = tmp_path / "my share"
    mounts = "/dev/a / ext4 rw 0 0\n" + line.format(place=str(share).replace(" ", "\\040"))
    with pytest.raises(ValueError, match=r"is on a nfs4? file system"):
        _trials.check_place(f"sqlite:///{share}/s.db", mounts)
    _trials.check_place(f"sqlite:///{tmp_path}/s.db", mounts)


@pytest.mark.parametrize(
    "command", [["make", "study.toml"], ["work"], ["launch", "--workers", "1"]], ids=lambda c: c[0]
)
def test_no_command_uses_sqlite_on_a_network_file_system(place, capsys, monkeypatch, command):
    """Also where a link leads to one; nothing is written there."""
    write(GRID)
    Path("share").mkdir()
    Path("s.db").symlink_to("share/s.db")
    check, mounts = _trials.check_place, f"/dev/a / ext4 rw 0 0\nserver:/x {Path('share').resolve()} nfs4 rw 0 0\n"
    monkeypatch.setattr(_trials, "check_place", lambda url: check(url, mounts))
    assert run(*command, "--storage", place) == 2
    said = capsys.readouterr().err
    assert "s.db is on a nfs4 file system, on which SQLite's locks do not hold; expected a local disk, or a" in said
    assert said.count("\n") == 1
    assert not list(Path("share").iterdir())


# --- workers ------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_all_trials_and_a_diverging_one_fails_with_its_reason(place, capsys):
    found = swept_study(GRID.replace("0.3]", "1e30]"), place)
    assert {number: one.state for number, one in found.items()} == {
        **dict.fromkeys(range(4), "COMPLETE"),
        **dict.fromkeys((4, 5), "FAIL"),
    }
    assert found[5].reason == "diverged at step 0"
    assert "4 complete, 2 failed, 0 pruned" in capsys.readouterr().out
    # Each as the population of one that main trains.
    for number in range(4):
        options = found[number].last.params
        config = dataclasses.replace(
            swept.PRESETS["small"][1],
            train=swept.TrainConfig(learning_rate=options["train.learning_rate"], seed=options["train.seed"]),
        )
        best = min(row["selection_loss"] for row in swept.main(config)["training"])
        assert found[number].last.value == pytest.approx(best, rel=1e-5)
    (zoo,) = Path("runs/study/zoos").glob("*/zoo/fits.txt")
    assert zoo.read_text() == "fitted\n"
    assert Path("runs/study/trials/00003/zoo").resolve() == zoo.parent.resolve()
    assert json.loads(Path("runs/study/trials/00000/trial.json").read_text())["options"]["train.learning_rate"] == 0.01


def test_status_and_report_tell_what_became_of_every_trial(place, capsys):
    swept_study(GRID.replace("0.3]", "1e30]"), place)
    capsys.readouterr()
    assert run("status", "--storage", place) == 0
    said = capsys.readouterr().out
    assert "COMPLETE  4" in said
    assert "trial 4 failed: diverged at step 0" in said
    assert run("report", "--storage", place, "--json", "table.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "train.learning_rate", "train.seed", "best.selection_loss", "state"]
    rows = json.loads(Path("table.json").read_text())["rows"]
    values = [row["results"]["best.selection_loss"] for row in rows[:4]]
    assert values == sorted(values)
    assert [row["state"] for row in rows[4:]] == ["FAIL", "FAIL"]
    page = Path("runs/study/report.html").read_text()
    assert page.count("<polyline") == 4
    assert "diverged at step 0" in page


@pytest.mark.slow
def test_a_trial_that_fails_leaves_the_others_to_go_on(place):
    text = GRID.replace("score = false", "score = true\ncolumns = ['note.a.b.1.c']")
    found = swept_study(text + "error = ['none', 'value', 'exit', 'population']\n", place)
    by_error = {}
    for one in found.values():
        by_error.setdefault(one.last.params["error"], set()).add((one.state, one.reason))
    assert by_error == {
        "none": {("COMPLETE", None)},
        "value": {("FAIL", "ValueError: a bad value")},
        "exit": {("FAIL", "RuntimeError: no data. Name some.")},
        "population": {("FAIL", "RuntimeError: out of memory")},
    }
    assert {one.last.user_attrs["results"]["note.a.b.1.c"] for one in found.values() if one.state == "COMPLETE"} == {
        0.01,
        0.1,
        0.3,
    }


@pytest.mark.slow
def test_options_that_the_experiment_refuses_together_fail_their_trials_alone(place):
    found = swept_study(GRID + "error = ['none', 'seeds']\n", place)
    for one in found.values():
        refused = one.last.params["error"] == "seeds" and one.last.params["train.seed"] == 1
        assert one.reason == ("ValueError: error is 'seeds' with seed 1; expected seed 0." if refused else None)


def test_an_objective_that_is_not_there_or_no_number_fails_the_trial(place):
    text = GRID.replace("[0.01, 0.1, 0.3]", "[0.1]").replace("[0, 1]", "[0]")
    found = swept_study("objective = 'best.selection_los'\n" + text, place, name="a.toml")
    assert found[0].reason == "The results have no 'best.selection_los'; did you mean 'best.selection_loss'?"
    Path("s.db").unlink()
    found = swept_study("objective = 'training'\n" + text, place, name="b.toml")
    assert "training is [{'selection_loss'" in found[0].reason


@pytest.mark.slow
def test_an_experiment_without_populations_runs_its_trials_one_by_one(place, monkeypatch, capsys):
    text = GRID.replace("score = false\n", "")
    together = swept_study(text, place)
    Path("s.db").unlink()
    monkeypatch.setattr(swept, "population", swept.population)
    original = swept.population
    monkeypatch.delattr(swept, "population")
    monkeypatch.setattr(
        swept, "main", lambda config: {"training": list(original([config]))[-1][0]["results"]["training"]}
    )
    monkeypatch.delattr(swept, "fit_zoo")
    alone = swept_study(text, place)
    for number, one in alone.items():
        assert one.last.value == pytest.approx(together[number].last.value, rel=1e-5)
    assert run("make", write(GRID, "x.toml"), "--storage", place) == 2
    assert "score is false, but swept has no training that can be run alone" in capsys.readouterr().err
    assert run("work", "--storage", place, "--pruner", "median") == 2
    assert "--pruner is median, but swept tells nothing before its end" in capsys.readouterr().err


@pytest.mark.slow
def test_random_trials_are_drawn_when_the_study_is_made_and_tpe_draws_while_it_runs(place):
    space = "[space]\ntrain.learning_rate = {low = 1e-3, high = 0.3, log = true}\ntrain.seed = {low = 0, high = 9}\n"
    space += "widths = [[3, 2], [3, 4, 2]]\n"
    base = "experiment = 'swept'\npreset = 'small'\nscore = false\ntrials = 7\nseed = 3\n"
    drawn = []
    for url in ("sqlite:///a.db", "sqlite:///b.db"):
        assert run("make", write(base + "sampler = 'random'\n" + space), "--storage", url) == 0
        drawn.append([one.last.params for one in trials(url).values()])
    assert drawn[0] == drawn[1]
    assert len({params["train.learning_rate"] for params in drawn[0]}) == 7
    found = swept_study(base + "sampler = 'tpe'\n" + space, "sqlite:///c.db")
    assert [one.state for one in found.values()] == ["COMPLETE"] * 7
    assert all(1e-3 <= one.last.params["train.learning_rate"] <= 0.3 for one in found.values())
    assert all(isinstance(one.last.params["train.seed"], int) for one in found.values())


@pytest.mark.slow
def test_the_median_pruner_ends_trials_that_are_worse_than_those_before(place):
    text = GRID.replace("[0.01, 0.1, 0.3]", "[0.3, 0.2, 0.1, 0.001]").replace("[0, 1]", "[0, 1, 2]")
    found = swept_study(text + "train.epochs = [6]\n", place, "--pruner", "median")
    states = {one.state for one in found.values()}
    assert states == {"COMPLETE", "PRUNED"}
    assert all(one.state == "PRUNED" for one in found.values() if one.last.params["train.learning_rate"] == 0.001)


@pytest.mark.slow
def test_a_worker_that_is_interrupted_gives_its_trials_back(place, monkeypatch, capsys):
    text = GRID.replace("score = false\n", "")
    assert run("make", write(text), "--storage", place) == 0
    main = swept.main
    monkeypatch.setattr(swept, "main", lambda config: main(dataclasses.replace(config, error="interrupt")))
    with pytest.raises(SystemExit, match="75"):
        run("work", "--storage", place, "--trials-per-program", "4")
    assert "Interrupted. Its trials wait for another worker" in capsys.readouterr().err
    assert {one.state for one in trials(place).values()} == {"WAITING"}
    monkeypatch.setattr(swept, "main", main)
    assert run("work", "--storage", place, "--trials-per-program", "4") == 0
    found = trials(place)
    assert {one.state for one in found.values()} == {"COMPLETE"}
    assert sorted(one.number for one in found.values()) == [1, 1, 2, 2, 2, 2]


def test_of_two_copies_the_first_one_counts_and_a_worker_taken_for_dead_tells_nothing(place):
    assert run("make", write(GRID), "--storage", place) == 0
    queue = Queue(place, None)
    (dead, *_) = queue.claim(1, lambda options: "")
    frozen = queue.optuna.trials[dead.trial.number]
    queue.storage.set_trial_state_values(frozen._trial_id, state=type(frozen.state).FAIL)
    callback = queue.storage.get_heartbeat_stale_trial_callback()
    for _ in range(2):  # by two workers at once
        callback(queue.optuna, queue.optuna.trials[dead.trial.number])
    other = Queue(place, None)
    claimed = [one for _ in range(8) for one in other.claim(1, lambda options: "")]
    assert sorted(one.identity for one in claimed) == list(range(6))
    assert not queue.complete(dead, 1.0, {})
    for one in claimed:
        assert other.complete(one, float(one.identity), {})
        assert not other.complete(one, -1.0, {})
    assert objectives(place) == {number: float(number) for number in range(6)}
    assert sum(trial.state.name == "COMPLETE" for trial in other.optuna.trials) == 6
    assert other.finished()


def test_a_trial_whose_worker_died_while_it_was_put_back_is_put_back_by_the_next(place):
    assert run("make", write(GRID), "--storage", place) == 0
    queue = Queue(place, None)
    (dead, *_) = queue.claim(1, lambda options: "")
    frozen = queue.optuna.trials[dead.trial.number]
    queue.storage.set_trial_state_values(frozen._trial_id, state=type(frozen.state).FAIL)  # and no copy is made
    claimed = Queue(place, None).claim(6, lambda options: "")
    assert sorted(one.identity for one in claimed) == list(range(6))


def test_a_trial_that_kills_every_worker_fails_after_its_retries(place):
    assert run("make", write(GRID), "--storage", place) == 0
    queue = Queue(place, None, retries=2)
    for _ in range(3):
        one = next(one for one in queue.claim(6, lambda options: "") if one.identity == 0)
        queue.storage.set_trial_state_values(one.trial._trial_id, state=type(queue.optuna.trials[0].state).FAIL)
    queue.claim(6, lambda options: "")
    assert trials(place)[0].reason == "its worker ended without a word, at attempt 3"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials-per-program", "0"], "--trials-per-program is 0; expected a number >= 1."),
        (["--heartbeat", "0"], "--heartbeat is 0; expected a number >= 1."),
        (["--retries", "-1"], "--retries is -1; expected a number >= 0."),
    ],
)
def test_bad_options_of_a_worker_are_refused(place, capsys, words, message):
    assert run("make", write(GRID), "--storage", place) == 0
    assert run("work", "--storage", place, *words) == 2
    assert message in capsys.readouterr().err


def test_parallel_coordinates_draw_every_row_and_refuse_what_cannot_be_drawn():
    axes = {"rate": [1e-3, 1e-2, 1e-1], "kind": ["b", "a", "b"], "loss": [3.0, 1.0, 2.0]}
    draw = functools.partial(sg.report.parallel_coordinates, labels=["x", "y", "z"])
    figure = draw(axes, log=["rate"])
    lines = re.findall(r'points="([^"]*)"><title>(\w)', figure)
    assert [label for _, label in lines] == ["x", "z", "y"]  # the best on top
    heights = {label: [float(corner.split(",")[1]) for corner in points.split()] for points, label in lines}
    assert heights["y"][0] == pytest.approx((heights["x"][0] + heights["z"][0]) / 2, abs=0.1)
    assert heights["x"][1] == heights["z"][1] < heights["y"][1]
    assert [label for _, label in re.findall(r'points="([^"]*)"><title>(\w)', draw(axes, best="maximize"))] == [*"yzx"]
    for wrong, message in (
        ({**axes, "loss": [1.0, math.nan, 2.0]}, "The axis 'loss' has .*; expected finite numbers"),
        ({**axes, "rate": [0.0, 1.0, 2.0]}, "The axis 'rate' has .*; expected finite numbers above 0"),
        ({**axes, "loss": ["a", "b", "c"]}, "The last axis 'loss' has texts; expected numbers"),
        ({**axes, "loss": [1.0]}, "axes have the lengths .* and there are 3 labels; expected one length"),
        ({}, "axes have the lengths"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(wrong, log=["rate"])


# --- workers that are killed ------------------------------------------------------------------------------------------


def start_worker(folder, seconds):
    words = [sys.executable, "-m", "jax_scalegmn", "sweep", "work", "--storage", "sqlite:///s.db", "--heartbeat", "1"]
    words += ["--trials-per-program", "4", "--retries", "50"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    environment |= {"SWEPT_SECONDS": str(seconds), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)


def sweep_with_kills(folder, text, monkeypatch, *, workers, kills, seconds, rng):
    """Runs a study by workers of which some are killed; returns the objectives and how many runs were lost."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run("make", write(text), "--storage", "sqlite:///s.db") == 0
    running = [start_worker(folder, seconds) for _ in range(workers)]
    queue = Queue("sqlite:///s.db", None)
    until, killed = time.monotonic() + 400, 0
    while any(worker.poll() is None for worker in running) and time.monotonic() < until:
        time.sleep(rng.uniform(0.02, 2.0))
        busy = {one.last.user_attrs.get("pid") for one in queue.attempts() if one.state == "RUNNING"}
        alive = [index for index, worker in enumerate(running) if worker.poll() is None]
        # Every third kill hits any worker, like one that starts or ends; the others one that has trials.
        some = [index for index in alive if killed % 3 == 2 or running[index].pid in busy]
        if killed < kills and some:
            index = rng.choice(some)
            running[index].send_signal(signal.SIGKILL)
            running[index].wait()
            killed += 1
            running[index] = start_worker(folder, seconds)
    log = (folder / "log.txt").read_text()
    assert killed == kills, log
    assert [worker.wait(60) for worker in running] == [0] * workers, log
    stored = Queue("sqlite:///s.db", None).optuna.trials
    complete = [_trials._identity(trial) for trial in stored if trial.state.name == "COMPLETE"]
    lost = sum(trial.state.name == "FAIL" and not trial.user_attrs.get("reason") for trial in stored)
    return complete, objectives("sqlite:///s.db"), lost


CLAIMS = """
import sys, time
from jax_scalegmn.cli._trials import Queue
print(len(Queue("sqlite:///s.db", None).claim(4, lambda options: "")), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_trials_of_a_killed_worker_are_run_by_another(place):
    expected = swept_study(GRID, "sqlite:///whole.db")
    assert run("make", "study.toml", "--storage", place) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", CLAIMS], stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdout.readline() == b"4\n"
        worker.send_signal(signal.SIGKILL)
    assert sorted(one.state for one in trials(place).values()) == ["RUNNING"] * 4 + ["WAITING"] * 2
    with contextlib.closing(sqlite3.connect("s.db")) as database, database:  # and an hour passes
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    assert run("work", "--storage", place, "--trials-per-program", "4") == 0
    assert objectives(place) == {number: one.last.value for number, one in expected.items()}
    assert [one.number for one in trials(place).values()] == [2] * 4 + [1] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "count", "kills"), [(2, 6, 2), (3, 24, KILLS)])
def test_killed_workers_leave_every_trial_complete_once_with_the_numbers_of_an_undisturbed_sweep(
    tmp_path, monkeypatch, workers, count, kills
):
    rng = random.Random(SEED)
    text = GRID.replace("[0, 1]", str(list(range(count // 3)))) + "train.epochs = [4]\n"
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    options = {"rng": rng, "workers": 1, "kills": 0, "seconds": 0}
    complete, expected, _ = sweep_with_kills(tmp_path / "whole", text, monkeypatch, **options)
    assert sorted(complete) == list(range(count))
    options = {"rng": rng, "workers": workers, "kills": kills, "seconds": 0.5}
    complete, found, lost = sweep_with_kills(tmp_path / "killed", text, monkeypatch, **options)
    print(f"seed {SEED}: {kills} kills, {lost} runs of {count} trials lost and repeated")
    assert sorted(complete) == list(range(count))
    assert found == expected  # to the last bit
    assert lost


@pytest.mark.slow
def test_a_worker_that_is_terminated_gives_its_trials_back_at_once_and_ends_with_status_75(place, tmp_path):
    assert run("make", write(GRID), "--storage", place) == 0
    worker = start_worker(tmp_path, seconds=5)
    until = time.monotonic() + 120
    while "RUNNING" not in {one.state for one in trials(place).values()}:
        assert time.monotonic() < until, (tmp_path / "log.txt").read_text()
        time.sleep(0.2)
    worker.terminate()
    assert worker.wait(60) == 75, (tmp_path / "log.txt").read_text()
    assert {one.state for one in trials(place).values()} == {"WAITING"}
    assert "Interrupted. Its trials wait for another worker" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_while_trials_are_taken_gives_them_back(place, monkeypatch, number):
    assert run("make", write(GRID), "--storage", place) == 0
    take = Queue._take

    def interrupted(queue, frozen):
        taken = take(queue, frozen)
        os.kill(os.getpid(), number)
        return taken

    monkeypatch.setattr(Queue, "_take", interrupted)
    with pytest.raises(SystemExit, match="75"):
        run("work", "--storage", place, "--trials-per-program", "4")
    assert {one.state for one in trials(place).values()} == {"WAITING"}


class Ends:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def in_a_destructor():
    Ends()


def in_a_callback_of_a_weak_reference():
    held = threading.Event()
    reference = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGTERM))
    del held
    assert reference() is None


def in_a_callback_of_the_garbage_collector():
    def begin(phase, _):
        if phase == "start":
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(begin)
    gc.collect()
    gc.callbacks.remove(begin)


ARRIVE = [in_a_destructor, in_a_callback_of_a_weak_reference, in_a_callback_of_the_garbage_collector]


@pytest.mark.parametrize("arrive", ARRIVE)
def test_an_interruption_is_not_lost_where_python_drops_what_is_raised(arrive):
    before, arrived = (signal.getsignal(signal.SIGTERM), sys.unraisablehook), False
    with pytest.raises(KeyboardInterrupt), _interruption.raised():  # noqa: PT012
        arrive()
        arrived = True
        time.sleep(10)
    assert arrived
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


# --- the experiments ------------------------------------------------------------------------------------------------

INR = """
experiment = "experiments.inr"
preset = "tiny"
objective = "reconstruction.share_of_variance"
columns = ["best.selection_loss", "merging.PD, noise 0.005.autoencoder.midpoint.mean"]
options = {zoo.widths = [2, 4, 1], zoo.steps = 20, model.features = 4, evaluation.noises = [0.005]}
[space.train]
learning_rate = [1e-3, 4e-3, 1e30]
seed = [5, 6]
"""


@pytest.mark.slow
def test_trials_of_the_inr_experiment_share_a_program_and_a_zoo_and_equal_runs_of_their_own(place, monkeypatch):
    fits, programs = [], []
    fit_images, population = zoo.fit_images, training.population
    monkeypatch.setattr(zoo, "fit_images", lambda *args, **options: fits.append(1) or fit_images(*args, **options))
    monkeypatch.setattr(training, "population", lambda *args, **o: programs.append(1) or population(*args, **o))
    found = swept_study(INR, place, "--trials-per-program", "6")
    assert (len(fits), len(programs)) == (3, 1)  # three splits
    assert [one.state for one in found.values()] == ["COMPLETE"] * 4 + ["FAIL"] * 2
    study = _study.read(Path("study.toml"))
    for number in (0, 3):
        config = _study.load(study).configure(found[number].last.params)
        results = inr.main(dataclasses.replace(config, out=Path(f"alone-{number}")))
        told = found[number].last.user_attrs["results"]
        assert told["best.selection_loss"] == pytest.approx(
            min(epoch["selection_loss"] for epoch in results["training"]), rel=1e-4
        )
        assert found[number].last.value == pytest.approx(results["reconstruction"]["share_of_variance"], rel=1e-3)
        assert (Path(found[number].last.user_attrs["folder"]) / "report.html").exists()
    assert (len(fits), len(programs)) == (9, 1)


CNN = """
experiment = "experiments.cnn"
preset = "tiny"
objective = "activations.tanh.best.selection_loss"
options = {activations = ["tanh"], zoo.networks = 8, zoo.train_images = 32}
space = {train.learning_rate = [1e-3, 4e-3], train.epochs = [1]}
"""


@pytest.mark.slow
def test_trials_of_the_cnn_experiment_share_a_program_and_equal_runs_of_their_own(place, monkeypatch):
    programs, population = [], training.population
    monkeypatch.setattr(training, "population", lambda *args, **o: programs.append(1) or population(*args, **o))
    found = swept_study(CNN, place)
    assert [one.state for one in found.values()] == ["COMPLETE"] * 2
    assert len(programs) == 1
    config = _study.load(_study.read(Path("study.toml"))).configure(found[1].last.params)
    results = cnn.main(dataclasses.replace(config, out=Path("alone")))
    (epoch,) = results["activations"]["tanh"]["training"]
    assert found[1].last.value == pytest.approx(epoch["selection_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("module", [inr, classify, cnn, generalization], ids=lambda module: module.__name__)
def test_a_zoo_that_is_fitted_once_is_all_that_trials_read(place, monkeypatch, module):
    config = dataclasses.replace(module.PRESETS["tiny"][1], out=Path("shared"))
    module.fit_zoo(config)
    trial = dataclasses.replace(config, out=Path("trial"), train=dataclasses.replace(config.train, learning_rate=0.5))
    assert module.zoo_key(trial) == module.zoo_key(config)
    assert module.zoo_key(dataclasses.replace(config, seed=1)) != module.zoo_key(config)
    trial.out.mkdir()
    (trial.out / "zoo").symlink_to(Path("shared/zoo").absolute(), target_is_directory=True)
    before = {path: path.stat().st_mtime_ns for path in Path("shared").rglob("*.safetensors")}
    monkeypatch.setattr(zoo, "fit_images", None)
    monkeypatch.setattr(zoo.classifier_zoo, "fit", None)
    module.fit_zoo(trial)
    assert before
    assert {path: path.stat().st_mtime_ns for path in Path("shared").rglob("*.safetensors")} == before


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_are_written(tmp_path, monkeypatch):
    """In a checkout, but for installing and for what needs a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("experiments").symlink_to(ROOT / "experiments")
    page = (ROOT / "docs" / "howto" / "sweeps.md").read_text()
    commands = [line for line in page.splitlines() if re.match(r"jax-scalegmn sweep .*sqlite", line)]
    assert [command.split()[2] for command in commands] == ["make", "work", "status", "report", "launch"]
    for command in commands:
        assert sg.cli.main(command.split()[1:]) == 0
    assert {one.state for one in trials("sqlite:///runs/s.db").values()} == {"COMPLETE"}
    assert Path("runs/tiny/report.html").read_text().count("<polyline") == 4


def test_the_objectives_of_the_page_are_in_the_results_of_their_experiments():
    page = (ROOT / "docs" / "howto" / "sweeps.md").read_text()
    files = {"inr": "digits", "edit": "edit_mnist"}
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| ((?:min|max)imize) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for experiment, names, direction in rows:
        module = importlib.import_module(f"experiments.{experiment}")
        assert experiment == "inr" or (names.strip("`"), direction) == module.OBJECTIVE
        name = files.get(experiment, f"{experiment}_digits")
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for objective in re.findall(r"`(.*?)`", names):
            assert math.isfinite(_study.pick(_work._with_best(results), objective))


def test_the_study_of_the_page_fits_its_experiment(place):
    page = (ROOT / "docs" / "howto" / "sweeps.md").read_text()
    study = _study.read(Path(write(page.split("```toml\n")[1].split("```")[0])))
    assert _study.load(study).trains_together
    assert study.trials == 48


# --- launching ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_launched_workers_run_a_study_and_their_statuses_are_told(place, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert run("make", write(GRID), "--storage", place) == 0
    assert run("launch", "--storage", place, "--workers", "2", "--trials-per-program", "4", "--heartbeat", "1") == 0
    assert {one.state for one in trials(place).values()} == {"COMPLETE"}
    assert len(list(Path("runs/study/logs").glob("worker-*.log"))) == 2
    said, warned = capfd.readouterr()
    assert "Warning" not in warned
    assert "2 workers: " in said
    assert "  COMPLETE  6\n" in said
    assert run("work", "--storage", place) == 0
    assert capfd.readouterr().out == "No trial was left for this worker.\n"


@pytest.mark.slow
def test_jobs_are_submitted_as_submitit_does_it(place, monkeypatch):
    """By its local cluster: there is no Slurm here."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert run("make", write(GRID), "--storage", place) == 0
    options = _sweep_options.Launch(storage=place, workers=2, executor="slurm", slurm=("partition=gpu",))
    words = _sweep.worker_words(options, "study")
    jobs = _sweep.submit(words, Path("logs"), options, "local")
    for job in jobs:
        job.result()
    assert {one.state for one in trials(place).values()} == {"COMPLETE"}


def test_slurm_without_slurm_or_submitit_is_refused(place, monkeypatch, capsys):
    assert run("make", write(GRID), "--storage", place) == 0
    monkeypatch.setenv("PATH", "")
    words = ["launch", "--storage", place, "--workers", "1", "--executor", "slurm"]
    assert run(*words) == 2
    assert "--executor is slurm, but this machine cannot submit jobs" in capsys.readouterr().err
    assert run(*words, "--slurm", "partition") == 2
    assert "--slurm is 'partition'; expected name=value, like partition=gpu." in capsys.readouterr().err
    assert run("launch", "--storage", place, "--workers", "0") == 2
    assert "--workers is 0; expected a number >= 1." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(*words) == 2
    assert 'Run pip install "jax-scalegmn[slurm]".' in capsys.readouterr().err


def test_the_reason_of_a_failure_is_one_line():
    assert _work._reason(ValueError("a\n b")) == "ValueError: a b"
