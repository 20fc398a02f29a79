"""Matchers and frames over seeds and on networks that they were not trained for: runs, resumes, refuses."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import aligners

TINY = aligners.PRESETS["tiny"][1]


@pytest.mark.slow
def test_a_run_scores_every_seed_and_what_was_not_trained_for(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 12, 12)).astype(np.uint8)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "m.npz", x_train=pixels, y_train=labels, x_test=pixels[:20], y_test=labels[:20])
    config = dataclasses.replace(TINY, out=tmp_path / "run", data=tmp_path / "m.npz")
    results = aligners.main(config)
    assert json.loads((config.out / "results.json").read_text()) == results
    assert list(results["seeds"]) == ["0", "1"]
    for seed in results["seeds"].values():
        assert seed["methods"]["search"]["midpoint"]["mean"] < seed["methods"]["naive"]["midpoint"]["mean"]
    exact = [one for seed in results["seeds"].values() for one in seed["methods"].values()]
    exact += [one for several in results["transfer"].values() for one in several.values()]
    assert all(one["end_point_gap"]["mean"] < 1e-6 for one in exact)
    wide, other = results["transfer"][aligners.WIDE], results["transfer"][aligners.OTHER]
    assert "learned_matching" in wide
    assert "learned_frame" not in wide
    assert {"learned_frame, trained on digits", "learned_frame, trained on other images"} <= other.keys()
    again = aligners.main(dataclasses.replace(config, resume=True))
    assert again["seeds"] == results["seeds"]
    one_way = dataclasses.replace(config, out=tmp_path / "one", seeds=(0,), both_ways=False, few_images=3)
    tried = aligners.main(one_way)["transfer"]
    assert list(tried) == [aligners.WIDE, aligners.OTHER]
    assert tried[aligners.OTHER]["learned_frame"]["pairs"] == 3


@pytest.mark.parametrize("change", [{"seeds": ()}, {"seeds": (1, 1)}])
def test_seeds_that_make_no_sense_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match="expected one or more, each once"):
        aligners.main(dataclasses.replace(TINY, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_a_run_without_training_is_refused(tmp_path):
    idle = dataclasses.replace(TINY, out=tmp_path / "run", alignment=dataclasses.replace(TINY.alignment, epochs=0))
    with pytest.raises(ValueError, match="expected 1 or more"):
        aligners.main(idle)
