"""Learned alignment: models that read networks and say by which group elements their neurons correspond.

Weight matching minimizes a distance of weights, and a search evaluates thousands of merged networks. Here a metanetwork
turns every neuron into a vector that follows its permutation and sign (as Navon et al. 2023, arXiv 2310.13397, do for
permutations). It is trained on what merged networks compute, by `training.losses.alignment`. In use an alignment costs
one forward pass and one assignment per layer, without data.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jax_scalegmn import architecture, matching, stacks, symmetry
from jax_scalegmn.architecture import Architecture, NeuronLayer, Scaling
from jax_scalegmn.matching import Matching, relaxation
from jax_scalegmn.models import graph
from jax_scalegmn.models._heads import divided
from jax_scalegmn.models._lean import LeanGMN, rms_normalized
from jax_scalegmn.models._scalegmn import ScaleGMN
from jax_scalegmn.symmetry import Element
from jax_scalegmn.types import Params

# Vectors or scores, by hidden neuron layer.
_ByLayer = dict[str, Array]


class _Aligner(nn.Module):
    """What `Matcher` and `Frame` share: the vectors of hidden neurons, and the scores between two sets of vectors."""

    arch: Architecture
    encoder: LeanGMN | ScaleGMN
    outputs: int = 32
    scales: tuple[float, ...] | None = None
    num_iterations: int = 20

    @property
    def balanced_arch(self) -> Architecture:
        """The architecture in the balanced gauge, where permutations and signs alone are left."""
        return architecture.restrict(self.arch, Scaling.SIGN)

    def setup(self) -> None:
        _check(self)
        self.heads = {n.name: nn.Dense(self.outputs, use_bias=False, name=f"head_{n.name}") for n in self.arch.hidden}
        self.sharpness = {n.name: self.param(_tag(n), nn.initializers.constant(1.0), ()) for n in self.arch.hidden}

    def embed(self, params: Params) -> dict[str, Float[Array, "n outputs"]]:
        """The vector of every hidden neuron: where a neuron is moved or flipped, so is its vector; scales do nothing.

        Args:
          params: One network of `arch`.

        Raises:
          ValueError: If the network does not fit, or the variables are those of other layers or groups.
        """
        architecture.check_params(self.arch, params)
        return self._embed(symmetry.balanced(self.arch, stacks.at_least_float32(params)))

    def _embed(self, balanced: Params) -> _ByLayer:
        arch = self.balanced_arch
        features = self.encoder(graph.from_params(arch, divided(arch, balanced, self.scales))).nodes
        places = graph.topology(arch).nodes
        return {name: head(rms_normalized(features[places[name]])) for name, head in self.heads.items()}

    def _embed_both(self, one: Params, other: Params) -> tuple[_ByLayer, _ByLayer]:
        """The vectors of two networks, by one program, which compiles in half the time."""
        both = nn.vmap(_Aligner._embed, variable_axes={"params": None}, split_rngs={"params": False})
        embedded = both(self, stacks.stack(one, other))
        first, second = (stacks.member(embedded, index) for index in range(2))
        return first, second

    def _scores(self, goal: _ByLayer, source: _ByLayer) -> _ByLayer:
        """By layer exp(sharpness) <goal_i, source_j> / sqrt(outputs)."""
        size = self.outputs**0.5
        # At full precision: where two scores nearly tie, rounding must not decide otherwise for a moved network.
        return {
            name: jnp.exp(sharpness) / size * jnp.matmul(goal[name], source[name].T, precision="highest")
            for name, sharpness in self.sharpness.items()
        }

    def _moved(self, scores: _ByLayer, balanced: Params, *, hard: bool) -> Params:
        arch = self.balanced_arch
        if hard:
            return symmetry.act(arch, relaxation.harden(arch, scores), balanced)
        return relaxation.soft_act(arch, relaxation.soften(arch, scores, num_iterations=self.num_iterations), balanced)


class Matcher(_Aligner):
    """A learned matcher of two networks: one forward pass, and one assignment for each layer.

    An encoder turns every hidden neuron of the two networks into a vector e, odd where signs act. The scores of a layer
    are S = exp(sharpness) e_target e_params^T / sqrt(outputs), and the element is the assignment that maximizes |S|
    with the signs of S at its places; where no sign acts it maximizes S. Both networks are read in their norm-balanced
    gauges, which settle positive scales. So for group elements g and h, ties apart,

        Matcher(h params, g target) = g Matcher(params, target) h^-1

    For training, `Sinkhorn(log 2 cosh S) * tanh S` takes the place of the element (`matching.relaxation`). Learned
    matching of permutations: Navon et al. (2023, arXiv 2310.13397). `training.losses.alignment` trains it, and its
    matching can be the `start` of `matching.search_matching`.

    Attributes:
      arch: The architecture of both networks.
      encoder: Reads balanced networks: `alignment_encoder(arch)`, or another model of `architecture.restrict(arch,
        Scaling.SIGN)`.
      outputs: The number of entries of a neuron's vector.
      scales: The usual size of every parameter's entries (`zoo.scales`), divided out first; None: weights unchanged.
      num_iterations: The number of Sinkhorn iterations in training.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.models.Matcher(arch, sg.models.alignment_encoder(arch, features=4, num_layers=1))
    >>> params = sg.architecture.abstract_params(arch)
    >>> found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), params, params)
    >>> found.element.permutation["hidden_0"].shape
    (4,)
    """

    def __call__(self, params: Params, target: Params) -> Matching:
        """The matching that moves `params` next to `target`; its sweeps are 0, since it is no search."""
        pair, scores = self._pair(params, target)
        element = pair.between_given(relaxation.harden(pair.arch, scores))
        similarity = matching.similarity(self.arch, symmetry.act(self.arch, element, params), target)
        return Matching(element, similarity, jnp.asarray(0), jnp.isfinite(similarity))

    def scores(self, params: Params, target: Params) -> dict[str, Float[Array, "n n"]]:
        """The scores of every layer; row: neuron of the target, column: neuron of params."""
        return self._pair(params, target)[1]

    def resized(self, arch: Architecture, scales: tuple[float, ...] | None = None) -> "Matcher":
        """The matcher of networks with other numbers of neurons, which takes the variables of this one.

        What a trained matcher knows is about neurons and weights, not how many there are. That it may be used on other
        widths is no promise that it is good there: compare it with `matching.weight_matching` first.

        Args:
          arch: The other architecture: the same inputs, outputs, layers and groups, in other widths.
          scales: The usual sizes of that architecture's parameters (`zoo.scales`); None for those of this model.

        Raises:
          ValueError: If inputs, outputs, layers or groups differ, or the encoder is not one of the library's.

        >>> import jax
        >>> import jax_scalegmn as sg
        >>> arch, wide = sg.siren((2, 4, 1)), sg.siren((2, 6, 1))
        >>> model = sg.models.Matcher(arch, sg.models.alignment_encoder(arch, features=4, num_layers=1))
        >>> variables = sg.models.abstract_variables(model)
        >>> params = sg.architecture.abstract_params(wide)
        >>> found = jax.eval_shape(model.resized(wide).apply, variables, params, params)
        >>> found.element.permutation["hidden_0"].shape
        (6,)
        """
        _check_alike(self.arch, arch)
        if not isinstance(self.encoder, LeanGMN | ScaleGMN):
            raise ValueError(
                f"The encoder is a {type(self.encoder).__name__}; expected a LeanGMN or ScaleGMN. Build a Matcher of "
                "the other architecture with an encoder that reads it, and apply it to these variables."
            )
        encoder = self.encoder.clone(arch=architecture.restrict(arch, Scaling.SIGN), parent=None, name=None)
        chosen = self.scales if scales is None else scales
        return self.clone(arch=arch, encoder=encoder, scales=chosen, parent=None, name=None)

    def as_frame(self, variables: Any, params: Params) -> tuple["Frame", Any]:
        """The frame of one network: every other is moved as this matcher moves it next to the balanced `params`.

        Trained further (`training.init` takes its variables), the frame merges better than that of one network. On INRs
        of digits it took half of the passes that a frame with random variables took.

        Args:
          variables: Those of the trained matcher.
          params: The network whose neurons become the slots.

        Returns:
          The frame, and its variables.

        Raises:
          ValueError: If the network does not fit, or the variables are those of other layers or groups.

        >>> import jax
        >>> import jax_scalegmn as sg
        >>> arch = sg.siren((2, 4, 1))
        >>> model = sg.models.Matcher(arch, sg.models.alignment_encoder(arch, features=4, num_layers=1))
        >>> variables, params = sg.models.abstract_variables(model), sg.architecture.abstract_params(arch)
        >>> frame_variables = jax.eval_shape(lambda *given: model.as_frame(*given)[1], variables, params)
        >>> frame_variables["params"]["slots_hidden_0"].shape
        (4, 32)
        """
        frame = Frame(self.arch, self.encoder, self.outputs, self.scales, self.num_iterations, parent=None)
        slots = self.apply(variables, params, method="embed")
        learned = variables["params"] | {_slots_of(name): vectors for name, vectors in slots.items()}
        return frame, dict(variables) | {"params": learned}

    def brought_together(self, params: Params, target: Params, *, hard: bool = False) -> tuple[Params, Params]:
        """(moved, goal): both networks balanced, params moved next to the target, softly unless hard."""
        pair, scores = self._pair(params, target)
        return self._moved(scores, pair.source, hard=hard), pair.goal

    def _pair(self, params: Params, target: Params) -> tuple[symmetry.BalancedPair, _ByLayer]:
        architecture.check_params(self.arch, params)
        architecture.check_params(self.arch, target, name="target")
        pair = symmetry.balanced_pair(self.arch, params, target)
        return pair, self._scores(*self._embed_both(pair.goal, pair.source))


class Frame(_Aligner):
    """A learned frame: one element for each network, so that N networks are aligned by N forward passes.

    As `Matcher`, with learned slots in place of the target's neurons: S = exp(sharpness) slots e_params^T /
    sqrt(outputs). The element moves every neuron to the slot that it belongs to and brings positive scales into the
    balanced gauge.
    No reference network is needed, and functions are kept: Frame(g params) = Frame(params) g^-1, ties apart, so all
    members of an orbit are moved to one network. Elements of pairs, e_target^-1 e_params, are cycle-consistent
    (`matching.relative`); `matching.framed` applies elements to a stack.

    The slots start as the vectors of the network by which the model is initialized. `Matcher.as_frame` makes a frame
    from a trained matcher.

    Attributes:
      arch: The architecture of the networks.
      encoder: As in `Matcher`, and so are outputs, scales and num_iterations.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.siren((2, 4, 1))
    >>> model = sg.models.Frame(arch, sg.models.alignment_encoder(arch, features=4, num_layers=1))
    >>> element, variables = jax.eval_shape(
    ...     model.init_with_output, jax.random.key(0), sg.architecture.abstract_params(arch)
    ... )
    >>> element.permutation["hidden_0"].shape, variables["params"]["slots_hidden_0"].shape
    ((4,), (4, 32))
    """

    def __call__(self, params: Params) -> Element:
        """The element that moves a network into the frame; the same as `align`."""
        return self.align(params)

    def align(self, params: Params) -> Element:
        """The element that moves a network into the frame.

        Raises:
          ValueError: If the network does not fit, or the variables are those of other layers, widths or groups.
        """
        architecture.check_params(self.arch, params)
        wide = stacks.at_least_float32(params)
        to_balanced = symmetry.balance(self.arch, wide)
        embedded = self._embed(symmetry.act(self.arch, to_balanced, wide))
        element = relaxation.harden(self.balanced_arch, self._scores(self._slots(embedded), embedded))
        return symmetry.compose(self.arch, element, to_balanced)

    def brought_together(self, params: Params, target: Params, *, hard: bool = False) -> tuple[Params, Params]:
        """Both networks balanced and moved into the frame, softly unless hard."""
        balanced = [symmetry.balanced(self.arch, stacks.at_least_float32(one)) for one in (params, target)]
        embedded = self._embed_both(*balanced)
        slots = self._slots(embedded[0])
        moved = [self._moved(self._scores(slots, e), p, hard=hard) for e, p in zip(embedded, balanced, strict=True)]
        return moved[0], moved[1]

    @nn.compact
    def _slots(self, embedded: _ByLayer) -> _ByLayer:
        for name, vectors in embedded.items():
            if not self.is_initializing():
                stored = self.variables["params"][_slots_of(name)].shape
                if stored != vectors.shape:
                    raise ValueError(
                        f"The variables have slots of shape {stored} for layer {name!r}; expected {vectors.shape}. A "
                        "frame is for networks of one width: use the architecture that it was trained on."
                    )
        return {name: self.param(_slots_of(name), lambda _, start=e: start) for name, e in embedded.items()}


def alignment_encoder(arch: Architecture, features: int = 48, **options: Any) -> LeanGMN:
    """The usual encoder of a `Matcher` or `Frame`: a `LeanGMN` that reads the networks in the balanced gauge.

    Args:
      arch: The networks' architecture, that of the matcher or frame. Restrict both to Scaling.PERMUTATION to align by
        permutations alone.
      features: The number of features of a neuron.
      **options: Further attributes of `LeanGMN`.

    >>> import jax_scalegmn as sg
    >>> sg.models.alignment_encoder(sg.mlp((2, 8, 1)), features=16).arch.hidden[0].scaling.value
    'permutation'
    """
    return LeanGMN(architecture.restrict(arch, Scaling.SIGN), features, **options)


# --- private ------------------------------------------------------------------------------------------------------

_SHARPNESS = "sharpness_"


def _tag(neurons: NeuronLayer) -> str:
    """The name of a layer's sharpness among the variables, which says the group too."""
    return f"{_SHARPNESS}{neurons.name}_{neurons.scaling.value}"


def _slots_of(name: str) -> str:
    """The name of a layer's slots among the variables of a frame."""
    return f"slots_{name}"


def _check_alike(arch: Architecture, other: Architecture) -> None:
    """Checks that two architectures have the same layers, in widths that may differ inside."""

    def described(one: Architecture) -> tuple[Any, ...]:
        hidden = [(neurons.name, neurons.scaling.value) for neurons in one.hidden]
        ends = [(one.neuron_layers[at].name, one.neuron_layers[at].width) for at in (0, -1)]
        return ends, hidden, [(p.path, [type(axis).__name__ for axis in p.axes]) for p in one.parameters]

    for expected, got in zip(described(arch), described(other), strict=True):
        if got != expected:
            raise ValueError(
                f"{other.name!r} has {got}; expected {expected}, as {arch.name!r}, which this matcher is for. Widths "
                "alone may differ: train a matcher for the other architecture."
            )


def _check(model: _Aligner) -> None:
    """Checks that the encoder reads what the model passes on, and that variables are those of its layers and groups."""
    expected = model.balanced_arch
    if model.encoder.arch != expected:
        raise ValueError(
            f"The encoder reads {model.encoder.arch.name!r}; expected {expected.name!r}: the architecture restricted "
            "to Scaling.SIGN, since networks are read in the balanced gauge. models.alignment_encoder makes one."
        )
    if isinstance(model.encoder, ScaleGMN) and model.encoder.dropout:
        raise ValueError(f"The encoder has dropout {model.encoder.dropout}, which alignment never applies; expected 0.")
    stored = {name for name in model.variables.get("params", {}) if name.startswith(_SHARPNESS)}
    wanted = {_tag(neurons) for neurons in model.arch.hidden}
    if not model.is_initializing() and stored != wanted:
        raise ValueError(
            f"The variables are those of the layers and groups {sorted(stored)}; {model.arch.name!r} expects "
            f"{sorted(wanted)}. They were trained for another architecture or other groups: use its model, or train."
        )
