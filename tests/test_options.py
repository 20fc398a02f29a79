"""Numbers out of their range are refused before an experiment computes anything, and those of presets are not."""

import dataclasses
import importlib
import re

import numpy as np
import pytest

from experiments import inr, merging, options, runs

EXPERIMENTS = ("aligners", "classify", "cnn", "cnn_zoo", "edit", "generalization", "inr", "merging", "merging_zoo")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_numbers_of_presets_are_in_their_ranges(name):
    for _, config in importlib.import_module(f"experiments.{name}").PRESETS.values():
        options.check(config)


def replaced(config, path, value):
    first, _, rest = path.partition(".")
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", -1, "a number >= 0 and <= 4294967295"),
        ("seed", 2**32, "a number >= 0 and <= 4294967295"),
        ("train.epochs", 0, "a number >= 1"),
        ("train.patience", 0, "a number >= 1"),
        ("train.micro_batch", -1, "a number >= 1"),
        ("train.clip_norm", 0.0, "a number > 0"),
        ("train.warmup_steps", -1, "a number >= 0"),
        ("train.minutes", -1.0, "a number >= 0"),
        ("train.learning_rate", float("nan"), "a number > 0"),
        ("train.moves.turn", float("inf"), "a number >= 0"),
        ("zoo.offset", float("nan"), "a number that is finite"),
        ("zoo.selection_images", -5, "a number >= 1"),
        ("zoo.widths", (2, 0, 1), "numbers >= 1"),
        ("evaluation.points", 1, "a number >= 2"),
        ("evaluation.orbits", 1, "a number >= 2"),
        ("evaluation.copies", -3, "a number >= 1"),
        ("evaluation.noises", (0.0, -1.0), "numbers >= 0"),
        ("mesh", -2, "a number >= -1"),
        ("alignment.frame_epochs", 0, "a number >= 1"),
    ],
)
def test_numbers_out_of_their_range_are_named(path, value, expected):
    config = replaced(inr.PRESETS["tiny"][1], path, value)
    with pytest.raises(ValueError, match=re.escape(f"{path} is {value}; expected {expected}.")):
        inr.main(config)
    assert not config.out.exists() or not any(config.out.iterdir())


def test_none_stays_none_and_what_is_free_stays_free():
    config = inr.PRESETS["tiny"][1]
    for path, value in (("train.micro_batch", None), ("zoo.offset", -0.5), ("mesh", -1), ("alignment.epochs", 0)):
        options.check(replaced(config, path, value))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [("models", 1, "a number >= 2"), ("pairs", 0, "a number >= 1"), ("many", (2, 1), "numbers >= 2")],
)
def test_numbers_of_merged_networks_are_named(path, value, expected):
    config = replaced(merging.PRESETS["tiny"][1], path, value)
    with pytest.raises(ValueError, match=re.escape(f"{path} is {value}; expected {expected}.")):
        merging.main(config)


@pytest.mark.parametrize("noises", [(), (0.1, 0.1), (0.001, 0.0010000001)])
def test_noises_of_copies_are_told_apart(noises, tmp_path):
    config = dataclasses.replace(replaced(inr.PRESETS["tiny"][1], "evaluation.noises", noises), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"evaluation.noises are .*; expected one or more, each once"):
        inr.main(config)
    assert not config.out.exists()


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.zeros(3))
    config = dataclasses.replace(inr.PRESETS["tiny"][1], out=tmp_path / "run", data=path)
    again = dataclasses.replace(config, resume=True)
    runs.claim(config)
    runs.claim(again)
    np.savez(path, x_train=np.ones(3))
    with pytest.raises(SystemExit, match=r"holds a run on other data: .*images.npz has changed since"):
        runs.claim(again)
    stored = runs.read_json(config.out / "config.json")
    runs.write_json(config.out / "config.json", {name: stored[name] for name in stored if name != "contents"})
    runs.claim(again)  # a run of a version that did not store what its data held
    folder = dataclasses.replace(config, out=tmp_path / "other", data=tmp_path / "idx")
    folder.data.mkdir()
    (folder.data / "train-images").write_bytes(b"1")
    runs.claim(folder)
    (folder.data / "train-images").write_bytes(b"2")
    with pytest.raises(SystemExit, match="idx has changed since"):
        runs.claim(dataclasses.replace(folder, resume=True))
