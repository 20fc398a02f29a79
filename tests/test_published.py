"""Networks and models from PyTorch compute what they did there; imported models have the published options."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_scalegmn as sg
from jax_scalegmn import architecture, io, network
from jax_scalegmn.io import tensors
from jax_scalegmn.models import IO, published

FIXTURES = Path(__file__).parent / "fixtures"
INR = sg.siren((2, 32, 32, 1))


# --- networks -------------------------------------------------------------------------------------------------------

SMALL = sg.siren((2, 4, 4, 1))


def test_a_siren_computes_what_it_did_in_pytorch():
    traced = np.load(FIXTURES / "siren.npz")
    params = io.from_torch(SMALL, tensors.read(FIXTURES / "siren.pt"))
    y = jax.vmap(lambda x: network.apply(SMALL, params, x))(traced["x"])
    np.testing.assert_allclose(y, traced["y"], atol=2e-5)  # phases of up to 30 radians in float32


def test_a_flattening_cnn_computes_what_it_did_in_pytorch():
    # Images of 15 x 11, so that height and width cannot be mistaken for one another.
    state_dict = tensors.read(FIXTURES / "cnn.npz")
    images, expected = state_dict.pop("x").transpose(0, 2, 3, 1), state_dict.pop("y")
    arch = sg.cnn((1, 2, 3), 4, activation="tanh", flatten=(15, 11))
    params = io.from_torch(arch, state_dict)
    apply = jax.vmap(lambda params, x: network.apply(arch, params, x), (None, 0))
    np.testing.assert_allclose(apply(params, images), expected, atol=2e-6)
    params["Dense_0"]["kernel"] = jnp.asarray(state_dict["5.weight"].T)
    assert abs(apply(params, images) - expected).max() > 1e-2, "the order of the flattened map makes no difference"


def test_the_weight_may_follow_its_bias():
    state_dict = tensors.read(FIXTURES / "siren.pt")
    by_name = io.from_torch(SMALL, dict(sorted(state_dict.items())))
    assert jax.tree.all(jax.tree.map(np.array_equal, by_name, io.from_torch(SMALL, state_dict)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq.1.weight": None}, r"state_dict\['seq.1.weight'\] is missing; .* expects shape \(4, 4\)"),
        ({"seq.2.weight": None, "seq.2.bias": None}, r"2 modules .* expects 3"),
        ({"seq.3.weight": np.zeros((1, 1))}, r"4 modules .* expects 3"),
        ({"seq.0.running_mean": np.zeros(4)}, r"\['seq.0.running_mean'\] is not a weight or bias"),
        ({"seq.0.weight": np.zeros((2, 4))}, r"\['seq.0.weight'\] has shape \(2, 4\); .* expects \(4, 2\)"),
        ({"seq.2.bias": np.zeros(())}, r"has shape \(\); .* expects \(1,\)"),
        ({"seq.1.bias": np.full(4, np.nan)}, r"\['seq.1.bias'\] holds 4 NaN"),
        ({"seq.1.bias": np.array([0, 1, np.inf, 0])}, r"\['seq.1.bias'\] holds 1 NaN or infinite"),
        ({"seq.1.weight": np.zeros((4, 4), np.int8)}, r"\['seq.1.weight'\] is int8; expected floating-point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_fit_no_layer_are_named(changes, message):
    state_dict = tensors.read(FIXTURES / "siren.pt") | changes
    with pytest.raises(ValueError, match=message):
        io.from_torch(SMALL, {key: value for key, value in state_dict.items() if value is not None})


def test_an_architecture_without_layers_is_refused():
    bare = architecture.Architecture("bare", SMALL.neuron_layers, SMALL.parameters)
    with pytest.raises(ValueError, match="'bare' does not name the layer"):
        io.from_torch(bare, tensors.read(FIXTURES / "siren.pt"))


# --- back to PyTorch ------------------------------------------------------------------------------------------------

RESNET = sg.resnet(8, widths=(2, 3, 2), outputs=2)
NETWORKS = support.ARCHITECTURES | {"resnet": RESNET, "vgg": sg.vgg(((2, 3), (3,)), 2, norm="group", groups=1)}


@pytest.mark.parametrize("arch", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_params_come_back_from_pytorch_bit_for_bit(arch, dtype):
    params = support.random_params(arch, dtype=dtype)
    state_dict = io.to_torch(arch, params)
    assert list(state_dict) == list(map(named, arch.parameters))
    support.assert_identical(io.from_torch(arch, state_dict), params)
    again = io.to_torch(arch, params, state_dict)
    assert list(again) == list(state_dict)
    assert all(again[name].dtype == value.dtype for name, value in state_dict.items())
    assert all(np.array_equal(again[name], value) for name, value in state_dict.items())


def named(parameter):
    """The name of its tensor, as it is made of the layer's name."""
    kinds = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    return ".".join((*parameter.path[:-1], kinds.get(parameter.path[-1], parameter.path[-1])))


def test_a_state_dict_comes_back_with_its_names_order_dtypes_and_counters():
    state_dict = io.to_torch(RESNET, support.random_params(RESNET))
    rng = np.random.default_rng(0)
    template = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in state_dict):
        of_module = {name: value for name, value in state_dict.items() if name.rpartition(".")[0] == module}
        for name, value in reversed(of_module.items()):  # another order, names, and values of its own
            template[f"net.{name}"] = rng.normal(size=value.shape).astype(jnp.bfloat16)
        if f"{module}.running_mean" in of_module:
            template[f"net.{module}.num_batches_tracked"] = np.array(len(template))
    params = support.random_params(RESNET, dtype="bfloat16")
    got = io.to_torch(RESNET, jax.tree.map(lambda leaf: leaf.astype("float32"), params), template)
    assert [(name, value.dtype) for name, value in got.items()] == [(n, v.dtype) for n, v in template.items()]
    support.assert_identical(io.from_torch(RESNET, got), params)
    counters = [name for name in template if name.endswith("tracked")]
    assert len(counters) == 9
    assert all(got[name] == template[name] and got[name] is not template[name] for name in counters)


def test_a_flattened_map_goes_back_to_pytorchs_order():
    state_dict = tensors.read(FIXTURES / "cnn.npz")
    del state_dict["x"], state_dict["y"]
    arch = sg.cnn((1, 2, 3), 4, activation="tanh", flatten=(15, 11))
    params = io.from_torch(arch, state_dict)
    back = io.to_torch(arch, params, state_dict)
    assert all(np.array_equal(back[name], value) for name, value in state_dict.items())
    assert not np.array_equal(np.asarray(params["Dense_0"]["kernel"]).T, state_dict["5.weight"]), "no order to restore"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params, template: params["Dense_0"].pop("bias"), r"\['bias'\] is missing"),
        (lambda params, template: template.pop("seq.0.bias"), "module 'seq.0' has no bias to store it"),
        (lambda params, template: template.update({"seq.0.weight": np.ones((2, 2))}), r"has shape \(2, 2\)"),
        (lambda params, template: template.update({"seq.0.weight": np.ones((4, 2), int)}), "is int64"),
        (lambda params, template: template.update({"seq.0.weight": np.full((4, 2), np.nan)}), "NaN"),
        (
            lambda params, template: (
                params["Dense_0"].update(bias=np.full(4, 1e5, "float32")),
                template.update({"seq.0.bias": np.ones(4, np.float16)}),
            ),
            r"\['seq.0.bias'\] has entries up to 1e\+05, too large for its dtype float16",
        ),
    ],
)
def test_params_and_templates_that_do_not_fit_are_refused(change, message):
    params, template = support.random_params(SMALL), dict(tensors.read(FIXTURES / "siren.pt"))
    io.to_torch(SMALL, params, template)
    change(params, template)
    with pytest.raises(ValueError, match=message):
        io.to_torch(SMALL, params, template)


# --- the published models -------------------------------------------------------------------------------------------


ENCODER, AUTOENCODER = "case1_inr_sign_forward", "case5_inr_sign_autoencoder"


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """The state_dict of a published model."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}


def test_parameters_that_the_published_code_never_uses_may_be_there_or_not():
    state_dict = tensors_of(ENCODER)
    used = {key: value for key, value in state_dict.items() if not key.startswith("gnn.readout.phi.")}
    assert len(used) < len(state_dict)
    with_them, without = (published.encoder(INR, t)[1] for t in (state_dict, used))
    assert jax.tree.all(jax.tree.map(np.array_equal, with_them, without))


def test_imported_variables_have_the_structure_of_fresh_ones():
    model, variables = published.autoencoder(INR, tensors_of(AUTOENCODER), dropout=0.2)
    fresh = jax.eval_shape(model.init, jax.random.key(0), network.init(INR, jax.random.key(0)))
    gmn = model.encoder.gmn
    assert (gmn.features, gmn.num_layers, model.encoder.latent, model.decoder.hidden) == (8, 2, 8, (16, 6))
    assert (gmn.dropout, gmn.normalized, gmn.parity, model.encoder.scales) == (0.2, False, False, None)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), fresh
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("case1_inr_sign_forward", {}),
        ("case2_inr_sign_bidirectional", {"bidirectional": True}),
        (
            "case2b_inr_sign_bidir_mnistcls",
            {"bidirectional": True, "skip": False, "edge_encoding": False, "encoding_features": True},
        ),
        ("case7_cnn_sign_forward", {"io": IO.SEPARATE, "skip": False, "edge_encoding": False}),
    ],
)
def test_options_follow_from_the_tensors(name, options):
    arch = sg.cnn((1, 16, 16, 16), 10, activation="tanh") if "cnn" in name else INR
    model, _ = published.encoder(arch, tensors_of(name))
    expected = {"bidirectional": False, "skip": True, "edge_encoding": True, "encoding_features": False, "io": IO.GATE}
    assert {option: getattr(model.gmn, option) for option in expected} == expected | options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gnn.fw_layers.1.w_v.weight": None}, r"missing are 1 tensors \['gnn.fw_layers.1.w_v.weight'\]"),
        ({"gnn.skip_layers.2.weight": None}, "missing are 1 tensors.*skip_layers.2"),
        ({"gnn.sw_layers.0.w_v.weight": np.zeros((8, 8))}, r"additional 1 \['gnn.sw_layers.0.w_v.weight'\]"),
        ({"gnn.fw_layers.0.w_v.weight": np.zeros((8, 7))}, r"w_v.weight'\] has shape \(8, 7\); .* expects \(8, 8\)"),
        ({"gnn.readout.global_mlp.fc.0.weight": np.zeros((32, 12))}, r"shape \(32, 12\); .* expects \(12, 32\)"),
        ({"positional_embeddings.pos_embed": np.zeros((6, 8))}, r"pos_embed'\] has shape \(6, 8\); .* \(5, 8\)"),
        ({"gnn.fw_layers.0.w_e.weight": np.full((8, 8), np.nan)}, r"w_e.weight'\] holds 64 NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_fit_no_published_encoder_are_named(changes, message):
    state_dict = {key: value for key, value in (tensors_of(ENCODER) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        published.encoder(INR, state_dict)


SCALED = sg.cnn((1, 16, 16, 16), 10)


@pytest.mark.parametrize(
    ("importer", "arch", "name", "message"),
    [
        (published.encoder, INR, AUTOENCODER, "not of the published model.*is missing"),
        (published.editor, INR, ENCODER, "missing are 19 tensors .*bias_scale"),
        (published.encoder, INR, "case4_inr_sign_equivariant_forward", "needs published.editor"),
        (
            published.autoencoder,
            sg.siren((2, 32, 32, 3)),
            AUTOENCODER,
            "has 3 outputs; expected 1",
        ),
        (
            published.encoder,
            sg.mlp((2, 32, 32, 1)),
            ENCODER,
            "additional 54 .*groups are those of the training",
        ),
        (
            published.autoencoder,
            sg.siren((2, 16, 32, 1)),
            AUTOENCODER,
            re.escape("decoder.net.fc.2.bias'] has shape (1185,)"),
        ),
        (published.encoder, INR, "case3_inr_permutation_forward", "Pass architecture.restrict"),
        (
            published.encoder,
            sg.mlp((2, 32, 32, 1), ("tanh", "relu")),
            ENCODER,
            "published models read networks of one",
        ),
        (published.encoder, SCALED, "caseB_cnn_scale_bidirectional", "not equivariant.*parity=True"),
    ],
)
def test_other_models_and_networks_are_refused(importer, arch, name, message):
    with pytest.raises(ValueError, match=message):
        importer(arch, tensors_of(name))


def test_an_empty_state_dict_is_refused():
    with pytest.raises(ValueError, match="not of the published model"):
        published.autoencoder(INR, {})
