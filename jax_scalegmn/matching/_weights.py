"""Weight matching: the group element that brings one network closest to another.

Maximizes <act(Q, params), target> over the group by coordinate ascent, one hidden neuron layer at a time
(Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1; with signs as Boufalis et al. 2025, arXiv 2511.12601), both
networks in their norm-balanced gauge, which settles the positive scales. Permutations and signs preserve norms, so the
maximum is the smallest squared distance too. Everything works under `jax.jit` and `jax.vmap`; the assignment solver is
an argument.
"""

import enum
import functools
import string
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jax_scalegmn import architecture, stacks, symmetry
from jax_scalegmn.architecture import Architecture, Axis, NeuronLayer
from jax_scalegmn.matching import assignment
from jax_scalegmn.matching.assignment import Assign
from jax_scalegmn.symmetry import Element, canonical
from jax_scalegmn.types import Key, Params

_T = TypeVar("_T")


class Start(enum.Enum):
    """Where the coordinate ascent of `weight_matching` begins.

    >>> from jax_scalegmn.matching import Start
    >>> [start.name for start in Start]
    ['IDENTITY', 'FORWARD']
    """

    IDENTITY = "identity"
    """Every neuron is matched to the neuron at its own place."""
    FORWARD = "forward"
    """Layer by layer from the input, each matched by the parameters whose other axis is settled already."""


class Matching(NamedTuple):
    """The result of a matcher: how to move one network next to another, and how close it comes.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> sg.matching.weight_matching(arch, params, params).element.permutation["hidden_0"].tolist()
    [0, 1, 2]

    Attributes:
      element: The group element; `symmetry.act(arch, element, params)` is the aligned network.
      similarity: The `similarity` of the aligned network and the target, comparable between methods, starts and scales.
      sweeps: The number of passes over the hidden layers, of which those are left out whose neighbors have not moved
        since; for methods that train, the number of steps.
      converged: Whether a further sweep would change nothing.
      loss: What the element reaches in the objective of `search_matching`, or in the loss of `best_of`; None for
        matchers that report no loss.
      start_loss: What the start of `search_matching` had; None for the others.
      evaluations: How many times `search_matching` computed its objective; None for the others.
    """

    element: Element
    similarity: Float[Array, "*networks"]
    sweeps: Int[Array, "*networks"]
    converged: Bool[Array, "*networks"]
    loss: Float[Array, "*networks"] | None = None
    start_loss: Float[Array, "*networks"] | None = None
    evaluations: Int[Array, "*networks"] | None = None


@stacks.any_container("params", "target")
def weight_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    key: Key | None = None,
    *,
    permute: bool = True,
    scale: bool | Bool[Array, ""] = True,
    start: "Start | Element | Matching" = Start.FORWARD,
    restarts: int = 0,
    max_sweeps: int = 100,
    assign: Assign | None = None,
) -> Matching:
    """Finds the group element that brings `params` closest to `target`, from the weights alone.

    Maximizes <act(Q, params), target> by coordinate ascent (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1). A
    hidden layer's score is C[i, j] = <target's parameters at neuron i, params' at neuron j>, with the other layers as
    matched so far. With signs the assignment maximizes |C| and the sign is C's at the matched place (+1 where C is
    0, so that no neuron is lost); parameters that no sign changes (power 0) add to the score without |.| (Boufalis et
    al. 2025, arXiv 2511.12601).

    With positive scales g, the networks are compared where every neuron's incoming and outgoing norms are equal
    (`symmetry.balance`), and the element is g_target^-1 Q g_params: act(element, params) is in the target's gauge.
    The action is linear, so merging there and merging in the balanced gauge result in one function.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> target = sg.network.init(arch, jax.random.key(0))
    >>> params = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), target)
    >>> matching = sg.matching.weight_matching(arch, params, target)
    >>> aligned = sg.symmetry.act(arch, matching.element, params)
    >>> bool((aligned["Dense_0"]["kernel"] == target["Dense_0"]["kernel"]).all())
    True

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.
      key: Consumed by restarts.
      permute: Whether neurons may be permuted.
      scale: Whether signs and positive scales may be used, where a layer's group has them. Without, networks are
        matched unchanged, by permutations. An array is read when the program runs: one program does both.
      start: Where to begin. FORWARD recovers a planted element exactly; IDENTITY can end in a local optimum; a given
        element, or that of a matching, is improved, except for its positive scales, which the gauge settles.
      restarts: The number of further starts from random permutations and signs; the most similar network of all starts
        wins.
      max_sweeps: The most sweeps; 0 returns the start itself.
      assign: `assignment.hungarian` (on the device), `assignment.scipy` (on the host), or another function with that
        signature; None for `assignment.default` of each layer's width, which is on the device on a GPU or TPU.

    Returns:
      The matching. Under `jax.vmap` its arrays have a leading axis [networks].

    Raises:
      ValueError: If a network does not fit the architecture or holds NaN or infinite values, on restarts without a
        key, or on a start that is none.
    """
    architecture.check_params(arch, params)
    architecture.check_params(arch, target, name="target")
    if restarts < 0 or (restarts and key is None) or max_sweeps < 0:
        raise ValueError(
            f"restarts is {restarts}, max_sweeps {max_sweeps} and key {key}; expected numbers >= 0, and a key for "
            "restarts, like jax.random.key(0)."
        )
    if isinstance(start, Matching):
        start = start.element
    if not isinstance(start, Start | Element):
        raise ValueError(f"start is {start!r}; expected Start.FORWARD, Start.IDENTITY, an element or a matching.")
    begin = start if isinstance(start, Element) else symmetry.identity(arch)
    symmetry.check(arch, begin)
    traced = isinstance(scale, jax.Array)
    return _weight_matching(
        arch,
        params,
        target,
        begin,
        key,
        scale if traced else None,
        forward=start is Start.FORWARD,
        permute=permute,
        scale=True if traced else bool(scale),
        restarts=restarts,
        max_sweeps=max_sweeps,
        assign=assign,
    )


@stacks.any_container("params", "target")
def canonical_matching(arch: Architecture, params: Params, target: Params) -> Matching:
    """Matches two networks by their closed-form canonical forms, without any search.

    The element is c_target^-1 c_params with c the elements of `symmetry.canonical.element`. It is exact for members of
    one orbit; for other networks it matches neurons that happen to have the same rank in both canonical forms. N
    networks need N canonical elements, not N^2 matchings.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> target = sg.network.init(arch, jax.random.key(0))
    >>> params = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), target)
    >>> matching = sg.matching.canonical_matching(arch, params, target)
    >>> round(float(matching.similarity), 4)
    1.0

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.

    Returns:
      The matching, with 0 sweeps.

    Raises:
      ValueError: If a network does not fit the architecture or holds NaN or infinite values.
    """
    architecture.check_params(arch, params)
    architecture.check_params(arch, target, name="target")
    to_form, target_to_form = (canonical.element(arch, network).element for network in (params, target))
    element = symmetry.compose(arch, symmetry.inverse(arch, target_to_form), to_form)
    aligned = symmetry.act(arch, element, params)
    matching = Matching(element, similarity(arch, aligned, target), jnp.asarray(0), jnp.asarray(True))
    return marked(matching, params, target)


@stacks.any_container("params", "target")
def unmatched(arch: Architecture, params: Params, target: Params) -> Matching:
    """The identity element with its similarity: the baseline for all matchers.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params, target = (sg.network.init(arch, key) for key in jax.random.split(jax.random.key(0)))
    >>> before = sg.matching.unmatched(arch, params, target)
    >>> after = sg.matching.weight_matching(arch, params, target)
    >>> bool(after.similarity >= before.similarity)
    True

    Args:
      arch: The architecture of both networks.
      params: The network that a matcher would transform.
      target: The network that it would come close to.

    Returns:
      The matching, with 0 sweeps.

    Raises:
      ValueError: If a network does not fit the architecture or holds NaN or infinite values.
    """
    architecture.check_params(arch, params)
    architecture.check_params(arch, target, name="target")
    identity = symmetry.identity(arch)
    matching = Matching(identity, similarity(arch, params, target), jnp.asarray(0), jnp.asarray(True))
    return marked(matching, params, target)


@stacks.any_container("params", "target")
def similarity(arch: Architecture, params: Params, target: Params) -> Float[Array, ""]:
    """The cosine of two networks in their norm-balanced gauges.

    <a, b> / (|a| |b|) with a and b the balanced networks (`symmetry.balanced`) as vectors of all their parameters. So
    it does not depend on positive scales, and the results of different methods and starts can be compared.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "relu")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> rescaled = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1), permute=False), params)
    >>> round(float(sg.matching.similarity(arch, params, rescaled)), 4)
    1.0

    Args:
      arch: The architecture of both networks.
      params: One network.
      target: The other network.

    Returns:
      The cosine, in [-1, 1]; 0 if a network is all zeros.

    Raises:
      ValueError: If a network does not fit the architecture.
    """
    left, right = (architecture.unpack(arch, symmetry.balanced(arch, network)) for network in (params, target))
    return _cosine(left, right)


@stacks.any_container("params", "target", returns=True)
def align(arch: Architecture, params: Params, target: Params, **options: Any) -> dict[str, Any]:
    """Moves `params` next to `target`: the same function, with its neurons in the target's order and gauge.

    It is act(Q, params) with the element Q of `weight_matching` (Ainsworth et al. 2023, arXiv 2209.04836).

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> target = sg.network.init(arch, jax.random.key(0))
    >>> params = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), target)
    >>> aligned = sg.matching.align(arch, params, target)
    >>> bool((aligned["Dense_0"]["kernel"] == target["Dense_0"]["kernel"]).all())
    True

    Args:
      arch: The architecture of both networks.
      params: The network to transform.
      target: The network to come close to.
      **options: As in `weight_matching`.

    Returns:
      The aligned params.

    Raises:
      ValueError: As `weight_matching`.
    """
    return symmetry.act(arch, weight_matching(arch, params, target, **options).element, params)


@stacks.any_container("params", "target")
def orbit_distance(arch: Architecture, params: Params, target: Params, **options: Any) -> Float[Array, ""]:
    """The relative squared distance of `target` from the orbit of `params`, as a loss on `target`.

    |target - act(Q, params)|^2 / |act(Q, params)|^2 with the element Q of `weight_matching`. The gradient flows to
    `target` alone: it is stopped through the assignment and through `params`.

    >>> import jax
    >>> import jax_scalegmn as sg
    >>> arch = sg.mlp((2, 3, 1), "tanh")
    >>> params = sg.network.init(arch, jax.random.key(0))
    >>> member = sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(1)), params)
    >>> float(sg.matching.orbit_distance(arch, params, member))
    0.0

    Args:
      arch: The architecture of both networks.
      params: The network whose orbit is meant.
      target: The network whose distance is measured.
      **options: As in `weight_matching`.

    Returns:
      The distance, 0 for a member of the orbit.

    Raises:
      ValueError: As `weight_matching`.
    """
    nearest = jax.lax.stop_gradient(align(arch, *jax.lax.stop_gradient((params, target)), **options))
    values = architecture.unpack(arch, nearest)
    gaps = [a - b for a, b in zip(architecture.unpack(arch, target, name="target"), values, strict=True)]
    size = optax.tree.vdot(values, values)
    return optax.tree.vdot(gaps, gaps) / jnp.where(size > 0, size, 1)


def marked(matching: Matching, params: Params, target: Params) -> Matching:
    """The matching; its similarity is NaN and it has not converged if one of the networks has diverged.

    The values of a stack under `jax.vmap` are not known where they could be refused, and one diverged network must
    not stop the others.
    """
    leaves = jax.tree.leaves((params, target))
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    return matching._replace(
        similarity=jnp.where(finite, matching.similarity, jnp.nan), converged=matching.converged & finite
    )


# --- private ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("forward", "permute", "scale", "restarts", "max_sweeps", "assign"))
def _weight_matching(
    arch: Architecture,
    params: Params,
    target: Params,
    begin: Element,
    key: Key | None,
    scaled: Bool[Array, ""] | None,
    *,
    forward: bool,
    permute: bool,
    scale: bool,
    restarts: int,
    max_sweeps: int,
    assign: Assign | None,
) -> Matching:
    pair = symmetry.balanced_pair(arch, params, target)
    # The gauge settles positive scales: from here on elements are permutations and signs, which preserve norms.
    source, goal = (architecture.unpack(arch, network) for network in (pair.source, pair.goal))
    given = [stacks.at_least_float32(architecture.unpack(arch, network)) for network in (params, target)]
    either = functools.partial(_either, scale if scaled is None else scaled)
    left, right = either([source, goal], given)
    networks = _Compared(left, right, scaled)
    options = _Options(arch, permute, scale, assign, max_sweeps)

    def ascend(element: Element) -> Matching:
        element, sweeps, converged = _ascend(element, networks, options)
        return Matching(element, _cosine(_moved(arch, element, source), goal), sweeps, converged)

    first = either(_signs_of(begin), _unscaled(begin))
    if forward:
        first = _walk_forward(first, networks, options)
    if restarts and key is not None:
        drawn = jax.vmap(lambda k: symmetry.random(arch, k, permute=permute, scale=scale, log_scale_std=0.0))
        more = drawn(jax.random.split(key, restarts))
        starts = jax.tree.map(
            lambda leaf, more: jnp.concatenate([leaf[None].astype(more.dtype), more]),
            first,
            either(more, _unscaled(more)),
        )
        matchings = jax.lax.map(ascend, starts)
        matching = stacks.member(matchings, jnp.argmax(matchings.similarity))
    else:
        matching = ascend(first)
    matching = matching._replace(element=either(pair.between_given(matching.element), matching.element))
    return marked(matching, params, target)


class _Options(NamedTuple):
    """What a search depends on, other than the networks."""

    arch: Architecture
    permute: bool
    scale: bool
    assign: Assign | None
    max_sweeps: int


class _Compared(NamedTuple):
    """The networks of a search, and whether it uses signs, where that is known only when the program runs."""

    source: list[Array]
    goal: list[Array]
    scaled: Bool[Array, ""] | None


def _either(scaled: bool | Bool[Array, ""], yes: _T, no: _T) -> _T:
    """One of two pytrees; by an array their entries are chosen when the program runs."""
    if isinstance(scaled, bool):
        return yes if scaled else no
    chosen: _T = jax.tree.map(lambda a, b: jnp.where(scaled, a, b), yes, no)
    return chosen


class _Search(NamedTuple):
    """Where a search is. A layer is stale if others have moved since it was matched, so that it may move again."""

    element: Element
    sweeps: Int[Array, ""]
    stale: dict[str, Bool[Array, ""]]

    def converged(self) -> Bool[Array, ""]:
        return ~jnp.stack([*self.stale.values()]).any()

    def finished(self, options: _Options) -> Bool[Array, ""]:
        return self.converged() | (self.sweeps >= options.max_sweeps)


def _walk_forward(element: Element, networks: _Compared, options: _Options) -> Element:
    """One walk from the inputs, each layer matched by the parameters whose other axis is settled already."""
    settled = set(options.arch.inputs)
    for neurons in options.arch.hidden:
        best = _best(element, neurons, networks, options, settled=settled)
        element = _replace(element, neurons.name, *best)
        settled.add(neurons.name)
    return element


def _ascend(
    element: Element, networks: _Compared, options: _Options
) -> tuple[Element, Int[Array, ""], Bool[Array, ""]]:
    """Sweeps over the hidden layers until none can move: the element, the sweeps, whether it converged."""

    if not options.max_sweeps or not options.arch.hidden:
        return element, jnp.asarray(0), jnp.asarray(not options.arch.hidden)

    @jax.custom_batching.custom_vmap
    def search(element: Element, networks: _Compared) -> _Search:
        return jax.lax.while_loop(
            lambda state: ~state.finished(options),
            lambda state: _sweep(state, networks, options),
            _start(element, options),
        )

    @search.def_vmap
    def search_many(size: int, batched: Any, *args: Any) -> tuple[_Search, _Search]:
        # As many at once as a CPU's caches hold; with fewer searches in all, fewer, of which the slowest holds up less.
        at_once = min(size, 64 if size < 1024 else 128) if jax.default_backend() == "cpu" else size
        found = _search_many(size, at_once, batched, args, options)
        return found, jax.tree.map(lambda _: True, found)

    # No derivative: the result does not change with the networks, except in jumps.
    found = search(*jax.lax.stop_gradient((element, networks)))
    return found.element, found.sweeps, found.converged()


def _start(element: Element, options: _Options) -> _Search:
    stale = {neurons.name: jnp.asarray(True) for neurons in options.arch.hidden}
    return _Search(element, jnp.asarray(0), stale)


def _search_many(size: int, at_once: int, batched: Any, args: Any, options: _Options) -> _Search:
    """Many searches, some at once: one that is finished makes room for the next, so that none waits for the slowest."""
    flat, structure = jax.tree.flatten(args)
    along = jax.tree.leaves(batched)

    def pick(index: Array) -> Any:
        """The arguments of some of the searches."""
        index = jnp.minimum(index, size - 1)
        picked = [leaf[index] if own else leaf for leaf, own in zip(flat, along, strict=True)]
        return jax.tree.unflatten(structure, picked)

    axes = jax.tree.unflatten(structure, [0 if own else None for own in along])
    begin = jax.vmap(lambda *args: _start(args[0], options), axes, axis_size=at_once)
    go_on = jax.vmap(lambda state, _, networks: _sweep(state, networks, options), (0, *axes), axis_size=at_once)

    def step(loop: tuple[_Search, Array, Array, _Search]) -> tuple[_Search, Array, Array, _Search]:
        state, index, first, results = loop
        state = go_on(state, *pick(index))
        finished = jax.vmap(lambda one: one.finished(options))(state)
        where = jnp.where(finished, index, size)  # beyond the results nothing is written
        results = jax.tree.map(lambda all_, leaf: all_.at[where].set(leaf, mode="drop"), results, state)
        index = jnp.where(finished, first + jnp.cumsum(finished) - 1, index)
        state = jax.tree.map(
            lambda new, old: jnp.where(jnp.expand_dims(finished, range(1, old.ndim)), new, old),
            begin(*pick(index)),
            state,
        )
        # Beyond the last search nothing is stale, and the host solves nothing.
        state = state._replace(stale={name: stale & (index < size) for name, stale in state.stale.items()})
        return state, index, first + finished.sum(), results

    index = jnp.arange(at_once)
    state = begin(*pick(index))
    empty = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), state)
    loop = (state, index, jnp.asarray(at_once), empty)
    return jax.lax.while_loop(lambda loop: (loop[1] < size).any(), step, loop)[-1]


def _sweep(state: _Search, networks: _Compared, options: _Options) -> _Search:
    """One pass over the hidden layers, of which those that are stale are matched again."""
    element, sweeps, stale = state.element, state.sweeps, dict(state.stale)
    neighbors = _neighbors(options.arch)
    for neurons in options.arch.hidden:
        name = neurons.name
        before = element.permutation[name], element.scale[name]

        def match(element: Element, neurons: NeuronLayer = neurons, before: Any = before) -> tuple[Array, Array]:
            order, sign = _best(element, neurons, networks, options, wanted=stale[neurons.name])
            return order.astype(before[0].dtype), sign.astype(before[1].dtype)

        # One pair alone leaves out what is not stale; of many (vmap) the host does.
        after = jax.lax.cond(stale[name], match, lambda _, before=before: before, element)
        moved = jnp.stack([(new != old).any() for new, old in zip(after, before, strict=True)]).any()
        element = _replace(element, name, *after)
        stale[name] = jnp.asarray(False)
        for other in neighbors[name]:
            stale[other] |= moved
    return _Search(element, sweeps + 1, stale)


def _neighbors(arch: Architecture) -> dict[str, set[str]]:
    """For every hidden layer the others that share a parameter with it."""
    together = [{axis.neurons for axis in parameter.neuron_axes} for parameter in arch.parameters]
    hidden = {neurons.name for neurons in arch.hidden}
    return {name: set().union(*(one for one in together if name in one)) & hidden - {name} for name in hidden}


def compared(before: Element, after: Element) -> tuple[Element, Bool[Array, ""]]:
    """The later element in the dtypes of the earlier one, and whether the two are equal."""
    # Solvers differ in their integers.
    after = jax.tree.map(lambda old, new: new.astype(old.dtype), before, after)
    equal = [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    # The constant is for networks without hidden layers, whose elements have no arrays.
    return after, jnp.stack([jnp.asarray(True), *equal]).all()


def _best(
    element: Element,
    neurons: NeuronLayer,
    networks: _Compared,
    options: _Options,
    *,
    settled: set[str] | None = None,
    wanted: Bool[Array, ""] | bool = True,
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The exact optimum over one layer, the others fixed; by the parameters whose other axes are `settled`, or by all.

    Where it is not wanted, it may be anything.
    """
    # Two sums: parameters that the neuron's sign flips, and those that it leaves, as before a normalization or
    # after an even activation.
    flipping = fixed = jnp.zeros((neurons.width, neurons.width))
    for parameter, value, target in zip(options.arch.parameters, networks.source, networks.goal, strict=True):
        axes = {axis.neurons: axis for axis in parameter.neuron_axes}
        others = axes.keys() - {neurons.name}
        if neurons.name not in axes or not (settled is None or others <= settled):
            continue
        moved = symmetry.act_on_others(element, parameter, neurons.name, value)
        score = _score(parameter, neurons.name, moved, target)
        if axes[neurons.name].shows_sign:
            flipping = flipping + score
        else:
            fixed = fixed + score
    signs: bool | Array = options.scale and neurons.scaling.has_signs
    if signs and networks.scaled is not None:
        signs = networks.scaled
    if assignment.skips(options.assign or assignment.default(neurons.width)):
        flipping = jnp.where(wanted, flipping, jnp.nan)
    return assignment.with_signs(flipping, fixed, signs=signs, permute=options.permute, assign=options.assign)


def _score(parameter: architecture.Parameter, name: str, value: Array, wanted: Array) -> Float[Array, "n n"]:
    """<wanted at neuron i, value at neuron j>, summed over all other axes."""
    shape: list[int] = []
    left, right = [], []
    letters = iter(string.ascii_lowercase)
    for size, axis in zip(value.shape, parameter.axes, strict=True):
        if isinstance(axis, Axis) and axis.neurons == name:
            shape += [axis.repeat, size // axis.repeat]
            repeat = next(letters)
            left += [repeat, "I"]
            right += [repeat, "J"]
        else:
            shape.append(size)
            left.append(next(letters))
            right.append(left[-1])
    equation = f"{''.join(left)},{''.join(right)}->IJ"
    return jnp.einsum(equation, wanted.reshape(shape), value.reshape(shape), precision="highest")


def _replace(element: Element, name: str, permutation: Array, scale: Array) -> Element:
    return Element(element.permutation | {name: permutation}, element.scale | {name: scale})


def _signs_of(element: Element) -> Element:
    """The element without its positive scales."""
    return Element(element.permutation, {name: jnp.where(s < 0, -1.0, 1.0) for name, s in element.scale.items()})


def _unscaled(element: Element) -> Element:
    return Element(element.permutation, jax.tree.map(jnp.ones_like, element.scale))


def _moved(arch: Architecture, element: Element, values: list[Array]) -> list[Array]:
    return architecture.unpack(arch, symmetry.act(arch, element, architecture.pack(arch, values)))


def _cosine(left: list[Array], right: list[Array]) -> Array:
    norms = jnp.sqrt(optax.tree.vdot(left, left)) * jnp.sqrt(optax.tree.vdot(right, right))
    return optax.tree.vdot(left, right) / jnp.where(norms > 0, norms, 1)
