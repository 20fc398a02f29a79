"""The order of a file's modules: against all permutations on small cases, and in linear time on large ones."""

import itertools
import random
import re
import time

import numpy as np
import pytest

import jax_scalegmn as sg
from jax_scalegmn import io
from jax_scalegmn.io import _order, _order_search, _precedence, tensors

PATTERNS = (
    ("fc{}", "bn{}"),
    ("a", "b", "c", "fc{}"),
    ("blocks.{}.conv{}", "blocks.{}.bn{}", "head"),
    ("l{}.x", "l0{}.x", "l{}"),
)


def earlier(a, b):
    """Whether the numbers in the names put a before b, told by comparing the two."""
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            same_letters = re.sub(r"\d+", "0", left) == re.sub(r"\d+", "0", right)
            return same_letters and [*map(int, re.findall(r"\d+", left))] < [*map(int, re.findall(r"\d+", right))]
    return False


def problem(seed):
    """Random modules, the layers that they fit, a list of some of them, and neighbors."""
    rng = random.Random(seed)
    patterns, modules = rng.choice(PATTERNS), []
    while len(modules) < rng.randint(1, 6):
        name = rng.choice(patterns).format(rng.randint(0, 4), rng.randint(0, 4))
        if name not in modules:
            modules.append(name)
        elif rng.random() < 0.3:
            break
    classes = [rng.randint(0, 1) for _ in modules]
    sets = {c: {m for m, own in zip(modules, classes, strict=True) if own == c} for c in set(classes)}
    fits = [sets[c] for c in rng.sample(classes, len(classes))]
    order = rng.sample(modules, rng.randint(0, len(modules))) if rng.random() < 0.5 else []
    neighbors = {rng.choice(modules): set(rng.sample(modules, 1))} if rng.random() < 0.3 else {}
    return modules, fits, order, neighbors


def is_allowed(candidate, fits, order, neighbors, links):
    place = {module: index for index, module in enumerate(candidate)}
    return (
        all(module in fitting for module, fitting in zip(candidate, fits, strict=True))
        and all(place[a] < place[b] for a, b in itertools.pairwise(order))
        and not any(earlier(b, a) and not (a in order and b in order) for a, b in itertools.combinations(candidate, 2))
        and all(any(abs(place[m] - place[n]) <= 1 for n in near) for m, near in neighbors.items())
        and (not links or all(links[a][1] == links[b][0] for a, b in itertools.pairwise(candidate)))
    )


@pytest.mark.parametrize("chained", [False, True])
def test_the_first_two_orders_are_those_of_all_permutations(chained):
    counts = set()
    for seed in range(400):
        modules, fits, order, neighbors = problem(seed)
        links = None
        if chained:
            rng = random.Random(seed)
            fits, neighbors = [set(modules)] * len(modules), {}
            links = {module: (rng.randint(1, 2), rng.randint(1, 2)) for module in modules}
        key = (lambda module, links=links: (links[module], module)) if links else None
        graph = _precedence.graph(modules, _precedence.places(modules), order, key=key)
        got = _order_search.first_two(fits, graph, neighbors, links)
        every = [p for p in itertools.permutations(modules) if is_allowed(p, fits, order, neighbors, links)]
        different = {tuple(links[m] for m in p) if links else p for p in every}
        assert len(got) == min(len(different), 2), (seed, modules)
        assert all(tuple(found) in every for found in got), (seed, modules)
        counts.add(len(got))
    assert counts == {0, 1, 2}


def test_what_the_names_say_agrees_with_comparing_all_pairs():
    outcomes = set()
    for seed in range(300):
        modules, fits, order, _ = problem(seed)
        where = _precedence.places(modules)
        in_order = not any(earlier(b, a) for a, b in itertools.combinations(modules, 2))
        assert _precedence.agrees(modules, where) == in_order, modules
        open_pairs = [
            {a, b}
            for fitting in fits
            for a, b in itertools.combinations(fitting, 2)
            if not (earlier(a, b) or earlier(b, a) or (a in order and b in order))
        ]
        assert _precedence.loose(fits, where, order) == set().union(*open_pairs), (modules, order)
        outcomes.add((in_order, bool(open_pairs)))
    assert len(outcomes) == 4


def test_numbers_of_any_length_are_compared_and_other_digits_are_letters():
    long = "9" * 5000  # more digits than int() takes
    assert _precedence.agrees([f"l{long}", f"l1{long}"], _precedence.places([f"l{long}", f"l1{long}"]))
    assert not _precedence.agrees(["l10", "l9"], _precedence.places(["l10", "l9"]))
    arrays = {f"l{mark}.weight": np.zeros((2, 2)) for mark in ("²", "٣")}
    assert not _order.is_told(arrays)


NONE_TOLD = {"told": False, "norms": set(), "order": None}


def names_of(kind, count):
    """Names that tell their order, by one number or by two, and names that do not."""
    rng = np.random.default_rng(0)
    return {
        "layers": lambda: [f"layer{index}" for index in range(count)],
        "blocks": lambda: [f"blocks.{index // 2}.conv{index % 2}" for index in range(count)],
        "letters": lambda: ["".join(name) for name in rng.choice(list("abcdef"), (count, 12))],
    }[kind]()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layers", "blocks", "letters"])
def test_the_order_of_many_equal_modules_takes_time_linear_in_their_number(kind):
    def seconds(count):
        names = names_of(kind, count)
        fits = [set(names)] * count
        begin = time.process_time()
        if kind == "letters":
            with pytest.raises(ValueError, match="order is unknown"):
                _order.find(fits, sorted(names), **NONE_TOLD)
        else:
            assert _order.find(fits, sorted(names), **NONE_TOLD) == names
        return time.process_time() - begin

    small, large = (min(seconds(count) for _ in range(3)) for count in (1000, 8000))
    assert large < 3 * 8 * small  # comparing all pairs takes 64 times as long
    assert large < 5


@pytest.mark.slow
def test_a_file_of_thousands_of_modules_is_read_in_seconds(tmp_path):
    count = 3000
    arch = sg.mlp((3,) * (count + 1), "relu")
    arrays = {}
    for index in np.random.default_rng(0).permutation(count):
        arrays[f"layer{index}.weight"] = np.full((3, 3), index, np.float32)
        arrays[f"layer{index}.bias"] = np.zeros(3, np.float32)
    tensors.write(tmp_path / "a.safetensors", arrays)
    begin = time.process_time()
    params = io.read_network(tmp_path / "a.safetensors", arch).params
    assert time.process_time() - begin < 20  # minutes, when all pairs of modules were compared
    assert all(float(params[f"Dense_{index}"]["kernel"][0, 0]) == index for index in (0, 1, 2, 10, 2999))
