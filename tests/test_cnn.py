"""The CNN experiment runs, resumes and refuses; what must be disjoint is, and what keeps functions does."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from experiments import alignment, cnn, cnn_zoo, progress
from jax_scalegmn import zoo
from jax_scalegmn.zoo import small_cnn_zoo

TINY = dataclasses.replace(cnn.PRESETS["tiny"][1], activations=("relu",))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run: its folder and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, cnn.main(dataclasses.replace(TINY, out=out))


@pytest.mark.slow
def test_results_are_complete_and_stored_in_the_files(run):
    out, results = run
    assert json.loads((out / "results.json").read_text()) == results
    one = results["activations"]["relu"]
    assert one["zoo"]["networks"] == TINY.zoo.networks
    assert len(one["training"]) == TINY.train.epochs
    by_function = {"sinkhorn_function", "straight_through_function", "search", "search_activations", "search_gradient"}
    learned = {"learned_matching", "learned_frame", "learned_search"}
    assert by_function | learned <= one["merging"].keys()
    assert len(one["merging"]) == 10 + len(by_function) + len(learned)
    for trained in one["alignment"].values():
        assert len(trained["training"]) == TINY.alignment.epochs
        assert np.isfinite(trained["training"][0]["selection_merged"])
    for method in one["merging"].values():
        for kind in ("plain", "repaired"):
            numbers = method[kind]
            assert numbers["accuracy"]["low"] <= numbers["accuracy"]["mean"] <= numbers["accuracy"]["high"]
            assert len(numbers["path_accuracy"]) == len(numbers["path_loss"]) == TINY.evaluation.points
            assert numbers["barrier"]["mean"] >= 0
    page = (out / "report.html").read_text()
    assert page.count("data-chart=") == 3
    assert page.count("<title>network: ") == len(cnn_zoo.split(_cnns(out), TINY.seed)["scoring"]) // 2
    assert support.asks_for_nothing(page)


@pytest.mark.slow
def test_aligned_end_points_are_the_original_functions_and_orbits_one_point(run):
    """Exact but for the autoencoder's; repaired by themselves they stay what they are."""
    one = run[1]["activations"]["relu"]
    for name in set(one["merging"]) - {"autoencoder", "latent"}:
        ends = [one["merging"][name][kind]["path_accuracy"] for kind in ("plain", "repaired")]
        for path in ends:
            assert (path[0] + path[-1]) / 2 == pytest.approx(one["end_points"], abs=1e-6)
        assert one["merging"][name]["plain"]["end_point_gap"]["mean"] == pytest.approx(0, abs=1e-6)
    assert one["orbit"]["ratio"] < 1e-3


@pytest.mark.slow
def test_networks_and_images_of_the_splits_are_disjoint(run):
    out, _ = run
    cnns = _cnns(out)
    parts = cnn_zoo.split(cnns, TINY.seed)
    models = [set(part.records["model"].tolist()) for part in parts.values()]
    assert sum(map(len, models)) == len(set.union(*models)) == TINY.zoo.networks
    assert sum(map(len, parts.values())) == len(cnns) == TINY.zoo.networks * TINY.zoo.checkpoints
    data = cnn_zoo.load_data(TINY)
    everything = np.concatenate([np.asarray(one.x).reshape(len(one.x), -1) for one in data.values()])
    assert len(np.unique(everything, axis=0)) == len(everything) == 64 + 16 + 16
    exchanged = small_cnn_zoo.load(out / "zoo" / "small_cnn_zoo" / "relu", activation="relu", step=None)
    np.testing.assert_array_equal(exchanged.records["scoring_accuracy"], cnns.records["scoring_accuracy"])


@pytest.mark.slow
def test_a_finished_run_resumes_to_the_same_numbers_from_its_files(run, monkeypatch):
    out, results = run
    monkeypatch.setattr(cnn_zoo.classifier_zoo, "fit", None)
    monkeypatch.setattr(cnn, "score", lambda *_: ({"merging": {}}, {}))
    monkeypatch.setattr(cnn.cnn_report, "sections", lambda *_, **__: [])
    monkeypatch.setattr(cnn.cnn_report, "result_tables", lambda *_: [])
    before = (out / "results.json").read_text()
    again = cnn.main(dataclasses.replace(TINY, out=out, resume=True))
    (out / "results.json").write_text(before)
    for ours, theirs in zip(
        again["activations"]["relu"]["training"], results["activations"]["relu"]["training"], strict=True
    ):
        assert ours == theirs


@pytest.mark.slow
def test_a_part_of_a_zoo_is_trained_as_it_would_be_with_the_others(run, tmp_path):
    """The second part alone has the recipes and the weights that it has after the first."""
    out, _ = run
    part = zoo.load(out / "zoo" / "relu-0001.safetensors")
    assert part.records["model"].tolist() == [8, 8, 9, 9, 10, 10, 11, 11]
    (tmp_path / "relu-0000.safetensors").write_bytes((out / "zoo" / "relu-0000.safetensors").read_bytes())
    with progress.Interruption() as interruption:
        whole = cnn_zoo.fit_zoo(TINY, "relu", cnn_zoo.load_data(TINY), tmp_path, interruption)
    np.testing.assert_array_equal(whole.records["scoring_loss"][-8:], part.records["scoring_loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": ("gelu",)}, r"activations are \('gelu',\)"),
        ({"evaluation": dataclasses.replace(TINY.evaluation, points=4)}, "points is 4"),
        ({"zoo": dataclasses.replace(TINY.zoo, train_images=100_000)}, "zoo.train_images is 100000"),
        ({"alignment": dataclasses.replace(TINY.alignment, images_per_step=0)}, "alignment.images_per_step is 0"),
        ({"alignment": dataclasses.replace(TINY.alignment, pairs=-1)}, "alignment.pairs is -1; expected a number >= 1"),
        ({"alignment": dataclasses.replace(TINY.alignment, frame_epochs=0)}, "alignment.frame_epochs is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cnn.main(dataclasses.replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_too_few_usable_networks_are_refused(run):
    out, _ = run
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, least_accuracy=1.1))
    parts = dict.fromkeys(("train", "selection"), zoo.load(out / "zoo" / "relu-0000.safetensors"))
    with pytest.raises(ValueError, match=r"0 relu networks reach train.least_accuracy=1.1; expected one batch"):
        cnn.fit_autoencoder(config, "relu", parts, {}, progress.Interruption())


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(run):
    out, _ = run
    with pytest.raises(SystemExit, match="other options"):
        cnn.main(dataclasses.replace(TINY, out=out, resume=True, seed=5))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"steps": 8}, {"checkpoints": 3}, {"networks": 6, "part": 6}])
def test_parts_of_another_zoo_are_refused(run, tmp_path, change):
    out, _ = run
    (tmp_path / "relu-0000.safetensors").write_bytes((out / "zoo" / "relu-0000.safetensors").read_bytes())
    config = dataclasses.replace(TINY, zoo=dataclasses.replace(TINY.zoo, **change))
    with progress.Interruption() as interruption, pytest.raises(ValueError, match=r"8 networks .* at steps \[3 6\]"):
        cnn_zoo.fit_zoo(config, "relu", cnn_zoo.load_data(config), tmp_path, interruption)


def test_pairs_of_cnns_are_different_networks_at_their_end_and_no_pair_twice():
    arch = cnn_zoo.architecture_of(TINY, "relu", 10)
    steps = np.array([3, 6, 3, 6, 3, 6])
    params = jax.tree.map(
        lambda leaf: np.stack([np.full(leaf.shape, row, np.float32) for row in range(6)]),
        sg.architecture.abstract_params(arch),
    )
    cnns = zoo.Zoo(arch, params, {"step": steps}, {})

    def drawn(most, seed=0):
        pairs = alignment.random_pairs(cnns, most, seed)
        rows = (np.asarray(jax.tree.leaves(side)[0]) for side in pairs)
        return list(zip(*(leaf.reshape(len(leaf), -1)[:, 0].tolist() for leaf in rows), strict=True))

    assert sorted(drawn(100)) == [(1, 3), (1, 5), (3, 1), (3, 5), (5, 1), (5, 3)]
    assert len(set(drawn(4))) == 4
    assert drawn(4) != drawn(4, seed=1)
    alone = cnns[np.array([1])]
    assert len(jax.tree.leaves(alignment.random_pairs(alone, 4, 0))[0]) == 0


def test_learned_rows_are_left_out_where_there_are_no_pairs(capsys):
    arch = cnn_zoo.architecture_of(TINY, "relu", 10)
    params = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape)), sg.architecture.abstract_params(arch))
    cnns = dict.fromkeys(("train", "selection"), zoo.Zoo(arch, params, {"step": np.array([6])}, {}))
    images = dict.fromkeys(cnns, np.zeros((2, 8, 8, 1)))
    with progress.Interruption() as interruption:
        assert alignment.fit_on_cnns(TINY, TINY.alignment, cnns, images, interruption, name="relu") == {}
    assert "0 for train, 0 for selection" in capsys.readouterr().out
    assert alignment.make_methods({}, None) == {}


# --- zoos of others -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo", "zoo/small_cnn_zoo/relu", "one.safetensors"])
def test_zoos_of_others_are_scored_on_our_images(run, tmp_path, name):
    """The run's own folder, the layout of the Small CNN Zoo and a file hold the same networks with the same scores."""
    out, _ = run
    cnns, data = _cnns(out), cnn_zoo.load_data(TINY)
    zoo.save(cnns, tmp_path / "one.safetensors")
    path = tmp_path / name if name.startswith("one") else out / name
    again = cnn_zoo.read(path, "relu", data, None)
    for record in ("model", "step"):
        np.testing.assert_array_equal(again.records[record], cnns.records[record])
    np.testing.assert_allclose(again.records["scoring_loss"], cnns.records["scoring_loss"], rtol=1e-4)
    ends = cnn_zoo.read(path, "relu", data, 6)
    assert len(ends) == TINY.zoo.networks
    assert set(cnn_zoo.split(ends, 0)["train"].records["model"]) < set(range(TINY.zoo.networks))


@pytest.mark.slow
def test_a_run_on_the_layout_of_the_small_cnn_zoo_trains_no_cnn(run, tmp_path, monkeypatch):
    out, _ = run
    monkeypatch.setattr(cnn_zoo.classifier_zoo, "fit", None)
    path = out / "zoo" / "small_cnn_zoo" / "relu"
    results = cnn.main(dataclasses.replace(TINY, out=tmp_path / "run", zoo_path=path))
    assert results["activations"]["relu"]["zoo"]["networks"] == TINY.zoo.networks
    assert not (tmp_path / "run" / "zoo").exists()


@pytest.mark.slow
def test_zoos_that_do_not_fit_are_refused_before_anything_is_written(run, tmp_path):
    out, _ = run

    def refused(path, message, **changes):
        config = dataclasses.replace(TINY, out=tmp_path / "run", zoo_path=path, **changes)
        with pytest.raises(ValueError, match=message) as caught:
            cnn.main(config)
        assert str(path) in str(caught.value)
        assert not config.out.exists()

    (tmp_path / "folder").mkdir()
    refused(tmp_path / "absent", "expected a folder with weights.npy.*got nothing")
    refused(tmp_path / "folder", "expected a folder with weights.npy.*got the entries")
    refused(out / "zoo", "no network has step 5; steps are", zoo_step=5)
    refused(out / "zoo", "with tanh CNNs", activations=("tanh",))
    part = out / "zoo" / "relu-0000.safetensors"
    refused(
        part, r"activations \['relu'\]; expected CNNs of 1 channel, 10 classes or more and tanh", activations=("tanh",)
    )
    arch = sg.siren((2, 3, 1))
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], sg.network.init(arch, jax.random.key(0)))
    zoo.save(zoo.Zoo(arch, params, {}, {}), tmp_path / "inr.safetensors")
    refused(tmp_path / "inr.safetensors", "expected CNNs of 1 channel")
    cnns = _cnns(out)
    records = {name: values for name, values in cnns.records.items() if name != "model"}
    zoo.save(dataclasses.replace(cnns, records=records), tmp_path / "nameless.safetensors")
    refused(tmp_path / "nameless.safetensors", "without a column 'model'")


def _cnns(out):
    parts = [zoo.load(path) for path in sorted((out / "zoo").glob("relu*.safetensors"))]
    return zoo.concatenate([dataclasses.replace(part, settings={}) for part in parts])
