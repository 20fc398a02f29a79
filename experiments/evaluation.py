"""How well two networks merge: every method on every kind of pair, measured along the path between them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from experiments import runs
from jax_scalegmn import landscape, matching, merge, symmetry
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.matching import Matching, Start
from jax_scalegmn.models import Autoencoder
from jax_scalegmn.types import Key, Params


class Member(NamedTuple):
    """Networks of pairs with what the autoencoder makes of them."""

    params: Params
    decoded: Params
    latent: Float[Array, "*networks latent"]


class Method(NamedTuple):
    """A way to merge: the path's end points for stacks of pairs, and the network at a point of the path."""

    label: str
    end_points: Callable[[Member, Member], tuple[Any, Any]]
    network: Callable[[Any], Params]
    reads: bool = False  # whether the autoencoder reads both networks first


class Paths(NamedTuple):
    """What one method does to many pairs, as NumPy arrays.

    Attributes:
      ts: The times along the path, [points].
      images: The images at each time, [networks, points, height, width, ...].
      losses: The mean squared error between the image at each time and the true image, [networks, points].
      height: The barrier, [networks].
      gap: The mean squared error between the images of each end point and of its original network, [networks, 2].
      midpoint: The loss at t = 1/2, [networks].
      middle: The images there, [networks, height, width, ...].
    """

    ts: np.ndarray
    images: np.ndarray
    losses: np.ndarray
    height: np.ndarray
    gap: np.ndarray
    midpoint: np.ndarray
    middle: np.ndarray


def make_read(
    model: Autoencoder, variables: Any, *, networks_at_once: int = 64, mesh: Mesh | None = None
) -> Callable[[Params], Member]:
    """A stack of networks -> the same with their embeddings and decoded networks; compiled once."""

    def read_one(params: Params) -> Member:
        z = model.apply(variables, params, method="encode")
        return Member(params, model.apply(variables, z, method="decode"), z)

    return runs.in_chunks(read_one, networks_at_once, mesh)


class Aligned(NamedTuple):
    """Stacks of elements and of the networks that they moved."""

    element: symmetry.Element
    params: Params


# (stacked params, stacked targets, options of the matcher) -> the params moved next to the targets.
Align: TypeAlias = Callable[..., Aligned]


def make_align(
    arch: Architecture,
    match: Callable[[Params, Params], Matching] | None = None,
    *,
    networks_at_once: int = 64,
    mesh: Mesh | None = None,
) -> Align:
    """A matcher of two networks on stacks; compiled once.

    If it is None, weight matching: its options `scale` and `start` are then keywords of the result, and one program
    has all of them.
    """

    def align_one(params: Params, target: Params, scale: Array, forward: Array) -> Aligned:
        if match is None:
            by_weights = functools.partial(matching.weight_matching, arch, params, target, scale=scale)
            walked, still = by_weights(max_sweeps=0).element, symmetry.identity(arch)
            element = by_weights(start=jax.tree.map(functools.partial(jnp.where, forward), walked, still)).element
        else:
            element = match(params, target).element
        return Aligned(element, symmetry.act(arch, element, params))

    chunked = runs.in_chunks(align_one, networks_at_once, mesh)

    def align(params: Params, target: Params, *, scale: bool = True, start: Start = Start.FORWARD) -> Aligned:
        count = len(jax.tree.leaves(params)[0])
        return chunked(params, target, np.full(count, scale), np.full(count, start is Start.FORWARD))

    return align


def methods(
    arch: Architecture,
    model: Autoencoder,
    variables: Any,
    fixed: Params,
    further: Mapping[str, Method] | None = None,
    weights: Align | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Method]:
    """All methods; `fixed` is a network that all others are aligned to, the control of the canonical frame.

    Those of `further` are listed after weight matching, which is `weights` (of `make_align`) where that is given. The
    devices of a mesh share the pairs.
    """
    by_weights = weights or make_align(arch, mesh=mesh)

    def align(params: Params, target: Params, **options: Any) -> Params:
        return by_weights(params, target, **options).params

    def decode(z: Array) -> Params:
        return model.apply(variables, z, method="decode")

    def to_fixed(member: Member) -> Params:
        copies = jax.tree.map(
            lambda leaf, one: np.broadcast_to(np.asarray(one), leaf.shape), member.params, dict(fixed)
        )
        return align(member.params, copies)

    def to_decoded(member: Member) -> Params:
        return align(member.params, member.decoded)

    whole = "scaled" if any(layer.scaling is Scaling.POSITIVE for layer in arch.neuron_layers) else "signed"
    p_forward, pd_identity = functools.partial(align, scale=False), functools.partial(align, start=Start.IDENTITY)
    p_identity = functools.partial(p_forward, start=Start.IDENTITY)
    return {
        "naive": Method("naive", lambda a, b: (a.params, b.params), itself),
        "matching_p_identity": pairwise("matching, permutations, identity start", p_identity),
        "matching_p_forward": pairwise("matching, permutations, forward start", p_forward),
        "matching_pd_identity": pairwise(f"matching, {whole}, identity start", pd_identity),
        "matching_pd_forward": pairwise(f"matching, {whole}, forward start", align),
        **(further or {}),
        "fixed_frame": Method("aligned to one fixed network", lambda a, b: (to_fixed(a), to_fixed(b)), itself),
        "canonical_frame": Method(
            "canonical frame: aligned to its own decoded", lambda a, b: (to_decoded(a), to_decoded(b)), itself, True
        ),
        "autoencoder": Method("autoencoder: decoded networks", lambda a, b: (a.decoded, b.decoded), itself, True),
        "latent": Method("autoencoder: in latent space", lambda a, b: (a.latent, b.latent), decode, True),
    }


def itself(point: Params) -> Params:
    """The network at a point of a path between networks: the point."""
    return point


def pairwise(label: str, align: Callable[[Params, Params], Params]) -> Method:
    """The method that moves the second networks next to the first, by (stacked params, stacked targets) -> moved."""
    return Method(label, lambda a, b: (a.params, align(b.params, a.params)), itself)


def make_search(
    arch: Architecture, x: Float[Array, " examples *example"], mesh: Mesh | None = None, **options: Any
) -> Callable[[Align], Callable[[Params, Params], Params]]:
    """A start -> (stacked params, stacked targets) -> the params moved by searches on x that begin there.

    One program for all starts; the options are those of `matching.search_matching`.
    """

    def one(row: tuple[Params, Params, symmetry.Element]) -> Params:
        params, target, start = row
        found = matching.search_matching(arch, params, target, x, jax.random.key(0), start=start, **options)
        return symmetry.act(arch, found.element, params)

    # One pair at a time: searches end after different numbers of sweeps.
    search = runs.by_rows(lambda *rows: jax.lax.map(one, rows), mesh)

    def make(start: Align) -> Callable[[Params, Params], Params]:
        return lambda params, target: search(params, target, start(params, target).element)

    return make


def make_follow(
    draw: Callable[[Params], np.ndarray],
    read: Callable[[Any], Params],
    *,
    num_points: int,
    pairs_at_once: int = 32,
    mesh: Mesh | None = None,
) -> Callable[..., Paths]:
    """(start points, end points, originals' images a, originals' images b, true images) -> the paths.

    Args:
      draw: A stack of networks -> the images that they draw.
      read: A point of a path -> the network there.
      num_points: The number of points of a path; t = 1/2 is computed besides.
      pairs_at_once: The number of pairs whose paths are computed at once.
      mesh: The devices that share these pairs.
    """
    ts = np.linspace(0, 1, num_points, dtype=np.float32)
    times = np.asarray([*ts, 0.5], np.float32)
    points = runs.in_chunks(
        lambda start, end: jax.vmap(lambda t: read(merge.lerp(start, end, t)))(times), pairs_at_once, mesh
    )

    def follow(start: Any, end: Any, a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> Paths:
        networks = points(start, end)
        drawn = draw(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), networks))
        drawn = drawn.reshape(len(truth), len(times), *drawn.shape[1:])
        images, middle = drawn[:, :-1], drawn[:, -1]
        losses = squared_error(images, truth[:, None], axes=2)
        gap = np.stack([squared_error(images[:, 0], a), squared_error(images[:, -1], b)], 1)
        return Paths(ts, images, losses, heights(losses), gap, squared_error(middle, truth), middle)

    return follow


def squared_error(a: np.ndarray, b: np.ndarray, *, axes: int = 1) -> np.ndarray:
    """The mean squared difference over all but the first axes."""
    gap = np.square(a - b)
    return gap.reshape(*gap.shape[:axes], -1).mean(-1)


def heights(losses: np.ndarray) -> np.ndarray:
    """The barriers of losses [pairs, points]: `landscape.height` of every row."""
    ts = np.linspace(0, 1, losses.shape[1], dtype=losses.dtype)
    return (losses - ((1 - ts) * losses[:, :1] + ts * losses[:, -1:])).max(1)


def make_transformed_copies(
    arch: Architecture, *, networks_at_once: int = 64, mesh: Mesh | None = None
) -> Callable[..., Params]:
    """A function that moves networks by random elements, then adds noise * normal to every weight.

    Its arguments are a stack, one key for each network's element, one for its noise, whether elements permute and
    whether they scale (or flip signs), and the noise: all known only when the program runs, so one program is enough.
    """

    def copy(params: Params, keys: tuple[Key, Key], permute: Array, scale: Array, noise: Array) -> Params:
        drawn, still = symmetry.random(arch, keys[0]), symmetry.identity(arch)
        element = symmetry.Element(
            jax.tree.map(lambda new, old: jnp.where(permute, new, old), drawn.permutation, still.permutation),
            jax.tree.map(lambda new, old: jnp.where(scale, new, old), drawn.scale, still.scale),
        )
        leaves, structure = jax.tree.flatten(symmetry.act(arch, element, params))
        noise_keys = jax.random.split(keys[1], len(leaves))
        noisy = [leaf + noise * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, noise_keys, strict=True)]
        return jax.tree.unflatten(structure, noisy)

    def from_data(params: Params, keys: tuple[Array, Array], *options: Array) -> Params:
        return copy(params, (jax.random.wrap_key_data(keys[0]), jax.random.wrap_key_data(keys[1])), *options)

    chunked = runs.in_chunks(from_data, networks_at_once, mesh)

    def copies(
        stack: Params, element_keys: Key, noise_keys: Key, *, permute: bool, scale: bool, noise: float = 0.0
    ) -> Params:
        data = tuple(np.asarray(jax.random.key_data(keys)) for keys in (element_keys, noise_keys))
        count = len(data[0])
        options = np.full(count, permute), np.full(count, scale), np.full(count, noise, np.float32)
        return chunked(stack, data, *options)

    return copies


def orbit_spread(
    copies: Callable[..., Params],
    read: Callable[[Params], Member],
    stack: Params,
    key: Key,
    size: int,
    *,
    permute: bool = True,
    scale: bool = True,
) -> dict[str, Any]:
    """How far the encoder collapses orbits: deviations within orbits of `size` members over those between networks.

    The members are moved by permutations, by scales (or signs), or by both.

    Returns root mean square distances of embeddings within orbits and between the orbits' means, their ratio, and
    the embeddings [networks, size, latent]. `copies` is a function of `make_transformed_copies`.
    """
    count = len(jax.tree.leaves(stack)[0])
    keys = each_split(jax.random.split(key, count), size).reshape(-1)
    repeated = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), size, axis=0), stack)
    members = copies(repeated, keys, keys, permute=permute, scale=scale)
    latent = read(members).latent.reshape(count, size, -1)
    centers = latent.mean(1)

    def rms(gaps: np.ndarray) -> float:
        return float(np.sqrt(np.square(gaps).sum(-1).mean()))

    within, between = rms(latent - centers[:, None]), rms(centers - centers.mean(0))
    return {"within": within, "between": between, "ratio": within / between, "latent": latent}


@functools.partial(jax.jit, static_argnums=1)
def each_split(keys: Key, number: int) -> Key:
    """[networks, number] keys."""
    return jax.vmap(lambda key: jax.random.split(key, number))(keys)


def summary(paths: Paths, key: Key) -> dict[str, Any]:
    """The numbers of one method on one kind of pair: means with 95 % bootstrap intervals over pairs."""
    values = {
        "midpoint": paths.midpoint,
        "barrier": paths.height,
        "end_point_gap": paths.gap.mean(1),
        "end_point_loss": paths.losses[:, [0, -1]].mean(1),
    }
    path_low, path_high = _bootstraps(paths.losses.T, key, resamples=500)
    return {
        **dict(zip(values, intervals(np.stack(list(values.values())), key), strict=True)),
        "ts": runs.numbers(paths.ts),
        "path": runs.numbers(paths.losses.mean(0)),
        "path_low": runs.numbers(path_low),
        "path_high": runs.numbers(path_high),
    }


def intervals(values: np.ndarray, key: Key) -> list[dict[str, float]]:
    """The mean of every row of values [rows, networks] with its 95 % bootstrap interval; resamples are shared."""
    low, high = _bootstraps(values, key)
    return [
        {"mean": float(row.mean()), "low": float(bottom), "high": float(top)}
        for row, bottom, top in zip(values, np.asarray(low), np.asarray(high), strict=True)
    ]


# --- private ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="resamples")
def _bootstraps(rows: Array, key: Key, *, resamples: int = 2000) -> tuple[Array, Array]:
    return jax.vmap(lambda values: landscape.bootstrap(values, key, resamples=resamples))(rows)
