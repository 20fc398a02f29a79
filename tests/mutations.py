"""Changes of files for `fuzzing`: of bytes anywhere, and of what each format is made of.

Every function takes a `random.Random` and the content of a file, and returns other content. It is the same one for the
same state of the generator.
"""

import bz2
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import pickletools
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import msgpack

MARKER = "marker"  # a file that no reader may make; `mark` in this module is what pickles of the mutations call
EDGES = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40)
EDGES += (2**62, 2**63 - 1, 2**63, 2**64 - 1)

marks: list[str] = []


def mark(*_: Any) -> None:
    """What hostile files ask for: a call of it is a failure."""
    marks.append("mark")


def mutate(rng: Random, kind: str, content: bytes) -> bytes:
    """One change of a file, or a few.

    Args:
      rng: Where every choice comes from.
      kind: What the file is, one of `KINDS`, or anything else for bytes.
      content: The file.
    """
    structured = KINDS.get(kind)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = structured if structured and rng.random() < 0.65 else any_bytes
        try:
            content = change(rng, content)
        except Exception:  # an earlier change broke what this one looks for
            content = any_bytes(rng, content)
        if len(content) > 2**21:  # a bomb, perhaps: its members are not read here
            break
    return content


# --- bytes --------------------------------------------------------------------------------------------------------


def any_bytes(rng: Random, content: bytes) -> bytes:
    """A change that needs no format."""
    return rng.choice(_BYTES)(rng, content)


def _place(rng: Random, content: bytes) -> int:
    """A position, often near the start or the end, where headers are."""
    size = len(content)
    return rng.choice((rng.randrange(size + 1), min(size, rng.randrange(64)), max(0, size - rng.randrange(64))))


def _part(rng: Random, content: bytes) -> tuple[int, int]:
    begin = _place(rng, content)
    return begin, min(len(content), begin + rng.choice((1, 2, 4, 8, 30, 100, 1000)))


def _flip(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[min(_place(rng, changed), len(changed) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: Random, content: bytes) -> bytes:
    return content[: _place(rng, content)]


def _insert(rng: Random, content: bytes) -> bytes:
    at, count = _place(rng, content), rng.choice((1, 2, 4, 8, 100))
    return content[:at] + rng.choice((rng.randbytes(count), b"\0" * count, b"\xff" * count)) + content[at:]


def _delete(rng: Random, content: bytes) -> bytes:
    begin, end = _part(rng, content)
    return content[:begin] + content[end:]


def _repeat(rng: Random, content: bytes) -> bytes:
    begin, end = _part(rng, content)
    return content[:begin] + content[begin:end] * rng.choice((2, 3, 10, 1000)) + content[end:]


def _swap(rng: Random, content: bytes) -> bytes:
    a, b, c, d = sorted(_place(rng, content) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _number(rng: Random, content: bytes) -> bytes:
    size = rng.choice((4, 8))
    order, value = rng.choice(("little", "big")), rng.choice(EDGES) % 256**size
    at = _place(rng, content)
    return content[:at] + value.to_bytes(size, order) + content[at + size :]


def _fill(rng: Random, content: bytes) -> bytes:
    begin, end = _part(rng, content)
    return content[:begin] + rng.choice((b"\0", b"\xff", b"[", b"9")) * (end - begin) + content[end:]


_BYTES = (_flip, _flip, _cut, _insert, _delete, _repeat, _swap, _number, _number, _fill)


# --- trees: JSON and msgpack --------------------------------------------------------------------------------------


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The container and the key of every value of nested dicts and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield tree, key
        yield from _places(value)


def _change_tree(rng: Random, tree: Any, odd: Callable[[Any], Any]) -> Any:
    """Replaces, removes, renames, repeats or moves one value; `odd` makes another value of one."""
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return odd(tree)
    container, key = rng.choice(places)
    how = rng.random()
    if how < 0.6:
        container[key] = odd(container[key])
    elif how < 0.7:
        del container[key]
    elif how < 0.8 and isinstance(container, dict):
        container[rng.choice(("", "evil", "type", str(odd(key))[:200000]))] = container.pop(key)
    elif how < 0.9:
        other, name = rng.choice(places)
        container[key] = json.loads(json.dumps(other[name])) if _is_plain(other[name]) else other[name]
    elif isinstance(container, list):
        container[key:key] = [container[key]] * rng.choice((1, 2, 100, 5000))
    else:
        container["copy"] = container[key]
    return tree


def _is_plain(value: Any) -> bool:
    return all(isinstance(node[key], str | int | float | list | dict | None) for node, key in _places([value]))


_JSON_TEXTS = (
    *("null", "true", "false", "-1", "0", "1", "2", "4.5", "1e400", "NaN", "Infinity", "-Infinity", "2147483648"),
    *("9223372036854775808", "1" + "0" * 400, "1" + "0" * 5000, '""', '"evil"', '"relu"', '"\\ud800"', '"\\u0000"'),
    *('"../../etc/passwd"', '"/dev/zero"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", '[null, "a", 1]'),
    *('{"": {}}', "[" * 100_000, "[" * 300 + "]" * 300, "[" * 5000 + "]" * 5000, '{"a": ' * 200 + "1" + "}" * 200),
    *('{"arch": ' * 900 + "1" + "}" * 900, "[" + "0, " * 20_000 + "0]", '[["a", 1]]', "[1, 2, 3, 4]", "1000000"),
)


def change_json(rng: Random, content: bytes) -> bytes:
    """Values of other types, extreme numbers, deep nesting, long strings, keys that are missing or there twice."""
    texts: dict[str, str] = {}

    def odd(value: Any) -> Any:
        if isinstance(value, int) and rng.random() < 0.3:
            return rng.choice((value + 1, -value, value * 1000, float(value), str(value), [value]))
        name = f"@{len(texts)}@"
        texts[name] = rng.choice(_JSON_TEXTS)
        return name

    text = json.dumps(_change_tree(rng, json.loads(content), odd))
    for name, raw in texts.items():
        text = text.replace(f'"{name}"', raw)
    if rng.random() < 0.05:
        text = text.replace("{", '{"type": "evil", "type": 1, ', 1).replace(", }", "}")
    return text.encode()


def _odd_value(rng: Random, value: Any) -> Any:
    if isinstance(value, msgpack.ExtType) and rng.random() < 0.8:
        parts = msgpack.unpackb(value.data)
        parts[rng.randrange(len(parts))] = rng.choice(
            (-1, 2**40, 2**63, [2**40], [-1, 2], [2, 2**62], "float99", "O", "bfloat16", "S1000000", b"", b"x", None)
        )
        return msgpack.ExtType(value.code, msgpack.packb(parts))
    odd = [None, True, -1, 2**63, float("nan"), "", "x" * 100_000, b"x" * 1000, [], {}, [[[]]], {"": {}}, 1.5]
    odd += [msgpack.ExtType(1, b""), msgpack.ExtType(99, b"x"), msgpack.ExtType(127, b"\xff" * 12)]
    odd += [{"__msgpack_chunked_array__": True, "shape": {"0": 2**40}, "chunks": {}}]
    odd += [{"__msgpack_chunked_array__": True, "shape": {"0": -1}, "chunks": {"0": None}}]
    return rng.choice(odd)


def _change_msgpack(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.15:
        deep = rng.choice((b"\x91", b"\x81\xa1k", b"\x81\xa1k\x91")) * rng.choice((400, 600, 100_000))
        huge = rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6")) + rng.choice((b"\xff" * 4, b"\x10\0\0\0"))
        at = _place(rng, content)
        return content[:at] + rng.choice((deep, huge)) + content[at:]
    tree = msgpack.unpackb(content, strict_map_key=False)
    return msgpack.packb(_change_tree(rng, tree, functools.partial(_odd_value, rng)))


# --- pickles ------------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


_CALLS = (
    b"cposix\nsystem\n" + _text(f"touch {MARKER}") + b"\x85R",
    b"cmutations\nmark\n)R",
    b"(" + _text(f"touch {MARKER}") + b"ios\nsystem\n",
    b"(cmutations\nmark\no",
    b"cbuiltins\neval\n" + _text(f"open({MARKER!r}, 'w')") + b"\x85R",
    _text("mutations") + _text("mark") + b"\x93)\x81",
    b"cmutations\nmark\n)}\x92",
    b"ccollections\nOrderedDict\ncmutations\nmark\nb",
)
_LENGTHS = (
    *(b"X\xff\xff\xff\x7f", b"\x8d" + b"\0" * 7 + b"\x40", b"\x8e" + b"\0" * 7 + b"\x40", b"\x8b\xff\xff\xff\x7f"),
    *(b"\x8a\xff" + b"\x7f" * 255, b"I" + b"9" * 50_000 + b"\n", b"L" + b"9" * 50_000 + b"L\n", b"\x96" + b"\xff" * 8),
    *(b"h\xff", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"T\xff\xff\xff\xff", b"\x95" + b"\xff" * 8),
)
_GROWTH = (
    *(b"2\x86" * 60, b"}" + b"2\x86" * 40 + b"K\x01s", b"]" * 20_000 + b"a" * 19_999, b")" + b"\x85" * 50_000),
    *(b"(" * 1000, b"]2a", b"]" + b"2a" * 30, b"}" * 300 + b"K\x012s" * 10, _text("x" * 60_000), b"\x91" * 3),
)
_CODES = tuple(code.code.encode("latin1") for code in pickletools.opcodes if code.arg is None)
_WHOLE = (b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G" * 9)
_VALUES = (*_WHOLE, b"N", b"\x88", b"]", b"}", b")", _text(""), _text("evil"), b"F1e999\n", b"Fnan\n", b"C\x00")


def _codes_of(content: bytes) -> tuple[list[bytes], list[str]]:
    """The codes of the first pickle of a file with their arguments, and their names."""
    places, names = [], []
    for code, _, position in pickletools.genops(content):
        places.append(position)
        names.append(code.name)
    end = places[-1] + 1
    return [content[a:b] for a, b in itertools.pairwise([*places, end])], names


def change_pickle(rng: Random, content: bytes) -> bytes:
    """Codes that are added, removed, repeated or moved, other arguments, calls, cycles, and structures that grow."""
    codes, names = _codes_of(content)
    rest = content[sum(map(len, codes)) :]
    at = rng.randrange(1, len(codes))
    how = rng.random()
    if how < 0.4:
        added = rng.choice(rng.choice((_CALLS, _CALLS, _LENGTHS, _GROWTH, _CODES, _VALUES)))
        codes.insert(at, added + rng.choice((b"", b"", b"0")))
    elif how < 0.7:
        arguments = [i for i, name in enumerate(names) if "INT" in name or "UNICODE" in name or "STRING" in name]
        codes[rng.choice(arguments or [at])] = rng.choice(_VALUES)
    elif how < 0.8:
        del codes[at : at + rng.choice((1, 1, 2, 5))]
    elif how < 0.9:
        codes[at:at] = codes[at : at + rng.choice((1, 3, 10))] * rng.choice((1, 2, 50))
    else:
        other = rng.randrange(1, len(codes))
        codes[at], codes[other] = codes[other], codes[at]
    return b"".join(codes) + rest


def _change_legacy(rng: Random, content: bytes) -> bytes:
    """One of the pickles of a PyTorch file before 1.6."""
    begin = 0
    for _ in range(rng.choice((1, 2, 3, 3, 3, 4))):
        begin += sum(map(len, _codes_of(content[begin:])[0]))
    return content[:begin] + change_pickle(rng, content[begin:])


# --- arrays -------------------------------------------------------------------------------------------------------

_DESCRIPTIONS = ("'|O'", "'<f8'", "'>f4'", "'|S100000000'", "'<U1000000000'", "'|V0'", "'|V8'", "'<M8[s]'", "'|b1'")
_DESCRIPTIONS += ("'<f99'", "None", "1", "[]", "[('a', '<f4'), ('a', '<f4')]", "[('a', '|O')]", "'e' * 9", "'<c16'")
_SHAPES = ("()", "(0,)", "(-1,)", "(2, -2)", "(1 << 40,)", f"({2**40},)", f"({2**31}, {2**31})", f"({2**62}, 4)", "4")
_SHAPES += ("None", "(None,)", "(1.0,)", "('a',)", "(True,)", f"({10**30},)", "(1,) * 999", "(" + "1, " * 70 + ")")
_SHAPES += ("(0, " + f"{2**62}" + ")", "(" * 90 + ")" * 90)


def npy(description: str, order: str, shape: str, data: bytes, *, version: int = 1, length: int | None = None) -> bytes:
    """An array of NumPy by the three texts of its header."""
    header = f"{{'descr': {description}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    size = len(header) if length is None else length
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", size) + header + data


def _change_npy(rng: Random, content: bytes) -> bytes:
    length = struct.unpack("<H", content[8:10])[0]
    header = eval(content[10 : 10 + length], {})  # of an array that this file made
    texts = {name: repr(value) for name, value in header.items()}
    name = rng.choice(("descr", "shape", "shape", "fortran_order"))
    pools = {"descr": _DESCRIPTIONS, "shape": _SHAPES, "fortran_order": ("True", "1", "None")}
    texts[name] = rng.choice(pools[name])
    version = rng.choice((1, 1, 1, 1, 2, 3, 9))
    lie = rng.choice((None, None, None, 0, 65535, 10)) if version == 1 else rng.choice((None, 2**31, 2**32 - 1))
    arguments = texts["descr"], texts["fortran_order"], texts["shape"], content[10 + length :]
    return npy(*arguments, version=version, length=lie)


def _change_idx(rng: Random, content: bytes) -> bytes:
    at = 4 * rng.randrange(max(1, content[3] + 1))
    value = rng.choice((*EDGES[:13], 0x00000800, 0x00000803, 0x00000D03, 0x000008FF))
    return content[:at] + struct.pack(">I", value % 2**32) + content[at + 4 :]


def _change_safetensors(rng: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.1:
        return rng.choice(EDGES).to_bytes(8, "little") + header + data
    tree = json.loads(header)
    texts = tree.get("__metadata__", {})
    inner = [name for name, value in texts.items() if value[:1] in "{["]
    if inner and rng.random() < 0.4:
        name = rng.choice(inner)
        texts[name] = change_json(rng, texts[name].encode()).decode()
        header = json.dumps(tree).encode()
    elif rng.random() < 0.4:
        entry = tree[rng.choice(list(tree))]
        entry["dtype"] = rng.choice(("F8_E4M3", "BF16", "F64", "BOOL", "U8", "I64", "F4", "C64", "", "evil"))
        if rng.random() < 0.5:
            entry["shape"] = rng.choice(([], [0], [2**40], [2**62, 4], [1] * 100, [2, 2]))
        header = json.dumps(tree).encode()
    else:
        header = change_json(rng, header)
    return len(header).to_bytes(8, "little") + header + data


# --- compressed files ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _zeros(mebibytes: int) -> bytes:
    """Zeros as deflate compresses them, 1000 times smaller: whole blocks that can follow others."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (compressor.compress(bytes(2**20)) + compressor.flush(zlib.Z_FULL_FLUSH)) * mebibytes + b"\x03\x00"


def deflated(start: bytes, mebibytes: int) -> bytes:
    """A deflate stream of some bytes, and zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(start) + compressor.flush(zlib.Z_FULL_FLUSH) + _zeros(mebibytes)


def gzip_bomb(start: bytes, mebibytes: int) -> bytes:
    """A gzip file of some bytes and zeros; the checksum at its end is wrong, which is seen too late to help."""
    size = (len(start) + mebibytes * 2**20) % 2**32
    return b"\x1f\x8b\x08\0\0\0\0\0\x02\xff" + deflated(start, mebibytes) + struct.pack("<II", 0, size)


def _zipped(members: Sequence[tuple[str, bytes]], method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, warnings.catch_warnings(action="ignore"):
        for name, content in members:  # some of them twice
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def zip_bomb(members: Sequence[tuple[str, bytes]], at: int, mebibytes: int) -> bytes:
    """A zip archive in which one member goes on with zeros."""
    name, content = members[at]
    compressed, size = deflated(content, mebibytes), len(content) + mebibytes * 2**20
    stored = bytearray(_zipped([*members[:at], (name, compressed), *members[at + 1 :]], zipfile.ZIP_STORED))
    for signature, method, sizes in ((b"PK\x03\x04", 8, 18), (b"PK\x01\x02", 10, 20)):
        begin = -1
        for _ in range(at + 1):  # the signatures before it are those of the members before it
            begin = stored.index(signature, begin + 1)
        struct.pack_into("<H", stored, begin + method, 8)
        struct.pack_into("<II", stored, begin + sizes, len(compressed), size % 2**32)
    return bytes(stored)


_ZIP_FIELDS = {  # the place and the size of what may lie
    b"PK\x03\x04": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4)),
    b"PK\x05\x06": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


def _lie(rng: Random, content: bytes) -> bytes:
    """Another number in a header of a zip archive."""
    signature = rng.choice(list(_ZIP_FIELDS))
    places = [at for at in range(len(content)) if content.startswith(signature, at)]
    at, (offset, size) = rng.choice(places), rng.choice(_ZIP_FIELDS[signature])
    changed = bytearray(content)
    value = rng.choice((*EDGES, rng.randrange(2**16))) % 256**size
    changed[at + offset : at + offset + size] = value.to_bytes(size, "little")
    return bytes(changed)


def _change_zip(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.2:
        return _lie(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at, how = rng.randrange(len(members)), rng.random()
    name, inside = members[at]
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith(".pkl")]
    if how < 0.6:
        at = pickles[0] if pickles and rng.random() < 0.75 else at
        members[at] = (members[at][0], mutate(rng, kind_of(members[at][0]), members[at][1]))
    elif how < 0.7:
        other = rng.choice(("", "/", "../up.npy", "/etc/passwd", "a\0b", "x" * 60_000, "é.npy", f"{name}/", "data.pkl"))
        members[at] = (rng.choice((other, name.upper(), name.replace("/", "\\"))), inside)
    elif how < 0.75:
        members.insert(at, (name, rng.choice((inside, b"", b"hi"))))
    elif how < 0.8:
        del members[at]
    elif how < 0.9:
        other = rng.randrange(len(members))
        members[at], members[other] = (name, members[other][1]), (members[other][0], inside)
    elif how < 0.95:
        members += [(f"{name}{number}", b"") for number in range(3000)]
    else:
        start = npy("'|u1'", "False", f"({3 * 2**30},)", b"") if name.endswith(".npy") else inside
        return zip_bomb([(n, start if n == name else c) for n, c in members], at, 3072)
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)  # the last one takes 5 ms a member
    return _zipped(members, rng.choice(methods[: 3 if len(members) < 100 else 2]))


def _change_gzip(rng: Random, content: bytes, *, kind: str) -> bytes:
    inside = gzip.decompress(content)
    if rng.random() < 0.1:
        return gzip_bomb(inside if rng.random() < 0.5 else _bomb_start(kind), 3072)
    changed = gzip.compress(mutate(rng, kind, inside), mtime=0)
    return changed + rng.choice((b"", b"", b"", b"trailing", changed))


def _bomb_start(kind: str) -> bytes:
    return {"idx": struct.pack(">4I", 0x803, 3, 2**15, 2**15), "csv": b"config.activation,step\n"}.get(kind, b"")


# --- archives -----------------------------------------------------------------------------------------------------


def _tarred(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def _change_header(rng: Random, content: bytes) -> bytes:
    """Another type, size or sparse map in the header of a tar member, with a right checksum."""
    places = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at, changed = rng.choice(places), bytearray(content)
    if rng.random() < 0.4:  # GNU's sparse file: one piece of data, and a real size
        real = rng.choice((2**31, 2**33 - 1, 2**40))
        changed[at + 156 : at + 157] = b"S"
        changed[at + 257 : at + 265] = b"ustar  \0"
        changed[at + 386 : at + 410] = b"%011o\0%011o\0" % (0, 512)
        changed[at + 483 : at + 495] = b"%011o\0" % real if real < 2**33 else b"\x80" + real.to_bytes(11, "big")
    elif rng.random() < 0.5:
        changed[at + 156 : at + 157] = rng.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"x", b"g", b"V"))
    else:
        size = rng.choice((0, 1, 511, 2**31, 2**33 - 1))
        changed[at + 124 : at + 136] = rng.choice((b"%011o\0" % size, b"\x80" + b"\xff" * 11, b"-0000000001\0"))
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def _change_tar(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return _change_header(rng, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive if member.isfile()]
    at, how = rng.randrange(len(members)), rng.random()
    member, inside = members[at]
    if how < 0.6:
        members[at] = (member, mutate(rng, kind_of(member.name), inside))
    elif how < 0.75:
        member.name = rng.choice(("", "/", "../x", "a/" * 200, member.name.upper(), members[0][0].name))
        member.linkname = rng.choice(("", "/dev/zero", member.name))
        member.type = rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
    elif how < 0.85:
        other = rng.randrange(len(members))
        members[at], members[other] = (member, members[other][1]), (members[other][0], inside)
    elif how < 0.95:
        members[at:at] = [(member, inside)] * rng.choice((1, 10))
    else:
        member.pax_headers = {"size": rng.choice(("-1", "9" * 30, "x")), "GNU.sparse.realsize": "9" * 12}
    return _tarred(members)


def _change_packed_tar(rng: Random, content: bytes) -> bytes:
    inside = gzip.decompress(content)
    if rng.random() < 0.05:
        start = bytearray(inside[:512])
        start[124:136] = b"%011o\0" % (3 * 2**30)
        start[148:156] = b"%06o\0 " % sum(start[:148] + b" " * 8 + start[156:])
        return gzip_bomb(bytes(start), 3072)
    changed = mutate(rng, "tar", inside)
    pack = rng.choice((gzip.compress, gzip.compress, bz2.compress, lzma.compress, bytes))
    packed = gzip.compress(changed, 1, mtime=0) if pack is gzip.compress else pack(changed)
    return any_bytes(rng, packed) if rng.random() < 0.3 else packed


# --- texts --------------------------------------------------------------------------------------------------------

_CELLS = (
    "",
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "x" * 131_000,
    "True",
    "evil",
    "\0",
    '"',
    "é",
    "1,2",
)
_CELLS += ("(1, 2", "(" * 1000, "()", "(-1, 2)", f"({2**40}, {2**40})", "(1.5,)", "relu", "0x10", "1_0", " 1 ", "١")


def _change_csv(rng: Random, content: bytes) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    row, how = rng.choice(rows), rng.random()
    if how < 0.6:
        row[rng.randrange(len(row))] = rng.choice(_CELLS)
    elif how < 0.7:
        del row[rng.randrange(len(row))]
    elif how < 0.8:
        rows.remove(row)
    elif how < 0.85:
        rows += [row] * rng.choice((1, 10, 12_000))
    elif how < 0.95:
        for cells in rows:
            cells.insert(0, rng.choice(("", cells[-1])))
    else:
        row += [rng.choice(_CELLS)] * rng.choice((1, 2000))
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", escapechar="\\").writerows(rows)
    return out.getvalue().encode()


_WORDS = ("-1", "0", "600000002", "9" * 30, "9" * 5000, "1.5", "nan", "none", "", "x" * 5000, "-" * 3000, "relu", "١")
_WORDS += ("64-" * 2000 + "1", "batch", "+" * 100, "SAME", "True", "(", "[" * 3000, "'", '"', "\n", "\0", "é", "1e9")


def _change_text(rng: Random, content: bytes) -> bytes:
    """Words of an expression that are replaced, removed, repeated or moved."""
    text = content.decode()
    marks = [at for at, letter in enumerate(text) if not letter.isalnum()]
    parts = [text[a:b] for a, b in itertools.pairwise([0, *(x for at in marks for x in (at, at + 1)), len(text)])]
    at, how = rng.randrange(len(parts)), rng.random()
    if how < 0.6:
        parts[at] = rng.choice(_WORDS)
    elif how < 0.75:
        del parts[at]
    elif how < 0.9:
        parts[at:at] = parts[at : at + rng.choice((1, 3, 8))] * rng.choice((1, 3, 1000))
    else:
        rng.shuffle(parts)
    return "".join(parts).encode()


KINDS: Mapping[str, Callable[[Random, bytes], bytes]] = {
    "csv": _change_csv,
    "csv.gz": functools.partial(_change_gzip, kind="csv"),
    "idx": _change_idx,
    "idx.gz": functools.partial(_change_gzip, kind="idx"),
    "json": change_json,
    "legacy": _change_legacy,
    "msgpack": _change_msgpack,
    "npy": _change_npy,
    "pickle": change_pickle,
    "safetensors": _change_safetensors,
    "tar": _change_tar,
    "tar.gz": _change_packed_tar,
    "text": _change_text,
    "zip": _change_zip,
}

_NAMES = {
    "zip": (".pt", ".pth", ".npz"),
    "json": (".json", "_METADATA", "_sharding", "process_0", ".zarray", "/metadata", "/metrics"),
    "pickle": (".pkl", *(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
    "idx": ("-ubyte",),
    "idx.gz": ("-ubyte.gz",),
    **{kind: (f".{kind}",) for kind in ("csv", "csv.gz", "legacy", "msgpack", "npy", "safetensors", "tar.gz")},
    "text": (".txt",),
}


def kind_of(name: str) -> str:
    """What a file is by the end of its name; "" for bytes without a structure that is known here."""
    return next((kind for kind, ends in _NAMES.items() if f"/{name}".endswith(ends)), "")
