"""Pairs of the best CNNs of a zoo are merged by every method, on images and networks that nothing else has used."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import cnn_zoo, merging, merging_zoo, runs
from jax_scalegmn import zoo

ZOO = cnn_zoo.PRESETS["tiny"][1]
TINY = dataclasses.replace(merging_zoo.PRESETS["tiny"][1], activations=("relu",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of the zoo on relu."""
    out = tmp_path_factory.mktemp("runs") / "zoo"
    return out, cnn_zoo.main(dataclasses.replace(ZOO, out=out, activations=("relu",)))


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """One finished tiny run: its configuration and results."""
    config = dataclasses.replace(TINY, zoo_path=trained[0], out=tmp_path_factory.mktemp("runs") / "merging")
    return config, merging_zoo.main(config)


@pytest.mark.slow
def test_a_zoo_alone_is_trained_stored_and_read_again(trained, monkeypatch):
    out, results = trained
    assert json.loads((out / "results.json").read_text()) == results
    assert results["zoos"]["relu"]["networks"] == ZOO.zoo.networks
    assert results["zoos"]["relu"]["cosine"]
    assert results["zoos"]["relu"]["optimizer"] == "muon"
    assert len(list((out / "zoo").glob("relu-*.safetensors"))) == cnn_zoo.num_parts(ZOO.zoo) == 4
    assert (out / "zoo" / "small_cnn_zoo" / "relu" / "weights.npy").exists()
    monkeypatch.setattr(cnn_zoo.classifier_zoo, "fit", None)
    again = cnn_zoo.main(dataclasses.replace(ZOO, out=out, activations=("relu",), resume=True))
    assert again["zoos"] == results["zoos"]


@pytest.mark.slow
def test_every_method_scores_disjoint_pairs_of_the_best(run):
    config, results = run
    assert json.loads((config.out / "results.json").read_text()) == results
    (one,) = results["pairs"].values()
    assert {"naive", "weights", "activations", "search"} <= one["methods"].keys()
    whole = zoo.concatenate(
        [dataclasses.replace(zoo.load(path), settings={}) for path in sorted((config.zoo_path / "zoo").glob("*.safe*"))]
    )
    last = whole[whole.records["step"] == ZOO.zoo.steps]
    best = np.sort(last.records["selection_accuracy"])[-config.best :]
    chosen = merging_zoo.best_networks(config, "relu")
    np.testing.assert_array_equal(np.sort(chosen.records["selection_accuracy"]), best)
    assert len(one["test_accuracy"]) == 2 * config.pairs
    assert set(np.float32(one["test_accuracy"])) <= set(chosen.records["scoring_accuracy"])
    for method in one["methods"].values():
        assert [pair["pair"] for pair in method["pairs"]] == [[0, 1], [2, 3]]
        for pair in method["pairs"]:
            ends = [pair["path"]["accuracy"][at] for at in (0, -1)]
            np.testing.assert_allclose(ends, [one["test_accuracy"][i] for i in pair["pair"]], atol=1e-6)
            assert 0.02 <= pair["tempered"]["temperature"] <= 50.1
    page = (config.out / "report.html").read_text()
    assert "temperature" in page


@pytest.mark.slow
def test_pairs_on_two_devices_have_the_numbers_of_one(run, tmp_path, monkeypatch):
    config, results = run
    one_each, calls, few = runs.one_each, [], ("naive", "weights", "search")
    methods = merging.methods
    monkeypatch.setattr(merging, "methods", lambda *given: {name: methods(*given)[name] for name in few})
    monkeypatch.setattr(runs, "one_each", lambda fn, mesh: calls.append(mesh) or one_each(fn, mesh))
    found = merging_zoo.main(dataclasses.replace(config, out=tmp_path / "run", mesh=2))
    assert {mesh.size for mesh in calls} == {2}

    def untimed(results):
        methods = results["pairs"]["CNN relu"]["methods"]
        return {
            name: [{k: v for k, v in pair.items() if "seconds" not in k} for pair in method["pairs"]]
            for name, method in methods.items()
            if name in few
        }

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), untimed(found), untimed(results))


@pytest.mark.slow
def test_a_finished_run_resumes_from_its_files(run, monkeypatch):
    config, results = run
    monkeypatch.setattr(merging_zoo.merging, "score_pairs", None)
    assert merging_zoo.main(dataclasses.replace(config, resume=True))["pairs"] == results["pairs"]


@pytest.mark.slow
def test_bad_input_is_refused_before_anything_is_written(trained, tmp_path):
    out, _ = trained

    def refused(message, **changes):
        config = dataclasses.replace(TINY, zoo_path=out, out=tmp_path / "run", **changes)
        with pytest.raises(ValueError, match=message):
            merging_zoo.main(config)
        assert not config.out.exists()

    refused("pairs 3; expected two networks or more for each pair", pairs=3)
    refused("has 8 relu CNNs; expected 10 or more for 5 pairs", pairs=5, best=10)
    refused("with tanh CNNs", activations=("tanh",))
    with pytest.raises(ValueError, match=r"config.json: there is no such file; expected one in the folder of a run"):
        merging_zoo.main(dataclasses.replace(TINY, zoo_path=tmp_path / "absent", out=tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"seed": 0, "zoo": {"widths": [2, 3, 1]}}')
    with pytest.raises(ValueError, match="it is of no zoo of CNNs"):
        merging_zoo.main(dataclasses.replace(TINY, zoo_path=tmp_path / "other", out=tmp_path / "run"))


def test_options_that_it_cannot_follow_are_refused(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"no programs of its own\. experiments\.cnn_zoo, which trains the networks"):
        merging_zoo.main(dataclasses.replace(config, compile_only="v5e:8x8"))
    with pytest.raises(ValueError, match=r"The mesh {'data': 9} has 9 devices, and there are 8; expected 8 at most"):
        merging_zoo.main(dataclasses.replace(config, mesh=9))
    assert not (tmp_path / "run").exists()
