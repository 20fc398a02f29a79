"""Imported models compute the published numbers: every case of tests/golden and of the folder JAX_SCALEGMN_GOLDEN."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_scalegmn as sg
from jax_scalegmn import architecture, models, network, training
from jax_scalegmn.architecture import Scaling
from jax_scalegmn.models import published
from jax_scalegmn.training import losses

FOLDERS = [Path(__file__).parent / "golden", *filter(None, [os.environ.get("JAX_SCALEGMN_GOLDEN")])]
FILES = {path.stem: path for folder in FOLDERS for path in sorted(Path(folder).glob("*.npz"))}
TRAINED = [name.removesuffix("_train") for name in FILES if name.endswith("_train")]
CASES = [name for name in FILES if not name.endswith("_train")]
PRECISIONS = {"float32": ("out", 1e-5), "float64": ("out64", 1e-10)}


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FILES[name], allow_pickle=False) as file:
        return dict(file)


def tensors(name: str, kind: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays of one kind: param, grad or after3."""
    arrays = {key.partition("/"): value for key, value in golden(name).items()}
    return {rest: value.astype(dtype) for (first, _, rest), value in arrays.items() if first == kind}


def published_case(name: str) -> tuple[Any, Any]:
    """(arch, importer) of a case: an importer takes a state_dict."""
    config = json.loads(str(golden(name)["config"]))["conf"]
    model, widths = config["scalegmn_args"], config["scalegmn_args"]["layer_layout"]
    activation = config["data"].get("activation_function")
    arch = sg.cnn(widths[:-1], widths[-1], activation=activation) if activation else sg.siren(widths)
    if model["symmetry"] == "permutation":
        arch = architecture.restrict(arch, Scaling.PERMUTATION)
    # The published norm of positive scales has an eps, which shows in float64.
    options: dict[str, Any] = {"parity": model["symmetry"] == "scale"}
    if model["equivariant"]:
        return arch, functools.partial(published.editor, arch, **options)
    options["ablated"] = model["gnn_args"]["ablate_symmetry"]
    decodes = any(key.startswith("param/decoder.") for key in golden(name))
    importer = published.autoencoder if decodes else published.encoder
    return arch, functools.partial(importer, arch, **options)


def networks(name: str, dtype: str) -> dict[str, dict[str, jax.Array]]:
    """The input networks: INR weights [batch, in, out, 1], CNN weights in PyTorch's layout."""
    arch, _ = published_case(name)
    params: dict[str, dict[str, jax.Array]] = {}
    for index, layer in enumerate(dict.fromkeys(parameter.path[0] for parameter in arch.parameters)):
        weight, bias = (golden(name)[f"in/{kind}_{index}"] for kind in ("weights", "biases"))
        if layer.startswith("Conv"):
            weight = weight.transpose(0, 3, 4, 2, 1)
        else:
            weight = weight[..., 0] if weight.ndim == 4 else weight.transpose(0, 2, 1)
        params[layer] = {"kernel": jnp.asarray(weight, dtype), "bias": jnp.asarray(bias.reshape(len(bias), -1), dtype)}
    return params


def images(name: str, dtype: str) -> jax.Array:
    return jnp.asarray(golden(name)["in/images"].transpose(0, 2, 3, 1), dtype)


def loss_of(name: str, model: models.Autoencoder, dtype: str) -> Any:
    if "in/images" in golden(name):
        return losses.distillation(model, images(name, dtype))
    return losses.inr_reconstruction(model, size=(28, 28))


def mean_loss(loss_fn: Any) -> Any:
    """Of a stack of networks."""
    batched = jax.vmap(loss_fn, (None, 0, None))
    return lambda variables, stack: batched(variables, stack, jax.random.key(0))[0].mean()


def assert_close(ours: Any, theirs: Any, relative: float) -> None:
    """Agreement relative to the largest entry of the published tensor."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() <= relative * abs(theirs).max()


def assert_trees_close(ours: Any, theirs: Any, relative: float) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(functools.partial(assert_close, relative=relative), ours, theirs)


def test_all_published_cases_are_here():
    assert {name.split("_")[0] for name in CASES} >= {
        *("case1", "case2", "case2b", "case3", "case3b", "case4", "case4b", "case5"),
        *("case6", "case7", "case8", "case8b", "caseA", "caseB"),
    }


# One case of each kind runs in both precisions, and without -m slow in the one that shows more.
FAST = {"case1_inr_sign_forward", "case3_inr_permutation_forward"}
FAST |= {"case5_inr_sign_autoencoder", "case6_cnn_scale_forward"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name in FAST and dtype == "float64" else pytest.mark.slow)
        for name in CASES
        for dtype in (PRECISIONS if name in FAST else ["float64"])
    ],
)
def test_outputs(name, dtype):
    """Embeddings, edits, decoded networks, images, logits and losses."""
    out, relative = PRECISIONS[dtype]
    with jax.enable_x64(dtype == "float64"):
        arch, importer = published_case(name)
        model, variables = importer(tensors(name, "param", dtype))
        stack = networks(name, dtype)

        def run(params: Any) -> dict[str, Any]:
            if isinstance(model, models.Editor):
                return {"delta": model.apply(variables, params, method="delta")}
            if isinstance(model, models.Encoder):
                return {"embedding": model.apply(variables, params)}
            z = model.apply(variables, params, method="encode")
            decoded = model.apply(variables, z, method="decode")
            if "in/images" in golden(name):
                both = {"original": params, "reconstructed": decoded}
                seen = {
                    f"logits_{which}": jax.vmap(lambda x, p=p: network.apply(arch, p, x))(images(name, dtype))
                    for which, p in both.items()
                }
                # The published flat vector: layer by layer, the bias, then the kernel as it is here.
                flat = [layer[kind].reshape(-1) for layer in decoded.values() for kind in ("bias", "kernel")]
            else:
                both = {"original": params, "reconstructed": decoded}
                seen = {f"image_{which}": network.render(arch, p, (28, 28)) for which, p in both.items()}
                # Layer by layer, the weight [out, in] row by row, then the bias.
                flat = [part for layer in decoded.values() for part in (layer["kernel"].T.reshape(-1), layer["bias"])]
            return {"embedding": z, "decoded_flat": jnp.concatenate(flat), **seen}

        results = jax.jit(jax.vmap(run))(stack)
        checked = 0
        for index, layer in enumerate(results.pop("delta", {}).values()):
            for kind, ours in (("weights", layer["kernel"]), ("biases", layer["bias"])):
                assert_close(ours, golden(name)[f"{out}/delta_{kind}_{index}"][..., 0], relative)
                checked += 1
        for key, ours in results.items():
            if f"{out}/{key}" in golden(name):
                assert ours.dtype == dtype
                assert_close(ours, golden(name)[f"{out}/{key}"], relative)
                checked += 1
        if isinstance(model, models.Autoencoder):
            key = f"{out}/loss_kd" if "in/images" in golden(name) else f"{out}/loss"
            loss = jax.jit(mean_loss(loss_of(name, model, dtype)))(variables, stack)
            assert_close(loss, golden(name)[key][0], relative)
    assert checked


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    # In float64, since single tensors have gradients of 1e-6 where others have 1: the published float32 ones are
    # themselves off by up to 1.1e-5 of a tensor's largest entry, ours in float32 by up to 2e-5 and more.
    with jax.enable_x64(True):
        _, importer = published_case(name)
        model, variables = importer(tensors(name, "param", "float64"))
        _, expected = importer(tensors(f"{name}_train", "grad", "float64"))
        loss_fn = mean_loss(loss_of(name, model, "float64"))
        gradient = jax.jit(jax.grad(loss_fn))(variables, networks(name, "float64"))
        assert_trees_close(gradient, expected, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_three_optimizer_steps(name):
    expected = golden(f"{name}_train")
    settings = json.loads(str(expected["train/optimization"]))
    _, importer = published_case(name)
    model, variables = importer(tensors(name, "param"))
    tx = training.make_optimizer(
        warmup_steps=settings["scheduler_args"]["warmup_steps"], clip_norm=settings["clip_grad_max_norm"]
    )
    step = jax.jit(training.make_step(loss_of(name, model, "float32"), tx))
    state = training.State(variables, tx.init(variables), jax.random.key(0), jnp.asarray(0))
    values, norms, states = [], [], []
    for _ in range(4):
        states.append(state)
        state, metrics = step(state, networks(name, "float32"))
        values.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert_close(values, expected["train/losses"], 1e-5)
    assert_close(norms[0], expected["grad_norm"], 1e-5)
    assert_close(norms[:3], expected["train/grad_norms_before_clip"], 1e-5)
    _, after = importer(tensors(f"{name}_train", "after3"))
    assert_trees_close(states[3].variables, after, 1e-5)
