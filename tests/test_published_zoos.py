"""The experiments run from published zoos to their reports; a test writes each in exactly the published form."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from test_inr_folders import write_inr
from test_small_cnn_zoo import PUBLISHED, layout_lines, write_layout, write_metrics

import jax_scalegmn as sg
from experiments import cnn, cnn_zoo, inr

INR = sg.siren((2, 6, 6, 1))
COUNTS = {"train": 20, "val": 8, "test": 8}
# The columns of the Small CNN Zoo's metrics.csv.gz as its authors list them, and what all its rows have.
COLUMNS = (
    *("config.activation", "config.b_init", "config.dataset", "config.dnn_architecture", "config.dropout"),
    *("config.epochs", "config.epochs_between_checkpoints", "config.init_std", "config.l2reg", "config.learning_rate"),
    *("config.num_layers", "config.num_units", "config.optimizer", "config.random_seed", "config.train_fraction"),
    *("config.w_init", "modeldir", "step", "test_accuracy", "test_loss", "train_accuracy", "train_loss"),
)
SETTINGS = ("zeros", "cifar10", "cnn", 0.25, 86, 20, 0.1, 1e-4, 1e-3, 3, 16, "adam", 42, 0.5, "he_normal")


@pytest.fixture(scope="module")
def inrs(tmp_path_factory):
    """mnist-inrs as published: a folder for every network, and a split with paths of its author's machine."""
    root = tmp_path_factory.mktemp("published") / "mnist-inrs"
    split, number = {}, 0
    draw = jax.jit(lambda key: sg.network.init(INR, key, initialization=sg.network.near_zero))
    for part, count in COUNTS.items():
        split[part] = {"path": [], "label": []}
        for index in range(count):
            label, kind = str(index % 4), "testing" if part == "test" else "training"
            name = f"mnist_png_{kind}_{label}_{number}/checkpoints/model_final.pth"
            params = draw(jax.random.key(number))
            state = {}
            for layer in range(3):
                dense = params[f"Dense_{layer}"]
                state[f"seq.{layer}.weight"] = np.ascontiguousarray(np.asarray(dense["kernel"], "<f4").T)
                state[f"seq.{layer}.bias"] = np.asarray(dense["bias"], "<f4")
            write_inr(root / name, state)
            split[part]["path"].append(f"/home/author/dataset/mnist-inrs/{name}")
            split[part]["label"].append(label)
            number += 1
    (root / "mnist_splits.json").write_text(json.dumps(split))
    return root


def _inr_config(out, path):
    tiny = inr.PRESETS["tiny"][1]
    return dataclasses.replace(
        tiny,
        out=out,
        zoo_path=path,
        drawn_size=(6, 6),
        zoo=dataclasses.replace(tiny.zoo, train_images=None, selection_images=8, scoring_images=8),
        evaluation=dataclasses.replace(tiny.evaluation, noises=(0.0,)),
    )


@pytest.mark.slow
def test_published_inrs_run_to_their_report(inrs, tmp_path):
    results = inr.main(_inr_config(tmp_path / "run", inrs))
    assert {part: numbers["networks"] for part, numbers in results["zoo"].items()} == dict(
        zip(("train", "selection", "scoring"), COUNTS.values(), strict=True)
    )
    assert len(results["training"]) == 3
    assert results["orbit"]["ratio"] < 1e-4
    assert next(iter(results["merging"])) == "P, noise 0"  # no image has two fits
    assert "Merging INRs 2-6-6-1" in (tmp_path / "run" / "report.html").read_text()


def test_published_inrs_of_other_widths_are_refused_before_anything_is_written(inrs, tmp_path):
    config = _inr_config(tmp_path / "run", inrs)
    wide = dataclasses.replace(config, zoo=dataclasses.replace(config.zoo, widths=(2, 32, 32, 1)))
    with pytest.raises(ValueError, match=r"expected published INRs 2-32-32-1; got: .*by --zoo\.widths"):
        inr.main(wide)
    large = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=21))
    with pytest.raises(ValueError, match=r"train\.batch_size is 21; expected a number from 1 to 20"):
        inr.main(large)
    (inrs / "mnist_png_training_0_0" / "checkpoints" / "model_final.pth").rename(tmp_path / "away.pth")
    try:
        with pytest.raises(ValueError, match=r"1 of 20 networks of the split are missing.*mnist_png_training_0_0"):
            inr.main(config)
    finally:
        (tmp_path / "away.pth").rename(inrs / "mnist_png_training_0_0" / "checkpoints" / "model_final.pth")
    assert not config.out.exists()


@pytest.fixture(scope="module")
def cnns(tmp_path_factory):
    """The Small CNN Zoo as published: 24 networks, half of them relu, at two steps."""
    folder = tmp_path_factory.mktemp("published") / "cifar10"
    folder.mkdir()
    rng = np.random.default_rng(0)
    width = sum(math.prod(shape) for shape in PUBLISHED.values())
    rows = []
    for network in range(24):
        for step in (40, 86):
            activation = "tanh" if network % 2 else "relu"
            scores = [repr(float(value)) for value in rng.uniform(size=4)]
            rows.append([activation, *SETTINGS, f"/cns/{network}/permanent_ckpt-{step}", step, *scores])
    matrix = 0.3 * rng.normal(size=(len(rows), width))
    np.save(folder / "weights.npy", matrix.astype("<f4"))
    write_metrics(folder / "metrics.csv.gz", rows, COLUMNS)
    write_layout(folder / "layout.csv", layout_lines(PUBLISHED))
    return folder


def _cnn_config(out, path, **changes):
    tiny = cnn.PRESETS["tiny"][1]
    return dataclasses.replace(tiny, out=out, zoo_path=path, zoo_step=86, activations=("relu",), **changes)


@pytest.mark.slow
def test_the_small_cnn_zoo_runs_to_its_report(cnns, tmp_path):
    results = cnn.main(_cnn_config(tmp_path / "run", cnns))
    one = results["activations"]["relu"]
    assert one["zoo"]["networks"] == one["zoo"]["checkpoints"] == 12
    assert len(one["training"]) == 2
    assert one["merging"].keys() >= {"naive", "autoencoder"}
    assert one["orbit"]["ratio"] < 1e-3
    assert 0 < one["zoo"]["gap_to_recorded_accuracy"] < 1
    assert not (tmp_path / "run" / "zoo").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_pixels_become_what_the_published_networks_were_trained_on():
    """From -1 to 1 in place of mean 0 and variance 1."""
    config = cnn.PRESETS["tiny"][1]
    plain, moved = (
        cnn_zoo.load_data(dataclasses.replace(config, zoo=dataclasses.replace(config.zoo, **options)))
        for options in ({"standardized": False}, {"pixels": (-1.0, 1.0)})
    )
    for split, part in plain.items():
        np.testing.assert_allclose(moved[split].x, 2 * part.x - 1, atol=1e-6)
    assert float(moved["train"].x.min()) == -1


def test_a_small_cnn_zoo_that_does_not_fit_is_refused_before_anything_is_written(cnns, tmp_path):
    config = _cnn_config(tmp_path / "run", cnns)
    for changes, message in (
        ({"zoo_step": None}, r"steps \[40, 86\] without a column 'model'.*Name a step by --zoo-step"),
        ({"zoo_step": 85}, r"no network has step 85; steps are \[40, 86\]"),
        ({"train": dataclasses.replace(config.train, batch_size=8)}, "7 relu networks reach .*train.batch_size=8"),
        ({"activations": ("gelu",)}, "activations are"),
        ({"zoo": dataclasses.replace(config.zoo, size=(32, 32))}, "expected images of 32 x 32 pixels, got 8 x 8"),
        ({"zoo": dataclasses.replace(config.zoo, pixels=(1, -1))}, r"zoo\.pixels is \(1, -1\); expected two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            cnn.main(dataclasses.replace(config, **changes))
    assert not config.out.exists()
