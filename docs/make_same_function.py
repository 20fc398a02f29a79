"""Writes the page "Same function?" of two SIRENs 2-16-16-1 that draw the moon.

    python docs/make_same_function.py same_function.html

The first network is fitted to a crescent. The second goes on from there until it draws a half moon, and is then moved
by a random element of the group, neurons permuted and signs flipped: nothing in its weights tells any more where it
came from. Aligned, the path between them passes through the phases of the moon; naive, through noise.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_scalegmn as sg

SIZE = (32, 32)
NAMES = ("half moon", "crescent")


def page(*, num_steps: int = 1200) -> sg.report.Page:
    """The page.

    Args:
      num_steps: Adam's steps for the crescent; the half moon takes a quarter as many.
    """
    arch, half_moon, crescent = moons(num_steps=num_steps)
    return sg.report.same_function(arch, half_moon, crescent, size=SIZE, names=NAMES)


def moons(*, num_steps: int = 1200) -> tuple[sg.Architecture, sg.Params, sg.Params]:
    """The architecture, the moved network of the half moon, and that of the crescent."""
    arch = sg.siren((2, 16, 16, 1))
    start = sg.network.init(arch, jax.random.key(0))
    crescent = fit(arch, start, moon(0.32), num_steps)
    half_moon = fit(arch, crescent, moon(0.75), num_steps // 4)
    return arch, sg.symmetry.act(arch, sg.symmetry.random(arch, jax.random.key(7)), half_moon), crescent


def moon(shadow: float) -> np.ndarray:
    """A gray image in [0, 1]: a disk less the shadow of another, whose center is that far to the right."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in SIZE), indexing="ij")

    def disk(center: tuple[float, float], radius: float) -> np.ndarray:
        return 1 / (1 + np.exp(-14 * (radius - np.hypot(x - center[0], y - center[1]))))

    return disk((0, 0), 0.72) * (1 - disk((shadow, -0.12), 0.62))


def fit(arch: sg.Architecture, params: sg.Params, image: np.ndarray, num_steps: int) -> sg.Params:
    """The params after that many steps of Adam on the mean squared error of the image."""
    places = jnp.asarray(sg.network.coordinates(*SIZE))
    tx = optax.adam(2e-3)

    def loss(params: sg.Params) -> jax.Array:
        pixels = jax.vmap(lambda x: sg.network.apply(arch, params, x))(places)
        return jnp.mean((pixels[:, 0] - image.reshape(-1)) ** 2)

    def step(state, _):
        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=num_steps)[0][0])
    return run(params)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(page().save(Path(sys.argv[1])))
