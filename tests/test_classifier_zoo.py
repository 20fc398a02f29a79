"""Classifiers trained at once follow their hyperparameters, do not depend on each other and are scored correctly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import network
from jax_scalegmn.zoo import _plain_cnns, classifier_zoo, classifiers, small_cnn_zoo

ARCH = sg.cnn((1, 2, 3), 3)
CHECKPOINTS = (0, 3, 40)
# Rows of the hyperparameters, named by what differs from the first row.
NAMES = ("base", "same", "decayed", "dropped", "larger", "faster", "few", "other", "diverged")


def examples(count, seed):
    """Images with a bright row, whose height tells the class."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, 0.3, (count, 8, 8, 1)), rng.integers(0, 3, count)
    x[np.arange(count), 1 + 2 * y] += 2
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


def hyperparameters():
    base = {
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "dropout": 0.0,
        "init_scale": 1.0,
        "train_fraction": 1.0,
        "seed": 3,
    }
    changes = {
        "decayed": {"weight_decay": 20.0},
        "dropped": {"dropout": 0.5},
        "larger": {"init_scale": 2.0},
        "faster": {"learning_rate": 3e-2},
        "few": {"train_fraction": 0.02},
        "other": {"seed": 4},
        "diverged": {"learning_rate": 1e38},
    }
    rows = [base | changes.get(name, {}) for name in NAMES]
    return classifier_zoo.Hyperparameters(**{name: jnp.asarray([row[name] for row in rows]) for name in base})


def fit(**options):
    options = {"checkpoints": CHECKPOINTS, "batch_size": 8, "evaluations": {"test": examples(30, 1)}} | options
    return classifier_zoo.fit(ARCH, examples(50, 0), hyperparameters(), **options)


@pytest.fixture(scope="module")
def cnns():
    seen = []
    zoo = fit(networks_at_once=4, progress=seen.append)
    assert seen == [4, 4, 1]
    return zoo


def row(cnns, name, step=CHECKPOINTS[-1]):
    (index,) = np.flatnonzero((cnns.records["model"] == NAMES.index(name)) & (cnns.records["step"] == step))
    return index


def params(cnns, name, step=CHECKPOINTS[-1]):
    return support.rows(cnns.params, row(cnns, name, step))


@pytest.mark.slow
def test_the_table_names_every_network_and_leaves_out_what_diverged(cnns):
    assert len(cnns) == 8 * 3
    assert cnns.settings["left_out"] == 1
    np.testing.assert_array_equal(cnns.records["model"], np.repeat(np.arange(8), 3))
    np.testing.assert_array_equal(cnns.records["step"], np.tile(CHECKPOINTS, 8))
    assert cnns.records["seed"][row(cnns, "other")] == 4
    assert cnns.records["weight_decay"][row(cnns, "decayed")] == 20


def test_scores_are_those_of_the_networks(cnns):
    scored = jax.jit(lambda params, x, y: classifiers.score(ARCH, params, x, y))
    for index in (row(cnns, "base", 0), row(cnns, "base"), row(cnns, "dropped", 3)):
        for name, (x, y) in {"train": examples(50, 0), "test": examples(30, 1)}.items():
            loss, accuracy = scored(support.rows(cnns.params, index), x, y)
            assert cnns.records[f"{name}_loss"][index] == pytest.approx(float(loss), rel=1e-5)
            assert cnns.records[f"{name}_accuracy"][index] == pytest.approx(float(accuracy))


def test_training_starts_at_the_scaled_initialization_and_learns(cnns):
    start = jax.jit(lambda key: jax.tree.map(lambda leaf: 2 * leaf, network.init(ARCH, key)))(jax.random.key(3))
    # Two programs: u (high - low) + low is rounded once in the one, twice in the other.
    assert support.deviation(params(cnns, "larger", 0), start) < 1e-6
    losses = {name: cnns.records["test_loss"][row(cnns, name)] for name in ("base", "faster", "other")}
    assert all(losses[name] < 0.9 * cnns.records["test_loss"][row(cnns, name, 0)] for name in losses)


def test_each_hyperparameter_has_its_effect(cnns):
    base = params(cnns, "base")
    support.assert_identical(params(cnns, "same"), base)
    for name in ("decayed", "dropped", "larger", "faster", "few", "other"):
        assert not np.allclose(params(cnns, name)["Conv_0"]["kernel"], base["Conv_0"]["kernel"], rtol=1e-3)
    norms = {name: np.linalg.norm(params(cnns, name)["Conv_1"]["kernel"]) for name in ("base", "decayed")}
    assert norms["decayed"] < 0.5 * norms["base"]
    # 2 % of 50 examples is one example, which the network learns.
    assert cnns.records["train_accuracy"][row(cnns, "few")] == 1
    assert cnns.records["train_loss"][row(cnns, "few")] < cnns.records["train_loss"][row(cnns, "base")]


def test_a_network_does_not_depend_on_those_trained_with_it(cnns):
    together = fit(networks_at_once=100, checkpoints=(3,))
    rows = cnns.records["step"] == 3
    for ours, theirs in zip(jax.tree.leaves(together.params), jax.tree.leaves(cnns[rows].params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_learning_rate_rises_and_falls_as_it_is_asked_to():
    """One update of Adam moves a weight by about the rate, whatever its gradient."""
    x, base = jax.random.normal(jax.random.key(0), (20, 2)), support.rows(hyperparameters(), np.array([0]))

    def moves(**options):
        zoo = classifier_zoo.fit(
            sg.mlp((2, 2)), (x, jnp.arange(20) % 2), base, checkpoints=(0, 1, 2, 9, 10), batch_size=20, **options
        )
        kernels = np.asarray(zoo.params["Dense_0"]["kernel"])
        return [float(np.abs(kernels[k] - kernels[k - 1]).max()) for k in (1, 2, 4)]

    first, second, _ = moves(warmup_steps=4)
    assert first == pytest.approx(1e-2 / 4, rel=1e-2)
    assert second > 1.2 * first
    first, _, last = moves(cosine=True)
    assert first == pytest.approx(1e-2, rel=1e-2)
    assert last < 0.2 * first
    assert moves()[0] == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.slow
def test_sgd_with_momentum_makes_the_steps_that_its_equations_name():
    """Full batches: v <- m v + g, w <- w - rate (g + m v) with the decay in the gradient, by hand."""
    x, y = jax.random.normal(jax.random.key(0), (20, 2)), jnp.arange(20) % 2
    arch, base = (
        sg.mlp((2, 2)),
        support.rows(hyperparameters(), np.array([2]))._replace(train_fraction=jnp.full(1, 0.05)),
    )
    zoo = classifier_zoo.fit(arch, (x, y), base, checkpoints=(0, 1, 2, 3), optimizer="sgd", momentum=0.5, batch_size=4)
    assert zoo.settings["optimizer"] == "sgd"
    (row,) = np.flatnonzero(
        np.isclose(_losses_of_examples(arch, support.rows(zoo.params, 0), x, y), zoo.records["train_loss"][0])
    )
    params = support.rows(zoo.params, 0)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for step in (1, 2, 3):
        gradient = _gradient(arch, params, x[row : row + 1], y[row : row + 1])
        gradient = jax.tree.map(lambda g, w: g + 20 * w, gradient, params)
        velocity = jax.tree.map(lambda v, g: 0.5 * v + g, velocity, gradient)
        params = jax.tree.map(lambda w, g, v: w - 1e-2 * (g + 0.5 * v), params, gradient, velocity)
        assert support.deviation(support.rows(zoo.params, step), params) < 1e-4


def test_muon_moves_hidden_kernels_by_orthogonal_matrices_and_the_rest_as_adam_does():
    """One step on one image: u s v.T of the gradient becomes u v.T, roughly; of the rest, the sign is left."""
    x, y = jax.random.normal(jax.random.key(0), (20, 8, 8, 1)), jnp.arange(20) % 2
    arch, base = sg.cnn((1, 2), 2), support.rows(hyperparameters(), np.array([2]))
    base = base._replace(train_fraction=jnp.full(1, 0.05), weight_decay=jnp.full(1, 0.0))
    zoo = classifier_zoo.fit(arch, (x, y), base, checkpoints=(0, 1), optimizer="muon", batch_size=4)
    assert zoo.settings["optimizer"] == "muon"
    (row,) = np.flatnonzero(
        np.isclose(_losses_of_examples(arch, support.rows(zoo.params, 0), x, y), zoo.records["train_loss"][0])
    )
    first, second = (support.rows(zoo.params, step) for step in (0, 1))
    gradient = _gradient(arch, first, x[row : row + 1], y[row : row + 1])
    step = jax.tree.map(lambda old, new: np.asarray(old - new) / 1e-2, first, second)
    u, _, v = np.linalg.svd(gradient["Conv_0"]["kernel"].reshape(9, 2), full_matrices=False)
    turned = u.T @ step["Conv_0"]["kernel"].reshape(9, 2) @ v.T
    assert np.abs(turned - np.diag(np.diag(turned))).max() < 1e-2
    assert (np.diag(turned) > 0.6).all()
    assert (np.diag(turned) < 1.3).all()
    size = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # with Nesterov momentum
    for layer, name in (("Conv_0", "bias"), ("Dense_0", "kernel"), ("Dense_0", "bias")):
        np.testing.assert_allclose(step[layer][name], size * np.sign(gradient[layer][name]), rtol=1e-2)


@jax.jit
def _losses_of_examples(arch, params, x, y):
    return jax.vmap(lambda image, label: classifiers.cross_entropy(arch, params, image[None], label[None]))(x, y)


@jax.jit
def _gradient(arch, params, x, y):
    return jax.grad(lambda p: classifiers.cross_entropy(arch, p, x, y))(params)


@pytest.mark.slow
def test_mirrored_training_learns_images_and_their_mirror_images_alike():
    """Bright columns at the left are class 0 and at the right class 1: mirrored, nothing can be learned."""
    y = jnp.arange(40) % 2
    x = jnp.zeros((40, 8, 8, 1)).at[jnp.arange(40), :, 1 + 5 * y].set(2.0)
    arch = sg.cnn((1, 3), 2, strides=1, flatten=(8, 8))
    options = {"checkpoints": (200,), "batch_size": 16}
    found = [
        classifier_zoo.fit(arch, (x, y), support.rows(hyperparameters(), np.array([0])), mirrored=mirrored, **options)
        for mirrored in (False, True)
    ]
    assert found[0].records["train_loss"][0] < 0.1
    assert found[1].records["train_loss"][0] > 0.5
    assert found[1].settings["mirrored"]
    rows, vectors = support.rows(hyperparameters(), np.array([0])), (x[:, 0, :2, 0], y)
    with pytest.raises(ValueError, match=r"'mlp 2-2 relu' reads vectors; expected a network of images"):
        classifier_zoo.fit(sg.mlp((2, 2)), vectors, rows, mirrored=True, checkpoints=(1,))


@pytest.mark.parametrize(
    "arch",
    [
        sg.cnn((1, 2, 3), 3, activation="tanh"),
        sg.cnn((1, 2), 3, kernel_size=2, strides=1, padding="SAME", flatten=(9, 8), dense=(4,)),
        sg.cnn((1, 2, 2), 3, strides=2, padding=1),
    ],
    ids=str,
)
def test_plain_cnns_on_whole_batches_are_the_networks(arch):
    """Two routes to one loss and to its gradients."""
    params = support.random_params(arch)
    x = jax.random.normal(jax.random.key(0), (5, 9, 8, 1))

    def total(logits):
        return jax.value_and_grad(lambda params: jnp.sin(logits(params)).sum())

    assert _plain_cnns.is_plain(arch)
    ours = jax.jit(total(lambda params: _plain_cnns.logits(arch, params, x)))(params)
    theirs = jax.jit(total(lambda params: jax.vmap(lambda x: network.apply(arch, params, x))(x)))(params)
    assert support.deviation(ours, theirs) < 1e-4


def test_what_is_not_plain_is_computed_by_the_network_itself():
    assert not any(map(_plain_cnns.is_plain, (sg.mlp((2, 3)), sg.resnet(8, widths=(2, 2, 2)), sg.vgg(((2,),), 3))))


def test_the_zoo_has_the_layout_of_the_small_cnn_zoo(cnns, tmp_path):
    small_cnn_zoo.save(tmp_path, cnns)
    again = small_cnn_zoo.load(tmp_path, activation="relu", step=40)
    support.assert_identical(again.params, cnns[cnns.records["step"] == 40].params)
    np.testing.assert_array_equal(again.records["test_accuracy"], cnns.records["test_accuracy"][2::3])


def test_hyperparameters_are_drawn_between_their_bounds():
    drawn = classifier_zoo.sample(500, 0, learning_rate=(1e-3, 1e-1), train_fractions=(0.5, 1.0))
    assert 1e-3 <= drawn.learning_rate.min() < 2e-3
    assert np.median(drawn.learning_rate) == pytest.approx(1e-2, rel=0.4)
    assert 0.05 < drawn.learning_rate.max() <= 1e-1
    assert 0 <= drawn.dropout.min() < 0.1 < 0.6 < drawn.dropout.max() < 0.7
    assert set(np.asarray(drawn.train_fraction).tolist()) == {0.5, 1.0}
    assert len(np.unique(drawn.seed)) == 500
    support.assert_identical(
        drawn._asdict(), classifier_zoo.sample(500, 0, learning_rate=(1e-3, 1e-1), train_fractions=(0.5, 1.0))._asdict()
    )
    assert not np.array_equal(drawn.seed, classifier_zoo.sample(500, 1).seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": (0.0, 1.0)}, r"learning_rate is \(0.0, 1.0\); expected two numbers with 0 < low <= high"),
        ({"dropout": (0.0, 1.0)}, r"dropout is \(0.0, 1.0\)"),
        ({"train_fractions": (0.5, 2.0)}, r"train_fractions are \(0.5, 2.0\)"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_invalid_bounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        classifier_zoo.sample(**({"count": 3, "seed": 0} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": ()}, r"checkpoints are \(\); expected increasing"),
        ({"checkpoints": (5, 5)}, r"checkpoints are \(5, 5\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"evaluations": {"train": examples(3, 0)}}, "name 'train'"),
        ({"evaluations": {"test": (examples(3, 0)[0], examples(4, 0)[1])}}, "test has 3 examples and 4 labels"),
        ({"evaluations": {"test": (examples(3, 0)[0], jnp.asarray([0, 1, 7]))}}, r"Labels are from 0 to 7"),
        ({"evaluations": {"test": (examples(3, 0)[0] * np.nan, examples(3, 0)[1])}}, "NaN"),
        ({"networks_at_once": 0}, "networks_at_once is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"optimizer": "lion"}, r"optimizer is 'lion'; expected one of \['adamw', 'sgd', 'muon'\]"),
    ],
)
def test_bad_input_is_refused_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_batch_normalizations_are_refused_with_a_cure():
    arch = sg.resnet(8, widths=(2, 2, 2), input_channels=1, outputs=3)
    with pytest.raises(ValueError, match=r"train it with classifiers.fit"):
        classifier_zoo.fit(arch, examples(5, 0), hyperparameters(), checkpoints=(1,))
