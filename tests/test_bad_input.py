"""What a user gets wrong on the command line of an experiment ends in one line that says what to do, and status 2."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from test_processes import ended, free_port, start

from experiments import classify, cnn_zoo, inr, merging, watch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """What an experiment answers to words that it refuses: one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "may_have_peers", lambda coordinator: False)  # no child of this process

    def answer(experiment, *words):
        monkeypatch.setattr(sys, "argv", ["experiment", *words])
        with pytest.raises(SystemExit) as raised:
            watch.command(experiment.main, experiment.PRESETS)
        assert raised.value.code == 2
        said = capsys.readouterr()
        assert not said.out
        assert said.err.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return said.err.rstrip("\n")

    return answer


BATCH = "train.batch_size is 100 and the mesh has 8 devices on 'data'; expected a multiple of 8, like 104."
CASES = {
    "batch": (inr, ["--mesh", "8", "--train.batch-size", "100"], BATCH),
    "batch of aligners": (
        inr,
        ["--mesh", "8", "--alignment.epochs", "1", "--alignment.batch-size", "9"],
        "alignment.batch_size is 9 and the mesh has 8 devices on 'data'; expected a multiple of 8, like 16.",
    ),
    "devices": (
        inr,
        ["--mesh", "64"],
        "The mesh {'data': 64} has 64 devices, and there are 8; expected 8 at most. Lower its sizes, or give one of "
        "them as -1, all devices that are left.",
    ),
    "no device": (
        cnn_zoo,
        ["--mesh", "0"],
        "The mesh is {'data': 0}; expected 1 device or more along each axis, and -1, all that are left, along one at "
        "most.",
    ),
    "no CPU device": (inr, ["--cpu-devices", "0"], "cpu_devices is 0; expected a number >= 1."),
    "devices without batches": (merging, ["--mesh", "9"], "The mesh {'data': 9} has 9 devices, and there are 8; exp"),
    "coordinator alone": (
        classify,
        ["--coordinator", "localhost:1"],
        "processes and process are not given, but 1 of coordinator, processes and process; expected all three, or",
    ),
    "place": (
        inr,
        ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
        "process is 2 of 2; expected a number from 0 to 1.",
    ),
    "topology": (
        inr,
        ["--compile-only", "v9:2x2"],
        "The topology is 'v9:2x2'; expected one of ['v4', 'v5e', 'v5p', 'v6e'] with its sizes, like v5e:8x8.",
    ),
    "data": (inr, ["--data", "none.npz"], "none.npz: nothing there. Expected an npz file with"),
    "images": (inr, ["--zoo.train-images", "100000"], "zoo.train_images is 100000; of 1797 images 1781 are left next"),
    "nothing to resume": (inr, ["--resume"], "runs/tiny holds no run to resume. Name the folder of one by --out, or"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_options_are_refused_in_one_line(refused, name):
    experiment, words, message = CASES[name]
    assert refused(experiment, "tiny", *words).startswith(message)


def test_devices_of_a_cpu_are_made_before_jax_is_used_alone(refused):
    count = jax.device_count()
    answer = refused(inr, "tiny", "--cpu-devices", "2")
    assert answer.startswith(f"cpu_devices is 2, and JAX has {count} devices already; expected a program that has not")


def test_an_unknown_option_is_told_the_nearest_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment", "tiny", "--train.batchsize", "8"])
    with pytest.raises(SystemExit, match="2"):
        watch.command(inr.main, inr.PRESETS)
    assert "--train.batch-size" in capsys.readouterr().err


def test_an_error_of_another_package_keeps_its_traceback(capsys):
    for wrong, kind in ((lambda: int("x"), ValueError), (lambda: 1 / 0, ZeroDivisionError)):
        with pytest.raises(kind), watch.told_in_one_line():
            exec("wrong()", {"wrong": wrong, "__name__": "another"})
    with pytest.raises(SystemExit, match="2"), watch.told_in_one_line():
        Path("nowhere").read_bytes()
    assert capsys.readouterr().err == "[Errno 2] No such file or directory: 'nowhere'\n"
    with pytest.raises(SystemExit, match="75"), watch.told_in_one_line():
        raise SystemExit(75)


@pytest.mark.parametrize("missing", ["rich", "orbax", "ott"])
def test_a_missing_package_is_named_with_its_extra_before_anything_runs(tmp_path, missing):
    site = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == MISSING else f(n, *a)"
    (tmp_path / "sitecustomize.py").write_text(site.replace("MISSING", repr(missing)))
    run = subprocess.run(
        [sys.executable, "-m", "experiments.inr", "tiny"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("The experiments need ")
    assert run.stderr.endswith("expected the extra 'experiments'. Run pip install 'jax-scalegmn[experiments]'.\n")


# --- several processes ----------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(sys.platform != "linux", reason="starts processes that meet at a local port")


def last_lines(tmp_path, *programs):
    """Of processes that end with status 2, each by its own program, without a traceback."""
    shared = ["tiny", "--out", str(tmp_path / "run"), "--coordinator", f"localhost:{free_port()}"]
    shared += ["--processes", str(len(programs)), "--process"]
    processes = [start([*words, *shared, str(n)], 1, tmp_path / "programs") for n, words in enumerate(programs)]
    codes, outputs = ended(processes)
    assert codes == [2] * len(programs), outputs
    assert not any("Traceback" in output for output in outputs)
    return [output.splitlines()[-1] for output in outputs]


@linux
@pytest.mark.slow
def test_processes_of_two_experiments_end_at_once(tmp_path):
    expected = (
        "The processes have other experiments: experiment is 'experiments.inr' in process 0 and "
        "'experiments.classify' in process 1. Start all of them by the same command."
    )
    assert last_lines(tmp_path, ["-m", "experiments.inr"], ["-m", "experiments.classify"]) == [expected] * 2


ELSEWHERE = """
import pathlib, sys
from experiments import inr, ownership, watch
seen = ownership.written
ownership.written = lambda folder: seen(folder.parent / "elsewhere")  # another disk at the same path
watch.command(inr.main, inr.PRESETS)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("earlier", [True, False])
def test_a_folder_that_another_process_does_not_see_is_refused_and_left_as_it_was(tmp_path, earlier):
    """Also where that process has files of another run at the same path."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    if earlier:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "owner.json").write_text("{}")
    expected = (
        f"{tmp_path / 'run'}: process 1 does not see what process 0 wrote there; expected a folder that all "
        "processes share. Name one by --out."
    )
    programs = ["-m", "experiments.inr"], [str(tmp_path / "elsewhere.py")]
    assert last_lines(tmp_path, *programs) == [expected] * 2
    assert not (tmp_path / "run").exists()


@linux
@pytest.mark.slow
def test_a_process_whose_peers_are_missing_for_a_minute_says_so_and_nothing_else(tmp_path):
    begin, port = time.monotonic(), free_port()
    words = ["-m", "experiments.inr", "tiny", "--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    codes, outputs = ended([start([*words, "0"], 1, tmp_path / "programs")])
    assert 60 < time.monotonic() - begin < 120
    assert codes == [2]
    assert outputs[0].splitlines() == [
        f"localhost:{port}: after 60 seconds not all 2 processes are there, seen from process 0; start every one of "
        "them with the same coordinator, and its own number."
    ]


def test_garbage_is_collected_rarely_in_an_experiment_and_as_before_after_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment", "tiny"])
    usual, seen = gc.get_threshold(), []
    gc.set_threshold(700)
    try:
        watch.command(lambda config: seen.append(gc.get_threshold()[0]), inr.PRESETS)
        assert (*seen, gc.get_threshold()[0]) == (100_000, 700)
    finally:
        gc.set_threshold(*usual)
