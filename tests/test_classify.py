"""The classification of INRs by four encoders runs, resumes and refuses."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import support
import tyro

from experiments import classify, encoders, runs
from jax_scalegmn import symmetry, zoo

TINY = dataclasses.replace(classify.PRESETS["tiny"][1], encoders=("ablated", "query"))
PAIR = {"seed", "best_epoch", "selection_accuracy", "seconds", "history", "networks_per_second", *classify.MEASURES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run: its folder and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, classify.main(dataclasses.replace(TINY, out=out))


def numbers(results):
    """The results without times."""
    timed = {"seconds", "networks_per_second"}
    if isinstance(results, dict):
        return {name: numbers(value) for name, value in results.items() if name not in timed}
    return [numbers(value) for value in results] if isinstance(results, list) else results


@pytest.mark.slow
def test_results_are_complete_and_stored_in_the_files(run):
    out, results = run
    assert json.loads((out / "results.json").read_text()) == results
    assert results["config"] == runs.plain(dataclasses.replace(TINY, out=out))
    assert {"device", "jax", "flax"} <= results["environment"].keys()
    assert {split: (one["networks"], one["images"]) for split, one in results["zoo"].items()} == {
        "train": (64, 32),
        "selection": (16, 8),
        "scoring": (16, 8),
    }
    assert tuple(results["encoders"]) == TINY.encoders
    for encoder in results["encoders"].values():
        assert [pair["seed"] for pair in encoder["seeds"]] == [0, 1]
        for pair in encoder["seeds"]:
            assert pair.keys() == PAIR
            reached = [epoch["selection_accuracy"] for epoch in pair["history"]]
            assert len(reached) == TINY.train.epochs
            assert pair["selection_accuracy"] == reached[pair["best_epoch"] - 1] == max(reached)
        for measure in classify.MEASURES:
            values = [pair[measure] for pair in encoder["seeds"]]
            assert encoder[measure]["values"] == values
            assert encoder[measure]["mean"] == pytest.approx(np.mean(values))
            assert encoder[measure]["std"] == pytest.approx(np.std(values, ddof=1))
            assert all(0 <= value <= 1 for value in values)
    page = (out / "report.html").read_text()
    assert all(classify.LABELS[name] in page for name in TINY.encoders)
    assert classify.LABELS["permutation"] not in page
    assert page.count("data-chart=") == 1
    assert support.asks_for_nothing(page)


@pytest.fixture(scope="module")
def shares(run, tmp_path_factory):
    """A run on the same zoo, with two shares of it and two learning rates: its configuration and results."""
    out = tmp_path_factory.mktemp("runs") / "shares"
    shutil.copytree(run[0] / "zoo", out / "zoo")
    config = dataclasses.replace(
        TINY, out=out, encoders=("query",), fractions=(1.0, 0.5), learning_rates=(1e-6, 3e-2), least_updates=6
    )
    return config, classify.main(config)


def test_a_learning_rate_that_diverges_loses():
    def train(names, rate, seeds):
        if rate > 1:
            raise FloatingPointError("training diverged")
        return {name: [{"selection_accuracy": rate}] for name in names}

    assert classify._reached(train, "query", 0.5) == 0.5
    assert classify._reached(train, "query", 1e6) is None


@pytest.mark.slow
def test_shares_of_the_images_are_trained_on_at_the_best_learning_rate(shares):
    config, results = shares
    half, whole = results["smaller"]["0.5"], results["encoders"]["query"]
    assert (half["networks"], half["epochs"]) == (32, 3)  # 2 updates an epoch, 6 at least
    assert len(whole["seeds"][0]["history"]) == 2
    for encoder in (whole, half["encoders"]["query"]):
        assert encoder["tuning"].keys() == {"1e-06", "0.03"}
        best = max(encoder["tuning"].values())
        assert encoder["tuning"][f"{encoder['learning_rate']:g}"] == best
        assert encoder["seeds"][0]["selection_accuracy"] == best
        assert [pair["seed"] for pair in encoder["seeds"]] == [0, 1]
    files = {str(path.relative_to(config.out / "pairs")) for path in (config.out / "pairs").rglob("*.json")}
    expected = {f"rate-{rate}/query-0.json" for rate in ("1e-06", "0.03")}
    assert expected | {f"fraction-0.5/{name}" for name in expected} <= files
    assert len(files) == 6  # the second seed is trained at the chosen rate alone
    assert "by the share of the training images" in (config.out / "report.html").read_text()


@pytest.mark.slow
def test_a_run_on_shares_resumes_from_its_files(shares, monkeypatch):
    config, results = shares
    monkeypatch.setattr(encoders, "_train_pair", None)
    again = classify.main(dataclasses.replace(config, resume=True))
    assert numbers(again) == numbers(results | {"config": again["config"]})


def test_smaller_shares_are_contained_in_larger_ones(tmp_path):
    arch = support.ARCHITECTURES["siren"]
    index = np.tile(np.arange(10), 2)
    networks = zoo.Zoo(arch, support.random_params(arch, models=(20,)), {"image_index": index}, {})
    chosen = [classify.share_of(networks, fraction, 0).records["image_index"].tolist() for fraction in (0.01, 0.3, 1.0)]
    assert [len(share) for share in chosen] == [2, 6, 20]  # both fits of 1, 3 and 10 images
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2]) == set(range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": (0.5, 1.5)}, r"fractions are \(0.5, 1.5\); expected one or more in \(0, 1\]"),
        ({"fractions": (0.01,)}, "train.batch_size is 16; expected a number from 1 to 2, the training networks"),
        ({"learning_rates": (1e-2, 1e-2)}, r"learning_rates are \(0.01, 0.01\)"),
        ({"least_updates": -1}, "least_updates is -1"),
    ],
)
def test_bad_shares_and_rates_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        classify.main(dataclasses.replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_seeds_differ(run):
    for encoder in run[1]["encoders"].values():
        first, second = (pair["history"] for pair in encoder["seeds"])
        assert first[0]["train_loss"] != second[0]["train_loss"]


@pytest.mark.slow
def test_group_elements_change_no_prediction_of_an_encoder_that_follows_the_whole_group(run):
    """Nor its accuracy. (A tiny ablated one may agree by chance; test_equivariance shows that it is not invariant.)"""
    for pair in run[1]["encoders"]["query"]["seeds"]:
        assert pair["agreement"] == 1
        assert pair["moved_accuracy"] == pair["accuracy"]


@pytest.mark.slow
def test_encoders_have_as_many_parameters_as_the_scale_equivariant_one():
    matched = classify.matched_encoders(TINY.model, support.ARCHITECTURES["siren"], 10, (1.0,) * 6)
    assert matched.keys() == classify.LABELS.keys()
    sizes = {name: encoder.parameters for name, encoder in matched.items()}
    assert sizes["ablated"] == sizes["equivariant"]
    for size in sizes.values():
        assert size == pytest.approx(sizes["equivariant"], rel=TINY.model.tolerance)


def test_encoders_that_cannot_be_matched_are_refused():
    arch = support.ARCHITECTURES["siren"]
    settings = dataclasses.replace(TINY.model, features=3, tolerance=0.0)
    with pytest.raises(ValueError, match=r"permutation-only encoder .*model\.tolerance=0 "):
        classify.matched_encoders(settings, arch, 10, (1.0,) * 6)


def test_augmentation_moves_every_network_inside_its_orbit():
    arch = support.ARCHITECTURES["siren"]
    params = support.random_params(arch)
    moved = jax.jit(encoders.augmented(arch, lambda variables, row, key: (row, key)))
    ((first, label), inner_key), ((second, _), _) = (moved(None, (params, 3), jax.random.key(i)) for i in (0, 1))
    assert label == 3
    assert inner_key != jax.random.key(0)
    x = support.example(arch)
    for one in (first, second):
        assert support.deviation(support.outputs(arch, one, x), support.outputs(arch, params, x)) < 1e-4
    assert support.deviation(first, params) > 0.1
    assert support.deviation(second, first) > 0.1
    element = symmetry.random(arch, jax.random.split(jax.random.key(0))[0])
    support.assert_identical(first, symmetry.act(arch, element, params))


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_keeps_its_pairs_and_resumes_to_the_same_numbers(run, tmp_path, monkeypatch, capsys):
    """The signal comes after the third of four trainings; the rest of the run trains the fourth alone."""
    out, expected = run
    config = dataclasses.replace(TINY, out=tmp_path / "stopped")
    runs.claim(config)
    shutil.copytree(out / "zoo", config.out / "zoo")
    shutil.copytree(out / "pairs", config.out / "pairs")
    for seed in (0, 1):
        (config.out / "pairs" / f"query-{seed}.json").unlink()
    right = runs.write_json

    def write_and_signal(path, value):
        right(path, value)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "write_json", write_and_signal)
        with pytest.raises(SystemExit, match=r"3 of 4 pairs.*same command and --resume"):
            classify.main(dataclasses.replace(config, resume=True))
    assert not (config.out / "results.json").exists()
    assert len(list((config.out / "pairs").iterdir())) == 3
    before = (config.out / "pairs" / "query-0.json").stat().st_mtime_ns
    results = classify.main(dataclasses.replace(config, resume=True))
    assert (config.out / "pairs" / "query-0.json").stat().st_mtime_ns == before
    assert numbers(results["encoders"]) == numbers(expected["encoders"])
    assert results["seconds"]["training"] == pytest.approx(
        sum(encoder["seconds"] for encoder in results["encoders"].values())
    )

    damaged = config.out / "pairs" / "query-1.json"
    damaged.write_text('{"seed": 1}')
    capsys.readouterr()
    again = classify.main(dataclasses.replace(config, resume=True))
    assert f"{damaged.name} is damaged and made again: it lacks" in capsys.readouterr().out.replace("\n", "")
    assert numbers(again["encoders"]) == numbers(expected["encoders"])


@pytest.mark.slow
def test_a_used_folder_is_refused_without_resume_and_with_other_options(run, tmp_path):
    out, _ = run
    with pytest.raises(SystemExit, match="--resume"):
        classify.main(dataclasses.replace(TINY, out=out))
    with pytest.raises(SystemExit, match=r"other options.*copies: 2 then, 3 now"):
        classify.main(dataclasses.replace(TINY, out=out, resume=True, copies=3))
    with pytest.raises(SystemExit, match="absent holds no run to resume"):
        classify.main(dataclasses.replace(TINY, out=tmp_path / "absent", resume=True))


def test_bad_input_is_refused_before_a_folder_is_made(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        classify.main(dataclasses.replace(TINY, out=out, data=tmp_path / "absent.npz"))
    with pytest.raises(ValueError, match="seeds is 0; expected a number >= 1"):
        classify.main(dataclasses.replace(TINY, out=out, seeds=0))
    assert not out.exists()


def test_command_line_knows_the_presets_and_no_others(capsys):
    def parse(*arguments):
        return tyro.extras.overridable_config_cli(classify.PRESETS, args=arguments)

    assert parse("digits") == classify.PRESETS["digits"][1]
    changed = parse("mnist", "--data", "mnist.npz", "--train.augment")
    assert changed.data == Path("mnist.npz")
    assert changed.train.augment
    with pytest.raises(SystemExit):
        parse("absent")
    assert "digits" in capsys.readouterr().err
