"""Parts of zoos are fitted in pieces of a few minutes; checkpoints are saved every few minutes, too."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import support
from flax import linen as nn

import jax_scalegmn as sg
from experiments import autoencoders, inr, inr_zoo, parts, progress, runs
from jax_scalegmn import zoo
from jax_scalegmn.zoo import Zoo

ARCH = sg.mlp((2, 3, 1))


class Clock:
    """Replaces the time module: the seconds pass where a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def perf_counter(self):
        self.seconds += 1e-6
        return self.seconds


class Killed(BaseException):
    pass


class Fitting:
    """Networks that take a time each, made of their number; the calls, and a call in which the program is killed."""

    def __init__(self, clock, seconds, killed_in=None):
        self.clock, self.seconds, self.killed_in = clock, seconds, killed_in
        self.calls = []

    def __call__(self, first, count):
        self.calls.append((first, count))
        if len(self.calls) == self.killed_in:
            raise Killed
        self.clock.seconds += self.seconds * count
        numbers = np.arange(first, first + count)
        params = [support.random_params(ARCH, int(number)) for number in numbers]
        return Zoo(ARCH, jax.tree.map(lambda *leaves: np.stack(leaves), *params), {"number": numbers}, {})


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """(seconds of a network, minutes of a piece, networks, pixels of a network, ...) -> the zoo and the calls."""
    clock = Clock()
    monkeypatch.setattr(parts, "time", clock)

    def fit(seconds, minutes, count=40, pixels=1e9, killed_in=None, stopped=False):
        config = runs.RunConfig(tmp_path, every_minutes=minutes)
        plan = parts.Plan(tmp_path / "zoo" / "train-0000.safetensors", count, 4, pixels, "networks")
        interruption, told = progress.Interruption(), []
        interruption.requested = stopped
        fitting = Fitting(clock, seconds, killed_in)
        try:
            whole = parts.fit(config, plan, fitting, zoo.concatenate, interruption, lambda *what: told.append(what))
        except (Killed, progress.Interrupted) as error:
            whole = error
        return whole, fitting.calls, told

    return fit


def files(folder):
    return sorted(path.name for path in (folder / "zoo").iterdir())


def test_a_piece_takes_no_longer_than_the_minutes_between_two_saves(fit, tmp_path):
    whole, calls, _ = fit(seconds=10.0, minutes=3.0)  # 18 networks in three minutes, 14 with the margin, in groups of 4
    assert calls == [(0, 4), (4, 12), (16, 12), (28, 12)]
    np.testing.assert_array_equal(whole.records["number"], np.arange(40))
    assert files(tmp_path) == ["train-0000.safetensors"]
    assert fit(seconds=10.0, minutes=3.0)[1] == []  # read


def test_the_last_piece_has_a_whole_group_at_least(fit):
    _, calls, _ = fit(seconds=10.0, minutes=3.0, count=31)
    assert calls == [(0, 4), (4, 12), (16, 15)]


def test_groups_that_take_longer_are_saved_one_by_one(fit):
    _, calls, _ = fit(seconds=1000.0, minutes=1.0, count=12)
    assert calls == [(0, 4), (4, 4), (8, 4)]


def test_quick_parts_are_fitted_at_once(fit):
    assert fit(seconds=0.01, minutes=None, pixels=1e5)[1] == [(0, 40)]


def test_a_killed_run_loses_one_piece_and_has_the_same_networks_in_the_end(fit, tmp_path):
    whole, calls, _ = fit(seconds=10.0, minutes=3.0, killed_in=3)
    assert isinstance(whole, Killed)
    assert files(tmp_path) == ["train-0000.00000000-00000004.piece", "train-0000.00000004-00000016.piece"]
    whole, calls, told = fit(seconds=10.0, minutes=3.0)
    assert told == [(16, "read")]
    assert calls == [(16, 4), (20, 12), (32, 8)]
    np.testing.assert_array_equal(whole.records["number"], np.arange(40))
    expected = [support.random_params(ARCH, number) for number in range(40)]
    support.assert_identical(whole.params, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))
    assert files(tmp_path) == ["train-0000.safetensors"]


def test_damaged_and_foreign_pieces_are_fitted_again(fit, tmp_path, capsys):
    fit(seconds=10.0, minutes=3.0, killed_in=4)
    damaged = tmp_path / "zoo" / "train-0000.00000004-00000016.piece"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (tmp_path / "zoo" / "train-0000.other.piece").write_bytes(b"")
    _, calls, told = fit(seconds=10.0, minutes=3.0)
    assert told == [(4, "read")]
    assert calls[0] == (4, 4)
    assert "is damaged and made again" in capsys.readouterr().out.replace("\n", " ")


def test_a_signal_stops_after_a_piece_that_is_saved(fit, tmp_path, capsys):
    stopped, calls, _ = fit(seconds=10.0, minutes=3.0, stopped=True)
    assert stopped.code == progress.AGAIN
    assert calls == [(0, 4)]
    assert "4 of 40 networks of train-0000" in capsys.readouterr().out
    assert fit(seconds=10.0, minutes=3.0)[1][0] == (4, 4)


def test_inrs_fitted_in_pieces_are_those_fitted_at_once(tmp_path, monkeypatch):
    config = dataclasses.replace(inr.PRESETS["tiny"][1], zoo=dataclasses.replace(inr_zoo.TINY, steps=2, chunk=8))
    arch, given = inr_zoo.architecture_of(config.zoo), runs.load_images(config, config.zoo)
    saved, right = [], runs.save_zoo
    monkeypatch.setattr(runs, "save_zoo", lambda networks, path: (saved.append(path.name), right(networks, path)))
    fitted = []
    for minutes in (None, 1e-9):
        folder = dataclasses.replace(config, out=tmp_path / str(minutes), every_minutes=minutes)
        fitted.append(inr_zoo.fit_split(folder, arch, "train", given["train"], progress.Interruption()))
    assert len(saved) == 1 + 8  # of 8 pieces the last is saved with the part
    support.assert_identical(fitted[0].params, fitted[1].params)
    for name, values in fitted[0].records.items():
        np.testing.assert_array_equal(values, fitted[1].records[name])


# --- checkpoints --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        (None, [1, 2, 3, 4, 5, 6, 7, 8]),
        # The best so far, every third minute since the last save, and the end.
        (2.5, [1, 2, 5, 8]),
        (100.0, [1, 2, 8]),
    ],
)
def test_checkpoints_are_saved_after_some_minutes_at_best_epochs_and_at_the_end(
    tmp_path, monkeypatch, minutes, expected
):
    clock, losses, saved = Clock(), itertools.chain([3.0, 2.0], itertools.repeat(4.0)), []

    class Saved:
        is_empty = True

        def __init__(self, *_):
            pass

        def save(self, state, *, history, **_):
            saved.append(len(history))
            self.state = state

        def restore_best(self, like):
            return self

        def wait(self):
            pass

        def close(self):
            pass

    def validate(*_):
        clock.seconds += 60.0
        return {"loss": next(losses)}

    monkeypatch.setattr(autoencoders, "time", clock)
    monkeypatch.setattr(autoencoders, "checkpoints", Saved)
    monkeypatch.setattr(autoencoders, "_validation", lambda *_: validate)
    settings = autoencoders.TrainConfig(2, epochs=8, warmup_steps=1, micro_batch=None)

    def loss(variables, x, key):
        return (Model().apply(variables, x) ** 2).mean(), {}

    rows = np.ones((4, 3), np.float32)
    autoencoders.fit(
        runs.RunConfig(Path(tmp_path), every_minutes=minutes),
        settings,
        Model(),
        {"train": loss, "selection": loss},
        {"train": rows, "selection": rows},
        progress.Interruption(),
        note=lambda metrics: "",
    )
    assert saved == expected
