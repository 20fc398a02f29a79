"""Writers that are killed at any moment leave the old file or the new one, and runs of an experiment go on.

JAX_SCALEGMN_KILLS is the number of kills of each test, JAX_SCALEGMN_SEED decides their moments.
"""

import contextlib
import dataclasses
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_scalegmn as sg
from experiments import inr, runs
from jax_scalegmn import io, training
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


def save_checkpoint(path, number):
    run = checkpoint.Checkpoints(path, {})
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
    "x.json": (
        lambda path, number: runs.write_json(path, [number] * 10_000),
        lambda path: set(json.loads(path.read_text())),
    ),
}


def numbers_in(name, path):
    found = WRITERS[name][1](path)
    return found if isinstance(found, set) else read_zoo(found) if isinstance(found, sg.Zoo) else numbers_of(found)


def serve():
    """Forks a program for every line with a writer's name and a folder, which writes 1, 2, 3, ... until it is killed."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, folder, first = json.loads(line)
        child = os.fork()
        if child == 0:
            for number in range(first, 10**6):
                WRITERS[name][0](Path(folder) / name, number)
                print(json.dumps({"written": number}), flush=True)
        print(json.dumps({"child": child}), flush=True)
        os.waitpid(child, 0)
        print(json.dumps({"ended": child}), flush=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A program that has imported all and computed nothing, so that it can fork."""
    words = [sys.executable, "-c", "import test_kills; test_kills.serve()"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as program:
        assert program.stdout.readline() == b"ready\n"
        yield program
        program.stdin.close()
        program.wait()


def told(program, seconds):
    """The next line of the server's, None where it says nothing for so long."""
    if not select.select([program.stdout], [], [], seconds)[0]:
        return None
    return json.loads(program.stdout.readline())


def kill_a_writer(program, name, folder, first, delay):
    """Starts writing at a number, kills the writer, and returns the last number that it had written."""
    program.stdin.write(json.dumps([name, str(folder), first]).encode() + b"\n")
    program.stdin.flush()
    last, child, until = first - 1, None, None
    while True:
        line = told(program, 60 if until is None else max(0, until - time.perf_counter()))
        if line is None:
            assert until is not None, f"{name}: the writer wrote nothing for a minute"
            os.kill(child, signal.SIGKILL)
            until = time.perf_counter() + 60
        elif "ended" in line:
            return last
        else:
            child, last = line.get("child", child), line.get("written", last)
            if until is None and child is not None and last >= first:
                until = time.perf_counter() + delay


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_writer_leaves_the_old_or_the_new_file(server, tmp_path, name):
    rng, first, path = random.Random(f"{SEED} {name}"), 1, tmp_path / name
    torn = 0
    for kill in range(int(KILLS or 8)):
        delay = rng.uniform(0, 0.25)
        last = kill_a_writer(server, name, tmp_path, first, delay)
        where = f"seed {SEED}, kill {kill} after {delay:.3f} s, {last} was written"
        torn += len(list(tmp_path.iterdir())) > 1 or any(path.glob("*.orbax-checkpoint-tmp*"))
        try:
            found = numbers_in(name, path)
            assert found in ({last}, {last + 1}), where
        except FileNotFoundError as error:
            assert "with notes" in name, where
            assert "weights.npy" in str(error), where
        first = last + 2
        WRITERS[name][0](path, first)
        assert numbers_in(name, path) == {first}, where
        assert [entry.name for entry in tmp_path.iterdir()] == [name], where
        assert not [*path.rglob(".*")] and not [*path.rglob("*tmp*")], where
        first += 1
    print(f"{name}: {torn} of {int(KILLS or 8)} kills left something to remove")
