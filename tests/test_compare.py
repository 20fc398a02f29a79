"""`benchmarks.compare`: two checkouts run in turn, and the ratios of what both measure."""

import subprocess

import pytest

from benchmarks import compare


def make(folder, seconds, more=""):
    """A checkout whose benchmark prints these seconds, and writes down that it ran."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "__init__.py").touch()
    (folder / "benchmarks" / "inr.py").write_text(
        "import json, pathlib\n"
        f"with pathlib.Path({str(folder.parent / 'order')!r}).open('a') as file: file.write({folder.name!r} + ' ')\n"
        f"print(json.dumps({{'benchmark': 'step', 'batch_size': 4, 'median_s': {seconds}, 'environment': {{}}}}))\n"
        f"print(json.dumps({{'job': 'width', 'width': 8, 'seconds': {{'host': {{'median_s': {2 * seconds}}}}}}}))\n"
        f"{more}\n"
    )
    return folder


def test_the_checkouts_run_in_turn_and_ratios_are_of_one_round(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "HERE", make(tmp_path / "mine", 0.5))
    base = make(tmp_path / "base", 2.0, "print(json.dumps({'benchmark': 'gone', 'median_s': 1.0}))")
    rows = compare.main(compare.Config(str(base), ("inr",), rounds=2))
    assert (tmp_path / "order").read_text().split() == ["base", "mine"] * 2
    assert [row["measurement"] for row in rows] == ["benchmark=step batch_size=4", "job=width width=8 host"]
    assert [(row["ratio"], row["lowest"], row["highest"]) for row in rows] == [(4.0, 4.0, 4.0)] * 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " 4.00 [4.00, 4.00]  2 s -> 0.5 s  inr: benchmark=step batch_size=4"


def test_the_spread_is_over_rounds():
    rounds = [[{"a": 2.0, "b": 1.0}, {"a": 1.0}], [{"a": 3.0}, {"a": 1.0}], [{"a": 1.0}, {"a": 2.0}]]
    (row,) = compare.ratios(rounds)
    assert (row["ratio"], row["lowest"], row["highest"]) == (2.0, 0.5, 3.0)
    assert (row["base_s"], row["this_s"]) == (2.0, 1.0)


def test_a_revision_is_checked_out_and_removed_again(tmp_path, monkeypatch):
    here = make(tmp_path / "mine", 0.5)
    git = ["git", "-C", str(here), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(compare, "HERE", here)
    with compare.checkout("HEAD") as folder:
        assert (folder / "benchmarks" / "inr.py").read_text() == (here / "benchmarks" / "inr.py").read_text()
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"nowhere: expected a revision of .* or the folder of a checkout"):
        compare.main(compare.Config("nowhere"))


def test_a_checkout_that_lacks_a_benchmark_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "HERE", make(tmp_path / "mine", 0.5))
    base = make(tmp_path / "base", 1.0)
    with pytest.raises(ValueError, match=r"base: the benchmark benchmarks.embed failed.*No module named.*--jobs: inr"):
        compare.main(compare.Config(str(base), ("embed",)))
    with pytest.raises(ValueError, match="--jobs names 'inrs'; expected some of inr, cnn, matching, embed"):
        compare.main(compare.Config(str(base), ("inrs",)))
    with pytest.raises(ValueError, match="--rounds is 0"):
        compare.main(compare.Config(str(base), ("inr",), rounds=0))
