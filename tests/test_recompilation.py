"""A function that is called again on networks of the same shapes compiles nothing."""

import jax
import jax.numpy as jnp
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import matching, merge

ARCH = sg.mlp((2, 3, 2), "relu")
X, KEY = jnp.linspace(-1, 1, 12).reshape(6, 2), jax.random.key(0)

CALLS = {
    "weight": lambda a, b: matching.weight_matching(ARCH, a, b),
    "canonical": lambda a, b: matching.canonical_matching(ARCH, a, b),
    "activation": lambda a, b: matching.activation_matching(ARCH, a, b, X),
    "balance": lambda a, _: sg.symmetry.balance(ARCH, a),
    "search": lambda a, b: matching.search_matching(ARCH, a, b, X, KEY, max_sweeps=1),
    "sinkhorn on weights": lambda a, b: matching.sinkhorn_matching(ARCH, a, b, num_steps=2),
    "sinkhorn": lambda a, b: matching.sinkhorn_matching(ARCH, a, b, KEY, x=X, num_steps=2),
    "straight-through": lambda a, b: matching.straight_through_matching(ARCH, a, b, x=X, key=KEY, num_steps=2),
    "align_all": lambda a, b: matching.align_all(ARCH, sg.stacks.stack(a, b)),
    "pairwise": lambda a, b: matching.pairwise(ARCH, sg.stacks.stack(a, b)),
    "merge_many": lambda a, b: merge.merge_many(ARCH, sg.stacks.stack(a, b), X, KEY, max_sweeps=1),
    "repair": lambda a, b: merge.repair(ARCH, a, sg.stacks.stack(a, b), X),
    "repair in batches": lambda a, b: merge.repair(ARCH, a, sg.stacks.stack(a, b), X, batch_size=4),
    "similarity": lambda a, b: matching.similarity(ARCH, a, b),
    "barrier": lambda a, b: sg.landscape.barrier(square, a, b),
}
QUICK = ("weight", "balance", "activation")


def square(params):
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_the_second_call_compiles_nothing(name):
    CALLS[name](support.random_params(ARCH, 0), support.random_params(ARCH, 1))
    support.COMPILED.clear()
    CALLS[name](support.random_params(ARCH, 2), support.random_params(ARCH, 3))
    assert not support.COMPILED


def test_the_listener_hears_of_every_compilation():
    support.COMPILED.clear()
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert support.COMPILED


def test_a_loss_of_the_caller_may_change_from_call_to_call():
    """Two functions with one name and other data are two losses, and a program that is kept does not mix them up."""
    params, target = support.random_params(ARCH, 0), support.random_params(ARCH, 1)
    found = [
        matching.search_matching(
            ARCH, params, target, None, KEY, loss_fn=lambda p, size=size: size * square(p), max_sweeps=1
        )
        for size in (1.0, 3.0)
    ]
    assert float(found[1].start_loss) == pytest.approx(3 * float(found[0].start_loss), rel=1e-5)
