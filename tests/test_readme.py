"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)


def test_every_python_example_runs_and_prints_what_is_shown_below_it(tmp_path, monkeypatch):
    """In one namespace, in the README's order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert EXAMPLES
    names: dict = {}
    for number, (code, output) in enumerate(EXAMPLES, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"README.md, example {number}", "exec"), names)
        if output:
            assert printed.getvalue() == output


def test_every_command_that_installs_into_a_folder_makes_it_first():
    """A reader copies one line: what it calls in .venv must be there."""
    for command in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in command.splitlines():
            if ".venv/bin/" in line:
                assert line.startswith("python3 -m venv .venv && ")
