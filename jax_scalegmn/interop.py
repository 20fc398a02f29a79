"""Networks and models from PyTorch: tensors (`torch_file.read_state_dict`) as the params of Flax."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jax_scalegmn import architecture, models
from jax_scalegmn.architecture import Architecture, Conv, Dense, Parameter
from jax_scalegmn.types import Params

# Tensors by name, in PyTorch's layout and in the order of the modules.
StateDict: TypeAlias = Mapping[str, np.ndarray]


def from_torch(arch: Architecture, state_dict: StateDict) -> dict[str, dict[str, jax.Array]]:
    """The params of a network whose modules stand in `state_dict` in the order of `arch.layers`.

    Linear weights [out, in] and convolutional ones [out, in, kh, kw] become kernels [in, out] and [kh, kw, in, out].
    Behind a Flatten the inputs are reordered, from PyTorch's channels slowest to channels fastest.

    Args:
      arch: of the network, with layers.
      state_dict: one weight and one bias for each linear or convolutional module, and nothing else.

    Raises:
      ValueError: on a missing, additional or misshapen tensor, or one that is not of finite floating-point numbers.
    """
    layers = [layer.name for layer in arch.layers if isinstance(layer, Dense | Conv)]
    if not layers or set(layers) != {parameter.path[0] for parameter in arch.parameters}:
        raise ValueError(
            f"{arch.name!r} does not say which layer each parameter is of (its layers are {layers}). Write the params "
            "yourself: kernels are transposed."
        )
    modules: dict[str, dict[str, str]] = {}
    for key in state_dict:
        module, _, kind = key.rpartition(".")
        if kind not in ("weight", "bias"):
            raise ValueError(f"{_named(key)} is no weight or bias, and {arch.name!r} expects no other. Remove it.")
        modules.setdefault(module, {})[kind] = key
    if len(modules) != len(layers):
        raise ValueError(
            f"The state_dict has {len(modules)} modules {list(modules)}; {arch.name!r} expects {len(layers)}, one for "
            f"each of {layers}. Remove modules of other networks, or use another Architecture."
        )
    keys = dict(zip(layers, modules.items(), strict=True))
    values = []
    for parameter in arch.parameters:
        layer, kind = parameter.path[0], "weight" if parameter.path[-1] == "kernel" else "bias"
        module, found = keys[layer]
        shape = _torch_shape(arch, parameter)
        if kind not in found:
            raise ValueError(
                f"{_named(f'{module}.{kind}'.lstrip('.'))} is missing; {arch.name!r} expects shape {shape} for "
                f"{architecture.describe(parameter.path)}. A module without bias needs one of zeros."
            )
        value = _tensor(state_dict, found[kind], shape, arch.name)
        values.append(jnp.asarray(_from_torch_layout(arch, parameter, value)))
    return architecture.pack(arch, values)


def encoder_from_published(
    arch: Architecture, state_dict: StateDict, *, dropout: float = 0.0
) -> tuple[models.Encoder, dict[str, Any]]:
    """The published invariant ScaleGMN for INRs (arXiv 2511.12601, forward, sign) as our model and its variables.

    All sizes follow from the tensors. `readout.phi`, which the published code never calls, is left out.

    Args:
      arch: of the networks that the model reads; one output.
      state_dict: of the published model, in PyTorch's layout; or its gradients, since the import is linear.
      dropout: rate in training, which the tensors do not tell; published: 0.2.

    Raises:
      ValueError: on a missing, additional or misshapen tensor, one with a NaN, or networks that the model cannot read.
    """
    keys = _encoder_keys(_count(state_dict, r"gnn\.fw_layers\.(\d+)\."))
    _check_keys(state_dict, keys, unused="gnn.readout.phi.")
    model = models.Encoder(arch, **_encoder_sizes(state_dict, ""), dropout=dropout, normalized=False)
    return model, _variables(model, keys, state_dict)


def autoencoder_from_published(
    arch: Architecture, state_dict: StateDict, *, dropout: float = 0.0
) -> tuple[models.Autoencoder, dict[str, Any]]:
    """The published ScaleGMN autoencoder for INRs (arXiv 2511.12601, forward, sign) as our model and its variables.

    As `encoder_from_published`, with the decoder; its outputs are reordered from the order of PyTorch's state_dict to
    that of `arch.parameters`.

    Raises:
      ValueError: as `encoder_from_published`.
    """
    encoder = _encoder_keys(_count(state_dict, r"encoder\.gnn\.fw_layers\.(\d+)\."))
    keys = {f"encoder/{ours}": f"encoder.{theirs}" for ours, theirs in encoder.items()}
    depth = max(1, _count(state_dict, r"decoder\.net\.fc\.(\d+)\."))
    for index in range(depth):
        name = "output" if index + 1 == depth else f"dense_{index}"
        keys |= {f"decoder/{name}/kernel": f"decoder.net.fc.{index}.weight"}
        keys |= {f"decoder/{name}/bias": f"decoder.net.fc.{index}.bias"}
    _check_keys(state_dict, keys, unused="encoder.gnn.readout.phi.")
    widths = tuple(np.size(state_dict[f"decoder.net.fc.{index}.bias"]) for index in range(depth - 1))
    sizes = _encoder_sizes(state_dict, "encoder.")
    model = models.Autoencoder(arch, **sizes, dropout=dropout, normalized=False, decoder_hidden=widths)
    variables = _variables(model, keys, state_dict)
    order = _output_order(arch)
    output = variables["params"]["decoder"]["output"]
    variables["params"]["decoder"]["output"] = {name: value[..., order] for name, value in output.items()}
    return model, variables


# --- private: tensors -----------------------------------------------------------------------------------------------


def _named(key: str) -> str:
    return f"state_dict[{key!r}]"


def _tensor(state_dict: StateDict, key: str, shape: Sequence[int], expecting: str) -> np.ndarray:
    """The tensor of that name, checked."""
    value = np.asarray(state_dict[key])
    if value.shape != tuple(shape):
        raise ValueError(
            f"{_named(key)} has shape {value.shape}; {expecting!r} expects {tuple(shape)}, in PyTorch's layout. It is "
            "of another architecture, or its modules stand in another order."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{_named(key)} is {value.dtype}; expected floating-point numbers. Convert quantized weights.")
    if not np.isfinite(value).all():
        raise ValueError(
            f"{_named(key)} holds {int((~np.isfinite(value)).sum())} NaN or infinite entries; expected finite numbers. "
            "The training diverged or the file is damaged: train or export it again."
        )
    return value


def _torch_shape(arch: Architecture, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter's tensor in PyTorch: [out], [out, in] or [out, in, kh, kw]."""
    shape = arch.shape(parameter)
    return (*shape[:-3:-1], *shape[:-2])


def _from_torch_layout(arch: Architecture, parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """A PyTorch tensor as the array of a parameter: its axes and, of flattened maps, its inputs in our order."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2:
        channels_slowest = value.reshape(len(value), -1, parameter.neuron_axes[0].repeat)
        return channels_slowest.transpose(2, 1, 0).reshape(arch.shape(parameter))
    return value


def _output_order(arch: Architecture) -> np.ndarray:
    """Where each entry of our flat network stands in PyTorch's."""
    order, start = [], 0
    for parameter in arch.parameters:
        shape = _torch_shape(arch, parameter)
        index = start + np.arange(math.prod(shape)).reshape(shape)
        order.append(_from_torch_layout(arch, parameter, index).reshape(-1))
        start += index.size
    return np.concatenate(order)


# --- private: the published model -----------------------------------------------------------------------------------


def _mlp_keys(ours: str, theirs: str) -> dict[str, str]:
    names = {
        "kernel_in": "fc.0.weight",
        "bias_in": "fc.0.bias",
        "norm_scale": "ln.0.weight",
        "norm_bias": "ln.0.bias",
        "kernel_out": "fc.1.weight",
        "bias_out": "fc.1.bias",
    }
    return {f"{ours}/{name}": f"{theirs}.{key}" for name, key in names.items()}


def _encoder_keys(num_layers: int) -> dict[str, str]:
    """The published name of every tensor of the encoder by its path in our variables."""
    keys = {
        "gmn/node_kernel": "construct_graph.proj_bias.weight",
        "gmn/edge_kernel": "construct_graph.proj_weight.weight",
        "gmn/node_encoding": "positional_embeddings.pos_embed",
        "gmn/edge_encoding": "positional_embeddings_edge.pos_embed",
        **_mlp_keys("invariant/rho", "gnn.readout.g1.rho"),
        **_mlp_keys("invariant/phi", "gnn.readout.g1.phi"),
        **_mlp_keys("readout", "gnn.readout.global_mlp"),
    }
    for index in range(num_layers):
        ours, theirs = f"gmn/layer_{index}", f"gnn.fw_layers.{index}"
        keys |= {
            f"{ours}/sender_kernel": f"{theirs}.w_v.weight",
            f"{ours}/edge_kernel": f"{theirs}.w_e.weight",
            f"{ours}/skip_kernel": f"gnn.skip_layers.{index}.weight",
        }
        for name, net in (("message", "message_fn"), ("update", "update_node_feats_fn")):
            layer = f"{theirs}.{net}.eq_layers.0"
            keys |= {f"{ours}/{name}/gamma": f"{layer}.W.weight"}
            keys |= _mlp_keys(f"{ours}/{name}/gate/rho", f"{layer}.g.g1.rho")
            keys |= _mlp_keys(f"{ours}/{name}/gate/phi", f"{layer}.g.g1.phi")
            keys |= _mlp_keys(f"{ours}/{name}/io_gate", f"{layer}.g.phi_in")
        if index + 1 < num_layers:
            update = f"{theirs}.update_edge_attr_fn"
            keys |= {f"{ours}/edge_update/kernel": f"{update}.W.weight"}
            keys |= _mlp_keys(f"{ours}/edge_update/rho", f"{update}.g1.rho")
            keys |= _mlp_keys(f"{ours}/edge_update/phi", f"{update}.phi")
    return keys


def _encoder_sizes(state_dict: StateDict, prefix: str) -> dict[str, Any]:
    readout = f"{prefix}gnn.readout.global_mlp.fc"
    return {
        "features": np.size(state_dict[f"{prefix}construct_graph.proj_bias.weight"]),
        "hidden": np.size(state_dict[f"{readout}.0.bias"]),
        "latent": np.size(state_dict[f"{readout}.1.bias"]),
        "num_layers": _count(state_dict, re.escape(prefix) + r"gnn\.fw_layers\.(\d+)\."),
    }


def _count(state_dict: StateDict, pattern: str) -> int:
    """How many modules there are, by the highest number in their names."""
    return max((int(found[1]) + 1 for key in state_dict if (found := re.match(pattern, key))), default=0)


def _check_keys(state_dict: StateDict, keys: Mapping[str, str], *, unused: str) -> None:
    expected = set(keys.values())
    missing = sorted(expected - set(state_dict))
    additional = sorted(key for key in set(state_dict) - expected if not key.startswith(unused))
    if missing or additional:
        raise ValueError(
            f"The state_dict is not of the published model: missing are {len(missing)} tensors {missing[:5]}, "
            f"additional {len(additional)} {additional[:5]}. Only the INR configuration can be imported: forward, sign "
            "with sign_symmetrization, mlp_on_io False, gnn_skip_connections, both positional encodings, full_graph "
            "readout."
        )


def _variables(
    model: models.Encoder | models.Autoencoder, keys: Mapping[str, str], state_dict: StateDict
) -> dict[str, Any]:
    """The model's variables from published tensors, in exactly the structure of `model.init`."""
    arch = model.arch
    if arch.neurons[-1].width != 1:
        raise ValueError(
            f"{arch.name!r} has {arch.neurons[-1].width} outputs; expected 1. With more, the published edge encodings "
            "depend on the order of the hidden neurons, so that no invariant model has these weights. Train one anew."
        )
    network: Params = architecture.pack(
        arch, [jax.ShapeDtypeStruct(arch.shape(parameter), jnp.float32) for parameter in arch.parameters]
    )
    expected = jax.eval_shape(model.init, jax.random.key(0), network)
    shapes: dict[str, Any] = dict(traverse_util.flatten_dict(jax.tree.map(np.shape, expected["params"]), sep="/"))
    if keys.keys() != shapes.keys():
        raise ValueError(f"{model} has other parameters than the published one: {sorted(keys.keys() ^ shapes.keys())}.")
    params = {}
    for path, key in keys.items():
        flip = key.endswith(".weight")  # Linear.weight is [out, in]; of a vector the transpose is itself
        value = _tensor(state_dict, key, shapes[path][::-1] if flip else shapes[path], arch.name)
        params[path] = jnp.asarray(value.T if flip else value)
    return {"params": traverse_util.unflatten_dict(params, sep="/")}
