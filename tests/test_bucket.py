"""Networks of several architectures in one batch: one program, each member's own group, padding without effect."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, models, symmetry
from jax_scalegmn.architecture import Architecture, NeuronLayer, Parameter, Scaling
from jax_scalegmn.models import Editor, Encoder, Readout, ScaleGMN, graph, reference
from jax_scalegmn.models.graph import Bucket

MIXED = Bucket(
    (
        sg.mlp((3, 5, 4, 2), "tanh"),
        sg.mlp((3, 6, 2), "relu"),
        sg.mlp((3, 3, 4, 5, 2), "gelu"),
        sg.cnn((1, 3, 4), 2, kernel_size=(2, 3)),
        sg.mlp((3, 4, 5, 2), ("abs", "relu")),
    ),
    multiple=4,
)
MEMBERS = pytest.mark.parametrize("arch", MIXED.members, ids=str)
COUNT = len(MIXED.members)


def encoder_of(bucket, readout=Readout.FULL_GRAPH, **options):
    return Encoder(ScaleGMN(bucket, 4, **{"num_layers": 2, "hidden": 3, **options}), 3, readout)


def stack_of(graphs):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *graphs)


def padded(bucket, arch, seed=0, dtype="float32"):
    return graph.from_params(arch, support.random_params(arch, seed, dtype), bucket=bucket)


@functools.cache
def mixed_reader(dtype):
    """(read, variables, traces): read maps a batch of padded graphs to embeddings, and notes when it is traced."""
    model, traces = encoder_of(MIXED, bidirectional=True), []
    variables = random_variables(model, padded(MIXED, MIXED.members[0], dtype=dtype), dtype=dtype)

    def read(graphs):
        traces.append(graphs)
        return jax.vmap(lambda one: model.apply(variables, one, method="read"))(graphs)

    return jax.jit(read), variables, traces


def random_variables(model, built, dtype="float32"):
    class Reads:
        def init(self, key, built):
            return model.init(key, built, method="read")

    return support.random_variables(Reads(), built, dtype=dtype)


def orbit(arch, params, dtype, **group):
    elements = support.random_elements(arch, COUNT, dtype=dtype, **group)
    return jax.jit(jax.vmap(lambda element: symmetry.act(arch, element, params)))(elements)


def graphs_of(arch, stack):
    """The padded graphs of some networks, by one program."""
    return jax.jit(jax.vmap(lambda params: graph.from_params(arch, params, bucket=MIXED)))(stack)


@functools.cache
def embedded_members(dtype):
    """One network of every member, read in one batch."""
    read, _, _ = mixed_reader(dtype)
    return read(stack_of([padded(MIXED, member, dtype=dtype) for member in MIXED.members]))


@pytest.mark.slow
@MEMBERS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_member_has_its_own_symmetry_in_one_program(arch, dtype):
    """Embeddings are invariant under the member's group, whatever the others have; nothing is compiled anew."""
    with support.precision(dtype):
        read, _, traces = mixed_reader(dtype)
        members = embedded_members(dtype)
        index, moved = MIXED.members.index(arch), orbit(arch, support.random_params(arch, dtype=dtype), dtype)
        for z in read(graphs_of(arch, moved)):
            assert support.deviation(z, members[index]) < {"float32": 1e-5, "float64": 1e-10}[dtype]
        others = read(graphs_of(arch, support.random_params(arch, dtype=dtype, models=(COUNT,))))
        assert np.abs(others[1:] - others[0]).max() > 1e-3 * np.abs(others).max()
        assert len(traces) == 1


def test_a_group_that_a_member_does_not_have_changes_its_embedding():
    """Signs are the tanh network's and not the gelu network's, which has layers of the same names."""
    with support.precision("float64"):
        read, _, _ = mixed_reader("float64")
        arch = MIXED.members[2]
        signed = dataclasses.replace(arch, neuron_layers=tuple(with_signs(n) for n in arch.neuron_layers))
        moved = orbit(signed, support.random_params(arch, dtype="float64"), "float64", permute=False)
        z = read(graphs_of(arch, moved))
        assert np.abs(z[1:] - z[0]).max() > 1e-3 * np.abs(z).max()


def with_signs(neurons):
    return neurons if neurons.scaling is Scaling.FIXED else dataclasses.replace(neurons, scaling=Scaling.SIGN)


def test_padded_graphs_are_read_as_by_the_plain_form():
    with support.precision("float64"):
        read, variables, _ = mixed_reader("float64")
        graphs = stack_of([padded(MIXED, member, dtype="float64") for member in MIXED.members])
        model = encoder_of(MIXED, bidirectional=True)
        plain = jax.jit(jax.vmap(lambda one: reference.encode(model, variables, one)))
        assert support.deviation(read(graphs), plain(graphs)) < 1e-12


@pytest.mark.slow
def test_padded_blocks_are_read_in_parts():
    with support.precision("float64"):
        read, variables, _ = mixed_reader("float64")
        graphs = stack_of([padded(MIXED, member, dtype="float64") for member in MIXED.members])
        model = encoder_of(MIXED, bidirectional=True, edges_at_once=5)
        in_parts = jax.jit(jax.vmap(lambda one: model.apply(variables, one, method="read")))
        assert support.deviation(in_parts(graphs), read(graphs)) < 1e-12


def chain(hidden, activation):
    """Two members alike in depth and group, of other widths."""
    return tuple(sg.mlp((3, *widths, 2), activation) for widths in hidden)


@pytest.mark.parametrize(
    ("members", "readout", "options"),
    [
        pytest.param(
            chain([(5, 4), (3, 9)], "relu"), Readout.FULL_GRAPH, {"bidirectional": True}, marks=pytest.mark.slow
        ),
        pytest.param(
            chain([(5, 4), (3, 9)], "relu"),
            Readout.LAST_LAYER,
            {"bidirectional": True, "normalized": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            chain([(5, 4), (3, 9)], "tanh"),
            Readout.FULL_GRAPH,
            {"normalized": False, "encoding_features": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(chain([(5, 4), (3, 9)], ("tanh", "relu")), Readout.FULL_GRAPH, {}, marks=pytest.mark.slow),
        (chain([(5, 4), (3, 9)], "gelu"), Readout.DEEP_SET, {"bidirectional": True}),
    ],
    ids=lambda value: value[0].name if isinstance(value, tuple) else None,
)
def test_padding_changes_nothing(members, readout, options):
    """Where bucket and member have one depth, the same variables compute the same embedding, padded or not."""
    with support.precision("float64"):
        bucket, arch = Bucket(members, multiple=8), members[0]
        padding, own = encoder_of(bucket, readout, **options), encoder_of(arch, readout, **options)
        built = padded(bucket, arch, dtype="float64")
        assert len(built.nodes) == 3 + 8 + 16 + 2
        variables = random_variables(padding, built, "float64")
        params = support.random_params(arch, dtype="float64")
        z = jax.jit(lambda: padding.apply(variables, built, method="read"))()
        assert support.deviation(z, jax.jit(lambda: own.apply(variables, params))()) < 1e-12


@pytest.mark.slow
def test_gradients_are_finite_and_padding_has_none():
    """In the variables each array has one; in the graph's features, just what is there."""
    model = encoder_of(MIXED, bidirectional=True, num_layers=1)
    graphs = stack_of([padded(MIXED, member) for member in MIXED.members])
    variables = random_variables(model, padded(MIXED, MIXED.members[0]))

    def loss(variables, nodes, edges):
        z = jax.vmap(lambda one: model.apply(variables, one, method="read"))(graphs._replace(nodes=nodes, edges=edges))
        return jnp.square(z).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(variables, graphs.nodes, graphs.edges)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads[0]))
    for grad, present in zip(grads[1:], (graphs.globals.nodes, graphs.globals.edges), strict=True):
        assert (grad[~present] == 0).all()
        assert (grad[present] != 0).any(-1).mean() > 0.9


def test_presence_says_what_is_there():
    for arch in MIXED.members:
        built = padded(MIXED, arch)
        assert built.globals.nodes.sum() == sum(neurons.width for neurons in arch.neuron_layers)
        assert built.globals.edges.sum() == graph.topology(arch).num_edges
        assert not built.nodes[~built.globals.nodes].any()
        assert not built.edges[~built.globals.edges].any()
        here = {
            name: [value for value, present in scalings.items() if present]
            for name, scalings in built.globals.scalings.items()
        }
        own = {neurons.name: [neurons.scaling.value] for neurons in arch.hidden}
        assert {name: found for name, found in here.items() if found} == own


# --- what is refused ------------------------------------------------------------------------------------------------


def test_graphs_that_are_not_of_the_bucket_are_refused(key):
    arch = MIXED.members[0]
    own = graph.from_params(arch, support.random_params(arch))
    with pytest.raises(ValueError, match=r"not padded; 'bucket of .*' expects .* padded\. .* and the bucket"):
        encoder_of(MIXED).init(key, own, method="read")
    other = Bucket(MIXED.members[:2], multiple=8)
    with pytest.raises(
        ValueError, match=r"The graph has nodes \(\d+, 1\), .* 'bucket of mlp 3-5-4-2 tanh, .*' expects"
    ):
        encoder_of(MIXED).init(key, padded(other, arch), method="read")
    with pytest.raises(ValueError, match=r"padded; 'mlp 3-5-4-2 tanh' expects .* not padded"):
        encoder_of(arch).init(key, padded(Bucket((arch,)), arch), method="read")


def test_architectures_that_are_no_member_are_refused():
    stranger = sg.mlp((3, 5, 5, 2), "tanh")
    with pytest.raises(ValueError, match=r"'mlp 3-5-5-2 tanh' is no member of the bucket of mlp 3-5-4-2 tanh, .*"):
        graph.from_params(stranger, support.random_params(stranger), bucket=MIXED)


@pytest.mark.parametrize(
    "model", [encoder_of(MIXED), Editor(ScaleGMN(MIXED, 4))], ids=lambda model: type(model).__name__
)
def test_a_bucket_reads_graphs_and_not_params(model):
    with pytest.raises(ValueError, match=r"params of one architecture.*bucket of mlp 3-5-4-2 tanh"):
        model.init(jax.random.key(0), support.random_params(MIXED.members[0]))


def renamed(names):
    """A network of one hidden layer after another, of these names."""
    neurons = [NeuronLayer(name, 2, Scaling.FIXED if name in ("in", "out") else Scaling.SIGN) for name in names]
    pairs = itertools.pairwise(names)
    kernels = [Parameter((f"{a}{b}",), (architecture.Axis(a, -1), architecture.Axis(b, 1))) for a, b in pairs]
    return Architecture("-".join(names), tuple(neurons), tuple(kernels))


@pytest.mark.parametrize(
    ("members", "multiple", "message"),
    [
        ((), 1, "needs members and a multiple >= 1; got 0 members and 1"),
        ((renamed(["in", "a", "out"]),), 0, "got 1 members and 0"),
        (
            (renamed(["in", "a", "b", "out"]), renamed(["in", "b", "a", "out"])),
            1,
            "order their neuron layers differently",
        ),
        (
            (renamed(["in", "a", "out"]), renamed(["in", "out", "a"])),
            1,
            "order their neuron layers differently",
        ),
    ],
)
def test_buckets_that_make_no_sense_are_refused(members, multiple, message):
    with pytest.raises(ValueError, match=message):
        Bucket(members, multiple)


def test_a_layer_that_is_hidden_in_one_member_alone_is_refused():
    hidden = renamed(["in", "a", "out"])
    end = dataclasses.replace(
        hidden, neuron_layers=tuple(dataclasses.replace(n, scaling=Scaling.FIXED) for n in hidden.neuron_layers)
    )
    with pytest.raises(ValueError, match=r"'a' is an input or output of one member and hidden in another.*Rename it"):
        Bucket((hidden, end))


def test_encoders_of_buckets_describe_their_variables():
    """Shapes alone, for checkpoints; also of the ScaleGMN inside."""
    model = encoder_of(MIXED, num_layers=1)
    variables = random_variables(model, padded(MIXED, MIXED.members[1]))
    shapes = models.abstract_variables(model)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    inside = models.abstract_variables(model.gmn)["params"]
    assert jax.tree.structure(inside) == jax.tree.structure(shapes["params"]["gmn"])
