"""Layers that consist of others: modules inside of modules, residual blocks, and torchvision's ResNets."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias, Union, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import _bounded
from jax_scalegmn.layers._kinds import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    GlobalAvgPool,
    MaxPool,
    Shapes,
    Single,
    Tensors,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A torch.nn.Sequential inside of the network: its layers one after the other, with its name before theirs.

    Attributes:
      layers: The layers; an activation without options may be its name alone. They are numbered from 0.
      name: The module's name, like "features"; None for its place in the list, "" for none before those inside.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.layers import Block, Conv, Dense, GlobalAvgPool
    >>> features = Block([Conv(4, 3, use_bias=False), "relu", Conv(4, 3, use_bias=False)], name="features")
    >>> arch = sg.sequential([features, GlobalAvgPool(), Dense(2, use_bias=False, name="head")], (1, 8, 8))
    >>> [name for (name,) in arch.array_shapes]
    ['features.0.weight', 'features.2.weight', 'head.weight']
    """

    layers: tuple["Layer | str", ...]
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", listed(self.layers))

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors, by their names inside of it, for an input of that shape."""
        return arranged(listed(self.layers), shape)[0]

    def __call__(self, tensors: Tensors, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Computes the layers on a batch."""
        return compute(listed(self.layers), tensors, x)


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual block: the sum of what two lists of layers compute of its input, before any activation.

    Attributes:
      branch: The layers of one side, numbered from 0.
      shortcut: Those of the other, named "downsample.0" and so on, as torchvision does; empty for the input itself.
      name: As in `Block`.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.layers import Dense, Residual
    >>> block = Residual([Dense(8, name="up"), "relu", Dense(4, name="down")], name="block")
    >>> arch = sg.sequential([Dense(4), block, "relu", Dense(1)], (3,))
    >>> [(layer.name, layer.width) for layer in arch.hidden]
    [('0.weight', 4), ('block.up.weight', 8)]
    """

    branch: tuple["Layer | str", ...]
    shortcut: tuple["Layer | str", ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "branch", listed(self.branch))
        object.__setattr__(self, "shortcut", listed(self.shortcut) if self.shortcut else ())

    @property
    def sides(self) -> tuple[tuple["Layer", ...], tuple["Layer", ...]]:
        """The layers of the branch and of the shortcut."""
        return listed(self.branch), listed(self.shortcut) if self.shortcut else ()

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors, by their names inside of it, for an input of that shape."""
        branch, shortcut = self.sides
        own, out = arranged(branch, shape)
        other, at_other = arranged(shortcut, shape, _DOWNSAMPLE)
        if out != at_other:
            raise ValueError(
                f"{_bounded.short(self)} adds values of shapes {out} and {at_other}, for an input of shape {shape}; "
                "expected one shape. Give the shortcut a convolution."
            )
        if twice := own.keys() & other.keys():
            raise ValueError(f"Two modules are named {min(twice)!r}; expected one name each. Pass name=.")
        return own | other

    def __call__(self, tensors: Tensors, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Computes the sum on a batch."""
        branch, shortcut = self.sides
        return compute(branch, tensors, x) + compute(shortcut, tensors, x, _DOWNSAMPLE)


@dataclasses.dataclass(frozen=True)
class BasicBlock:
    """The block of torchvision's ResNet-18 and -34, with its names: two convolutions, batch normalized, and a sum.

    The shortcut is the input, or, where the shape changes, a 1x1 convolution with a batch normalization.

    Attributes:
      features: The number of channels.
      stride: The stride of the first convolution.
      name: As in `Block`; in torchvision "layer1.0" and so on.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.layers import BasicBlock, Conv, Dense, GlobalAvgPool
    >>> layers = [Conv(4, 3, name="conv1"), BasicBlock(8, stride=2, name="layer1.0"), GlobalAvgPool(), Dense(2)]
    >>> arch = sg.sequential(layers, (1, 8, 8))
    >>> arch.array_shapes["layer1.0.downsample.0.weight",]
    (8, 4, 1, 1)
    """

    features: int
    stride: int = 1
    name: str | None = None

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors, by their names inside of it, for an input of that shape."""
        return arranged(self.layers(shape[0]), shape)[0]

    def layers(self, channels: int) -> tuple["Layer", ...]:
        """The layers that it consists of, for an input of that many channels."""
        return _torchvision_block(self, channels, [(self.features, 3, self.stride), (self.features, 3, 1)])

    def __call__(self, tensors: Tensors, x: Float[Array, "n in h w"]) -> Float[Array, "n out _h _w"]:
        """Computes the block on a batch."""
        return compute(self.layers(x.shape[1]), tensors, x)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """The block of torchvision's ResNet-50, -101 and -152, with its names: a 3x3 convolution between two of 1x1.

    The shortcut is as in `BasicBlock`.

    Attributes:
      features: The number of channels of the 3x3 convolution.
      stride: Its stride.
      expansion: How many times as many channels the block's output has.
      name: As in `Block`; in torchvision "layer1.0" and so on.

    >>> import jax_scalegmn as sg
    >>> from jax_scalegmn.layers import Bottleneck, Dense, GlobalAvgPool
    >>> arch = sg.sequential([Bottleneck(2, name="layer1.0"), GlobalAvgPool(), Dense(3, name="fc")], (4, 8, 8))
    >>> arch.array_shapes["layer1.0.conv3.weight",], arch.array_shapes["fc.weight",]
    ((8, 2, 1, 1), (3, 8))
    """

    features: int
    stride: int = 1
    expansion: int = 4
    name: str | None = None

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors, by their names inside of it, for an input of that shape."""
        return arranged(self.layers(shape[0]), shape)[0]

    def layers(self, channels: int) -> tuple["Layer", ...]:
        """The layers that it consists of, for an input of that many channels."""
        wide = self.expansion * self.features
        return _torchvision_block(
            self, channels, [(self.features, 1, 1), (self.features, 3, self.stride), (wide, 1, 1)]
        )

    def __call__(self, tensors: Tensors, x: Float[Array, "n in h w"]) -> Float[Array, "n out _h _w"]:
        """Computes the block on a batch."""
        return compute(self.layers(x.shape[1]), tensors, x)


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A whole ResNet as torchvision has it, with its names: "conv1.weight", "layer1.0.conv1.weight", ..., "fc.bias".

    A 7x7 convolution with stride 2, batch normalization, relu, max pooling of 3x3 with stride 2, four stages of
    `BasicBlock` or `Bottleneck` of which all but the first begin with stride 2, the mean over positions, a dense layer.

    Attributes:
      depth: 18, 34, 50, 101 or 152.
      width: The channels of the first convolution and of the first stage; 64 in torchvision.
      outputs: The number of outputs.
      name: As in `Block`; "" for torchvision's own names.

    >>> import jax_scalegmn as sg
    >>> arch = sg.sequential([sg.layers.ResNet(18, width=4, outputs=10)], (3, 32, 32))
    >>> arch.array_shapes["layer2.0.downsample.0.weight",], len(arch.hidden)
    ((8, 4, 1, 1), 12)
    """

    depth: int = 18
    width: int = 64
    outputs: int = 1000
    name: str | None = ""

    def __post_init__(self) -> None:
        if self.depth not in _BLOCKS_OF_DEPTH:
            raise ValueError(f"depth is {self.depth!r}; expected one of {sorted(_BLOCKS_OF_DEPTH)}.")

    @property
    def layers(self) -> tuple["Layer", ...]:
        """The layers that it consists of."""
        kind: type[BasicBlock] | type[Bottleneck] = BasicBlock if self.depth < 50 else Bottleneck
        blocks = [
            kind(self.width * 2**stage, 2 if stage and not number else 1, name=f"layer{stage + 1}.{number}")
            for stage, count in enumerate(_BLOCKS_OF_DEPTH[self.depth])
            for number in range(count)
        ]
        stem = Conv(self.width, 7, stride=2, padding=3, use_bias=False, name="conv1"), BatchNorm(name="bn1"), _RELU
        head = GlobalAvgPool(), Dense(self.outputs, name="fc")
        return (*stem, MaxPool(3, stride=2, padding=1), *blocks, *head)

    def shapes(self, shape: tuple[int, ...]) -> Shapes:
        """The shapes of its tensors, by their names inside of it, for an input of that shape."""
        return arranged(self.layers, shape)[0]

    def __call__(self, tensors: Tensors, x: Float[Array, "n in h w"]) -> Float[Array, "n outputs"]:
        """Computes the network on a batch."""
        return compute(self.layers, tensors, x)


Layer: TypeAlias = Union[Single, Block, Residual, BasicBlock, Bottleneck, ResNet]  # noqa: UP007  # strings name it

# --- used by `sequential` -----------------------------------------------------------------------------------------


def listed(layers: Sequence[Layer | str]) -> tuple[Layer, ...]:
    """The layers, with an activation for each name.

    Raises:
      ValueError: If one is no layer, or there are none.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers is {_bounded.short(layers)}; expected a list of layers.")
    every = tuple(Activation(layer) if isinstance(layer, str) else layer for layer in layers)
    foreign = [layer for layer in every if not isinstance(layer, get_args(Layer))]
    if foreign or not every:
        kinds = ", ".join(kind.__name__ for kind in get_args(Layer))
        raise ValueError(f"layers holds {_bounded.short(foreign)}; expected one or more of {kinds}.")
    return every


def walk(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Yields every layer, each followed by those inside of it; those that torchvision's blocks consist of once."""
    for layer in layers:
        yield layer
        if isinstance(layer, Residual):
            yield from walk([inner for side in layer.sides for inner in side])
        elif isinstance(layer, Block):
            yield from walk(listed(layer.layers))
        elif isinstance(layer, ResNet):
            yield from walk(layer.layers)
        elif isinstance(layer, BasicBlock | Bottleneck):
            yield from walk(layer.layers(0))


def arranged(layers: Sequence[Layer], shape: tuple[int, ...], prefix: str = "") -> tuple[Shapes, tuple[int, ...]]:
    """The shapes of all tensors by name, and that of the output, for an input of a shape.

    Raises:
      ValueError: If a layer does not fit what comes before it, or two modules have one name.
    """
    shapes: Shapes = {}
    for name, layer in zip(_names(layers, prefix), layers, strict=True):
        own = layer.shapes(shape)
        shape = _output_shape(layer, own, shape)
        named = {f"{name}.{kind}" if name else kind: size for kind, size in own.items()}
        if named.keys() & shapes.keys():
            raise ValueError(f"Two modules are named {name!r}; expected one name each. Pass name=.")
        shapes |= named
    return shapes, shape


def compute(layers: Sequence[Layer], tensors: Tensors, x: Array, prefix: str = "") -> Array:
    """What layers compute on a batch, one after the other."""
    for name, layer in zip(_names(layers, prefix), layers, strict=True):
        start = f"{name}." if name else ""
        own = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        if isinstance(layer, get_args(Single)):
            own = {kind: value for kind, value in own.items() if "." not in kind}
        x = layer(own, x)
    return x


# --- private ------------------------------------------------------------------------------------------------------

_RELU = Activation("relu")
_DOWNSAMPLE = "downsample."
_BLOCKS_OF_DEPTH = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _names(layers: Sequence[Layer], prefix: str) -> list[str]:
    """The names of modules: their own, or their places in the list."""
    own = [getattr(layer, "name", None) for layer in layers]
    return [f"{prefix}{place}" if name is None else name for place, name in enumerate(own)]


def _torchvision_block(
    block: BasicBlock | Bottleneck, channels: int, convolutions: Sequence[tuple[int, int, int]]
) -> tuple[Layer, ...]:
    """The convolutions of those (features, size, stride), with their names, the shortcut and the last activation."""
    branch: list[Layer] = []
    for number, (features, size, stride) in enumerate(convolutions, 1):
        name = f"conv{number}"
        branch.append(Conv(features, size, stride=stride, padding=size // 2, use_bias=False, name=name))
        branch += [BatchNorm(name=f"bn{number}"), _RELU]
    features = convolutions[-1][0]
    shortcut: tuple[Layer, ...] = ()
    if block.stride != 1 or channels != features:
        shortcut = (Conv(features, 1, stride=block.stride, use_bias=False), BatchNorm())
    return Residual(tuple(branch[:-1]), shortcut, name=""), _RELU


def _output_shape(layer: Layer, tensors: Shapes, shape: tuple[int, ...]) -> tuple[int, ...]:
    abstract = {kind: jax.ShapeDtypeStruct(size, jnp.float32) for kind, size in tensors.items()}
    try:
        out = jax.eval_shape(layer, abstract, jax.ShapeDtypeStruct((2, *shape), jnp.float32)).shape[1:]
    except Exception as error:
        cause = _bounded.one_line(error, 500)
        raise ValueError(f"{_bounded.short(layer)} fails on values of shape {shape}: {cause}") from error
    for size in (math.prod(out), *map(math.prod, tensors.values())):
        _bounded.check("tensor_bytes", size, f"{_bounded.short(layer)}: the number of its values or weights")
    if 0 in out:
        raise ValueError(f"{layer} gets a map of shape {shape}, too small for it. Take larger images.")
    return tuple(out)
