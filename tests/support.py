"""Small networks, random numbers and comparisons that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_scalegmn as sg
from jax_scalegmn import architecture, network, symmetry
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer, Parameter, Scaling

ARCHITECTURES = {
    "siren": sg.siren((2, 5, 4, 1)),
    "tanh mlp": sg.mlp((3, 5, 4, 2), "tanh"),
    "relu mlp": sg.mlp((3, 5, 4, 2), "relu"),
    "mixed mlp": sg.mlp((3, 5, 4, 6, 2), ("tanh", "leaky_relu", "gelu")),
    "relu cnn": sg.cnn((1, 3, 4), 2),
    "tanh cnn": sg.cnn((2, 3, 4), 3, activation="tanh", kernel_size=(3, 2), padding="SAME", flatten=(7, 9)),
    "abs mlp": sg.mlp((3, 5, 4, 2), "abs"),
}
SIGN = {name: ARCHITECTURES[name] for name in ("siren", "tanh mlp", "tanh cnn")}
GROUPS = {
    "P": {"permute": True, "scale": False},
    "D": {"permute": False, "scale": True},
    "PD": {"permute": True, "scale": True},
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}

COMPILED: list[str] = []  # the names of the programs that were compiled; tests clear it

act = jax.jit(symmetry.act)


def _remember(event, duration, *, fun_name="", **_):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_remember)


def precision(dtype):
    """The context in which arrays of that dtype exist."""
    return jax.enable_x64(dtype == "float64")


def random_params(arch: Architecture, seed: int = 0, dtype="float32", models: tuple[int, ...] = ()):
    """Params of a generic network, biases included, with pre-activations of order one and positive variances."""
    rng = np.random.default_rng(seed)
    frequency = {layer.name: layer.activation.frequency for layer in arch.layers if getattr(layer, "activation", None)}
    values = []
    for parameter in arch.parameters:
        shape = arch.shape(parameter)
        size = 1 / np.sqrt(np.prod(shape[:-1], initial=1)) / frequency.get(parameter.path[0], 1)
        value = size * rng.normal(size=(*models, *shape))
        if arch.layers and parameter.path[-1] == "var":
            value = np.abs(value) + 0.3
        values.append(jnp.asarray(value, dtype))
    return architecture.pack(arch, values)


def random_variables(model, *inputs, seed: int = 0, dtype="float32"):
    """Generic variables of a model, no entry at a special value such as 0 or 1; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        size = 1 / np.sqrt(leaf.shape[0]) if "kernel" in name or "gamma" in name else 0.3
        return jnp.asarray(("norm_scale" in name) + size * rng.normal(size=leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), *inputs))


def random_elements(arch: Architecture, count: int, *, permute=True, scale=True, seed=0, dtype="float32"):
    """A stack of group elements, drawn with NumPy."""
    rng = np.random.default_rng(seed)
    permutation, scales = {}, {}
    for neurons in arch.hidden:
        order = np.tile(np.arange(neurons.width), (count, 1))
        permutation[neurons.name] = rng.permuted(order, axis=1) if permute else order
        signs, sizes = rng.choice([-1.0, 1.0], order.shape), np.exp(rng.normal(size=order.shape))
        draw = {Scaling.SIGN: signs, Scaling.POSITIVE: sizes, Scaling.NONZERO: signs * sizes}.get(
            neurons.scaling, np.ones(order.shape)
        )
        scales[neurons.name] = (draw if scale else np.ones(order.shape)).astype(dtype)
    return symmetry.Element(permutation, scales)


def recovered(found, planted):
    """Which pairs of a stack have every permutation and sign, and every positive scale to 1e-4."""
    right = True
    for name, order in planted.permutation.items():
        ratio = np.asarray(found.element.scale[name]) / planted.scale[name]
        right &= (np.asarray(found.element.permutation[name]) == order).all(-1)
        right &= (np.abs(ratio - 1) < 1e-4).all(-1)
    return right


def rows(stack, index):
    """One member of a stack, or some."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


def example(arch: Architecture, count: int = 4, seed: int = 0, dtype="float32"):
    """A batch of inputs."""
    image = bool(arch.layers) and arch.input_rank == 3
    shape = (7, 9, arch.neuron_layers[0].width) if image else (arch.neuron_layers[0].width,)
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, *shape)), dtype)


@jax.jit
def outputs(arch: Architecture, params, x):
    """The network's function on a batch."""
    return jax.vmap(lambda one: network.apply(arch, params, one))(x)


def deviation(got, expected) -> float:
    """The largest deviation of any array, relative to its counterpart's largest entry; absolute where that is 0."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        assert np.isfinite(b).all()
        size, gap = np.abs(b).max(), np.abs(a - b).max()
        worst = max(worst, gap / size if size > 0 else gap)
    return worst


def assert_identical(got, expected) -> None:
    """Equal structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def abs_cnn() -> Architecture:
    """Two convolutions with abs and a relu layer, inferred, in PyTorch's layout; the first abs is after a norm."""
    some = [sg.layers.Conv(4, 3), sg.layers.BatchNorm(), "abs", sg.layers.Conv(3, 2), "abs", sg.layers.GlobalAvgPool()]
    return sg.sequential([*some, sg.layers.Dense(4), "relu", sg.layers.Dense(2)], (2, 7, 9))


def batch_norm_mlp() -> tuple[Architecture, object]:
    """A hand-written description of a tanh network with normalization, and its function."""
    neurons = (
        NeuronLayer("pixels", 3, Scaling.FIXED),
        NeuronLayer("units", 5, Scaling.SIGN),
        NeuronLayer("classes", 2, Scaling.FIXED),
    )
    powers = {"scale": 1, "bias": 1, "mean": 0, "var": 0}
    parameters = (
        Parameter(("dense", "kernel"), (Axis("pixels", 0), Axis("units", 0))),
        *(Parameter(("norm", name), (Axis("units", power),)) for name, power in powers.items()),
        Parameter(("head", "kernel"), (Axis("units", -1), Axis("classes", 0))),
        Parameter(("head", "bias"), (Axis("classes", 0),)),
    )

    def apply(params, x):
        norm = params["norm"]
        u = (x @ params["dense"]["kernel"] - norm["mean"]) / jnp.sqrt(1 + jnp.square(norm["var"]))
        return jnp.tanh(u * norm["scale"] + norm["bias"]) @ params["head"]["kernel"] + params["head"]["bias"]

    return Architecture("normalized mlp", neurons, parameters), apply


def layer_norm_mlp() -> tuple[Architecture, object]:
    """A residual stream between layer normalizations, on which permutations alone act, and its function.

    The units that write to the stream read it too: their graph has a cycle.
    """
    neurons = (
        NeuronLayer("pixels", 3, Scaling.FIXED),
        NeuronLayer("stream", 5, Scaling.PERMUTATION),
        NeuronLayer("units", 4, Scaling.POSITIVE),
        NeuronLayer("classes", 2, Scaling.FIXED),
    )
    parameters = (
        Parameter(("embed", "kernel"), (Axis("pixels", -1), Axis("stream", 1))),
        *(Parameter((norm, name), (Axis("stream", 1),)) for norm in ("norm", "end") for name in ("scale", "bias")),
        Parameter(("up", "kernel"), (Axis("stream", -1), Axis("units", 1))),
        Parameter(("up", "bias"), (Axis("units", 1),)),
        Parameter(("down", "kernel"), (Axis("units", -1), Axis("stream", 1))),
        Parameter(("head", "kernel"), (Axis("stream", -1), Axis("classes", 1))),
    )

    def normed(x, norm):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * norm["scale"] + norm["bias"]

    def apply(params, x):
        stream = x @ params["embed"]["kernel"]
        units = jax.nn.relu(normed(stream, params["norm"]) @ params["up"]["kernel"] + params["up"]["bias"])
        stream = stream + units @ params["down"]["kernel"]
        return normed(stream, params["end"]) @ params["head"]["kernel"]

    return Architecture("layer norm mlp", neurons, parameters), apply


def residual_mlp(activation: str) -> tuple[Architecture, object]:
    """A stream that two kernels feed, the second after batch normalizations, and its function.

    The stream and the units carry the group of the activation. One normalization divides by its gain, which so goes
    against a rescaling.
    """
    scaling, act = {"relu": (Scaling.POSITIVE, jax.nn.relu), "tanh": (Scaling.SIGN, jnp.tanh)}[activation]
    neurons = (
        NeuronLayer("pixels", 3, Scaling.FIXED),
        NeuronLayer("stream", 5, scaling),
        NeuronLayer("units", 4, scaling),
        NeuronLayer("classes", 2, Scaling.FIXED),
    )
    powers = {"bias": 1, "mean": 0, "var": 0}
    parameters = (
        Parameter(("embed", "kernel"), (Axis("pixels", 0), Axis("stream", 1))),
        Parameter(("embed", "bias"), (Axis("stream", 1),)),
        Parameter(("up", "kernel"), (Axis("stream", -1), Axis("units", 0))),
        *(Parameter(("inner", name), (Axis("units", power),)) for name, power in {"gain": -1, **powers}.items()),
        Parameter(("down", "kernel"), (Axis("units", -1), Axis("stream", 0))),
        *(Parameter(("outer", name), (Axis("stream", power),)) for name, power in {"gain": 1, **powers}.items()),
        Parameter(("head", "kernel"), (Axis("stream", -1), Axis("classes", 0))),
        Parameter(("head", "bias"), (Axis("classes", 0),)),
    )

    def normed(x, norm):
        return (x - norm["mean"]) / jnp.sqrt(1 + jnp.square(norm["var"]))

    def apply(params, x):
        stream = act(x @ params["embed"]["kernel"] + params["embed"]["bias"])
        inner, outer = params["inner"], params["outer"]
        units = act(normed(stream @ params["up"]["kernel"], inner) / inner["gain"] + inner["bias"])
        stream = act(stream + normed(units @ params["down"]["kernel"], outer) * outer["gain"] + outer["bias"])
        return stream @ params["head"]["kernel"] + params["head"]["bias"]

    return Architecture(f"residual mlp {activation}", neurons, parameters), apply


# Networks with a function of their own: name -> (architecture, apply).
HAND_WRITTEN = {
    "batch norm": batch_norm_mlp(),
    "layer norm": layer_norm_mlp(),
    "residual relu": residual_mlp("relu"),
    "residual tanh": residual_mlp("tanh"),
}


def asks_for_nothing(page: str) -> bool:
    """Whether an HTML page names no address but that of the SVG namespace, which no browser asks for."""
    return "://" not in page.replace("http://www.w3.org/2000/svg", "")
