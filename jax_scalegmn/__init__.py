"""Learning on, aligning and merging neural networks in weight space.

>>> import jax
>>> import jax_scalegmn as sg
>>> arch = sg.siren((2, 16, 16, 1))
>>> target = sg.network.init(arch, jax.random.key(0))
>>> params = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), target)
>>> aligned = sg.matching.align(arch, params, target)
>>> bool(sg.merge.lerp(aligned, target, 0.5)["Dense_0"]["kernel"].shape == (2, 16))
True

The packages, from what a network is to what is done with many of them:

- `architecture`: the description from which all else follows, and builders of the usual ones.
- `inference`: reads a description off a network's own function.
- `layers`: describes a network by a list of layers.
- `network`: computes the networks that a description describes.
- `symmetry`: the group of a description, how it acts on params, canonical forms.
- `matching`: from networks to the group elements that align them.
- `merge`: from several networks to one.
- `models`: networks that read networks: graphs, ScaleGMN, its heads, baselines.
- `training`: losses, steps and checkpoints for those models.
- `zoo`: thousands of networks, fitted at once or read from published files.
- `io`: files of networks and images.
- `cli`: the command line `jax-scalegmn`.
- `report`: the "Same function?" page of two networks.

Next to them are the modules `landscape` (losses along paths and barriers), `testing` (checks for your own networks and
models), `stacks` (several networks in one pytree), `distributed` (many devices and processes) and `types`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_scalegmn import (
        architecture,
        cli,
        distributed,
        inference,
        io,
        landscape,
        layers,
        matching,
        merge,
        models,
        network,
        report,
        stacks,
        symmetry,
        testing,
        training,
        types,
        zoo,
    )
    from jax_scalegmn.architecture import (
        Architecture,
        Axis,
        NeuronLayer,
        Parameter,
        Scaling,
        cnn,
        mlp,
        resnet,
        siren,
        vgg,
    )
    from jax_scalegmn.inference import Inference, infer
    from jax_scalegmn.layers import sequential
    from jax_scalegmn.matching import Matching
    from jax_scalegmn.models import Autoencoder, Decoder, Editor, Encoder, ScaleGMN, autoencoder
    from jax_scalegmn.symmetry import Element
    from jax_scalegmn.types import Key, Params
    from jax_scalegmn.zoo import Zoo

# Every name and the module that has it. Nothing is imported before it is asked for (PEP 562), so that the command line
# can answer `--help` without JAX.
_MODULE_OF = {
    **dict.fromkeys(("Architecture", "Axis", "NeuronLayer", "Parameter", "Scaling"), "architecture"),
    **dict.fromkeys(("cnn", "mlp", "resnet", "siren", "vgg"), "architecture"),
    **dict.fromkeys(("Inference", "infer"), "inference"),
    "sequential": "layers",
    "Matching": "matching",
    **dict.fromkeys(("Autoencoder", "Decoder", "Editor", "Encoder", "ScaleGMN", "autoencoder"), "models"),
    "Element": "symmetry",
    **dict.fromkeys(("Key", "Params"), "types"),
    "Zoo": "zoo",
}

__all__ = [
    "Architecture",
    "Autoencoder",
    "Axis",
    "Decoder",
    "Editor",
    "Element",
    "Encoder",
    "Inference",
    "Key",
    "Matching",
    "NeuronLayer",
    "Parameter",
    "Params",
    "ScaleGMN",
    "Scaling",
    "Zoo",
    "architecture",
    "autoencoder",
    "cli",
    "cnn",
    "distributed",
    "infer",
    "inference",
    "io",
    "landscape",
    "layers",
    "matching",
    "merge",
    "mlp",
    "models",
    "network",
    "report",
    "resnet",
    "sequential",
    "siren",
    "stacks",
    "symmetry",
    "testing",
    "training",
    "types",
    "vgg",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
