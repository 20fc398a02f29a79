"""The editing experiment runs, resumes and refuses; its goals are dilated images, its editors of one size."""

import dataclasses
import json

import numpy as np
import pytest
import support

from experiments import autoencoders, edit, inr_zoo
from jax_scalegmn.io import images

TINY = edit.PRESETS["tiny"][1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run: its folder and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, edit.main(dataclasses.replace(TINY, out=out))


@pytest.mark.slow
def test_results_are_complete_and_stored_in_the_files(run):
    out, results = run
    assert json.loads((out / "results.json").read_text()) == results
    assert results["editors"].keys() == {"1", "2"}
    sizes = [one["parameters"] for one in results["editors"].values()]
    assert sizes[1] == pytest.approx(sizes[0], rel=TINY.model.tolerance)
    for one in results["editors"].values():
        assert len(one["training"]) == TINY.train.epochs
        assert one["mse"]["low"] <= one["mse"]["mean"] <= one["mse"]["high"]
        assert one["moved_mse"] == pytest.approx(one["mse"]["mean"], rel=1e-3)  # equivariant
    assert results["baselines"].keys() == {"unedited", "true_image", "mean_goal"}
    assert results["baselines"]["mean_goal"] < results["baselines"]["unedited"]
    page = (out / "report.html").read_text()
    assert page.count("data-chart=") == 1
    assert "2 networks" in page
    assert support.asks_for_nothing(page)


@pytest.mark.slow
def test_a_finished_run_resumes_to_the_same_numbers_without_training(run, monkeypatch):
    out, results = run
    monkeypatch.setattr(autoencoders.checkpoint.Checkpoints, "save", None)
    again = edit.main(dataclasses.replace(TINY, out=out, resume=True))
    assert again["editors"] == results["editors"]


@pytest.mark.slow
def test_editors_of_permutations_change_their_edits_under_signs(tmp_path):
    results = edit.main(dataclasses.replace(TINY, out=tmp_path / "run", networks=(2,), symmetry="permutation"))
    one = results["editors"]["2"]
    assert abs(one["moved_mse"] / one["mse"]["mean"] - 1) > 1e-3


def test_goals_are_dilated_images():
    given = np.zeros((2, 5, 6), np.float32)
    given[0, 2, 3], given[1, 0, 0], given[1, 4, 5] = 0.5, 1.0, 0.25
    expected = np.zeros_like(given)
    expected[0, 1:4, 2:5], expected[1, :2, :2], expected[1, 3:, 4:] = 0.5, 1.0, 0.25
    np.testing.assert_array_equal(edit.dilated(images.Images(given, np.array([0, 1]))), expected)


def test_editors_have_one_size_by_their_features():
    arch = inr_zoo.architecture_of(TINY.zoo)
    features = edit.matched_features(dataclasses.replace(TINY, networks=(1, 60)), arch)
    assert features[1] == TINY.model.features
    assert features[60] < features[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": ()}, r"networks are \(\); expected one or more different numbers"),
        ({"networks": (1, 1)}, r"networks are \(1, 1\)"),
        ({"networks": (0,)}, r"networks are \(0,\)"),
        (
            {"networks": (1, 60), "model": dataclasses.replace(TINY.model, tolerance=1e-4)},
            r"The editor of 60 networks has \d+ parameters at best for the \d+ of that of 1",
        ),
        ({"zoo": dataclasses.replace(TINY.zoo, size=(28, 28))}, "expected images of 28 x 28 pixels, got 8 x 8"),
        ({"train": dataclasses.replace(TINY.train, batch_size=33)}, r"train\.batch_size is 33; expected .* 1 to 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        edit.main(dataclasses.replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
