"""Every benchmark measures what it says, on tiny sizes."""

import dataclasses
import json

from benchmarks import cnn, inr, matching, recovery, scalegmn


def test_inr_measures_every_part(capsys):
    config = inr.Config((4,), (2,), (2, 4, 4, 1), 6, 8, 2, repeats=1, zoo_networks=4, zoo_steps=2, zoo_chunks=(2,))
    rows = inr.main(dataclasses.replace(config, matmul_size=64))
    names = [row["benchmark"] for row in rows]
    assert names == ["encoder_forward", "training_step", "training_step_micro_2", "zoo_fit"]
    assert [json.loads(line)["benchmark"] for line in capsys.readouterr().out.splitlines()] == names


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


def test_matching_times_both_solvers_and_leaves_out_what_would_take_long(capsys):
    config = matching.Config((4, 8), (1,), (1, 3), (2,), (2, 5), (1, 4), 30, device_width=4, repeats=1)
    rows = matching.main(config)
    assert [row["job"] for row in rows] == ["solver"] * 3 + ["width"] * 2 + ["depth"] + ["batch"] * 2 + ["frame"]
    assert [(row["width"], row["batch"]) for row in rows[:3]] == [(2, 1), (2, 4), (5, 1)]
    assert [set(row["seconds"]) for row in rows[3:5]] == [{"device", "host"}, {"host"}]
    assert [row["batch"] for row in rows[-3:-1]] == [1, 3]
    assert set(rows[-1]["seconds"]) == {"canonical", "first", "mean"}
    assert all(times["median_s"] > 0 for row in rows for times in row["seconds"].values())
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_recovery_counts_what_is_found(capsys):
    config = recovery.Config(("mlp:6-8-8-3,tanh",), (0.0, 30.0), pairs=4, restarts=1)
    clean, noisy = recovery.main(config)
    assert clean["forward"] == clean["identity_and_1_random"] == 1
    assert clean["forward_similarity"] > 0.999
    assert noisy["forward"] == noisy["identity"] == 0
    assert [json.loads(line)["noise"] for line in capsys.readouterr().out.splitlines()] == [0, 30]


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
