"""Every benchmark measures what it says, on tiny sizes."""

import dataclasses
import json

from benchmarks import inr, scalegmn


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
