"""The merging of classifiers by every method runs, resumes and refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import support

from experiments import merging, runs
from jax_scalegmn import matching, network, zoo

TINY = merging.PRESETS["tiny"][1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run on one architecture: its configuration and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = dataclasses.replace(TINY, out=out, networks=TINY.networks[:1])
    return config, merging.main(config)


@pytest.mark.slow
def test_results_are_complete_and_stored_in_the_files(run):
    config, results = run
    assert json.loads((config.out / "results.json").read_text()) == results
    assert results["config"] == runs.plain(config)
    (one,) = results["pairs"].values()
    assert list(one["methods"]) == list(config.methods)
    for method in one["methods"].values():
        assert len(method["pairs"]) == config.pairs
        for pair in method["pairs"]:
            assert len(pair["path"]["accuracy"]) == config.points
            assert pair["function_change"] < 1e-5
            assert {"middle", "repaired", "similarity", "sweeps", "converged", "seconds", "cpu_seconds"} < pair.keys()
    assert results["many"]["by_number"].keys() == {"2", "3"}
    for ways in results["many"]["by_number"].values():
        assert list(ways) == ["end_points", *config.ways]
    assert "weights, permutations alone" in (config.out / "report.html").read_text()


@pytest.mark.slow
def test_paths_begin_and_end_at_the_networks(run):
    """Every method's path has the end points' own scores, and the middle is its middle point."""
    config, results = run
    (one,) = results["pairs"].values()
    trained = zoo.load(next((config.out / "networks").glob("mlp*")))
    np.testing.assert_allclose(one["test_accuracy"], trained.records["accuracy"])
    for method in one["methods"].values():
        (pair,) = method["pairs"]
        ends = [pair["path"]["loss"][at] for at in (0, -1)]
        np.testing.assert_allclose(ends, [one["test_loss"][i] for i in pair["pair"]], rtol=1e-4)
        assert pair["path"]["loss"][1] == pytest.approx(pair["middle"]["loss"], rel=1e-5)
    assert one["methods"]["weights"]["pairs"][0]["similarity"] > one["methods"]["naive"]["pairs"][0]["similarity"]
    assert one["methods"]["naive"]["pairs"][0]["function_change"] == 0


@pytest.mark.slow
def test_a_copy_merges_without_loss(run):
    """A network and a moved copy of it: the naive middle is another network, the aligned one the same."""
    config, _ = run
    trained = zoo.load(next((config.out / "networks").glob("mlp*")))
    element = support.rows(support.random_elements(trained.arch, 1), 0)
    stack = jax.tree.map(
        lambda a, b: np.stack([a, b]),
        support.rows(trained.params, 0),
        support.act(trained.arch, element, support.rows(trained.params, 0)),
    )
    data = merging.as_inputs(trained.arch, merging.load_images(config))
    records = {name: values[[0, 0]] for name, values in trained.records.items()}
    planted = zoo.Zoo(trained.arch, stack, records, trained.settings)
    methods = merging.score_pairs(config, trained.arch, planted, data, jax.random.key(0))["methods"]
    for name in ("canonical", "weights", "activations", "sinkhorn", "straight_through"):
        (pair,) = methods[name]["pairs"]
        np.testing.assert_allclose(pair["path"]["loss"], pair["path"]["loss"][0], rtol=1e-4)
        assert pair["repaired"]["loss"] == pytest.approx(pair["middle"]["loss"], rel=1e-3)
    (naive,) = methods["naive"]["pairs"]
    assert abs(naive["middle"]["loss"] - naive["path"]["loss"][0]) > 1e-3


@pytest.mark.slow
def test_pairs_over_the_devices_of_a_mesh_have_the_numbers_of_one_device(run):
    """Three pairs on two devices, so that the last group is filled up; each device computes a pair as it is."""
    config, _ = run
    trained = zoo.load(next((config.out / "networks").glob("mlp*")))
    data = merging.as_inputs(trained.arch, merging.load_images(config))
    pairs = [(0, 1), (1, 0), (0, 0)]
    few = dataclasses.replace(config, methods=("naive", "weights", "activations", "straight_through", "search"))

    def scored(mesh):
        config = dataclasses.replace(few, mesh=mesh)
        whole = merging.score_pairs(config, trained.arch, trained, data, jax.random.key(0), pairs)["methods"]
        found = {name: method["pairs"] for name, method in whole.items()}
        for pair in (pair for rows in found.values() for pair in rows):
            assert min(pair.pop("seconds"), pair.pop("cpu_seconds")) >= 0
        return found

    alone, shared = scored(None), scored(2)
    assert [pair["pair"] for pair in shared["weights"]] == [list(pair) for pair in pairs]
    assert alone["weights"][0] != alone["weights"][1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shared, alone)
    with pytest.raises(ValueError, match=r"The mesh {'data': 9} has 9 devices, and there are 8; expected 8 at most"):
        merging.main(dataclasses.replace(config, mesh=9, out=config.out / "other"))
    assert not (config.out / "other").exists()


@pytest.mark.slow
def test_a_finished_run_resumes_from_its_files(run):
    config, results = run
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*.safetensors")}
    again = merging.main(dataclasses.replace(config, resume=True))
    assert again["pairs"] == results["pairs"]
    assert again["many"] == results["many"]
    assert before == {path: path.stat().st_mtime_ns for path in config.out.rglob("*.safetensors")}
    with pytest.raises(SystemExit, match="already holds a run"):
        merging.main(config)


def test_images_become_inputs_of_mean_0():
    arch_texts = ("mlp:64-8-8-10,relu", "cnn:1-4,10,relu")
    images = merging.load_images(TINY)
    for text, shape in zip(arch_texts, ((200, 64), (200, 8, 8, 1)), strict=True):
        data = merging.as_inputs(merging.architecture.parse(text), images)
        assert data.x.shape == shape
        assert abs(data.x.mean()) < 1e-4
        assert data.test_x.shape[0] == 50


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_scales_are_fitted_where_there_are_some(activation):
    arch = merging.architecture.parse(f"mlp:64-8-8-10,{activation}")
    data = merging.as_inputs(arch, merging.load_images(TINY))
    left = {
        *(set(TINY.methods) - set(merging.methods(TINY, arch, data))),
        *(set(TINY.ways) - set(merging.many_routes(TINY, arch, data))),
    }
    assert left == (merging.FITTING if activation == "tanh" else set())


@pytest.mark.slow
def test_scales_see_all_training_images_where_they_are_drawn():
    arch = merging.architecture.parse("mlp:64-8-8-10,relu")
    data = merging.as_inputs(arch, merging.load_images(TINY))
    params, target = (network.init(arch, jax.random.key(seed)) for seed in (0, 1))
    found = {}
    for batch in (None, 200):
        match = dataclasses.replace(TINY.match, scale_batch=batch)
        fit = merging.methods(dataclasses.replace(TINY, match=match), arch, data)["scales"].match
        found[batch] = fit(params, target, jax.random.key(2))
    start = matching.weight_matching(arch, params, target).element
    for batch, images in ((None, TINY.match.function_examples), (200, 200)):
        x = data.x[:images]
        expected = matching.fit_scales(
            arch, params, target, x, distance=matching.cross_entropy, start=start, times=(0.5,), num_steps=1
        )
        np.testing.assert_allclose(found[batch].start_loss, expected.start_loss, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"models": 1},
        {"pairs": 0},
        {"points": 1},
        {"many": (1,)},
        {"networks": ()},
        {"methods": ()},
        {"ways": ("mean", "mean")},
        {"methods": ("scales", "search_scales"), "networks": ("mlp:64-8-8-10,relu", "mlp:64-8-8-10,tanh")},
        {"ways": ("search_scales",), "many_of": "mlp:64-8-8-10,tanh"},
        {"match": dataclasses.replace(TINY.match, scale_batch=201)},
        {"match": dataclasses.replace(TINY.match, scale_batch=0)},
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        merging.main(dataclasses.replace(TINY, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
