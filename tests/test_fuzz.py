"""No mutated file makes a reader fail, hang, grow, write or run code; and what does is found.

JAX_SCALEGMN_SEED is the seed, 1 if it is not set.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path
from random import Random

import fuzzed_readers
import fuzzing
import mutations
import pytest
from fuzzed_readers import Reader

SEED = int(os.environ.get("JAX_SCALEGMN_SEED", "1"))

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of Linux")


@pytest.mark.slow
def test_no_reader_fails_on_mutated_files(tmp_path):
    cases = {name: (0, count) for name, count in fuzzed_readers.cases_by_reader(10_000).items()}
    reports = fuzzing.campaign(cases, SEED, tmp_path)
    assert fuzzing.failures_in_words(reports, SEED) == ""
    for (name, report), (_, count) in zip(reports.items(), cases.values(), strict=True):
        assert sum(report.counts.values()) == count, name
        assert report.counts.keys() & {"ValueError", "OSError"}, f"{name} refused nothing"


# --- what must be found -------------------------------------------------------------------------------------------

SMALL = fuzzing.Limits(cpu=2, wall=10, memory=2**28)  # a machine with little memory kills what takes gigabytes
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
    if not (folder / "x.pkl").is_file():
        raise FileNotFoundError
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
    return b"x" * (SMALL.memory + 2**26)


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
    reports = fuzzing.campaign(cases, 1, folder, readers="test_fuzz", limits=SMALL)
    print(fuzzing.failures_in_words(reports, 1))
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


# --- what failed once -----------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000


def _linked(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def _piped(path):
    path.unlink()
    os.mkfifo(path)


def _sparse(inside):
    """The archive with a first member that says that it is 4 TiB of zeros."""
    header = bytearray(inside[:512])
    header[156:157], header[257:265] = b"S", b"ustar  \0"
    header[386:410], header[483:495] = b"%011o\0%011o\0" % (0, 512), b"\x80" + (2**42).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + inside[512:]


def _lying_size(inside):
    header = bytearray(inside[:512])
    header[124:136] = b"\x80" + b"\xff" * 11
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + inside[512:]


def _packed(change):
    return lambda content: gzip.compress(change(gzip.decompress(content)))


def _zeros_in_npz(content):
    start = mutations.npy("'|u1'", "False", f"({3 * 2**30},)", b"")
    return mutations.zip_bomb([("x_train.npy", start), ("y_train.npy", b"")], 0, 3072)


def _long_names(content):
    return content.replace(b"x_train.npy", b"x_tra\0n.npy", 1).replace(b"y_test.npy", b"y" * 10)


def _json_header(content):
    return len(DEEP).to_bytes(8, "little") + DEEP.replace(b"[", b"{", 1) + content


FAILED = {  # name -> the reader, the sample, its file, and what becomes of it
    "msgpack is a device": ("read_network, .msgpack", "params", "x.msgpack", _linked),
    "msgpack is a pipe": ("read_network, .msgpack", "params", "x.msgpack", _piped),
    "msgpack is deep": ("read_network, .msgpack", "params", "x.msgpack", lambda _: b"\x81\xa1k" * 600 + b"\x01"),
    "msgpack has extra data": ("read_network, .msgpack", "params", "x.msgpack", lambda content: content + b"\0" * 5000),
    "msgpack has a long name": (
        "read_network, .msgpack",
        "params",
        "x.msgpack",
        lambda content: content.replace(b"\xa7Dense_0", b"\xdb\0\1\x86\xa0" + b"x" * 100_000),
    ),
    "zeros in a pickle": (
        "read_network, .pt",
        "mlp",
        "x.pt",
        lambda _: mutations.zip_bomb([("x/data.pkl", b""), ("x/data/0", b"")], 0, 3072),
    ),
    "a number of 4 EiB in a pickle": (
        "tensors.read, before PyTorch 1.6",
        "plain",
        "x.legacy",
        lambda content: content[:15] + b"\x80\x02\x8e" + b"\0" * 7 + b"\x40" + content[15:],
    ),
    "a zoo is deep": ("zoo.load", "signed", "x.safetensors", _json_header),
    "a header of 2 GiB": (
        "small_cnn_zoo.load",
        "six",
        "weights.npy",
        lambda content: mutations.npy("'<f4'", "False", "(6, 9)", content, version=2, length=2**31),
    ),
    "zeros in a table": (
        "small_cnn_zoo.load",
        "six",
        "metrics.csv.gz",
        lambda _: mutations.gzip_bomb(b"config.activation,step\n", 3072),
    ),
    "one long cell": (
        "small_cnn_zoo.load",
        "six",
        "metrics.csv.gz",
        lambda _: gzip.compress(b"config.activation,step\n" + b"x" * 131_000 + b",86\n" + b"relu,86\n" * 12_000),
    ),
    "a long name in a layout": (
        "small_cnn_zoo.load",
        "six",
        "layout.csv",
        lambda content: content.replace(b"conv2d", b"x" * 100_000),
    ),
    "a split has a long name": (
        "inr_folders.load and split",
        "mnist",
        "split.json",
        lambda content: content.replace(b"mnist_png", b"x" * 100_000, 1),
    ),
    "a split is deep": ("inr_folders.load and split", "mnist", "split.json", lambda _: DEEP),
    "zeros in IDX": (
        "images.load, IDX",
        "gzipped",
        "train-images-idx3-ubyte.gz",
        lambda _: mutations.gzip_bomb(bytes((0, 0, 8, 3)), 3072),
    ),
    "zeros in npz": ("images.load, .npz", "plain", "x.npz", _zeros_in_npz),
    "other names in npz": ("images.load, .npz", "plain", "x.npz", _long_names),
    "a sparse member": ("images.load, CIFAR-10", "python", "x.tar.gz", _packed(_sparse)),
    "a member of a negative size": ("images.load, CIFAR-10", "python", "x.tar.gz", _packed(_lying_size)),
    "bzip2 that ends early": ("images.load, CIFAR-10", "python", "x.tar.gz", lambda _: bz2.compress(bytes(9999))[:25]),
    "xz that is damaged": (
        "images.load, CIFAR-10",
        "python",
        "x.tar.gz",
        lambda content: lzma.compress(gzip.decompress(content))[:200] + b"\xff" * 100,
    ),
    "a model is a number": ("models.from_json", "encoder", "x.json", lambda _: b"9223372036854775808"),
    "a model of models": ("models.from_json", "encoder", "x.json", lambda _: b'{"gmn": ' * 60 + b"1" + b"}" * 60),
    "a model with a long name": (
        "models.from_json",
        "encoder",
        "x.json",
        lambda content: content.replace(b"symmetrized", b"x" * 100_000),
    ),
    "an activation that nobody knows": (
        "jax-scalegmn check --arch",
        ".pt",
        "arch.json",
        lambda content: content.replace(b"relu", b"evil"),
    ),
    "a description is deep": ("jax-scalegmn check --arch", ".pt", "arch.json", lambda _: DEEP),
    "a name that is a list": (
        "architecture.from_json",
        "mlp",
        "x.json",
        lambda content: content.replace(b'"name": "mlp', b'"name": [1], "x": "mlp'),
    ),
    "an expression is deep": (
        "architecture.parse, layers.parse",
        "sequential",
        "x.txt",
        lambda _: b"sequential(" + b"[" * 3000,
    ),
    "an expression of many terms": (
        "architecture.parse, layers.parse",
        "sequential",
        "x.txt",
        lambda _: b"sequential(" + b"64-" * 2000 + b"1)",
    ),
    "a long list of widths": (
        "architecture.parse, layers.parse",
        "cnn",
        "x.txt",
        lambda _: b"cnn:1-" + b"64-" * 2000 + b"1,10,relu,strides=evil",
    ),
    "a network without an end": (
        "architecture.parse, layers.parse",
        "resnet",
        "x.txt",
        lambda _: b"resnet:600000002,16-32-64",
    ),
    "a damaged list of losses": ("checkpoint.load", "two", "run/2/metrics/metrics", lambda _: b"\xff"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The samples of a reader, built once."""
    root = tmp_path_factory.mktemp("built")

    def samples(name):
        if not (root / name).exists():
            fuzzed_readers.READERS[name].build(root / name)
        return root / name

    return samples


@pytest.fixture
def _ends():
    """A hang ends in an error, after 20 s."""

    def stop(*_):
        raise fuzzing._TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_ends")
@pytest.mark.parametrize("name", FAILED)
def test_what_failed_once_is_refused(built, tmp_path, name):
    """Briefly, by name, in little time and memory."""
    reader, sample, file, change = FAILED[name]
    folder = tmp_path / "case"
    shutil.copytree(built(reader) / sample, folder)
    if change in (_linked, _piped):
        change(folder / file)
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    before = fuzzing._memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with pytest.raises((ValueError, OSError)) as error:
        fuzzed_readers.READERS[reader].read(folder)
    assert fuzzing._memory("VmHWM") - before < 2**29
    assert fuzzing._verdict(error.value, fuzzed_readers.READERS[reader], folder)[0] in ("ValueError", "OSError")


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
