"""Writers that are killed at any moment leave the old file or the new one, and runs of an experiment go on.

JAX_SCALEGMN_KILLS is the number of kills of each test, JAX_SCALEGMN_SEED decides their moments.
"""

import contextlib
import functools
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

import jax_scalegmn as sg
from experiments import inr, runs
from jax_scalegmn import training
from jax_scalegmn.io import _trees, tensors
from jax_scalegmn.training import checkpoint
from jax_scalegmn.zoo import small_cnn_zoo

SEED = int(os.environ.get("JAX_SCALEGMN_SEED", "1"))
KILLS = os.environ.get("JAX_SCALEGMN_KILLS")
ROOT = Path(__file__).resolve().parents[1]

# --- writers: name -> how they write a number everywhere, and which numbers a file holds ------------------------------

CNN, MLP = sg.cnn((1, 8, 8), 4), sg.mlp((64, 128, 8))


def arrays(number):
    return {name: np.full((200, 100), number, np.float32) for name in ("a", "b", "c")}


def numbers_of(tree):
    return {float(number) for leaf in jax.tree.leaves(tree) for number in np.unique(np.asarray(leaf))}


def zoo_of(arch, number):
    params = {path: np.full((4, *shape), number, np.float32) for path, shape in arch.array_shapes.items()}
    return sg.Zoo(arch, sg.architecture.unflatten(params), {"step": np.full(4, number)}, {})


def read_zoo(loaded):
    return numbers_of(loaded.params) | numbers_of(loaded.records)


def save_checkpoint(path, number, **options):
    run = checkpoint.Checkpoints(path, {}, **options)
    state = training.State(arrays(number), (), jax.random.key(0), np.int32(number))
    run.save(state, loss=1.0 / number, history=[{"loss": float(number)}])
    run.close()


def restored(path):
    run = checkpoint.Checkpoints(path, {})
    found = run.restore_last(training.State(arrays(0), (), jax.random.key(0), np.int32(0)))
    run.close()
    return numbers_of(found.state.variables) | {float(found.state.step)} | {found.history[0]["loss"]}


def write_next_to_others(path, number):
    path.mkdir(exist_ok=True)
    (path / "notes.txt").touch()
    small_cnn_zoo.save(path, zoo_of(CNN, number), overwrite=True)


WRITERS = {
    **{
        f"x{ending}": (lambda path, number: tensors.write(path, arrays(number), overwrite=True), tensors.read)
        for ending in (".pt", ".npz", ".safetensors")
    },
    "x.msgpack": (lambda path, number: _trees.write(path, arrays(number), overwrite=True), _trees.read),
    "orbax": (lambda path, number: _trees.write(path, arrays(number), overwrite=True), _trees.read),
    "zoo.safetensors": (lambda path, number: sg.zoo.save(zoo_of(MLP, number), path), sg.zoo.load),
    "small_cnn_zoo": (
        lambda path, number: small_cnn_zoo.save(path, zoo_of(CNN, number), overwrite=True),
        lambda path: small_cnn_zoo.load(path, activation="relu", step=None),
    ),
    "small_cnn_zoo with notes": (
        write_next_to_others,
        lambda path: small_cnn_zoo.load(path, activation="relu", step=None),
    ),
    "checkpoints": (save_checkpoint, restored),
    "asynchronous checkpoints": (functools.partial(save_checkpoint, asynchronous=True), restored),
    "x.json": (
        lambda path, number: runs.write_json(path, [number] * 10_000),
        lambda path: set(json.loads(path.read_text())),
    ),
}


def numbers_in(name, path):
    found = WRITERS[name][1](path)
    return found if isinstance(found, set) else read_zoo(found) if isinstance(found, sg.Zoo) else numbers_of(found)


# --- programs that are killed -----------------------------------------------------------------------------------------


def tell(message):
    """Prints a message in one piece: `print` writes its line's end apart, and a program may be killed between."""
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def write_for_ever(name, folder, first):
    """Writes the next number until it is killed, and tells each that is written."""
    for number in range(first, 10**6):
        WRITERS[name][0](Path(folder) / name, number)
        tell({"written": number})


def run_inr(*words):
    """`python -m experiments.inr` with these words."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.argv = ["inr", *words]
        inr.main(tyro.extras.overridable_config_cli(inr.PRESETS))


def serve():
    """Forks a program for every line with the name of a function and its arguments; it tells when each has ended."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                {"write": write_for_ever, "inr": run_inr}[name](*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        tell({"child": child})
        tell({"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A program that has imported all and computed nothing: what it forks starts at once."""
    words = [sys.executable, "-c", "import test_kills; test_kills.serve()"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    errors = tmp_path_factory.mktemp("errors") / "errors.txt"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, bufsize=0
        ) as program,
    ):
        assert program.stdout.readline() == b"ready\n"
        program.errors = errors
        yield program
        program.stdin.close()


def lines(program, seconds):
    """What the server says, as long as it says something within these seconds."""
    while select.select([program.stdout], [], [], seconds)[0]:
        yield json.loads(program.stdout.readline())


def start(program, *words):
    """Starts a program, and returns its number."""
    program.stdin.write(json.dumps(words).encode() + b"\n")
    return next(lines(program, 60))["child"]


def kill_a_writer(program, name, folder, first, delay):
    """Starts writing at a number, kills the writer, and returns the last number that it had written."""
    child, last = start(program, "write", name, str(folder), first), first - 1
    wait = 60.0
    while last < first:  # the delay begins with the first file
        last = next(lines(program, wait))["written"]
    until = time.perf_counter() + delay
    while (left := until - time.perf_counter()) > 0:
        for line in lines(program, left):
            last = line["written"]
            break
    os.kill(child, signal.SIGKILL)
    for line in lines(program, wait):
        if "ended" in line:
            return last
        last = line["written"]
    raise AssertionError("the killed program did not end")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new_file(server, tmp_path, name):
    rng, first, path = random.Random(f"{SEED} {name}"), 1, tmp_path / name
    torn = 0
    for kill in range(int(KILLS or 8)):
        delay = rng.uniform(0, 0.25)
        last = kill_a_writer(server, name, tmp_path, first, delay)
        where = f"seed {SEED}, kill {kill} after {delay:.3f} s, {last} was written"
        torn += len(list(tmp_path.iterdir())) > 1 or any([*path.glob("*.orbax-checkpoint-tmp*"), *path.glob(".*")])
        if "with notes" in name and not (path / "weights.npy").exists():
            with pytest.raises(FileNotFoundError, match=r"weights\.npy"):
                numbers_in(name, path)
        else:
            assert numbers_in(name, path) in ({last}, {last + 1}), where
        first = last + 2
        WRITERS[name][0](path, first)
        assert numbers_in(name, path) == {first}, where
        assert [entry.name for entry in tmp_path.iterdir()] == [name], where
        assert not [*path.rglob(".*"), *path.rglob("*tmp*")], where
        first += 1
    print(f"{name}: {torn} of {int(KILLS or 8)} kills left something to remove")


# --- the experiment on INRs -------------------------------------------------------------------------------------------

SMALL = ("tiny", "--zoo.widths", "2", "4", "1", "--zoo.part", "16", "--zoo.steps", "20", "--zoo.train-images", "16")
SMALL += ("--model.features", "4", "--train.epochs", "4", "--train.batch-size", "8", "--train.micro-batch", "8")
SMALL += ("--evaluation.noises", "0.005", "--evaluation.points", "3", "--evaluation.orbits", "2")


def without_times(value):
    """Results without seconds, and without the options that say how a run is run."""
    if isinstance(value, dict):
        return {key: without_times(of) for key, of in value.items() if key not in ("seconds", "milliseconds", "config")}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def results_of(out):
    return without_times(json.loads((out / "results.json").read_text()))


def run_to_the_end(program, out, *words):
    """Runs the experiment, and returns the seconds that it took."""
    begin = time.perf_counter()
    start(program, "inr", *SMALL, "--out", str(out), *words)
    status = next(lines(program, 600))["ended"]
    assert status == 0, program.errors.read_text()[-3000:]
    return time.perf_counter() - begin


def run_and_kill(program, out, delay):
    """Runs or resumes the experiment, and kills it after a delay; False if it had ended before."""
    resume = ["--resume"] if (out / "config.json").exists() else []
    child = start(program, "inr", *SMALL, "--out", str(out), *resume)
    for line in lines(program, delay):
        assert line["ended"] == 0, program.errors.read_text()[-3000:]
        return False
    os.kill(child, signal.SIGKILL)
    return next(lines(program, 60))["ended"] != 0


def truncate_the_newest_step(rng, out):
    """Halves a file of the newest checkpoint, if there are two; whether it did."""
    steps = sorted((int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal()), reverse=True)
    if len(steps) < 2:
        return False
    files = [path for path in (out / "checkpoints" / str(steps[0])).rglob("*") if path.is_file()]
    path = rng.choice(sorted(path for path in files if path.stat().st_size > 1))
    os.truncate(path, path.stat().st_size // 2)
    return True


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_numbers_of_an_undisturbed_one(server, tmp_path):
    rng = random.Random(SEED)
    run_to_the_end(server, tmp_path / "cold")
    seconds = run_to_the_end(server, tmp_path / "whole")
    expected = results_of(tmp_path / "whole")
    assert results_of(tmp_path / "cold") == expected
    wanted, kills, rounds, truncated = int(KILLS or 20), 0, 0, 0
    while kills < wanted:
        out = tmp_path / f"killed-{rounds}"
        for _ in range(4):
            if not run_and_kill(server, out, rng.uniform(0, seconds)):
                break
            kills += 1
            truncated += rng.random() < 0.5 and truncate_the_newest_step(rng, out)
        run_to_the_end(server, out, *(["--resume"] if (out / "config.json").exists() else []))
        assert results_of(out) == expected, f"seed {SEED}, round {rounds}"
        rounds += 1
    assert truncated
    print(f"seed {SEED}: {kills} kills in {rounds} runs of {seconds:.1f} s, {truncated} newest checkpoints truncated")
