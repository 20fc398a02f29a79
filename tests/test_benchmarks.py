"""Every benchmark measures what it says, on tiny sizes."""

import dataclasses
import json
import os
import time

import jax.numpy as jnp
import pytest

from benchmarks import accelerator, cnn, embed, inr, matching, population, recipes, recovery, scalegmn, search, timing
from experiments import inr_zoo
from experiments.inr import PRESETS
from experiments.merging import MatchConfig, TrainConfig


@pytest.mark.slow
def test_inr_measures_every_part(capsys):
    config = inr.Config((4,), (2,), (2, 4, 4, 1), 6, 8, 2, repeats=1, zoo_networks=4, zoo_steps=2, zoo_chunks=(2,))
    rows = inr.main(dataclasses.replace(config, matmul_size=64))
    names = [row["benchmark"] for row in rows]
    assert names == [
        *("encoder_forward", "training_step", "training_step_micro_2", "zoo_fit"),
        *("sine_fit", "sine_loss", "sine_midpoint"),
    ]
    assert [json.loads(line)["benchmark"] for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.slow
def test_scalegmn_measures_both_implementations_and_leaves_out_what_would_take_long(capsys):
    config = scalegmn.Config(
        batch_sizes=(2,), widths=(3, 5), features=4, num_layers=1, dtypes=("float32",), repeats=1, matmul_size=64
    )
    # More than the narrow networks take, less than the wide ones: those are measured on blocks alone.
    rows = scalegmn.main(dataclasses.replace(config, segment_sum_gflop=1.5e-4))
    measured = [(row["width"], row["implementation"], row["benchmark"]) for row in rows]
    assert measured == [
        (3, "blocks", "forward"),
        (3, "blocks", "step"),
        (3, "segment_sum", "forward"),
        (3, "segment_sum", "step"),
        (5, "blocks", "forward"),
        (5, "blocks", "step"),
    ]
    assert [json.loads(line)["width"] for line in capsys.readouterr().out.splitlines()] == [3, 3, 3, 3, 5, 5]
    for row in rows:
        assert row["graphs_per_second"] > 0
        assert row["share_of_matmul_rate"] > 0


@pytest.mark.slow
def test_embed_measures_every_way(capsys):
    rows = embed.main(embed.Config((3,), (4,), num_layers=1, networks=6, sizes=(2,), repeats=1))
    assert set(rows[0]["networks_per_second"]) == {"embed", "vmap", "micro_batch_2"}
    assert all(rate > 0 for rate in rows[0]["networks_per_second"].values())
    assert json.loads(capsys.readouterr().out)["networks"] == 6


@pytest.mark.slow
def test_population_measures_one_training_alone_and_several_together(capsys):
    config = population.Config(3, 4, 1, networks=4, batch_size=2, micro_batches=(1,), trials=(2,), epochs=2)
    rows = population.main(config)
    assert [row["trials"] for row in rows] == [None, 2]
    for row, line in zip(rows, capsys.readouterr().out.splitlines(), strict=True):
        assert json.loads(line) == row
        count, median = row["trials"] or 1, row["epoch_seconds"]["median_s"]
        assert row["networks_per_second"] == pytest.approx(4 * count / median)
        assert row["first_epoch_seconds"] > median


@pytest.mark.slow
def test_recipes_train_the_same_networks_and_are_told_apart(tmp_path, monkeypatch, capsys):
    experiment = inr_zoo.Config(tmp_path, zoo=inr_zoo.TINY)
    inr_zoo.fit_zoo(experiment)
    capsys.readouterr()  # its progress
    small = {"features": 4, "num_layers": 1}
    made = {
        name: dataclasses.replace(recipes.RECIPES[name], **small, batch_sizes=(16,))
        for name in ("baseline", "muon", "schedule-free", "mean of weights", "fewer networks first", "moved images")
    }
    made |= {"again": made["baseline"], "growing": recipes.Recipe(batch_sizes=(8, 16), **small)}
    monkeypatch.setattr(recipes, "RECIPES", made)
    rows = recipes.main(recipes.Config(tmp_path / "zoo", epochs=4, points=2))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == json.loads(json.dumps(rows))
    curves = {row["label"]: row["curve"] for row in rows}
    assert all(
        [point["networks"] for point in curve] == [128, 256] for name, curve in curves.items() if name != "growing"
    )
    assert all(curve[0]["cpu_s"] < curve[1]["cpu_s"] for curve in curves.values())
    errors = {name: curve[-1]["scoring"] for name, curve in curves.items()}
    assert errors["again"] == errors["baseline"]
    assert len(set(errors.values())) == len(errors) - 1
    assert errors["baseline"] < 1.2  # of a random network it is more
    with pytest.raises(ValueError, match="only names \\['adam'\\]; expected names out of"):
        recipes.main(recipes.Config(tmp_path / "zoo", only=("adam",)))


@pytest.mark.slow
def test_matching_times_both_solvers_and_leaves_out_what_would_take_long(capsys):
    config = matching.Config(
        (4, 8), (1,), (1, 3), (2,), (2, 5), (1, 4), 30, device_width=4, repeats=1, independent=(3,), fit_steps=2
    )
    rows = matching.main(config)
    jobs = ["solver"] * 3 + ["width"] * 2 + ["depth"] + ["batch"] * 2 + ["independent", "frame"]
    assert [row["job"] for row in rows] == jobs
    assert [(row["width"], row["batch"]) for row in rows[:3]] == [(2, 1), (2, 4), (5, 1)]
    assert [set(row["seconds"]) for row in rows[3:5]] == [{"device", "host"}, {"host"}]
    assert [row["batch"] for row in rows[-4:-2]] == [1, 3]
    objective = rows[-2]["objective"]
    assert objective["ours"] == pytest.approx(objective["published"], rel=0.1)  # the same problem, another order
    assert set(rows[-1]["seconds"]) == {"canonical", "first", "mean"}
    assert all(times["median_s"] > 0 for row in rows for times in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.slow
def test_recovery_counts_what_is_found(capsys):
    config = recovery.Config(("mlp:6-8-8-3,tanh",), (0.0, 30.0), pairs=4, restarts=1)
    clean, noisy = recovery.main(config)
    assert clean["forward"] == clean["identity_and_1_random"] == 1
    assert clean["forward_similarity"] > 0.999
    assert noisy["forward"] == noisy["identity"] == 0
    assert [json.loads(line)["noise"] for line in capsys.readouterr().out.splitlines()] == [0, 30]


@pytest.mark.slow
def test_search_merges_inrs_and_classifiers(tmp_path, capsys):
    config = search.Config(
        zoo=PRESETS["tiny"][1].zoo,
        inr_pairs=2,
        classifiers=("mlp:64-4-10,tanh",),
        many=(3,),
        pairs=2,
        match=MatchConfig(function_examples=8, search_neurons=1, search_candidates=2),
        train=TrainConfig(epochs=1),
        widths=(4,),
        inputs=(3,),
        vmapped=(2,),
        out=tmp_path,
    )
    rows = search.main(config)
    assert [row["job"] for row in rows] == ["inr"] * 8 + ["classifier"] * 5 + ["many"] * 3 + ["cost"] * 3
    cost = rows[-3:]
    assert [row["over"] for row in cost] == ["width", "inputs", "pairs"]
    assert cost[0]["evaluations"] == 1 + 2 * 4 * 2  # of 4 neurons each has 2 partners
    assert all(row["ms"] > 0 and row["temporary_mib"] > 0 for row in cost)
    searched = rows[2:8]
    assert len({row["start_loss"] for row in searched}) == 1
    assert all(row["loss"] <= row["start_loss"] for row in searched)
    assert all(row["loss"] <= searched[1]["loss"] * 1.0001 for row in searched[2:5])  # kicks lose nothing
    assert all(row["end_change"] < 1e-5 for row in rows[:8])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line).get("method") for line in printed] == [row.get("method") for row in rows]


@pytest.mark.slow
def test_cnn_measures_zoos_and_autoencoders(capsys):
    config = cnn.Config(
        channels=(1, 2),
        side=4,
        examples=8,
        networks=2,
        chunks=(1, 2),
        zoo_batch_size=4,
        zoo_repeats=1,
        activations=("relu",),
        features=3,
        num_layers=1,
        batch_sizes=(2,),
        micro_batches=(1,),
        images_per_step=2,
        repeats=1,
        matmul_size=64,
    )
    rows = cnn.main(config)
    assert [row["benchmark"] for row in rows] == ["zoo_fit", "zoo_fit", "encoder_forward", "training_step_micro_1"]
    assert [row["chunk"] for row in rows[:2]] == [1, 2]
    assert all(row["graphs_per_second"] > 0 for row in rows[2:])
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_operations_are_counted_before_optimization():
    gflop = timing.count_gflop(jnp.matmul, jnp.ones((8, 16)), jnp.ones((16, 4)))
    assert gflop == pytest.approx(2 * 8 * 16 * 4 / 1e9)


def test_accelerator_keeps_every_line_and_goes_on_after_an_error(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(accelerator.inr, "zoo_row", fail)
    out = tmp_path / "new" / "lines.jsonl"
    config = accelerator.Config(out, ("zoo", "rates"), processes=False, tiny=True)
    rows = accelerator.main(config, "as typed")
    assert rows[0]["error"] == "RuntimeError: the card is gone"
    products = [(row["dtype"], row["precision"]) for row in rows[1:4]]
    assert products == [("float32", "default"), ("float32", "highest"), ("bfloat16", "default")]
    assert all(row["tflop_per_second"] > 0 for row in rows[1:4])
    assert rows[4]["gb_per_second"] > 0
    late = accelerator.main(dataclasses.replace(config, minutes=0))
    assert [row["skipped"] for row in late] == ["no time was left"] * 5
    lines = out.read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == rows + late
    assert {row["command"] for row in rows} == {"as typed"}


def test_the_plan_of_an_accelerator_is_at_published_sizes_within_nine_minutes():
    config, sizes = accelerator.Config(), accelerator._full()
    plan = {name: [case for case, _ in accelerator._cases(config, name, 0.0)] for name in accelerator.SECTIONS}
    assert plan["rates"] == ["float32 default", "float32 highest", "bfloat16 default", "memory"]
    assert plan["inr"][:2] == ["float32, 128", "bfloat16, 128"]
    assert plan["cnn"][:2] == ["relu, float32, 64", "relu, bfloat16, 64"]
    assert len(plan["matching"]) == 4
    assert sizes.pairs == 4096
    assert (sizes.inr.widths, sizes.inr.features, sizes.inr.num_layers) == ((2, 32, 32, 1), 128, 4)
    assert (sizes.cnn.channels, sizes.cnn.features, sizes.cnn.num_layers) == ((1, 16, 16, 16), 256, 4)
    published = PRESETS["mnist"][1]
    assert (sizes.mnist.model, sizes.mnist.train.batch_size) == (published.model, published.train.batch_size)
    assert config.sections == tuple(accelerator.SECTIONS)
    assert config.minutes <= 9


def test_no_turn_begins_after_the_most_seconds_but_one():
    calls = []
    times = timing.in_turn({"a": lambda: calls.append(time.sleep(0.05))}, repeats=50, most_seconds=0.12)
    assert 2 <= len(calls) <= 5
    assert times["a"]["min_s"] >= 0.05
    timing.in_turn({"a": lambda: calls.append(0)}, repeats=3, most_seconds=0)
    assert calls.count(0) == 2  # with the warm-up


def hang_and_crash(config, section, first, until, command, begun):
    """In the place of `measure_section`: one case does not end, one ends its process."""
    for number in range(first, 4):
        begun.value = number
        if section == "zoo":
            time.sleep(600)
        if number == 1:
            os._exit(13)
        accelerator._keep(config, {"section": section, "case": number, "first": first})


@pytest.mark.slow
def test_what_hangs_or_crashes_costs_one_measurement_and_no_more_time(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "GRACE", 1.0)
    sizes = accelerator._tiny()
    monkeypatch.setattr(accelerator, "_tiny", lambda: sizes._replace(seconds={"zoo": 1.0, "rates": 600.0}))
    config = accelerator.Config(tmp_path / "lines.jsonl", ("zoo", "rates", "mnist"), minutes=20.0, tiny=True)
    begin = time.monotonic()
    rows = accelerator.main(dataclasses.replace(config, minutes_mnist=0.0), measure=hang_and_crash)
    assert time.monotonic() - begin < 400  # of the 600 s for which the first one sleeps
    (hung, *others) = rows
    assert (hung["section"], hung["case"]) == ("zoo", "2 at once")
    assert hung["error"] == "The process was ended 1 s after the time of its section (exit code -9)."
    kept = [(row["case"], row.get("first"), row.get("error")) for row in others if row["section"] == "rates"]
    crash = ("float32 highest", None, "The process did not survive it (exit code 13).")
    assert kept == [(0, 0, None), crash, (2, 2, None), (3, 2, None)]
    assert [row.get("skipped") for row in others if row["section"] == "mnist"] == ["no time was left"]


@pytest.mark.slow
def test_accelerator_measures_every_section(tmp_path):
    out = tmp_path / "lines.jsonl"
    rows = accelerator.main(accelerator.Config(out, ("rates",), minutes=60, tiny=True))
    others = tuple(name for name in accelerator.SECTIONS if name != "rates")
    rows += accelerator.main(accelerator.Config(out, others, minutes=60, processes=False, tiny=True))
    assert not any("error" in row or "skipped" in row for row in rows)
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(accelerator.SECTIONS)
    assert {row["solver"] for row in rows if row["section"] == "matching"} == {"device", "host"}
    steps = [row["benchmark"] for row in rows if row["section"] in ("inr", "cnn")]
    assert steps == ["encoder_forward", "training_step"] * 2
    curve = rows[-1]["curve"]
    assert len(curve) >= 1
    assert curve[0]["share_of_variance"] > 0
