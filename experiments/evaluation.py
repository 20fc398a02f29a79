"""How well two networks merge: every method on every kind of pair, measured along the path between them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_scalegmn import landscape, matching, merge, network, symmetry
from jax_scalegmn.architecture import Architecture, Scaling
from jax_scalegmn.matching import Start
from jax_scalegmn.models import Autoencoder
from jax_scalegmn.types import Key, Params


class Member(NamedTuple):
    """One network of a pair with what the autoencoder makes of it."""

    params: Params
    decoded: Params
    latent: Float[Array, "*networks latent"]


class Method(NamedTuple):
    """A way to merge: the path's end points for stacks of pairs, and the network at a point of the path."""

    label: str
    end_points: Callable[[Member, Member], tuple[Any, Any]]
    network: Callable[[Any], Params]


class Paths(NamedTuple):
    """What one method does to many pairs.

    Attributes:
      ts: times along the path.
      losses: mean squared error between the image at each time and the true image.
      height: the barrier.
      gap: mean squared error between the images that each end point draws and its original network draws.
      midpoint: the loss at t = 1/2, and the images there.
    """

    ts: Float[Array, "networks points"]
    losses: Float[Array, "networks points"]
    height: Float[Array, " networks"]
    gap: Float[Array, "networks 2"]
    midpoint: Float[Array, " networks"]
    middle: Float[Array, "networks height width"]


def make_read(model: Autoencoder, variables: Any, *, batch_size: int = 64) -> Callable[[Params], Member]:
    """A stack of networks -> the same with their embeddings and decoded networks; compiled."""

    def one(params: Params) -> Member:
        z = model.apply(variables, params, method="encode")
        return Member(params, model.apply(variables, z, method="decode"), z)

    return jax.jit(functools.partial(jax.lax.map, one, batch_size=batch_size))


def methods(arch: Architecture, model: Autoencoder, variables: Any, fixed: Params) -> dict[str, Method]:
    """All methods; `fixed` is a network that all others are aligned to, the control of the canonical frame."""

    def make_align(**options: Any) -> Callable[[Params, Params], Params]:
        return jax.jit(jax.vmap(functools.partial(matching.align, arch, **options)))

    def pairwise(align: Callable[[Params, Params], Params]) -> Callable[[Member, Member], tuple[Params, Params]]:
        return lambda a, b: (a.params, align(b.params, a.params))

    def itself(point: Params) -> Params:
        return point

    def decode(z: Array) -> Params:
        return model.apply(variables, z, method="decode")

    def to_fixed(member: Member) -> Params:
        many = jax.tree.map(lambda leaf, one: jnp.broadcast_to(one, leaf.shape), member.params, dict(fixed))
        return align(member.params, many)

    def to_decoded(member: Member) -> Params:
        return align(member.params, member.decoded)

    whole = "scaled" if any(neurons.scaling is Scaling.POSITIVE for neurons in arch.neuron_layers) else "signed"
    align = make_align()
    p_identity, p_forward = make_align(scale=False, start=Start.IDENTITY), make_align(scale=False)
    pd_identity = make_align(start=Start.IDENTITY)
    return {
        "naive": Method("naive", lambda a, b: (a.params, b.params), itself),
        "matching_p_identity": Method("matching, permutations, identity start", pairwise(p_identity), itself),
        "matching_p_forward": Method("matching, permutations, forward start", pairwise(p_forward), itself),
        "matching_pd_identity": Method(f"matching, {whole}, identity start", pairwise(pd_identity), itself),
        "matching_pd_forward": Method(f"matching, {whole}, forward start", pairwise(align), itself),
        "fixed_frame": Method("aligned to one fixed network", lambda a, b: (to_fixed(a), to_fixed(b)), itself),
        "canonical_frame": Method(
            "canonical frame: aligned to its own decoded", lambda a, b: (to_decoded(a), to_decoded(b)), itself
        ),
        "autoencoder": Method("autoencoder: decoded networks", lambda a, b: (a.decoded, b.decoded), itself),
        "latent": Method("autoencoder: in latent space", lambda a, b: (a.latent, b.latent), decode),
    }


def make_follow(
    arch: Architecture, read: Callable[[Any], Params], *, num_points: int, batch_size: int = 32
) -> Callable[[Any, Any, Member, Member, Float[Array, "networks height width"]], Paths]:
    """(start points, end points, members a, members b, true images) -> the paths; compiled, `batch_size` at a time.

    `read` gives the network at a point of a path.
    """

    def one(row: tuple[Any, Any, Member, Member, Array]) -> Paths:
        start, end, a, b, image = row

        def draw(point: Any) -> Array:
            return network.render(arch, read(point), image.shape)

        def loss(point: Any) -> Array:
            return jnp.square(draw(point) - image).mean()

        def gap(point: Any, member: Member) -> Array:
            return jnp.square(draw(point) - network.render(arch, member.params, image.shape)).mean()

        path = landscape.barrier(loss, start, end, num_points=num_points)
        half = merge.lerp(start, end, 0.5)
        return Paths(*path, jnp.stack([gap(start, a), gap(end, b)]), loss(half), draw(half))

    return jax.jit(lambda *rows: jax.lax.map(one, rows, batch_size=batch_size))


def make_filmstrip(
    arch: Architecture, read: Callable[[Any], Params], size: tuple[int, int], *, columns: int = 9
) -> Callable[[Any, Any], Float[Array, "networks columns height width"]]:
    """(start points, end points) -> the images along every path; compiled."""

    def one(start: Any, end: Any) -> Array:
        return jax.vmap(lambda t: network.render(arch, read(merge.lerp(start, end, t)), size))(
            jnp.linspace(0, 1, columns)
        )

    return jax.jit(jax.vmap(one))


def transformed_copies(
    arch: Architecture, stack: Params, keys: Key, *, permute: bool, flip: bool, noise: Float[Array, ""] | float
) -> Params:
    """Every network moved by a random group element of its own, then noise * normal added to every weight."""

    def one(params: Params, key: Key) -> Params:
        element_key, noise_key = jax.random.split(key)
        moved = symmetry.act(arch, symmetry.random(arch, element_key, permute=permute, scale=flip), params)
        leaves, structure = jax.tree.flatten(moved)
        noise_keys = jax.random.split(noise_key, len(leaves))
        noisy = [leaf + noise * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, noise_keys, strict=True)]
        return jax.tree.unflatten(structure, noisy)

    return jax.vmap(one)(stack, keys)


def orbit_spread(
    arch: Architecture, read: Callable[[Params], Member], stack: Params, key: Key, size: int
) -> dict[str, Any]:
    """How far the encoder collapses orbits: deviations within orbits of `size` members over those between networks.

    Returns root mean square distances of embeddings within orbits and between the orbits' means, their ratio, and
    the embeddings [networks, size, latent].
    """
    keys = jax.random.split(key, len(jax.tree.leaves(stack)[0]))
    members = jax.vmap(lambda params, key: symmetry.orbit(arch, params, key, size))(stack, keys)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), members)
    latent = read(flat).latent.reshape(len(keys), size, -1)
    centers = latent.mean(1)

    def rms(gaps: Array) -> float:
        return float(jnp.sqrt(jnp.square(gaps).sum(-1).mean()))

    within, between = rms(latent - centers[:, None]), rms(centers - centers.mean(0))
    return {"within": within, "between": between, "ratio": within / between, "latent": latent}


def summary(paths: Paths, key: Key) -> dict[str, Any]:
    """The numbers of one method on one kind of pair: means with 95 % bootstrap intervals over pairs."""
    return {
        "midpoint": interval(paths.midpoint, key),
        "barrier": interval(paths.height, key),
        "end_point_gap": interval(paths.gap.mean(1), key),
        "end_point_loss": interval(paths.losses[:, jnp.asarray([0, -1])].mean(1), key),
        "ts": paths.ts[0].tolist(),
        "path": paths.losses.mean(0).tolist(),
        "path_low": _path_interval(paths.losses, key)[0].tolist(),
        "path_high": _path_interval(paths.losses, key)[1].tolist(),
    }


def interval(values: Array, key: Key) -> dict[str, float]:
    """The mean of values [networks] with its 95 % bootstrap interval."""
    low, high = _bootstrap(values, key)
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


# --- private ------------------------------------------------------------------------------------------------------


_bootstrap = jax.jit(landscape.bootstrap)


@jax.jit
def _path_interval(losses: Array, key: Key) -> tuple[Array, Array]:
    return jax.vmap(lambda values: landscape.bootstrap(values, key, resamples=500))(losses.T)
