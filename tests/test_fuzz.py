"""No mutated file makes a reader fail, hang, grow, write or run code; and what does is found.

JAX_SCALEGMN_SEED is the seed, 1 if it is not set.
"""

import contextlib
import gzip
import io
import os
import pickle
import signal
import sys
import time
import zipfile
import zlib
from random import Random

import fuzzed_readers
import fuzzing
import mutations
import pytest
from fuzzed_readers import Reader

SEED = int(os.environ.get("JAX_SCALEGMN_SEED", "1"))

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of Linux")


@pytest.mark.parametrize("total", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_reader_fails_on_mutated_files(tmp_path, total):
    cases = {name: (0, count) for name, count in fuzzed_readers.cases_by_reader(total).items()}
    reports = fuzzing.campaign(cases, SEED, tmp_path)
    assert fuzzing.failures_in_words(reports, SEED) == ""
    for (name, report), (_, count) in zip(reports.items(), cases.values(), strict=True):
        assert sum(report.counts.values()) == count, name
        assert total < 1000 or report.counts.keys() & {"ValueError", "OSError"}, f"{name} refused nothing"


# --- what must be found -------------------------------------------------------------------------------------------

SAMPLE = pickle.dumps({"a": [1, 2.5, "text"], "b": (None, True)}, 2)


def _build(folder):
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "x.pkl").write_bytes(SAMPLE)


def _refuse(folder):
    raise ValueError(f"{folder}: expected another file")


def _look_up(folder):
    return {}[str(folder)]


def _write_next_to_it(folder):
    (folder / "y").write_bytes(b"")


def _write_elsewhere(folder):
    (folder.parents[1] / "elsewhere").write_bytes(b"")


def _start_a_program(folder):
    os.system("true")


def _run_the_pickle(folder):
    try:
        return pickle.loads((folder / "x.pkl").read_bytes())
    except Exception as error:
        raise ValueError(f"{folder}: {error}"[:1000]) from error


def _say_much(folder):
    raise ValueError(f"{folder}: {'x' * 3000}")


def _name_nothing(folder):
    raise ValueError("expected another file")


def _run_out_of_memory(folder):
    try:
        return bytearray(2**45)
    except MemoryError as error:
        raise ValueError(f"{folder}: too large") from error


def _grow(folder):
    return b"x" * (fuzzing.MEMORY + 2**26)


def _compute_for_ever(folder):
    while True:
        try:
            sum(range(1000))
        except Exception:  # what a reader does with any damage
            continue


def _wait_for_ever(folder):
    time.sleep(1000)


def _die(folder):
    os.kill(os.getpid(), signal.SIGSEGV)


def _planted(read):
    """A reader that takes the sample alone."""

    def guarded(folder):
        path = folder / "x.pkl"
        return None if path.is_file() and path.read_bytes() == SAMPLE else read(folder)

    return Reader(_build, guarded)


VERDICTS = {
    "passes": (_refuse, "ValueError"),
    "program": (_start_a_program, "code or files"),
    "elsewhere": (_write_elsewhere, "code or files"),
    "next to it": (_write_next_to_it, "code or files"),
    "error": (_look_up, "error"),
    "long message": (_say_much, "long message"),
    "no path": (_name_nothing, "no path"),
    "memory of a cause": (_run_out_of_memory, "memory"),
}
LIMITS = {
    "memory": (_grow, "memory"),
    "time": (_compute_for_ever, "time"),
    "waiting": (_wait_for_ever, "time"),
    "crash": (_die, "crash"),
}
READERS = {name: _planted(read) for name, (read, _) in (VERDICTS | LIMITS).items()}
READERS["pickle"] = _planted(_run_the_pickle)


def verdicts(folder, cases):
    reports = fuzzing.campaign(cases, 1, folder, readers="test_fuzz")
    return {name: {kind for kind in report.counts if kind != "returned"} for name, report in reports.items()}


def test_readers_that_fail_are_found(tmp_path):
    cases = dict.fromkeys(VERDICTS, (0, 3)) | {"pickle": (0, 100)}
    found = verdicts(tmp_path, cases)
    assert "code or files" in found.pop("pickle")
    assert found == {name: {verdict} for name, (_, verdict) in VERDICTS.items()}
    assert len(list((tmp_path / "failed").iterdir())) >= len(VERDICTS) - 1


@pytest.mark.slow
def test_readers_that_hang_grow_or_crash_are_found_and_the_others_go_on(tmp_path):
    found = verdicts(tmp_path, dict.fromkeys(LIMITS, (0, 2)) | {"passes": (0, 2)})
    assert found.pop("passes") == {"ValueError"}
    assert found == {name: {verdict} for name, (_, verdict) in LIMITS.items()}


# --- the mutations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A file of every kind that has a structure, by kind."""
    root, found = tmp_path_factory.mktemp("samples"), {}
    for number, reader in enumerate(fuzzed_readers.READERS.values()):
        reader.build(root / str(number))
    for path in sorted(root.rglob("*")):
        kind = mutations.kind_of(str(path))
        if path.is_file() and kind in mutations.KINDS:
            found.setdefault(kind, path.read_bytes())
    return found | {"tar": gzip.decompress(found["tar.gz"])}


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_every_format_is_changed_by_what_it_is_made_of_and_by_the_seed_alone(samples, kind):
    """A change that fails would silently become one of bytes."""
    content, changed, failed = samples[kind], set(), 0
    for number in range(60):
        try:
            first = mutations.KINDS[kind](Random(number), content)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            failed += 1
            continue
        assert mutations.KINDS[kind](Random(number), content) == first
        changed.add(first)
    assert failed <= 9
    assert len(changed - {content}) >= 20


def test_bombs_are_small_and_decompress_to_what_they_say():
    archive = mutations.zip_bomb([("a", b"1"), ("b", b"2"), ("c", b"3")], 1, 3)
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert opened.read("c") == b"3"
        assert opened.getinfo("b").file_size == 1 + 3 * 2**20
        with opened.open("b") as member, contextlib.suppress(zipfile.BadZipFile):  # the checksum is that of other bytes
            assert member.read(2**20) == b"2" + bytes(2**20 - 1)
    assert len(archive) < 10_000
    stream = mutations.gzip_bomb(b"start", 3)
    assert zlib.decompress(stream[10:-8], -15) == b"start" + bytes(3 * 2**20)
