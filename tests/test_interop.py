"""Networks and models from PyTorch compute what they did there; imported models give the published numbers."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_scalegmn import architecture, interop, losses, network, torch_file, train

FIXTURES = Path(__file__).parent / "fixtures"
INR = architecture.siren((2, 32, 32, 1))


# --- networks -------------------------------------------------------------------------------------------------------

SMALL = architecture.siren((2, 4, 4, 1))


def test_a_siren_computes_what_it_did_in_pytorch():
    traced = np.load(FIXTURES / "siren.npz")
    params = interop.from_torch(SMALL, torch_file.read_state_dict(FIXTURES / "siren.pt"))
    y = jax.vmap(lambda x: network.apply(SMALL, params, x))(traced["x"])
    np.testing.assert_allclose(y, traced["y"], atol=2e-5)  # phases of up to 30 radians in float32


def test_a_flattening_cnn_computes_what_it_did_in_pytorch():
    # Images of 15 x 11, so that height and width cannot be mistaken for one another.
    tensors = torch_file.read_state_dict(FIXTURES / "cnn.npz")
    images, expected = tensors.pop("x").transpose(0, 2, 3, 1), tensors.pop("y")
    arch = architecture.cnn((1, 2, 3), 4, activation="tanh", flatten=(15, 11))
    params = interop.from_torch(arch, tensors)
    apply = jax.vmap(lambda params, x: network.apply(arch, params, x), (None, 0))
    np.testing.assert_allclose(apply(params, images), expected, atol=2e-6)
    params["Dense_0"]["kernel"] = jnp.asarray(tensors["5.weight"].T)
    assert abs(apply(params, images) - expected).max() > 1e-2, "the order of the flattened map makes no difference"


def test_the_weight_may_stand_behind_its_bias():
    tensors = torch_file.read_state_dict(FIXTURES / "siren.pt")
    by_name = interop.from_torch(SMALL, dict(sorted(tensors.items())))
    assert jax.tree.all(jax.tree.map(np.array_equal, by_name, interop.from_torch(SMALL, tensors)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq.1.bias": None}, r"state_dict\['seq.1.bias'\] is missing; .* expects shape \(4,\)"),
        ({"seq.2.weight": None, "seq.2.bias": None}, r"2 modules .* expects 3"),
        ({"seq.3.weight": np.zeros((1, 1))}, r"4 modules .* expects 3"),
        ({"seq.0.running_mean": np.zeros(4)}, r"\['seq.0.running_mean'\] is no weight or bias"),
        ({"seq.0.weight": np.zeros((2, 4))}, r"\['seq.0.weight'\] has shape \(2, 4\); .* expects \(4, 2\)"),
        ({"seq.2.bias": np.zeros(())}, r"has shape \(\); .* expects \(1,\)"),
        ({"seq.1.bias": np.full(4, np.nan)}, r"\['seq.1.bias'\] holds 4 NaN"),
        ({"seq.1.bias": np.array([0, 1, np.inf, 0])}, r"\['seq.1.bias'\] holds 1 NaN or infinite"),
        ({"seq.1.weight": np.zeros((4, 4), np.int8)}, r"\['seq.1.weight'\] is int8; expected floating-point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_fit_no_layer_are_named(changes, message):
    tensors = torch_file.read_state_dict(FIXTURES / "siren.pt") | changes
    with pytest.raises(ValueError, match=message):
        interop.from_torch(SMALL, {key: value for key, value in tensors.items() if value is not None})


def test_an_architecture_without_layers_is_refused():
    bare = architecture.Architecture("bare", SMALL.neurons, SMALL.parameters)
    with pytest.raises(ValueError, match="'bare' does not say which layer"):
        interop.from_torch(bare, torch_file.read_state_dict(FIXTURES / "siren.pt"))


# --- the published models -------------------------------------------------------------------------------------------


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    folders = [Path(__file__).parent / "golden", Path(os.environ.get("JAX_SCALEGMN_GOLDEN", "golden"))]
    path = next(folder / f"{name}.npz" for folder in folders if (folder / f"{name}.npz").is_file())
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def group(name: str, kind: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The arrays of one kind: param, grad or after3."""
    arrays = {key.partition("/"): value for key, value in golden(name).items()}
    return {rest: value.astype(dtype) for (first, _, rest), value in arrays.items() if first == kind}


def networks(name: str, dtype: Any = np.float32) -> dict[str, dict[str, jax.Array]]:
    """The input networks of a golden file: weights [batch, in, out, 1], biases [batch, out, 1]."""
    read = lambda key: jnp.asarray(golden(name)[key][..., 0].astype(dtype))  # noqa: E731
    return {f"Dense_{i}": {"kernel": read(f"in/weights_{i}"), "bias": read(f"in/biases_{i}")} for i in range(3)}


def assert_close(ours: Any, published: Any, relative: float) -> None:
    """Agreement relative to the largest entry of the published tensor."""
    ours, published = np.asarray(ours), np.asarray(published)
    assert ours.shape == published.shape
    assert abs(ours - published).max() <= relative * abs(published).max()


def assert_trees_close(ours: Any, published: Any, relative: float) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(published)
    jax.tree.map(functools.partial(assert_close, relative=relative), ours, published)


ENCODER, AUTOENCODER, TRAINING = (
    "case1_inr_sign_forward",
    "case5_inr_sign_autoencoder",
    "case5_inr_sign_autoencoder_train",
)


@pytest.mark.parametrize(
    ("out", "dtype", "relative"), [("out", np.float32, 1e-5), ("out64", np.float64, 1e-10)], ids=["float32", "float64"]
)
def test_the_published_encoder_gives_its_published_embeddings(out, dtype, relative):
    with jax.enable_x64(dtype == np.float64):
        model, variables = interop.encoder_from_published(INR, group(ENCODER, "param", dtype))
        embeddings = jax.jit(jax.vmap(model.apply, (None, 0)))(variables, networks(ENCODER, dtype))
        assert embeddings.dtype == dtype
        assert_close(embeddings, golden(ENCODER)[f"{out}/embedding"], relative)


def test_the_published_autoencoder_gives_its_published_networks_images_and_loss():
    model, variables = interop.autoencoder_from_published(INR, group(AUTOENCODER, "param"))
    assert (model.features, model.latent, model.num_layers, model.decoder_hidden) == (8, 8, 2, (16, 6))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(variables: Any, params: Any) -> dict[str, Any]:
        z = model.apply(variables, params, method="encode")
        decoded = model.apply(variables, z, method="decode")
        original, reconstructed = (network.render(INR, p, (28, 28)) for p in (params, decoded))
        # The published flat vector: layer by layer, the weight [out, in] row by row, then the bias.
        flat = [part for layer in decoded.values() for part in (layer["kernel"].T.reshape(-1), layer["bias"])]
        return {
            "embedding": z,
            "decoded_flat": jnp.concatenate(flat),
            "image_original": original,
            "image_reconstructed": reconstructed,
        }

    results = run(variables, networks(AUTOENCODER))
    for name, value in results.items():
        assert_close(value, golden(AUTOENCODER)[f"out/{name}"], 1e-5)
    loss = jnp.square(results["image_original"] - results["image_reconstructed"]).mean()
    assert_close(loss, golden(AUTOENCODER)["out/loss"][0], 1e-5)


def test_the_gradient_is_the_published_one():
    # In float64, since single tensors have gradients of 1e-6 where others have 1: the published float32 ones are
    # themselves off by up to 1.1e-5 of a tensor's largest entry, ours in float32 by up to 2e-5 and more.
    with jax.enable_x64(True):
        model, variables = interop.autoencoder_from_published(INR, group(AUTOENCODER, "param", np.float64))
        _, published = interop.autoencoder_from_published(INR, group(TRAINING, "grad", np.float64))
        loss_fn = jax.vmap(losses.autoencoder_loss(model, size=(28, 28)), (None, 0, None))

        def mean_loss(variables: Any, params: Any) -> jax.Array:
            return loss_fn(variables, params, jax.random.key(0))[0].mean()

        gradient = jax.jit(jax.grad(mean_loss))(variables, networks(AUTOENCODER, np.float64))
        assert_trees_close(gradient, published, 2e-5)


def test_three_optimizer_steps_are_the_published_ones():
    expected = golden(TRAINING)
    model, variables = interop.autoencoder_from_published(INR, group(AUTOENCODER, "param"))
    tx = train.make_optimizer(warmup_steps=10)
    loss_fn = losses.autoencoder_loss(model, size=(28, 28))
    step = jax.jit(train.make_step(loss_fn, tx))
    state = train.State(variables, tx.init(variables), jax.random.key(0), jnp.asarray(0))
    batch, values, norms, states = networks(AUTOENCODER), [], [], []
    for _ in range(4):
        states.append(state)
        state, metrics = step(state, batch)
        values.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert_close(values, expected["train/losses"], 1e-5)
    assert_close(norms[0], expected["grad_norm"], 1e-5)
    assert_close(norms[:3], expected["train/grad_norms_before_clip"], 1e-5)
    _, published = interop.autoencoder_from_published(INR, group(TRAINING, "after3"))
    assert_trees_close(states[3].variables, published, 1e-5)


def test_parameters_that_the_published_code_never_uses_may_be_there_or_not():
    tensors = group(ENCODER, "param")
    used = {key: value for key, value in tensors.items() if not key.startswith("gnn.readout.phi.")}
    assert len(used) < len(tensors)
    with_them, without = (interop.encoder_from_published(INR, t)[1] for t in (tensors, used))
    assert jax.tree.all(jax.tree.map(np.array_equal, with_them, without))


def test_imported_variables_have_the_structure_of_fresh_ones():
    model, variables = interop.autoencoder_from_published(INR, group(AUTOENCODER, "param"), dropout=0.2)
    fresh = jax.eval_shape(model.init, jax.random.key(0), network.init(INR, jax.random.key(0)))
    assert model.dropout == 0.2
    assert not model.normalized
    assert model.scales is None
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gnn.fw_layers.1.w_v.weight": None}, r"missing are 1 tensors \['gnn.fw_layers.1.w_v.weight'\]"),
        ({"gnn.skip_layers.2.weight": None}, "missing are 1 tensors.*gnn_skip_connections"),
        ({"gnn.bw_layers.0.w_v.weight": np.zeros((8, 8))}, r"additional 1 \['gnn.bw_layers.0.w_v.weight'\]"),
        ({"gnn.fw_layers.0.w_v.weight": np.zeros((8, 7))}, r"w_v.weight'\] has shape \(8, 7\); .* expects \(8, 8\)"),
        ({"gnn.readout.global_mlp.fc.0.weight": np.zeros((32, 12))}, r"shape \(32, 12\); .* expects \(12, 32\)"),
        ({"positional_embeddings.pos_embed": np.zeros((6, 8))}, r"pos_embed'\] has shape \(6, 8\); .* \(5, 8\)"),
        ({"gnn.fw_layers.0.w_e.weight": np.full((8, 8), np.nan)}, r"w_e.weight'\] holds 64 NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_fit_no_published_encoder_are_named(changes, message):
    tensors = {key: value for key, value in (group(ENCODER, "param") | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        interop.encoder_from_published(INR, tensors)


def test_other_models_and_networks_are_refused():
    tensors = group(AUTOENCODER, "param")
    with pytest.raises(ValueError, match="not of the published model"):
        interop.encoder_from_published(INR, tensors)
    with pytest.raises(ValueError, match="not of the published model"):
        interop.autoencoder_from_published(INR, {})
    with pytest.raises(ValueError, match="has 3 outputs; expected 1"):
        interop.autoencoder_from_published(architecture.siren((2, 32, 32, 3)), tensors)
    with pytest.raises(ValueError, match="sign symmetries"):
        interop.autoencoder_from_published(architecture.mlp((2, 32, 32, 1)), tensors)
    with pytest.raises(ValueError, match=re.escape("decoder.net.fc.2.weight'] has shape (1185, 6)")):
        interop.autoencoder_from_published(architecture.siren((2, 16, 32, 1)), tensors)
