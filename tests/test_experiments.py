"""The INR experiment runs, resumes and refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import inr, progress, runs, sweep
from jax_scalegmn import zoo
from jax_scalegmn.training import checkpoint

TINY = inr.PRESETS["tiny"][1]
METHODS = {
    "naive",
    "matching_p_identity",
    "matching_p_forward",
    "matching_pd_identity",
    "matching_pd_forward",
    "fixed_frame",
    "canonical_frame",
    "autoencoder",
    "latent",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run: its folder and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, inr.main(dataclasses.replace(TINY, out=out))


def test_results_are_complete_and_stand_in_the_files(run):
    out, results = run
    stored = json.loads((out / "results.json").read_text())
    assert stored["merging"].keys() == results["merging"].keys()
    assert len(stored["merging"]) == 1 + 3 * len(TINY.evaluation.noises)
    for kind in stored["merging"].values():
        assert kind.keys() == METHODS
        for numbers in kind.values():
            assert numbers["midpoint"]["low"] <= numbers["midpoint"]["mean"] <= numbers["midpoint"]["high"]
            assert len(numbers["path"]) == TINY.evaluation.points
            assert numbers["barrier"]["mean"] >= 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http://" not in page
    assert "https://" not in page


def test_end_points_are_exact_where_the_original_networks_are_merged(run):
    _, results = run
    for kind in results["merging"].values():
        for name in METHODS - {"autoencoder", "latent"}:
            assert kind[name]["end_point_gap"]["mean"] < 1e-9
        assert kind["autoencoder"]["end_point_gap"]["mean"] > 1e-5


def test_noiseless_copies_merge_without_loss_by_the_right_matching_and_by_the_autoencoder(run):
    _, results = run
    for group, name in (("P", "matching_p_forward"), ("PD", "matching_pd_forward"), ("D", "matching_pd_forward")):
        assert results["merging"][f"{group}, noise 0"][name]["barrier"]["mean"] < 1e-8
        assert results["merging"][f"{group}, noise 0"]["autoencoder"]["barrier"]["mean"] < 1e-8
    assert results["merging"]["PD, noise 0"]["naive"]["barrier"]["mean"] > 1e-3
    assert results["orbit"]["ratio"] < 1e-4


def test_images_of_training_selection_and_scoring_are_disjoint():
    images = runs.load_images(TINY, TINY.zoo)
    everything = np.concatenate([one.images.reshape(len(one.images), -1) for one in images.values()])
    assert len(everything) == 32 + 8 + 8
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_files_bring_their_own_scoring_images(tmp_path):
    """The official test part serves for scoring alone; training and selection share the rest."""
    rng = np.random.default_rng(0)
    arrays = {
        f"x_{part}": rng.integers(0, 256, (count, 6, 6), np.uint8) for part, count in (("train", 60), ("test", 20))
    }
    arrays |= {f"y_{part}": np.arange(count) % 10 for part, count in (("train", 60), ("test", 20))}
    np.savez(tmp_path / "mnist.npz", **arrays)
    images = runs.load_images(dataclasses.replace(TINY, data=tmp_path / "mnist.npz"), TINY.zoo)
    assert {name: len(one.images) for name, one in images.items()} == {"train": 32, "selection": 8, "scoring": 8}

    def known(one, part):
        return {image.tobytes() for image in one.images} <= {
            image.tobytes() for image in (arrays[f"x_{part}"] / 255).astype(np.float32)
        }

    assert known(images["scoring"], "test")
    assert known(images["train"], "train")
    assert known(images["selection"], "train")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        inr.main(dataclasses.replace(TINY, out=tmp_path / "run", data=tmp_path / "absent.npz"))
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused_without_resume_and_with_other_options(run):
    out, _ = run
    with pytest.raises(SystemExit, match="--resume"):
        inr.main(dataclasses.replace(TINY, out=out))
    with pytest.raises(SystemExit, match=r"other options.*seed"):
        inr.main(dataclasses.replace(TINY, out=out, resume=True, seed=1))


def test_resuming_where_there_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="absent holds no run to resume"):
        inr.main(dataclasses.replace(TINY, out=tmp_path / "absent", resume=True))
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
def test_training_over_eight_devices_has_the_losses_of_training_on_one(run, tmp_path):
    out, results = run
    zoos = {
        split: zoo.concatenate([zoo.load(path) for path in sorted((out / "zoo").glob(f"{split}-*"))])
        for split in runs.SPLITS
    }
    settings = dataclasses.replace(TINY.train, data_parallel=True, micro_batch=1)
    config = dataclasses.replace(TINY, out=tmp_path, train=settings)
    with progress.Interruption() as interruption:
        variance = results["reconstruction"]["image_variance"]
        history = inr.fit_autoencoder(config, zoos, (8, 8), variance, interruption)["history"]
    for shared, alone in zip(history, results["training"], strict=True):
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)
        assert shared["selection_loss"] == pytest.approx(alone["selection_loss"], rel=1e-3)


def test_too_many_images_are_refused():
    settings = dataclasses.replace(TINY.zoo, train_images=100_000)
    with pytest.raises(ValueError, match=r"zoo.train_images is 100000"):
        runs.load_images(TINY, settings)


def test_a_run_stopped_by_sigterm_resumes_to_the_same_numbers(run, tmp_path, monkeypatch):
    """The signal comes while the autoencoder trains; the resumed run ends with the very same variables.

    What is scored follows from them, and is not computed again here.
    """
    whole, expected = run
    kept = ("merging", "orbit", "reconstruction")
    monkeypatch.setattr(inr, "score", lambda *_: {name: expected[name] for name in kept} | {"pictures": {}})
    monkeypatch.setattr(inr.report, "write", lambda *_: None)
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "experiments.inr", "tiny", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=_root())
    deadline = time.monotonic() + 300
    while not list((out / "checkpoints").glob("[0-9]*/commit_success.txt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("The run ended before the signal came.")
    assert "Go on with the same command and --resume" in output
    assert not (out / "results.json").exists()
    results = inr.main(dataclasses.replace(TINY, out=out, resume=True))
    history = [
        [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in one["training"]]
        for one in (results, expected)
    ]
    assert history[0] == history[1]
    assert _variables(whole) == _variables(out)


def test_sweep_prints_one_row_for_each_setting(run, tmp_path, monkeypatch):
    """Each from a run with that setting, on the same zoo."""
    copied = []

    def main(config):
        copied.append((config.out / "zoo" / "zoo").exists())
        (config.out / "zoo").mkdir(parents=True, exist_ok=True)
        (config.out / "zoo" / "zoo").touch()
        return run[1] | {"config": runs.plain(config)}

    monkeypatch.setattr(inr, "main", main)
    rows = sweep.main(
        sweep.Config(
            tmp_path,
            base="tiny",
            orbit_weights=(0.0, 0.3),
            features=(8,),
            epochs=(1,),
            noises=(0.005,),
            results=tmp_path / "s.json",
        )
    )
    assert [row["orbit_weight"] for row in rows] == [0.0, 0.3]
    assert {(row["features"], row["training_seconds"] > 0) for row in rows} == {(8, True)}
    assert copied == [False, True]
    assert json.loads((tmp_path / "s.json").read_text())["rows"] == rows


def _variables(out: Path) -> list:
    import jax

    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(checkpoint.load(out / "checkpoints")[1])]


def _root() -> Path:
    return Path(__file__).resolve().parents[1]
