"""The prediction of CNNs' accuracy by four encoders runs, resumes, takes the zoo of another run, and refuses."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import support
import tyro

from experiments import cnn_zoo, encoders, generalization, runs
from jax_scalegmn import zoo

TINY = dataclasses.replace(generalization.PRESETS["tiny"][1], encoders=("equivariant", "statistics"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run on one activation and CNNs of one convolution: its configuration and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    cnns = dataclasses.replace(TINY.zoo, channels=(1, 4))
    config = dataclasses.replace(TINY, out=out, activations=("relu",), zoo=cnns)
    return config, generalization.main(config)


def numbers(results):
    """The results without times."""
    timed = {"seconds", "networks_per_second"}
    if isinstance(results, dict):
        return {name: numbers(value) for name, value in results.items() if name not in timed}
    return [numbers(value) for value in results] if isinstance(results, list) else results


@pytest.mark.slow
def test_results_are_complete_and_stored_in_the_files(run):
    config, results = run
    assert json.loads((config.out / "results.json").read_text()) == results
    assert results["config"] == runs.plain(config)
    one = results["activations"]["relu"]
    networks = {name: part["networks"] for name, part in one["parts"].items()}
    assert networks == {"train": 10, "selection": 2, "scoring": 4}
    assert all(part["checkpoints"] == 2 * part["networks"] for part in one["parts"].values())
    assert tuple(one["encoders"]) == TINY.encoders
    for encoder in one["encoders"].values():
        assert [pair["seed"] for pair in encoder["seeds"]] == [0, 1]
        for pair in encoder["seeds"]:
            reached = [epoch["selection_loss"] for epoch in pair["history"]]
            assert len(reached) == TINY.train.epochs
            assert pair["selection_loss"] == reached[pair["best_epoch"] - 1] == min(reached)
            truth, predicted = np.asarray(one["truth"]), np.asarray(pair["predicted"])
            assert pair["l1"] == pytest.approx(np.abs(predicted - truth).mean(), rel=1e-4)
            assert pair["tau"] <= one["ceiling"] + 1e-12
        for measure in generalization.MEASURES:
            values = [pair[measure] for pair in encoder["seeds"]]
            assert encoder[measure]["values"] == values
            assert encoder[measure]["mean"] == pytest.approx(np.mean(values))
            assert encoder[measure]["std"] == pytest.approx(np.std(values, ddof=1))
    page = (config.out / "report.html").read_text()
    assert all(generalization.LABELS[name] in page for name in TINY.encoders)
    assert generalization.LABELS["permutation"] not in page
    assert page.count("data-chart=") == 1
    assert page.count("<circle") == 2 * len(one["truth"])
    assert support.asks_for_nothing(page)


@pytest.mark.slow
def test_group_elements_change_no_prediction_of_the_encoder_that_follows_the_whole_group(run):
    """But those of the encoders that do not: positive scales are no symmetry of theirs."""
    for name, encoder in run[1]["activations"]["relu"]["encoders"].items():
        if name == "equivariant":
            for pair in encoder["seeds"]:
                assert pair["moved_tau"] == pytest.approx(pair["tau"], abs=1e-6)
                assert pair["moved_r2"] == pytest.approx(pair["r2"], abs=1e-4)
                assert pair["moved_l1"] == pytest.approx(pair["l1"], abs=1e-6)
        else:
            assert max(abs(pair["moved_r2"] - pair["r2"]) for pair in encoder["seeds"]) > 1e-3


@pytest.mark.slow
def test_a_run_on_the_zoo_of_another_resumes_to_the_same_numbers(run, tmp_path):
    """It trains the pair that is missing and no CNN."""
    config, expected = run
    other = dataclasses.replace(config, out=tmp_path / "other", zoo_from=config.out)
    runs.claim(other)
    shutil.copytree(config.out / "pairs", other.out / "pairs")
    missing = other.out / "pairs" / "relu" / "statistics-1.json"
    missing.unlink()
    before = {path: path.stat().st_mtime_ns for path in other.out.rglob("*-*.json")}
    results = generalization.main(dataclasses.replace(other, resume=True))
    assert missing.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not (other.out / "zoo").exists()
    assert numbers(results["activations"]) == numbers(expected["activations"])


@pytest.mark.slow
def test_the_zoo_of_another_run_is_refused_at_the_door_where_it_does_not_fit(run, tmp_path):
    config, _ = run
    other = dataclasses.replace(config, out=tmp_path / "other", zoo_from=config.out)

    def refused(message, **changes):
        with pytest.raises(SystemExit, match=message):
            generalization.main(dataclasses.replace(other, **changes))

    refused("absent holds no finished run", zoo_from=tmp_path / "absent")
    refused(r"zoo\.steps: 30 there, 31 here", zoo=dataclasses.replace(config.zoo, steps=31))
    refused("seed: 0 there, 1 here", seed=1)
    refused(r"data: None there, x\.npz here", data=Path("x.npz"))
    refused("activations: no tanh there", activations=("relu", "tanh"))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(config.out / "config.json", unfinished)
    refused("holds no finished run", zoo_from=unfinished)
    assert not other.out.exists()


def test_bad_input_is_refused_before_a_folder_is_made(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="copies is 0"):
        generalization.main(dataclasses.replace(TINY, out=out, copies=0))
    with pytest.raises(ValueError, match="absent"):
        generalization.main(dataclasses.replace(TINY, out=out, activations=("absent",)))
    for wrong in ((), ("absent",), ("ablated", "ablated")):
        with pytest.raises(ValueError, match=r"encoders are .*expected one or more of \('equivariant', "):
            generalization.main(dataclasses.replace(TINY, out=out, encoders=wrong))
    with pytest.raises(ValueError, match="twice"):
        generalization.main(dataclasses.replace(TINY, out=out, activations=("relu", "relu")))
    assert not out.exists()


@pytest.mark.slow
def test_encoders_learn_the_standardized_accuracy_and_predict_the_accuracy(run):
    config, _ = run
    parts = [zoo.load(path) for path in sorted((config.out / "zoo").glob("*.safetensors"))]
    train = cnn_zoo.split(zoo.concatenate(parts), config.seed)["train"]
    task = generalization.task(train)
    target = task.target(train)
    assert target.dtype == np.float32
    np.testing.assert_allclose([target.mean(), target.std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(task.read(target[:, None]), train.records["scoring_accuracy"], rtol=1e-5)


# --- measures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [(1, 2, 3, 4, 5), (1, 1, 2, 3, 4), (1, 1, 1, 2, 2), (0, 1, 1, 1, 1), (1, 1)])
def test_ceiling_is_the_largest_tau_over_all_orders(truth):
    taus = [
        generalization.kendall(np.array(order), np.array(truth)) for order in itertools.permutations(range(len(truth)))
    ]
    if len(set(truth)) == 1:
        assert set(taus) == {None}
        assert generalization.ceiling(np.array(truth)) is None
    else:
        assert generalization.ceiling(np.array(truth)) == pytest.approx(max(taus), rel=1e-12)


def test_measures_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=20).astype(np.float32)
    plain = truth + 0.1 * rng.normal(size=20).astype(np.float32)
    moved = np.stack([plain, plain[::-1]], 1)
    got = generalization.score(plain, moved, truth)
    np.testing.assert_allclose(got["predicted"], plain)
    assert got["l1"] == pytest.approx(np.abs(plain - truth).mean(), rel=1e-5)
    assert got["r2"] == pytest.approx(1 - np.square(plain - truth).mean() / truth.var(), rel=1e-4)
    concordant = np.sign(np.subtract.outer(plain, plain) * np.subtract.outer(truth, truth))
    assert got["tau"] == pytest.approx(concordant.sum() / (20 * 19))
    reverse = scipy.stats.kendalltau(plain[::-1], truth).statistic
    assert got["moved_tau"] == pytest.approx((got["tau"] + reverse) / 2)


def test_equal_accuracies_or_predictions_have_no_tau(tmp_path):
    """None in JSON and "-" in tables, but no NaN."""
    same, different = np.full(4, 0.5, np.float32), np.arange(4, dtype=np.float32)
    for plain, truth in ((same, different), (different, same), (same, same)):
        got = generalization.score(plain, plain[:, None], truth)
        assert got["tau"] is got["moved_tau"] is None
        assert (got["r2"] is None) == (truth is same)
        assert got["l1"] == pytest.approx(np.abs(plain - truth).mean())
        runs.write_json(tmp_path / "measures.json", got)
    undefined = encoders.spread([None, 0.5])
    assert undefined == {"mean": None, "std": None, "values": [None, 0.5]}
    assert encoders.text(undefined, 3) == "-"
    assert encoders.text(encoders.spread([0.5]), 3) == "0.500"


def test_command_line_knows_the_presets_and_no_others(capsys):
    def parse(*arguments):
        return tyro.extras.overridable_config_cli(generalization.PRESETS, args=arguments)

    assert parse("digits") == generalization.PRESETS["digits"][1]
    changed = parse("cifar", "--data", "cifar.npz", "--zoo-from", "runs/cnn-cifar", "--zoo.networks", "32")
    assert (changed.data, changed.zoo_from) == (Path("cifar.npz"), Path("runs/cnn-cifar"))
    assert changed.zoo.networks == 32
    with pytest.raises(SystemExit):
        parse("absent")
    assert "digits" in capsys.readouterr().err
