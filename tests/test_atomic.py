"""A file or folder is there in full or not at all, and nothing is replaced unasked."""

import os

import pytest

from jax_scalegmn import io


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


def test_an_old_folder_comes_back_where_the_new_one_cannot_be_put_in_its_place(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write(path, "old", folder=True)
    replace, calls = os.replace, []

    def second_fails(*names):
        calls.append(names)
        if len(calls) == 2:
            raise OSError("no")
        replace(*names)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no"):
        write(path, "new", folder=True, overwrite=True)
    assert len(calls) == 3
    assert read(path) == "old"


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
