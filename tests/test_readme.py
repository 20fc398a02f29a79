"""What the README shows is what happens."""

import contextlib
import io
import re
import sys
from pathlib import Path

import jax
import pytest

import jax_scalegmn as sg

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with two networks that PyTorch saved."""
    arch = sg.mlp((8, 32, 3), "relu")
    for seed, name in enumerate(("a.pt", "b.pt")):
        state = sg.io.to_torch(arch, sg.network.init(arch, jax.random.key(seed)))
        sg.io.tensors.write(tmp_path / name, state)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_every_python_example_runs_as_it_stands_and_prints_what_is_shown_below_it(folder, example):
    code, output = EXAMPLES[example]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README.md, example {example}", "exec"), {"__name__": "example"})
    assert printed.getvalue() == output


def test_there_is_an_example_for_every_framework():
    code = "".join(code for code, _ in EXAMPLES)
    assert all(framework in code for framework in ("flax.linen", "nnx", "equinox", "a.pt"))


def test_the_commands_make_the_environment_that_they_use():
    """A reader copies one line: what it calls must be there."""
    (commands,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(commands.splitlines()) == 2
    assert all(
        line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip ") for line in commands.splitlines()
    )


def test_the_result_table_is_taken_from_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables

    written = {tuple(row) for row in tables.inr_methods(tables.Results()).rows}
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in README.splitlines() if " [0." in line
    ]
    assert 1 <= len(rows) <= 6
    assert set(rows) <= written
    del sys.modules["tables"]


def test_the_links_lead_to_files_of_the_repository():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
