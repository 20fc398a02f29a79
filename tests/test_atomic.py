"""A file or folder is there in full or not at all, and nothing is replaced unasked."""

import contextlib
import errno
import os
import subprocess
import sys

import pytest

from jax_scalegmn import io
from jax_scalegmn.io import _atomic


def write(path, text, *, folder=False, overwrite=False):
    with io.atomic_path(path, overwrite=overwrite) as written:
        if folder:
            written.mkdir()
            (written / "inside").write_text(text)
        else:
            written.write_text(text)


def read(path):
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path, folder):
    path = tmp_path / "x"
    write(path, "old", folder=folder)
    with pytest.raises(FileExistsError, match="x: it exists already"):
        write(path, "new", folder=folder)
    assert read(path) == "old"
    write(path, "new", folder=folder, overwrite=True)
    assert read(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_failure_leaves_the_old_one(tmp_path, folder):
    path = tmp_path / "x"
    write(path, "old", folder=folder)

    def fail():
        with io.atomic_path(path, overwrite=True) as written:
            written.mkdir() if folder else written.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError("no"), KeyboardInterrupt("no")], ids=["error", "interrupt"])
def test_an_old_folder_comes_back_where_the_new_one_cannot_be_put_in_its_place(tmp_path, monkeypatch, stop):
    path = tmp_path / "x"
    write(path, "old", folder=True)
    replace, calls = os.replace, []

    def second_fails(*names):
        calls.append(names)
        if len(calls) == 2:
            raise stop
        replace(*names)

    monkeypatch.setattr(_atomic, "_exchange", lambda *_: False)  # as on a system without it
    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(type(stop), match="no"):
        write(path, "new", folder=True, overwrite=True)
    assert len(calls) == 3
    assert read(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_after_the_renamings_keeps_the_new_folder(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write(path, "old", folder=True)
    replace = os.replace

    def interrupted(a, b):
        replace(a, b)
        if os.fspath(b) == str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr(_atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new", folder=True, overwrite=True)
    assert read(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_appears_in_between_is_kept(tmp_path):
    path = tmp_path / "x"

    def race():
        with io.atomic_path(path) as written:
            written.write_text("ours")
            path.write_text("theirs")

    with pytest.raises(FileExistsError):
        race()
    assert path.read_text() == "theirs"


def test_files_and_folders_do_not_replace_each_other(tmp_path):
    for folder in (False, True):
        path = tmp_path / str(folder)
        write(path, "old", folder=folder)
        with pytest.raises(ValueError, match="expected to replace a"):
            write(path, "new", folder=not folder, overwrite=True)
        assert read(path) == "old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Make the folder"):
        write(tmp_path / "absent" / "x", "new")


def test_the_file_has_the_permissions_that_any_new_file_has(tmp_path):
    (tmp_path / "usual").write_text("")
    write(tmp_path / "x", "new")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_is_replaced_keeps_its_permissions(tmp_path, folder, mode):
    path = tmp_path / "x"
    write(path, "old", folder=folder)
    (path / "inside" if folder else path).chmod(mode)
    if folder:
        path.chmod(0o700)
    with io.atomic_path(path, overwrite=True) as written:
        if folder:
            written.mkdir()
            (written / "other").write_text("what the old folder did not have")
        (written / "inside" if folder else written).write_text("new")
    assert read(path) == "new"
    files = [path / "inside", path / "other"] if folder else [path]
    assert [file.stat().st_mode & 0o777 for file in files] == [mode] * len(files)
    if folder:
        assert path.stat().st_mode & 0o777 == 0o700


RACE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("atomic", sys.argv[5])  # without the package, which imports JAX
io = importlib.util.module_from_spec(spec)
spec.loader.exec_module(io)
path, folder, number, overwrite = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3], sys.argv[4] == "True"
print("ready", flush=True)
sys.stdin.readline()
try:
    with io.atomic_path(path, overwrite=overwrite) as written:
        if folder:
            written.mkdir()
        (written / "inside" if folder else written).write_text(number)
        print("written", flush=True)
        sys.stdin.readline()
    print("won", flush=True)
except FileExistsError:
    print("lost", flush=True)
"""


def program(path, number, *, folder, overwrite):
    words = [sys.executable, "-c", RACE, path, str(folder), str(number), str(overwrite), _atomic.__file__]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def say(processes, answers):
    """Lets all programs go on, and returns what they say."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert {process.stdout.readline().strip() for process in processes} == answers


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_one_of_several_writers_wins_and_a_killed_one_leaves_nothing(tmp_path, folder):
    path = tmp_path / "x"
    processes = [program(path, number, folder=folder, overwrite=False) for number in range(4)]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
        say(processes, {"written"})
        killed, *others = processes
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 4  # the killed one's too
        for process in others:  # at the same time
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in others]
        assert sorted(answers) == ["lost\n", "lost\n", "won\n"]
        assert read(path) == str(1 + answers.index("won\n"))
        for process in others:
            process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    alive = _atomic.in_use(leave := tmp_path / f"{_atomic._prefix(path)}12345678")
    leave.mkdir()
    (tmp_path / ".x.writing").mkdir()  # no temporary folder of ours
    with alive:
        write(path, "new", folder=folder, overwrite=True)
        assert {entry.name for entry in tmp_path.iterdir()} == {"x", ".x.writing", leave.name}
    write(path, "newer", folder=folder, overwrite=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"x", ".x.writing"}
    assert read(path) == "newer"


def test_what_a_killed_program_moved_away_returns(tmp_path):
    """Between the two renamings, on a system without an exchange of names."""
    path = tmp_path / "x"
    hidden = tmp_path / f"{_atomic._prefix(path)}12345678"
    hidden.mkdir()
    write(hidden / "replaced", "old", folder=True)
    with pytest.raises(FileExistsError):
        write(path, "new", folder=True)
    assert read(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 250, "é" * 125])
def test_long_names_are_written(tmp_path, name):
    write(tmp_path / name, "new")
    assert read(tmp_path / name) == "new"


def too_large(scratch):
    raise OSError(errno.EFBIG, "File too large")


def without_a_number(scratch):
    raise OSError("3 requested and 0 written")


def of_the_hidden_folder(scratch):
    raise OSError(errno.ENOSPC, "No space left", str(scratch / "inside"))


@pytest.mark.parametrize("fail", [too_large, without_a_number, of_the_hidden_folder])
def test_errors_of_writing_name_the_file(tmp_path, fail):
    path = tmp_path / "x"
    with pytest.raises(OSError, match=f"{path}") as error, io.atomic_path(path) as scratch:
        fail(scratch)
    assert "writing-" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="elsewhere"), io.atomic_path(path):
        (tmp_path / "elsewhere").read_text()
