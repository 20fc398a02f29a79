"""Images are moved by the weights of an INR's first layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_scalegmn as sg
from experiments.moves import MoveConfig, move, moved

ARCH = sg.siren((2, 16, 1))
PARAMS = sg.network.init(ARCH, jax.random.key(0))


def test_a_moved_network_draws_the_image_at_moved_points():
    x = jax.random.uniform(jax.random.key(1), (20, 2))
    after = move(MoveConfig(turn=8.0, shift=0.08, stretch=0.08), ARCH, PARAMS, jax.random.key(2))
    points = jnp.column_stack([x, jnp.ones(20)])
    back = jnp.linalg.pinv(PARAMS["Dense_0"]["kernel"])
    matrix, shift = after["Dense_0"]["kernel"] @ back, (after["Dense_0"]["bias"] - PARAMS["Dense_0"]["bias"]) @ back
    assert 0.01 < jnp.abs(matrix - jnp.eye(2)).max() < 0.6
    assert 0.005 < jnp.abs(shift).max() < 0.4
    draw = jax.vmap(sg.network.apply, (None, None, 0))
    expected = draw(ARCH, PARAMS, points @ jnp.concatenate([matrix, shift[None]]))
    np.testing.assert_allclose(draw(ARCH, after, x), expected, atol=1e-4)


@pytest.mark.parametrize("config", [MoveConfig(turn=5.0), MoveConfig(shift=0.1), MoveConfig(stretch=0.1)])
def test_a_loss_sees_another_move_with_every_key_and_its_own_key_too(config):
    def loss(variables, params, key):
        return params["Dense_0"]["kernel"].sum() + params["Dense_0"]["bias"].sum() + variables, jax.random.normal(key)

    values = {
        tuple(map(float, moved(config, ARCH, loss)(0.0, PARAMS, key))) for key in jax.random.split(jax.random.key(0), 5)
    }
    assert len({value for value, _ in values}) == len({drawn for _, drawn in values}) == 5
    assert moved(MoveConfig(), ARCH, loss) is loss


def test_networks_whose_first_layer_cannot_be_moved_are_refused():
    arch = sg.cnn((1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"The first layer of .* expected a kernel over .* Leave train.moves at 0"):
        moved(MoveConfig(turn=1.0), arch, lambda *_: None)
