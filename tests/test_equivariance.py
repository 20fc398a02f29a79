"""Models follow the group of the network that they read: architecture by direction by head by options.

A case is compiled once for a batch of networks with variables of their own, and every claim is checked on it: features
after every layer and edited networks move with the network, embeddings stay, the plain edge-by-edge implementation
computes the same, no parameter is idle.
"""

import functools
import itertools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, symmetry, testing
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models import (
    IO,
    Canonical,
    Editor,
    Encoder,
    Readout,
    ScaleGMN,
    _features,
    _layers,
    _message_passing,
    graph,
    reference,
)

ROWS = 8  # networks of a batch
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ARCHITECTURES = {
    **support.ARCHITECTURES,
    "relu cnn": sg.cnn((1, 3, 4), 2, kernel_size=(3, 2)),
    "gelu mlp": sg.mlp((3, 5, 4, 2), "gelu"),
    "abs cnn, out in": support.abs_cnn(),
    **{name: arch for name, (arch, _) in support.HAND_WRITTEN.items()},
}
ARCHITECTURES |= {
    f"{name}, restricted": architecture.restrict(ARCHITECTURES[name], Scaling.PERMUTATION)
    for name in ("siren", "relu cnn", "residual relu")
}
HEADS = {
    "full_graph": Readout.FULL_GRAPH,
    "last_layer": Readout.LAST_LAYER,
    "editor": None,
    "deep_set": Readout.DEEP_SET,
}


class Case(NamedTuple):
    """A model; `options` of its ScaleGMN."""

    name: str
    bidirectional: bool
    head: str
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self):
        changes = [f"{key}={getattr(value, 'value', value)}" for key, value in self.options]
        return ", ".join([self.name, "both ways" if self.bidirectional else "forward", self.head, *changes])

    @property
    def arch(self):
        return ARCHITECTURES[self.name]

    @property
    def model(self):
        options = {"num_layers": 2, "hidden": 3, **dict(self.options)}
        gmn = ScaleGMN(self.arch, 4, bidirectional=self.bidirectional, **options)
        return Editor(gmn) if self.head == "editor" else Encoder(gmn, 3, HEADS[self.head])


def case(name, direction, head, **options):
    return Case(name, direction == "both", head, tuple(options.items()))


ABSOLUTE = {"canonical": Canonical.ABSOLUTE}
NO_ENCODING = {"node_encoding": False, "edge_encoding": False}
# Every two values of different columns occur together in some case, where they can. FAST ones run without -m slow.
CASES = [
    case("siren", "forward", "full_graph"),
    case("siren", "both", "last_layer", io=IO.SEPARATE, edge_encoding=False, **ABSOLUTE),
    case("tanh mlp", "both", "editor", encoding_features=True),
    case("tanh cnn", "forward", "editor", io=IO.SHARED, **ABSOLUTE),
    case("tanh cnn", "both", "full_graph", io=IO.SEPARATE, **NO_ENCODING),
    case("relu mlp", "forward", "full_graph", io=IO.SHARED, encoding_features=True),
    case("relu mlp", "both", "full_graph"),
    case("relu cnn", "forward", "full_graph", io=IO.SEPARATE, skip=False, normalized=False),
    case("relu cnn", "both", "full_graph", io=IO.SHARED, edge_encoding=False),
    case("relu cnn", "forward", "editor", io=IO.SHARED, message_layers=2),
    case("mixed mlp", "forward", "editor", io=IO.SEPARATE, skip=False, **ABSOLUTE),
    case("mixed mlp", "both", "last_layer", normalized=False, encoding_features=True),
    case("batch norm", "both", "editor", io=IO.SEPARATE, **ABSOLUTE),
    case("batch norm", "forward", "full_graph", encoding_features=True),
    case("layer norm", "both", "full_graph", io=IO.SHARED),
    case("layer norm", "forward", "editor", **NO_ENCODING),
    case("residual relu", "forward", "full_graph", **NO_ENCODING),
    case("residual relu", "both", "full_graph", io=IO.SHARED),
    case("residual relu", "both", "editor"),
    case("residual relu", "both", "editor", num_layers=1),
    case("residual tanh", "forward", "last_layer", num_layers=3, update_layers=2, **ABSOLUTE),
    case("gelu mlp", "forward", "full_graph"),
    case("abs mlp", "both", "full_graph"),
    case("abs mlp", "forward", "editor", io=IO.SHARED, **ABSOLUTE),
    case("abs cnn, out in", "both", "editor", encoding_features=True),
    case("abs cnn, out in", "forward", "full_graph", io=IO.SEPARATE, **NO_ENCODING),
    case("siren, restricted", "both", "deep_set", normalized=False),
    case("relu cnn, restricted", "both", "editor", **NO_ENCODING),
]
FAST = {
    case("siren", "forward", "full_graph"),
    case("relu mlp", "both", "full_graph"),
    case("abs mlp", "both", "full_graph"),
    case("residual relu", "both", "editor", num_layers=1),
    case("siren, restricted", "both", "deep_set", normalized=False),
}
IN_BOTH_PRECISIONS = {
    *(one for one in CASES if one.name.startswith(("re", "abs")) and one.head in ("full_graph", "editor")),
    case("siren", "forward", "full_graph"),
    case("residual relu", "both", "editor", num_layers=1),
}


def all_cases():
    """Every architecture with every head; direction and rule run through, the other options are drawn."""
    draw = random.Random(0)
    for (i, name), (k, head) in itertools.product(enumerate(ARCHITECTURES), enumerate(HEADS)):
        direction, io = ("forward", "both")[(i + k) % 2], tuple(IO)[(i + k) % 3]
        plain = not graph.topology(ARCHITECTURES[name]).has_scales
        if head == "deep_set" and not plain:
            continue
        options = {name: draw.random() < 0.5 for name in ("node_encoding", "edge_encoding", "skip", "normalized")}
        if not plain:
            options |= {
                "io": io,
                "canonical": draw.choice([Canonical.SYMMETRIZED, Canonical.ABSOLUTE]),
                "message_layers": draw.choice([1, 2]),
                "update_layers": draw.choice([1, 2]),
                "encoding_features": options["node_encoding"] and draw.random() < 0.5,
            }
        yield case(name, direction, head, num_layers=draw.choice([1, 2]), **options)


def columns(one):
    """What occurs together, two by two: architecture, direction, head and rule."""
    scaled = graph.topology(one.arch).has_scales
    return one.name, one.bidirectional, one.head, one.model.gmn.io if scaled else None


def of_new_pairs(cases, known):
    """The cases that bring two values together that no case before them does."""

    def pairs(one):
        return set(itertools.combinations(enumerate(columns(one)), 2))

    seen = set().union(*map(pairs, known))
    for one in cases:
        if not pairs(one) <= seen:
            seen |= pairs(one)
            yield one


SLOW = pytest.mark.slow
EVERY_CASE = [*CASES, *of_new_pairs(all_cases(), CASES)]


def test_every_two_of_architecture_direction_head_and_rule_occur_together():
    """In some case, fast or slow, of the architectures with scales."""
    scaled = [one for one in EVERY_CASE if graph.topology(one.arch).has_scales]
    for first, second in itertools.combinations(zip(*map(columns, scaled), strict=True), 2):
        assert set(zip(first, second, strict=True)) == set(itertools.product(first, second))


def marked(cases):
    return [pytest.param(one, marks=() if one in FAST else SLOW) for one in cases]


every_case = pytest.mark.parametrize("case", marked(EVERY_CASE), ids=str)
every_encoder = pytest.mark.parametrize("case", marked(one for one in EVERY_CASE if one.head != "editor"), ids=str)


def marked_in_both(cases):
    """(case, dtype), unmarked where a fast test compiles them anyway."""

    def marks(one, dtype):
        return () if one in FAST and dtype == "float64" else SLOW

    pairs = [(one, dtype) for one in cases for dtype in TOLERANCE if one in IN_BOTH_PRECISIONS or dtype == "float64"]
    return pytest.mark.parametrize(
        ("case", "dtype"), [pytest.param(*pair, marks=marks(*pair)) for pair in pairs], ids=str
    )


# --- one compiled program a case ------------------------------------------------------------------------------------


def compiled_reader(case, dtype):
    """(read, params, variables): read maps ROWS networks, with variables each, to (outcome, features on the way)."""
    arch, model = case.arch, case.model
    params = support.random_params(arch, dtype=dtype)
    edits = isinstance(model, Editor)
    variables = support.random_variables(_Delta(model) if edits else model, params, dtype=dtype)

    def is_kept(module, method):
        return isinstance(module, _message_passing.MessagePassing | _message_passing.PlainMessagePassing | ScaleGMN)

    def read(variables, params):
        if edits:
            return model.apply(variables, params, method="delta"), []
        z, kept = model.apply(variables, params, capture_intermediates=is_kept, mutable=["intermediates"])
        kept = kept["intermediates"]["gmn"]
        layers = [kept[f"layer_{index}"]["__call__"][0] for index in range(model.gmn.num_layers)]
        whole = in_blocks(graph.topology(arch), kept["__call__"][0])
        values = [
            (
                state.nodes,
                [_features.value(e) for e in state.edges],
                [_features.value(e) for e in state.backward if case.bidirectional],
            )
            for state in layers
        ]
        return z, [*values, (*whole, [])]

    return jax.jit(jax.vmap(read)), params, variables


class _Delta(NamedTuple):
    """An editor whose `init` makes the variables that its delta reads."""

    model: Editor

    def init(self, key, params):
        return self.model.init(key, params, method="delta")


reader = functools.lru_cache(maxsize=80)(compiled_reader)


def in_blocks(topo, built):
    """The flat node and edge features of a graph, layer by layer and block by block."""
    by_block = [built.edges[block.edges].reshape(*block.shape, -1) for block in topo.blocks]
    return {name: built.nodes[where] for name, where in topo.nodes.items()}, by_block


def repeated(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * ROWS), tree)


act_on_stack = jax.jit(jax.vmap(symmetry.act, (None, 0, 0)))


# --- symmetry -------------------------------------------------------------------------------------------------------


def moved_features(arch, element, features):
    """What node features by neuron layer, and edge features by block, become under an element."""
    topo, along = graph.topology(arch), -1 if graph.is_turned(arch) else 1
    nodes, edges, backward = features
    order, scale = dict(element.permutation), {name: q**along for name, q in element.scale.items()}
    for name, h in nodes.items():
        order.setdefault(name, np.arange(len(h)))
        scale.setdefault(name, np.ones(len(h)))
    new_nodes = {name: h[order[name]] * scale[name][:, None] for name, h in nodes.items()}

    def turned(block, e, sign):
        e = e[np.ix_(order[block.sender], order[block.receiver])] if e.shape[0] > 1 or e.shape[1] > 1 else e
        ends = [scale[name] for name in (block.sender, block.receiver)]
        ends = [np.abs(q) if hidden else q for q, hidden in zip(ends, block.unsigned, strict=True)]
        ratio = ends[1][None, :, None] / ends[0][:, None, None]
        return e * ratio**sign

    pairs = [list(zip(topo.blocks, one, strict=False)) for one in (edges, backward)]
    return new_nodes, [turned(*pair, 1) for pair in pairs[0]], [turned(*pair, -1) for pair in pairs[1]]


def worst_deviation(case, read, params, variables, group, dtype, elements=None):
    """Of an outcome or feature from what it should be, over a batch of group elements."""
    arch = case.arch
    if elements is None:
        elements = support.random_elements(arch, ROWS, **group, dtype=dtype)
    same, stack = repeated(variables), repeated(params)
    outcome, by_layer = read(same, stack)
    if case.head == "editor":
        outcome = act_on_stack(arch, elements, outcome)
    outcome_moved, by_layer_stack = jax.device_get(read(same, act_on_stack(arch, elements, stack)))
    by_layer, worst = jax.device_get(support.rows(by_layer, 0)), 0.0
    for index in range(ROWS):
        element, by_layer_moved = support.rows((jax.device_get(elements), by_layer_stack), index)
        worst = max(worst, support.deviation(*support.rows((outcome_moved, outcome), index)))
        for features, features_moved in zip(by_layer, by_layer_moved, strict=True):
            moved = moved_features(arch, element, features)
            worst = max(worst, support.deviation(features_moved, moved))
    return worst


@marked_in_both(EVERY_CASE)
def test_outcomes_and_features_follow_the_group(case, dtype):
    """Embeddings are invariant; features after every layer, forward and backward, and edits are equivariant."""
    with support.precision(dtype):
        read, params, variables = reader(case, dtype)
        assert worst_deviation(case, read, params, variables, support.GROUPS["PD"], dtype) < TOLERANCE[dtype]
        others = read(repeated(variables), support.random_params(case.arch, 1, dtype, models=(ROWS,)))[0]
        for leaf in jax.tree.leaves(others):  # networks of another function have another outcome
            assert np.abs(leaf - leaf[:1]).max() > 1e-4 * np.abs(leaf).max()


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in support.HAND_WRITTEN])
def test_hand_written_descriptions_are_right(name):
    """Their function is the same after every element, and not if one vector's power is wrong."""
    arch, apply = support.HAND_WRITTEN[name]
    params, x = support.random_params(arch), jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), "float32")
    assert testing.assert_function_preserved(arch, apply, params, x, samples=3) < 1e-5
    turned = {**params, next(iter(params)): jax.tree.map(lambda leaf: leaf[..., ::-1], next(iter(params.values())))}
    assert support.deviation(apply(turned, x), apply(params, x)) > 1e-2


# --- negative controls ----------------------------------------------------------------------------------------------


def constant_in_message(monkeypatch):
    """Messages with a constant, which no sign flips."""
    right = _layers.ScaleEquivariant.__call__
    monkeypatch.setattr(
        _layers.ScaleEquivariant, "__call__", lambda self, x, rule, extra=None: right(self, x, rule, extra) + 0.1
    )


def uneven_map(monkeypatch):
    """rho(x) in the place of rho(x) + rho(-x)."""
    monkeypatch.setattr(_layers.MLP, "activate_even", lambda self, u: 2 * self.activate(u))


def type_per_hidden_neuron(monkeypatch):
    right = graph.topology
    monkeypatch.setattr(graph, "topology", lambda a: right(a)._replace(node_types=np.arange(right(a).num_nodes)))


def last_types_in_wrong_order(monkeypatch):
    """Types of the last edges by the sender, not by the receiver."""
    right = graph.topology

    def wrong(arch):
        *first, last = right(arch).blocks
        types = last.types.min() + np.arange(np.prod(last.shape)).reshape(last.shape) // last.shape[0]
        return right(arch)._replace(blocks=(*first, last._replace(types=types)))

    monkeypatch.setattr(graph, "topology", wrong)


SMALL = case("tanh mlp", "forward", "full_graph", num_layers=1)


def assert_breaks(case, broken, whole):
    """The case follows one group and not the other."""
    read, params, variables = compiled_reader(case, "float32")
    assert worst_deviation(case, read, params, variables, support.GROUPS[whole], "float32") < 1e-5
    assert worst_deviation(case, read, params, variables, support.GROUPS[broken], "float32") > 1e-4


@pytest.mark.parametrize(
    ("damage", "broken", "whole"),
    [
        (constant_in_message, "D", "P"),
        pytest.param(uneven_map, "D", "P", marks=SLOW),
        pytest.param(type_per_hidden_neuron, "P", "D", marks=SLOW),
        pytest.param(last_types_in_wrong_order, "P", "D", marks=SLOW),
    ],
)
def test_a_wrong_model_fails_the_same_check(damage, broken, whole, monkeypatch):
    """And only for the group that it breaks."""
    damage(monkeypatch)
    assert_breaks(SMALL, broken, whole)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case("tanh mlp", "forward", "full_graph", num_layers=1, canonical=Canonical.ABLATED), marks=SLOW),
        pytest.param(case("relu mlp", "forward", "full_graph", num_layers=1, canonical=Canonical.ABLATED), marks=SLOW),
        pytest.param(case("relu mlp", "both", "full_graph", num_layers=1, parity=True), marks=SLOW),
    ],
    ids=str,
)
def test_the_ablated_model_and_the_published_backward_messages_follow_permutations_alone(case):
    assert_breaks(case, "D", "P")


# --- the same function by another route -----------------------------------------------------------------------------


def plain(case):
    """(variables, params) -> the embedding, edge by edge."""
    return lambda v, p: reference.encode(case.model, v, graph.from_params(case.arch, p))


@every_encoder
def test_encoders_equal_their_plain_form(case):
    """No rewrite changes the function."""
    with support.precision("float64"):
        read, params, variables = reader(case, "float64")
        z = read(repeated(variables), repeated(params))[0][0]
        assert support.deviation(z, jax.jit(plain(case))(variables, params)) < 1e-12


@pytest.mark.parametrize("case", [case("siren", "forward", "full_graph", num_layers=1), CASES[6]], ids=str)
@SLOW
def test_gradients_equal_those_of_the_plain_form(case):
    """In the variables and in the params."""
    with support.precision("float64"):
        _, params, variables = reader(case, "float64")

        def gradients(read):
            return jax.jit(jax.grad(lambda v, p: jnp.square(read(v, p)).sum(), argnums=(0, 1)))(variables, params)

        assert support.deviation(gradients(case.model.apply), gradients(plain(case))) < 1e-9


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == CASES[6] else SLOW) for c in EVERY_CASE], ids=str)
def test_parts_of_blocks_are_the_whole_blocks(case):
    """Of three edges at a time, so that blocks have several parts, smaller last ones, and parts of one sender."""
    in_parts = case._replace(options=(*case.options, ("edges_at_once", 3)))
    method = "delta" if case.head == "editor" else None
    with support.precision("float64"):
        _, params, variables = reader(case, "float64")

        def gradient_and_outcome(model):
            def squares(v, p):
                outcome = model.apply(v, p, method=method)
                return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(outcome)), outcome

            return jax.jit(jax.grad(squares, argnums=(0, 1), has_aux=True))(variables, params)

        assert support.deviation(gradient_and_outcome(in_parts.model), gradient_and_outcome(case.model)) < 1e-9
        drawn = jax.eval_shape(functools.partial(in_parts.model.init, method=method), jax.random.key(0), params)
        assert jax.tree.structure(drawn) == jax.tree.structure(variables), "every variable keeps its place"


# --- rescalings from 1e-6 to 1e6, and zeros -------------------------------------------------------------------------

RESCALED = [one for one in CASES if one.name.startswith("re") and one.head == "full_graph"]


def wide_elements(arch, dtype):
    """Each neuron's scale its own, log-uniform from 1e-6 to 1e6."""
    rng = np.random.default_rng(0)
    elements = support.random_elements(arch, ROWS, dtype=dtype)
    scales = {name: 10 ** rng.uniform(-6, 6, scale.shape) for name, scale in elements.scale.items()}
    return elements._replace(scale={name: scale.astype(dtype) for name, scale in scales.items()})


@marked_in_both(RESCALED)
def test_embeddings_survive_rescalings_of_twelve_orders_of_magnitude(case, dtype):
    with support.precision(dtype):
        read, params, variables = reader(case, dtype)
        same, stack = repeated(variables), repeated(params)
        expected = read(same, stack)[0]
        got = read(same, act_on_stack(case.arch, wide_elements(case.arch, dtype), stack))[0]
        assert support.deviation(got, expected) < TOLERANCE[dtype]


def degenerate(arch, dtype):
    """Networks at special points, ROWS of them; `dead`: nothing comes into some neurons, `unread`: nothing leaves."""
    generic = architecture.unpack(arch, support.random_params(arch, dtype=dtype))
    rng = np.random.default_rng(1)
    first = arch.hidden[0].name
    tiny = 1e-6 if graph.topology(arch).columns.against else 1e-20  # there 1 / tiny counts too, and its square

    def edited(change):
        return architecture.pack(
            arch, [jnp.asarray(change(p, np.array(v)), dtype) for p, v in zip(arch.parameters, generic, strict=True)]
        )

    def silent(power):
        def change(parameter, value):
            for position, axis in enumerate(parameter.axes):
                here = isinstance(axis, architecture.Axis) and axis.neurons == first
                feeds = here and (len(parameter.neuron_axes) == 1 or axis is parameter.neuron_axes[1])
                if here and feeds == (power > 0):
                    index = np.arange(value.shape[position]) % arch.neuron_layer(first).width < 2
                    value = np.where(np.expand_dims(index, [i for i in range(value.ndim) if i != position]), 0, value)
            return value

        return change

    return {
        "zero": edited(lambda _, v: 0 * v),
        "zero kernels": edited(lambda p, v: v if len(p.neuron_axes) == 1 else 0 * v),
        "zero vectors": edited(lambda p, v: 0 * v if len(p.neuron_axes) == 1 else v),
        "sparse": edited(lambda _, v: v * (rng.random(v.shape) < 0.5)),
        "dead": edited(silent(1)),
        "unread": edited(silent(-1)),
        "tiny": edited(lambda _, v: tiny * v),
        "huge": edited(lambda _, v: 1e3 * v),
    }


@marked_in_both([*RESCALED, CASES[0]])
def test_degenerate_networks_are_read_and_invariant(case, dtype):
    """Zeros, dead units and extreme weights; padded kernels are zeros too."""
    with support.precision(dtype):
        read, _, variables = reader(case, dtype)
        kinds = degenerate(case.arch, dtype)
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kinds.values())
        expected = read(repeated(variables), stack)[0]
        moved = act_on_stack(case.arch, support.random_elements(case.arch, ROWS, dtype=dtype), stack)
        got = read(repeated(variables), moved)[0]
        for index, kind in enumerate(kinds):
            assert support.deviation(got[index], expected[index]) < TOLERANCE[dtype], kind


@pytest.mark.parametrize(
    "case",
    [case("relu cnn", "both", "full_graph"), case("residual relu", "both", "full_graph", num_layers=1)],
    ids=str,
)
@SLOW
def test_degenerate_networks_have_finite_gradients(case):
    """In the variables and in the params, in float32."""
    kinds = degenerate(case.arch, "float32")
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kinds.values())
    variables = support.random_variables(case.model, support.random_params(case.arch))
    loss = jax.value_and_grad(lambda v, p: case.model.apply(v, p).sum(), argnums=(0, 1))
    results = jax.jit(jax.vmap(loss, (None, 0)))(variables, stack)
    for index, kind in enumerate(kinds):
        broken = {
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(support.rows(results, index))
            if not np.isfinite(leaf).all()
        }
        assert not broken, kind


# --- no idle parameter ----------------------------------------------------------------------------------------------


def idle_parameters(case):
    """The arrays of the variables that change no outcome."""
    read, params, variables = reader(case, "float64")
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(1234)  # not the one that drew the variables: x / |x| does not see a multiple of them
    stack = repeated(jax.tree.map(lambda leaf: 3 * rng.normal(size=leaf.shape), params))  # even maps hardly see less
    expected = read(repeated(variables), stack)[0]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    idle = set()
    for start in range(0, len(leaves), ROWS):
        changed = [np.stack([leaf] * ROWS) for leaf in leaves]
        here = range(start, min(start + ROWS, len(leaves)))
        for row, index in enumerate(here):
            changed[index][row] += 0.1 * rng.normal(size=leaves[index].shape)
        got = read(jax.tree.unflatten(tree, changed), stack)[0]
        for row, index in enumerate(here):
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
            if all(np.allclose(a[row], b[row], rtol=1e-12, atol=0) for a, b in pairs):
                idle.add(paths[index])
    return idle


def reaches_everything(case):
    """Whether what every map of the model computes can come to the neurons that are read."""
    gmn = case.model.gmn
    if case.head != "last_layer":
        return True
    # Forward, new features of inputs come to the outputs only through as many more layers as the network has.
    reads_inputs = gmn.bidirectional or gmn.io is not IO.SEPARATE
    return gmn.num_layers >= len(graph.topology(case.arch).blocks) and reads_inputs


@pytest.mark.parametrize("case", marked(one for one in EVERY_CASE if one in CASES or reaches_everything(one)), ids=str)
def test_no_parameter_is_idle(case):
    """Each array of the variables, changed alone, changes the outcome."""
    with support.precision("float64"):
        assert not idle_parameters(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation",
    [jax.nn.relu, jnp.tanh, jnp.abs, jnp.cos],
    ids=lambda act: act.__name__,
)
def test_networks_without_biases_have_their_group(activation):
    """Their neurons have no vectors; a number in place of them would not follow a scale."""

    def apply(params, x):
        return activation(activation(x @ params["w"]) @ params["u"]) @ params["v"]

    params = {"w": jnp.ones((5, 4)), "u": jnp.ones((4, 6)), "v": jnp.ones((6, 3))}
    arch = sg.infer(apply, params, jnp.ones((7, 5))).arch
    params = support.random_params(arch)
    model = Encoder(ScaleGMN(arch, 8, num_layers=3, bidirectional=True), 3, Readout.FULL_GRAPH)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (1.5 if "kernel" in jax.tree_util.keystr(path) else 1),  # or u would hardly show
        support.random_variables(model, params),
    )
    elements = support.random_elements(arch, 4)
    moved = jax.jit(jax.vmap(lambda element: symmetry.act(arch, element, params)))(elements)
    other = params | {"u": support.random_params(arch, 1)["u"]}
    stack = jax.tree.map(lambda one, some, last: jnp.concatenate([one[None], some, last[None]]), params, moved, other)
    embedded = jax.jit(jax.vmap(lambda one: model.apply(variables, one)))(stack)
    assert support.deviation(embedded[1:5], jnp.stack([embedded[0]] * 4)) < 1e-5
    assert support.deviation(embedded[5], embedded[0]) > 1e-4
