"""The published ScaleGMN models, trained in PyTorch, as ours with their variables.

The import is exact: embeddings, edits, decoded networks, losses and optimizer steps are those of the published code.
What the tensors do not tell is an argument.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jax_scalegmn.architecture import Architecture, Parameter, Scaling
from jax_scalegmn.io import StateDict, torch_layout
from jax_scalegmn.models import _descriptions, _heads
from jax_scalegmn.models._layers import IO, Canonical

__all__ = ["autoencoder", "editor", "encoder"]


def encoder(
    arch: Architecture,
    state_dict: StateDict,
    *,
    ablated: bool = False,
    dropout: float = 0.0,
    parity: bool = False,
) -> tuple[_heads.Encoder, dict[str, Any]]:
    """The published invariant ScaleGMN (arXiv 2406.10685, 2511.12601) as our model and its variables.

    Sizes and options follow from the tensors, the groups from `arch`. Tensors that the published code builds and never
    uses, like `readout.phi`, are left out.

        state_dict = sg.io.tensors.read("scalegmn.pt")
        model, variables = sg.models.published.encoder(arch, state_dict)
        z = model.apply(variables, params)

    Args:
      arch: The architecture of the networks that the model reads. For the permutation-only model,
        `architecture.restrict(arch, Scaling.PERMUTATION)`.
      state_dict: The published model's tensors, in PyTorch's layout; or their gradients, since the import is linear.
      ablated: Whether it was trained with ablate_symmetry, which the tensors do not tell.
      dropout: The rate in training, which the tensors do not tell; published: 0.2.
      parity: Whether the model repeats the published defects (`models.ScaleGMN`). A bidirectional model of positive
        scales has no other form.

    Returns:
      (model, variables), for `model.apply(variables, params)`.

    Raises:
      ValueError: On a missing, additional or misshapen tensor, one with a NaN, or networks that the model cannot read.

    >>> import numpy as np
    >>> import jax_scalegmn as sg
    >>> sg.models.published.encoder(sg.siren((2, 32, 32, 1)), {"net.weight": np.zeros(1)})
    Traceback (most recent call last):
    ...
    ValueError: The state_dict is not of the published model: 'construct_graph.proj_bias.weight' is missing among 1
    tensors ['net.weight'].
    """
    model = _encoder(arch, state_dict, "", ablated=ablated, dropout=dropout, parity=parity)
    return model, _variables(
        arch, model, state_dict, functools.partial(_encoder_key, model), _unused(model.gmn, ends=_ends(model))
    )


def editor(
    arch: Architecture, state_dict: StateDict, *, dropout: float = 0.0, parity: bool = False
) -> tuple[_heads.Editor, dict[str, Any]]:
    """The published equivariant ScaleGMN (arXiv 2406.10685, section 5: editing) as our model and its variables.

    Args:
      arch, state_dict, dropout, parity: As `encoder`.

    Returns:
      (model, variables), for `model.apply(variables, params)`.

    Raises:
      ValueError: As `encoder`.

    >>> import jax_scalegmn as sg
    >>> sg.models.published.editor(sg.siren((2, 32, 32, 1)), {})
    Traceback (most recent call last):
    ...
    ValueError: The state_dict is not of the published model: 'construct_graph.proj_bias.weight' is missing among 0
    tensors [].
    """
    model = _heads.Editor(_gmn(arch, state_dict, "", ablated=False, dropout=dropout, parity=parity))
    return model, _variables(
        arch, model, state_dict, functools.partial(_gmn_key, model.gmn), _unused(model.gmn, ends=True)
    )


def autoencoder(
    arch: Architecture,
    state_dict: StateDict,
    *,
    ablated: bool = False,
    dropout: float = 0.0,
    parity: bool = False,
) -> tuple[_heads.Autoencoder, dict[str, Any]]:
    """The published ScaleGMN autoencoder (arXiv 2511.12601) as our model and its variables.

    The decoder's outputs are reordered from the published order, which is that of PyTorch's state_dict for INRs and
    that of the Small CNN Zoo for CNNs, to that of `arch.parameters`.

    Args:
      arch, state_dict, ablated, dropout, parity: As `encoder`.

    Returns:
      (model, variables), for `model.apply(variables, params)`.

    Raises:
      ValueError: As `encoder`.

    >>> import jax_scalegmn as sg
    >>> sg.models.published.autoencoder(sg.siren((2, 32, 32, 1)), {})
    Traceback (most recent call last):
    ...
    ValueError: The state_dict is not of the published model: 'encoder.construct_graph.proj_bias.weight' is missing
    among 0 tensors [].
    """
    encoder = _encoder(arch, state_dict, "encoder.", ablated=ablated, dropout=dropout, parity=parity)
    depth = _count(state_dict, r"decoder\.net\.fc\.(\d+)\.")
    widths = tuple(np.size(_present(state_dict, f"decoder.net.fc.{index}.bias")) for index in range(depth - 1))
    model = _heads.Autoencoder(encoder, _heads.Decoder(arch, widths))

    def key(path: str) -> str:
        part, _, rest = path.partition("/")
        if part == "encoder":
            return f"encoder.{_encoder_key(encoder, rest)}"
        layer, kind = rest.split("/")
        index = depth - 1 if layer == "output" else int(layer.removeprefix("dense_"))
        return f"decoder.net.fc.{index}.{_DENSE[kind]}"

    variables = _variables(arch, model, state_dict, key, _unused(encoder.gmn, ends=_ends(encoder), prefix="encoder."))
    order = _output_order(arch)
    output = variables["params"]["decoder"]["output"]
    variables["params"]["decoder"]["output"] = {name: value[..., order] for name, value in output.items()}
    return model, variables


# --- private: the published model -----------------------------------------------------------------------------------


def _output_order(arch: Architecture) -> np.ndarray:
    """The index of each entry of our flat network in the published flat network.

    INRs: in PyTorch's order and layout. CNNs: layer by layer with the bias first, in our layout.
    """
    convolutional = arch.input_rank == 3
    layers = list(dict.fromkeys(parameter.path[0] for parameter in arch.parameters))
    first = "bias" if convolutional else "kernel"
    in_order = sorted(arch.parameters, key=lambda p: (layers.index(p.path[0]), p.path[-1] != first))
    order, start = {}, 0
    for parameter in in_order:
        shape = arch.shape(parameter) if convolutional else torch_layout.tensor_shape(arch, parameter)
        index = start + np.arange(math.prod(shape)).reshape(shape)
        if not convolutional:
            index = torch_layout.array_of_tensor(arch, parameter, index)
        order[parameter] = index.reshape(-1)
        start += index.size
    return np.concatenate([order[parameter] for parameter in arch.parameters])


_MLP = {
    "kernel_in": "fc.0.weight",
    "bias_in": "fc.0.bias",
    "norm_scale": "ln.0.weight",
    "norm_bias": "ln.0.bias",
    "kernel_out": "fc.1.weight",
    "bias_out": "fc.1.bias",
}
_DENSE = {"kernel": "weight", "bias": "bias"}
_FEATURES = {
    "node_kernel": "construct_graph.proj_bias.weight",
    "edge_kernel": "construct_graph.proj_weight.weight",
    "node_encoding": "positional_embeddings.pos_embed",
    "edge_encoding": "positional_embeddings_edge.pos_embed",
}


def _encoder(
    arch: Architecture, state_dict: StateDict, prefix: str, *, ablated: bool, dropout: float, parity: bool
) -> _heads.Encoder:
    gmn = _gmn(arch, state_dict, prefix, ablated=ablated, dropout=dropout, parity=parity)
    readouts = {
        "local_mlp": (_heads.Readout.DEEP_SET, "global_mlp"),
        "rho": (_heads.Readout.LAST_LAYER, "rho"),
        "global_mlp": (_heads.Readout.FULL_GRAPH, "global_mlp"),
    }
    for name, (readout, mlp) in readouts.items():
        if f"{prefix}gnn.readout.{name}.fc.0.weight" in state_dict:
            latent = np.size(_present(state_dict, f"{prefix}gnn.readout.{mlp}.fc.1.bias"))
            return _heads.Encoder(gmn, latent, readout)
    raise ValueError(
        f"{_FOREIGN}: it has no tensors {prefix}gnn.readout.*. An equivariant model needs published.editor."
    )


_FOREIGN = "The state_dict is not of the published model"


def _gmn(
    arch: Architecture, state_dict: StateDict, prefix: str, *, ablated: bool, dropout: float, parity: bool
) -> _heads.ScaleGMN:
    """The model whose sizes and options the tensors show."""
    layer = f"{prefix}gnn.fw_layers.0.message_fn"
    plain = f"{layer}.rho.fc.0.weight" in state_dict
    bidirectional = any(key.startswith(f"{prefix}gnn.bw_layers.") for key in state_dict)
    _check_groups(arch, plain=plain, bidirectional=bidirectional, parity=parity)
    features = np.size(_present(state_dict, f"{prefix}construct_graph.proj_bias.weight"))
    options: dict[str, Any] = {
        "num_layers": _count(state_dict, re.escape(prefix) + r"gnn\.fw_layers\.(\d+)\."),
        "bidirectional": bidirectional,
        "node_encoding": f"{prefix}positional_embeddings.pos_embed" in state_dict,
        "edge_encoding": f"{prefix}positional_embeddings_edge.pos_embed" in state_dict,
        "skip": f"{prefix}gnn.skip_layers.0.weight" in state_dict,
        "dropout": dropout,
        "normalized": False,
        "parity": parity,
    }
    if plain:
        options |= {"hidden": np.size(_present(state_dict, f"{layer}.rho.fc.0.bias"))}
    else:
        update = "update_node_feats_fn.0" if bidirectional else "fw_layers.0.update_node_feats_fn"
        options |= _map_options(arch, state_dict, layer, f"{prefix}gnn.{update}", features, ablated=ablated)
    return _heads.ScaleGMN(arch, features, **options)


def _map_options(
    arch: Architecture, state_dict: StateDict, message: str, update: str, features: int, *, ablated: bool
) -> dict[str, Any]:
    """The options of equivariant maps that the tensors of a message and of a node update show."""
    gate = f"{message}.eq_layers.0.g"
    phi = _present(state_dict, f"{gate}.g1.phi.fc.0.weight")
    separate, shared = (f"{message}.eq_layers_{end}.0.rho.fc.0.weight" in state_dict for end in ("last", "in"))
    signs = any(layer.scaling.has_signs for layer in arch.hidden)
    symmetrized = not signs or f"{gate}.g1.rho.fc.0.weight" in state_dict
    return {
        "hidden": len(phi),
        "canonical": Canonical.ABLATED if ablated else Canonical.SYMMETRIZED if symmetrized else Canonical.ABSOLUTE,
        "io": IO.SEPARATE if separate else IO.SHARED if shared else IO.GATE,
        "encoding_features": phi.shape[-1] == 2 * features,
        "message_layers": _count(state_dict, re.escape(message) + r"\.eq_layers\.(\d+)\."),
        "update_layers": _count(state_dict, re.escape(update) + r"\.eq_layers\.(\d+)\."),
    }


def _check_groups(arch: Architecture, *, plain: bool, bidirectional: bool, parity: bool) -> None:
    """Whether a model with these options can read networks with the architecture's groups."""
    groups = {layer.scaling for layer in arch.hidden}
    named = sorted(group.value for group in groups)
    if plain and groups != {Scaling.PERMUTATION}:
        raise ValueError(
            f"The state_dict is of a permutation-only model; {arch.name!r} has the groups {named}. Pass "
            "architecture.restrict(arch, Scaling.PERMUTATION)."
        )
    if not plain and (len(groups) != 1 or Scaling.NONZERO in groups):
        raise ValueError(
            f"{arch.name!r} has hidden layers of the groups {named}; the published models read networks of one of the "
            "groups sign, positive and permutation. "
            "Train a model anew."
        )
    if bidirectional and Scaling.POSITIVE in groups and not parity:
        raise ValueError(
            "The published bidirectional model of positive scales is not equivariant: no equivariant model has these "
            "weights. Import it with parity=True to repeat it, or train one anew."
        )


def _encoder_key(model: _heads.Encoder, path: str) -> str:
    """The published name of the tensor at a path of our variables."""
    part, _, rest = path.partition("/")
    if part == "gmn":
        return _gmn_key(model.gmn, path)
    if part in ("outputs", "inputs"):
        return f"gnn.project_{'last' if part == 'outputs' else 'first'}.{_DENSE[rest]}"
    if part == "invariant":
        return f"gnn.readout.g1.{_mlp_key(rest)}"
    name = {"local": "local_mlp", "mlp": "rho" if model.readout is _heads.Readout.LAST_LAYER else "global_mlp"}[part]
    return f"gnn.readout.{name}.{_MLP[rest]}"


def _gmn_key(model: _heads.ScaleGMN, path: str) -> str:
    """As `_encoder_key`, for the paths below gmn and for the scales of an editor."""
    _, first, *rest = path.split("/")
    if first in _FEATURES:
        return _FEATURES[first]
    index = int(first.removeprefix("layer_"))
    direction = "bw" if rest[0].startswith("backward_") else "fw"
    part, inner = rest[0].removeprefix("backward_"), "/".join(rest[1:])
    layer = f"gnn.{direction}_layers.{index}"
    if part == "skip_kernel":
        return f"gnn.skip_layers.{index}.weight"
    if part in ("sender_kernel", "edge_kernel"):
        return f"{layer}.{'w_v' if part == 'sender_kernel' else 'w_e'}.weight"
    if part == "edge_update":
        module = (
            f"gnn.{direction}_update_edge_attr_fn.{index}" if model.bidirectional else f"{layer}.update_edge_attr_fn"
        )
        if inner == "kernel":
            return f"{module}.W.weight"
        return f"{module}.phi.{_MLP[inner]}" if inner in _MLP else f"{module}.{_mlp_key(inner, 'g1.')}"
    module = f"{layer}.message_fn"
    if part == "update":
        module = f"gnn.update_node_feats_fn.{index}" if model.bidirectional else f"{layer}.update_node_feats_fn"
    if inner in _MLP:
        return f"{module}.rho.{_MLP[inner]}"
    maps, part, *rest = inner.split("/")
    number = int(maps.removeprefix("maps_"))
    if part == "gamma":
        return f"{module}.eq_layers.{number}.W.weight"
    if part == "gate":
        return f"{module}.eq_layers.{number}.g.g1.{_mlp_key('/'.join(rest))}"
    if model.io is IO.GATE:
        return f"{module}.eq_layers.{number}.g.phi_in.{_MLP[rest[0]]}"
    end = "last" if part == "end_output" and model.io is IO.SEPARATE else "in"
    return f"{module}.eq_layers_{end}.{number}.rho.{_MLP[rest[0]]}"


def _mlp_key(path: str, prefix: str = "") -> str:
    """canonical/rho/... and phi/... of an invariant map."""
    *_, mlp, name = path.split("/")
    return f"{prefix if mlp == 'rho' else ''}{mlp}.{_MLP[name]}"


def _ends(model: _heads.Encoder) -> bool:
    return model.readout is _heads.Readout.LAST_LAYER


def _unused(model: _heads.ScaleGMN, *, ends: bool, prefix: str = "") -> str:
    """A pattern of the tensors that the published code builds and that have no part in its result."""
    patterns = [r"gnn\.readout\.(phi|aggr)\."]
    if model.io is not IO.GATE:  # a message never comes to the inputs, and backward never to the outputs
        patterns.append(r"gnn\.(fw|bw)_layers\.\d+\.message_fn\.eq_layers_(in|last)\.")
    if ends:  # what the last layer computes for nodes that nothing reads
        patterns.append(rf"gnn\.((fw|bw)_layers|update_node_feats_fn)\.{model.num_layers - 1}\.")
    return re.escape(prefix) + f"({'|'.join(patterns)})"


def _count(state_dict: StateDict, pattern: str) -> int:
    """How many modules there are, by the highest number in their names; at least one, to be found missing."""
    matches = [re.match(pattern, key) for key in state_dict]
    return max((int(match[1]) + 1 for match in matches if match), default=1)


def _present(state_dict: StateDict, key: str) -> np.ndarray:
    if key not in state_dict:
        raise ValueError(f"{_FOREIGN}: {key!r} is missing among {len(state_dict)} tensors {list(state_dict)[:5]}.")
    return np.asarray(state_dict[key])


def _variables(
    arch: Architecture,
    model: _heads.Encoder | _heads.Editor | _heads.Autoencoder,
    state_dict: StateDict,
    key_of: Callable[[str], str],
    unused: str,
) -> dict[str, Any]:
    """The model's variables from published tensors, in exactly the structure of `model.init`."""
    gmn = model.encoder.gmn if isinstance(model, _heads.Autoencoder) else model.gmn
    outputs = arch.neuron_layers[-1].width
    if outputs != 1 and gmn.edge_encoding:
        raise ValueError(
            f"{arch.name!r} has {outputs} outputs; expected 1. With more, the published edge encodings "
            "depend on the order of the hidden neurons, so that no invariant model has these weights. Train one anew."
        )
    expected = _descriptions.abstract_variables(model)
    shapes: dict[str, Any] = dict(traverse_util.flatten_dict(jax.tree.map(np.shape, expected["params"]), sep="/"))
    scales = shapes.pop("out_scales", None)
    keys = {path: key_of(path) for path in shapes}
    own = {} if scales is None else _scale_keys(arch)
    _check_keys(state_dict, {*keys.values(), *own.values()}, unused)
    params = {}
    for path, key in keys.items():
        flip = key.endswith(".weight")  # Linear.weight is [out, in]; of a vector the transpose is itself
        value = torch_layout.checked_tensor(state_dict, key, shapes[path][::-1] if flip else shapes[path], arch.name)
        params[path] = jnp.asarray(value.T if flip else value)
    if scales is not None:
        params["out_scales"] = jnp.stack(
            [jnp.asarray(torch_layout.checked_tensor(state_dict, key, (), arch.name)) for key in own.values()]
        )
    return {"params": traverse_util.unflatten_dict(params, sep="/")}


def _scale_keys(arch: Architecture) -> dict[Parameter, str]:
    """The learned factor of an editor for every parameter, in the order of `arch.parameters`."""
    layers = list(dict.fromkeys(parameter.path[0] for parameter in arch.parameters))
    return {
        parameter: f"{'weight' if parameter.path[-1] == 'kernel' else 'bias'}_scale.{layers.index(parameter.path[0])}"
        for parameter in arch.parameters
    }


def _check_keys(state_dict: StateDict, expected: set[str], unused: str) -> None:
    missing = sorted(expected - set(state_dict))
    additional = sorted(key for key in set(state_dict) - expected if not re.match(unused, key))
    if missing or additional:
        raise ValueError(
            f"{_FOREIGN}: missing are {len(missing)} tensors {missing[:5]}, additional {len(additional)} "
            f"{additional[:5]}. Check that the architecture and its groups are those of the training."
        )
