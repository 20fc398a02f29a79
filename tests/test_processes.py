"""Programs of several processes: what two compute is what one computes, and they save, stop and fail together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import support

from experiments import ownership, progress
from jax_scalegmn import distributed
from jax_scalegmn.training import checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes that meet at a local port")


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def environment(devices, cache):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return known | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


def start(command, devices, cache):
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment(devices, cache),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(processes, seconds=300):
    """The exit status and the output of each; none is left running."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


# --- arrays and agreements ----------------------------------------------------------------------------------------

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jax_scalegmn as sg
from jax_scalegmn import distributed, training, zoo
number = int(sys.argv[2])
distributed.initialize(sys.argv[1], 2, number)
assert jax.device_count() == 4 and distributed.is_writer() == (number == 0)
mesh = distributed.mesh({"data": 4})
values, keys = np.arange(18.0).reshape(9, 2), jax.random.split(jax.random.key(0), 9)
tree = {"numpy": values, "committed": jax.device_put(values.astype("float32"), jax.local_devices()[1]), "keys": keys}
rows = distributed.shard_rows(tree, mesh)
assert max(len(shard.data) for leaf in jax.tree.leaves(rows) for shard in leaf.addressable_shards) == 3
back = distributed.gather(rows)
for name in ("numpy", "committed"):
    np.testing.assert_array_equal(back.tree[name][back.mask], values)
assert (jax.random.key_data(back.tree["keys"])[back.mask] == jax.random.key_data(keys)).all()
np.testing.assert_array_equal(distributed.gather(distributed.shard_rows(rows.tree, mesh).tree)["numpy"][:9], values)
state = distributed.replicate({"key": keys[0], "w": tree["committed"]}, mesh)
again = distributed.replicate(state, mesh)
assert again["w"].is_fully_replicated and (distributed.gather(again)["w"] == values).all()
noise = distributed.make_map(lambda row, key: row + jax.random.normal(key, (2,)), mesh, rows_at_once=2)
alone = distributed.make_map(lambda row, key: row + jax.random.normal(key, (2,)), rows_at_once=2)
np.testing.assert_array_equal(noise((values, keys)), alone((values, keys)))
evaluate = training.make_evaluation(lambda w, row, key: (jnp.square(row - w).sum(), {}), mesh=mesh)
assert abs(float(evaluate(jnp.ones(2), values)["loss"]) - np.square(values - 1).sum(1).mean()) < 1e-3
params = {"Dense_0": {"kernel": np.arange(16.0).reshape(8, 2, 1), "bias": np.ones((8, 1))}}
many = zoo.Zoo(sg.mlp((2, 1)), distributed.place_rows(params, mesh), {"seed": np.arange(8)}, {})
assert not many.params["Dense_0"]["bias"].is_fully_addressable
zoo.save(many, sys.argv[3])
distributed.every_process(None)
np.testing.assert_array_equal(zoo.load(sys.argv[3]).params["Dense_0"]["kernel"], params["Dense_0"]["kernel"])
assert distributed.any_process(number == 1) and not distributed.any_process(False)
assert distributed.every_process({"n": number}) == [{"n": 0}, {"n": 1}]
distributed.check_same({"seed": 0})
try:
    distributed.check_same({"seed": 3 * number, "train.epochs": 2})
except ValueError as error:
    print(error)
try:
    distributed.mesh({"data": 2})
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_share_out_rows_and_tell_each_other_what_differs(cache, tmp_path):
    path = str(tmp_path / "zoo.safetensors")
    address = f"localhost:{free_port()}"
    codes, outputs = ended([start(["-c", PROGRAM, address, str(number), path], 2, cache) for number in range(2)])
    assert codes == [0, 0], outputs
    for output in outputs:
        assert "other options: seed is 0 in process 0 and 3 in process 1. Start all of them by the same" in output
        assert "train.epochs" not in output
        assert "has 2 devices of 4; expected all of them" in output


@pytest.mark.slow
def test_a_process_whose_peers_are_missing_says_so(cache):
    call = f"initialize('localhost:{free_port()}', 2, 0, timeout=3)"
    code = f"from jax_scalegmn import distributed; distributed.{call}"
    begin = time.monotonic()
    (code,), (output,) = ended([start(["-c", code], 1, cache)])
    assert code != 0
    assert time.monotonic() - begin < 60
    assert "after 3 seconds not all 2 processes are there" in output


# --- preemption ---------------------------------------------------------------------------------------------------

# Each process counts its places until it is stopped; process 1 gets the notice.
STOPPED = """
import os, signal, sys, time
from experiments import progress
from jax_scalegmn import distributed
notice, number = sys.argv[2], int(sys.argv[3])
distributed.initialize(sys.argv[1], 2, number)
if notice == "before" and number == 1:  # JAX's service has it, and nobody else
    os.kill(os.getpid(), signal.SIGTERM)
with progress.Interruption() as interruption:
    for place in range(80):
        if notice.startswith("SIG") and number == 1 and place == 3:
            os.kill(os.getpid(), getattr(signal, notice))
        print("place", place, flush=True)
        interruption.stop_if_requested(f"place {place}")
        time.sleep(0.02)
"""


def stopped(cache, notice):
    address = f"localhost:{free_port()}"
    command = ["-c", STOPPED, address, notice]
    codes, outputs = ended([start([*command, str(number)], 1, cache) for number in range(2)])
    last = [[line for line in output.splitlines() if line.startswith("place ")][-1] for output in outputs]
    return codes, last, outputs


@pytest.mark.parametrize("notice", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_notice_to_one_process_stops_both_at_the_same_place(cache, notice):
    codes, last, outputs = stopped(cache, notice)
    assert codes == [progress.AGAIN] * 2, outputs
    assert last == ["place 3"] * 2
    assert all("Interrupted. Saved: place 3. Continue with the same command and --resume." in out for out in outputs)
    assert f"{notice}: stopping after the current piece of work" in outputs[1]


@pytest.mark.slow
def test_a_notice_that_only_jax_has_stops_both_at_the_same_place(cache):
    codes, last, outputs = stopped(cache, "before")
    assert codes == [progress.AGAIN] * 2, outputs
    assert last[0] == last[1] != "place 79"
    assert all("JAX's preemption service: stopping after" in output for output in outputs)


@pytest.mark.slow
def test_processes_without_a_notice_or_without_jaxs_service_go_on(cache, monkeypatch):
    assert stopped(cache, "none")[:2] == ([0, 0], ["place 79"] * 2)
    monkeypatch.setenv("JAX_ENABLE_PREEMPTION_SERVICE", "0")
    codes, last, outputs = stopped(cache, "SIGTERM")
    assert (codes, last) == ([progress.AGAIN] * 2, ["place 3"] * 2), outputs


def test_signals_of_schedulers_are_left_to_those_who_handle_them():
    with progress.Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert interruption.requested
        with pytest.raises(progress.Interrupted, match="Saved: all of it") as caught:
            interruption.stop_if_requested("all of it")
        assert caught.value.code == progress.AGAIN
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda *_: calls.append(1))
    try:
        with progress.Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert calls == [1]
            assert not interruption.due()
    finally:
        signal.signal(signal.SIGUSR2, before)


# --- the owner of a folder ----------------------------------------------------------------------------------------


def test_a_second_launcher_is_refused_at_once_and_told_the_owner(tmp_path):
    folder = tmp_path / "run"
    code = (
        f"import pathlib; from experiments import ownership\nwith ownership.owned(pathlib.Path({str(folder)!r})): pass"
    )
    with ownership.owned(folder):
        owner = json.loads((folder / "owner.json").read_text())
        assert owner.keys() == {"host", "pid", "time"}
        assert owner["pid"] == os.getpid()
        begin = time.monotonic()
        with pytest.raises(SystemExit, match=f"run that goes on .process {os.getpid()} on {owner['host']} since"):
            ownership.owned(folder).__enter__()
        assert time.monotonic() - begin < 1
        refused = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert f"process {os.getpid()} on" in refused.stderr
        assert (folder / "owner.json").exists()
    assert not folder.exists()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_a_killed_owner_left_is_taken_over(tmp_path):
    code = (
        f"import os, pathlib; from experiments import ownership\n"
        f"with ownership.owned(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -9
    assert (tmp_path / "owner.json").exists()
    with ownership.owned(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_an_owner_on_another_machine_is_dead_after_two_minutes_without_a_sign(tmp_path):
    path = tmp_path / "owner.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": "2026-01-01 00:00:00"}))
    with pytest.raises(SystemExit, match="process 1 on elsewhere since 2026-01-01"):
        ownership.owned(tmp_path).__enter__()
    os.utime(path, (time.time() - 121,) * 2)
    with ownership.owned(tmp_path):
        pass
    path.write_text("damaged")
    with ownership.owned(tmp_path):
        pass


# --- a whole experiment -------------------------------------------------------------------------------------------


def experiment(out, cache, *options, processes=2):
    """The processes of `inr tiny` with 4 devices in all."""
    command = ["-m", "experiments.inr", "tiny", "--out", str(out), *options]
    if processes == 1:
        return [start([*command, "--mesh", "4"], 4, cache)]
    shared = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes), "--process"]
    return [start([*command, *shared, str(number)], 4 // processes, cache) for number in range(processes)]


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The folder of a run of two processes with two devices each."""
    out = tmp_path_factory.mktemp("two") / "run"
    codes, outputs = ended(experiment(out, cache))
    assert codes == [0, 0], outputs
    return out, outputs


def numbers(results, path=""):
    """All numbers by path, without times and what says how the program ran."""
    if isinstance(results, dict):
        kept = {name: value for name, value in results.items() if name not in ("config", "environment")}
        return {k: v for name, value in kept.items() for k, v in numbers(value, f"{path}/{name}").items()}
    if isinstance(results, list):
        return {k: v for place, value in enumerate(results) for k, v in numbers(value, f"{path}/{place}").items()}
    return {} if "seconds" in path or "per_second" in path else {path: results}


def assert_same_numbers(run, expected):
    """That the results of a run are those of another, numbers to 1e-5."""
    found, wanted = (numbers(json.loads((folder / "results.json").read_text())) for folder in (run, expected))
    assert found.keys() == wanted.keys()
    differ = {
        name: (found[name], value)
        for name, value in wanted.items()
        if found[name] != (pytest.approx(value, 1e-5, 1e-5) if isinstance(value, float) else value)
    }
    assert not differ


@pytest.mark.slow
def test_two_processes_have_the_results_of_one_with_as_many_devices(whole, cache, tmp_path):
    out, outputs = whole
    assert "Report:" in outputs[0]
    assert "Report:" not in outputs[1]
    codes, alone = ended(experiment(tmp_path / "one", cache, processes=1))
    assert codes == [0], alone
    assert_same_numbers(out, tmp_path / "one")
    assert not (out / "owner.json").exists()


def by_two_processes_and_by_one(command, shared_folder, cache, folder):
    """Runs a command by two processes of two devices and, from the same networks, by one of one: their two folders."""
    two, one = folder / "two", folder / "one"
    shared = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
    codes, outputs = ended([start([*command, "--out", str(two), *shared, str(n)], 2, cache) for n in range(2)])
    assert codes == [0, 0], outputs
    shutil.copytree(two / shared_folder, one / shared_folder)
    codes, outputs = ended([start([*command, "--out", str(one)], 1, cache)])
    assert codes == [0], outputs
    return two, one


@pytest.mark.slow
def test_two_processes_train_and_score_an_encoder_as_one_device_does(cache, tmp_path):
    """On the same zoo, which is rounded as its groups of networks are."""
    command = ["-m", "experiments.classify", "tiny", "--encoders", "query", "--seeds", "1"]
    assert_same_numbers(*by_two_processes_and_by_one(command, "zoo", cache, tmp_path))


@pytest.mark.slow
def test_two_processes_share_pairs_and_merges_and_have_the_numbers_of_one_device(cache, tmp_path):
    """On the same networks: five pairs on four devices, and the merges of N networks by process."""
    command = ["-m", "experiments.merging", "tiny", "--networks", "mlp:64-8-8-10,relu", "--models", "4", "--pairs", "5"]
    command += ["--methods", "naive", "weights", "search", "--ways", "naive", "first", "mean"]
    two, one = by_two_processes_and_by_one(command, "networks", cache, tmp_path)
    assert_same_numbers(two, one)
    assert sum("accuracy" in name for name in numbers(json.loads((one / "results.json").read_text()))) > 20


def variables(out):
    return checkpoint.load(out / "checkpoints")[1]


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_restored_in_one_on_any_devices(whole):
    model, restored = checkpoint.load(whole[0] / "checkpoints")
    for devices in (1, 4):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        stored = distributed.replicate(restored, mesh)
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(stored)} == {devices}
        params = distributed.replicate(support.random_params(model.arch), mesh)
        assert np.isfinite(model.apply(stored, params, method="encode")).all()


def wait_for(condition, processes, seconds=200):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_checkpoint_and_nothing_is_lost(whole, cache, tmp_path):
    out = tmp_path / "run"
    processes = experiment(out, cache)
    wait_for(lambda: (out / "zoo" / "selection-0000.safetensors").exists(), processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = ended(processes)
    assert codes == [progress.AGAIN] * 2, outputs
    assert "Interrupted. Saved: " in outputs[0]
    assert not (out / "results.json").exists()
    codes, outputs = ended(experiment(out, cache, "--resume"))
    assert codes == [0, 0], outputs
    support.assert_identical(variables(out), variables(whole[0]))


# Process 1 gets a signal while the second epoch is trained, and each says where it ended.
SIGNALED = """
import dataclasses, os, pathlib, signal, sys
from experiments import inr, progress
from jax_scalegmn import training
number, update = int(sys.argv[3]), training.Monitor.update
def updated(monitor, loss, **options):
    if number == 1 and update.calls == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    update.calls += 1
    return real(monitor, loss, **options)
update, real = updated, update
update.calls = 0
training.Monitor.update = update
shared = {"coordinator": sys.argv[2], "processes": 2, "process": number}
try:
    inr.main(dataclasses.replace(inr.PRESETS["tiny"][1], out=pathlib.Path(sys.argv[1]), **shared))
except progress.Interrupted as interrupted:
    print("ended:", interrupted)
    raise
"""


@pytest.mark.slow
def test_a_signal_in_training_has_both_save_at_the_same_step_where_one_process_can_go_on(whole, cache, tmp_path):
    out, address = tmp_path / "run", f"localhost:{free_port()}"
    codes, outputs = ended([start(["-c", SIGNALED, str(out), address, str(number)], 2, cache) for number in range(2)])
    assert codes == [progress.AGAIN] * 2, outputs
    for output in outputs:
        assert "ended: Interrupted. Saved: a checkpoint after epoch 2 of 3" in output
    saved = [int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(saved) == 8  # two epochs of 64 networks in batches of 16
    alone = {devices: Path(shutil.copytree(out, tmp_path / f"by {devices}")) for devices in (1, 4)}
    codes, outputs = ended(experiment(out, cache, "--resume"))
    assert codes == [0, 0], outputs
    support.assert_identical(variables(out), variables(whole[0]))
    for devices, copy in alone.items():  # which one process goes on with
        command = ["-m", "experiments.inr", "tiny", "--out", str(copy), "--resume", "--mesh", str(devices)]
        codes, outputs = ended([start(command, devices, cache)])
        assert codes == [0], outputs
        assert_same_numbers(copy, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_where_a_process_is_killed_the_other_ends_and_both_resume_to_the_same_numbers(whole, cache, tmp_path, killed):
    out, other = tmp_path / "run", 1 - killed
    processes = experiment(out, cache)
    wait_for(lambda: (out / "zoo" / "selection-0000.safetensors").exists(), processes)
    processes[killed].kill()
    begin = time.monotonic()
    codes, outputs = ended(processes)
    assert time.monotonic() - begin < 120
    assert (codes[killed], codes[other]) == (-signal.SIGKILL, progress.AGAIN), outputs
    assert f"Process {other} of 2 ends, since another one is lost" in outputs[other]
    codes, outputs = ended(experiment(out, cache, "--resume"))
    assert codes == [0, 0], outputs
    support.assert_identical(variables(out), variables(whole[0]))


@pytest.mark.slow
def test_processes_with_other_options_end_before_the_zoo(cache, tmp_path):
    command = ["-m", "experiments.inr", "tiny", "--out", str(tmp_path / "run")]
    command += ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
    codes, outputs = ended(
        [start([*command, str(number), "--train.epochs", str(3 + number)], 1, cache) for number in range(2)]
    )
    assert codes == [2, 2]
    for output in outputs:
        assert "The processes have other options: train.epochs is 3 in process 0 and 4 in process 1" in output
    assert not (tmp_path / "run").exists()
