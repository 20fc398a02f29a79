"""The INR experiment runs, resumes and refuses."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
import tyro

import jax_scalegmn as sg
from experiments import (
    alignment,
    autoencoders,
    classify,
    controls,
    encoders,
    evaluation,
    generalization,
    inr,
    inr_report,
    inr_zoo,
    progress,
    runs,
    xla_flags,
)
from experiments.runs import SPLITS
from jax_scalegmn import models, training, zoo
from jax_scalegmn.training import checkpoint

TINY = inr.PRESETS["tiny"][1]
WITHOUT_LEARNED = TINY
TINY = dataclasses.replace(
    TINY,
    train=dataclasses.replace(TINY.train, orbit_weight=0.3),
    alignment=dataclasses.replace(TINY.alignment, epochs=2, frame_start="matcher", frame_epochs=1),
)
LEARNED = {"learned_matching", "learned_frame", "learned_search"}
METHODS = LEARNED | {
    "naive",
    "matching_p_identity",
    "matching_p_forward",
    "matching_pd_identity",
    "matching_pd_forward",
    "search",
    "fixed_frame",
    "canonical_frame",
    "autoencoder",
    "latent",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished tiny run: its folder and results."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, inr.main(dataclasses.replace(TINY, out=out))


@pytest.fixture(scope="module")
def run_without_learned(tmp_path_factory):
    """As `run`, without a matcher and a frame, whose compilation takes half of its time."""
    out = tmp_path_factory.mktemp("runs") / "without-learned"
    return out, inr.main(dataclasses.replace(WITHOUT_LEARNED, out=out))


@pytest.fixture(params=["run_without_learned", pytest.param("run", marks=pytest.mark.slow)])
def either_run(request):
    return request.getfixturevalue(request.param)


def test_results_are_complete_and_stored_in_the_files(either_run):
    out, results = either_run
    methods = METHODS if results["alignment"] else METHODS - LEARNED
    stored = json.loads((out / "results.json").read_text())
    assert stored["merging"].keys() == results["merging"].keys()
    assert len(stored["merging"]) == 1 + 3 * len(TINY.evaluation.noises)
    for kind in stored["merging"].values():
        assert kind.keys() == methods
        for numbers in kind.values():
            assert numbers["midpoint"]["low"] <= numbers["midpoint"]["mean"] <= numbers["midpoint"]["high"]
            assert len(numbers["path"]) == TINY.evaluation.points
            assert numbers["barrier"]["mean"] >= 0
    assert all(numbers["milliseconds"] >= 0 for numbers in stored["merging"]["independent fits"].values())
    assert stored["alignment"].keys() == ({"matcher", "frame"} if methods == METHODS else set())
    epochs = {"matcher": TINY.alignment.epochs, "frame": TINY.alignment.frame_epochs}
    for name, learned in stored["alignment"].items():
        assert len(learned["training"]) == epochs[name]
        assert all(np.isfinite(list(epoch.values())).all() for epoch in learned["training"])
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(methods) * 3 + 3  # the methods' three pairs, and reconstructions
    assert page.count("data-chart=") == 4 + len(stored["alignment"])
    assert "<title>orbit 0 of label" in page
    assert "mean of training networks, aligned to one" in page
    assert stored["orbits"].keys() == {"P", "D", "PD"}
    assert stored["orbits"]["PD"] == stored["orbit"]
    assert support.asks_for_nothing(page)


def test_orbits_of_an_invariant_encoder_are_points_of_both_latent_pictures_and_others_are_not():
    """PCA and t-SNE of embeddings of 40 networks in two clusters, with two orbits of 6 members on top."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(40, 5)) + 8 * (np.arange(40) % 2)[:, None]
    one_point = np.repeat(latent[:2, None], 6, axis=1)
    spread_out = rng.normal(4, 5, (2, 6, 5))
    for orbits, is_point in ((one_point, True), (spread_out, False)):
        maps = inr_report.latent_pictures(latent, orbits)
        assert maps.keys() == {"PCA", "t-SNE"}
        for places, members in maps.values():
            assert (places.shape, members.shape) == ((40, 2), (2, 6, 2))
            size = np.ptp(places, 0).max()
            # What is the same embedding is the same place, up to the last iterations of t-SNE.
            assert (np.ptp(members, 1).max() < 0.05 * size) == is_point
            apart = np.linalg.norm(places[::2].mean(0) - places[1::2].mean(0))
            assert apart > places[::2].std()
    pictures = {"latent": latent, "orbits": one_point, "labels": np.arange(40) % 2, "orbit_labels": np.array([0, 1])}
    page = "".join(inr_report._embeddings(pictures))
    assert page.count("<figure") == 2
    assert page.count("<title>orbit 1 of label 1") == 2 * 6
    assert page.index("<title>label 1") < page.index("<title>orbit 0 of label 0")  # on top: drawn later


def test_end_points_are_exact_where_the_original_networks_are_merged(either_run):
    _, results = either_run
    for kind in results["merging"].values():
        for name in kind.keys() - {"autoencoder", "latent"}:
            assert kind[name]["end_point_gap"]["mean"] < 1e-9
        assert kind["autoencoder"]["end_point_gap"]["mean"] > 1e-5


def test_noiseless_copies_merge_without_loss_by_the_right_matching_and_by_the_autoencoder(either_run):
    _, results = either_run
    learned = LEARNED - {"learned_search"} if results["alignment"] else ()
    for group, name in (("P", "matching_p_forward"), ("PD", "matching_pd_forward"), ("D", "matching_pd_forward")):
        for method in (name, *learned, "autoencoder"):
            assert results["merging"][f"{group}, noise 0"][method]["barrier"]["mean"] < 1e-8
    assert results["merging"]["PD, noise 0"]["naive"]["barrier"]["mean"] > 1e-3
    assert results["orbit"]["ratio"] < 1e-4


def test_controls_are_scored_as_decoded_networks_are(either_run):
    """Each against what the networks draw; the nearest training network is one, and less noise is nearer."""
    reconstruction = either_run[1]["reconstruction"]
    found = reconstruction["controls"]
    assert found.keys() == controls.LABELS.keys()
    for numbers in found.values():
        assert numbers["share_of_variance"] == pytest.approx(numbers["mse"] / reconstruction["image_variance"])
        assert 0 <= numbers["recognized"] <= 1
    noises = [found[f"noise_{noise:g}"]["mse"] for noise in controls.NOISES]
    assert noises == sorted(noises)
    assert noises[0] < found["nearest"]["mse"] < found["mean_network"]["mse"]


@pytest.mark.slow
def test_every_row_of_weight_matching_is_what_the_library_matches():
    """One program for all rows, no two of which agree on all pairs."""
    arch = sg.siren((2, 8, 8, 1))
    params, targets = (support.random_params(arch, seed, models=(12,)) for seed in (0, 1))
    align, rows = evaluation.make_align(arch, networks_at_once=2), []
    for scale, start in itertools.product((True, False), sg.matching.Start):
        match = functools.partial(sg.matching.align, arch, scale=scale, start=start)
        rows.append(align(params, targets, scale=scale, start=start).params)
        jax.tree.map(np.testing.assert_array_equal, rows[-1], jax.jit(jax.vmap(match))(params, targets))
    different = [support.deviation(one, other) for one, other in itertools.combinations(rows, 2)]
    assert np.count_nonzero(different) == 6


@pytest.mark.slow
def test_controls_draw_what_they_say():
    """Two training networks: one of the wanted two is nearest to each, and means are between them."""
    arch = sg.siren((2, 4, 1))
    stack = jax.vmap(lambda key: sg.network.init(arch, key))(jax.random.split(jax.random.key(0), 2))
    draw = inr.make_draw(arch, (3, 5))
    images = draw(stack)
    networks = zoo.Zoo(arch, stack, {}, {})
    turned = jax.tree.map(lambda leaf: leaf[::-1], stack)
    align = evaluation.make_align(arch, networks_at_once=2)
    drawn = controls.score(draw, align, networks, images, turned, images[::-1], jax.random.key(1))
    np.testing.assert_array_equal(drawn["nearest"], images[::-1])
    np.testing.assert_allclose(drawn["mean_image"][0], images.mean(0), rtol=1e-5)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), stack)
    np.testing.assert_allclose(drawn["mean_network"][1], inr.make_draw(arch, (3, 5))(_one(mean))[0], atol=1e-5)
    aligned = sg.matching.align(arch, *(jax.tree.map(lambda leaf, row=row: leaf[row], stack) for row in (1, 0)))
    middle = jax.tree.map(lambda leaf, other: (leaf[0] + other) / 2, stack, aligned)
    np.testing.assert_allclose(drawn["mean_aligned"][0], draw(_one(middle))[0], atol=1e-5)
    numbers = controls.numbers(images[::-1], images, images, lambda several: np.arange(len(several)), np.array([0, 0]))
    assert numbers["recognized"] == 0.5
    assert numbers["mse"] == pytest.approx(np.square(images[0] - images[1]).mean())


@pytest.mark.slow
def test_an_encoder_of_permutations_collapses_their_orbits_only(run, tmp_path):
    """As large as the whole group's, which collapses all orbits."""
    _, ours = run
    config = dataclasses.replace(
        TINY,
        out=tmp_path / "run",
        encoder="permutation",
        alignment=dataclasses.replace(TINY.alignment, epochs=0),
        evaluation=dataclasses.replace(TINY.evaluation, noises=(0.0,), copies=4),
    )
    theirs = inr.main(config)
    assert theirs["model"]["parameters"] == pytest.approx(ours["model"]["parameters"], rel=0.02)
    for group, ratio in {name: spread["ratio"] for name, spread in ours["orbits"].items()}.items():
        assert ratio < 1e-4, group
    ratios = {name: spread["ratio"] for name, spread in theirs["orbits"].items()}
    assert ratios["P"] < 1e-4
    assert min(ratios["D"], ratios["PD"]) > 0.1
    assert "latent" not in theirs["orbits"]["PD"]


def test_searches_look_at_pixels_of_the_image_drawn_at_random():
    """Each at most once, and on no regular grid: a search on one ends at networks that agree there alone."""
    given = runs.load_images(TINY, TINY.zoo)["train"]
    whole, some = inr.coordinates(given), inr.coordinates(given, 16, seed=3)
    assert whole.shape == (64, 2)
    assert some.shape == (16, 2)
    assert len(np.unique(some, axis=0)) == 16
    places, of_all = ({tuple(place) for place in np.asarray(several).tolist()} for several in (some, whole))
    assert places < of_all
    assert len(np.unique(some[:, 0])) > 4
    assert np.array_equal(inr.coordinates(given, 100), inr.coordinates(given, 64))
    few = dataclasses.replace(TINY.evaluation, search_pixels=0)
    with pytest.raises(ValueError, match=r"evaluation\.search_pixels is 0"):
        inr.main(dataclasses.replace(TINY, evaluation=few))


@pytest.mark.slow
def test_the_baseline_has_the_same_decoder_and_size():
    arch = sg.siren((2, 8, 8, 1))
    networks = zoo.Zoo(arch, _one(sg.network.init(arch, jax.random.key(0))), {}, {})
    settings = autoencoders.ModelConfig(8, 2)
    whole = autoencoders.make_model(settings, networks)
    ours, theirs = (encoders.autoencoder(settings, whole, kind) for kind in ("equivariant", "permutation"))
    assert ours == autoencoders.make_model(settings, networks)
    assert ours.decoder == theirs.decoder
    assert all(layer.scaling is sg.Scaling.PERMUTATION for layer in theirs.encoder.arch.hidden)
    sizes = [models.num_parameters(model, sg.architecture.abstract_params(arch)) for model in (ours, theirs)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize(
    ("zoo_changes", "train_changes", "message"),
    [
        ({"size": (28, 28)}, {}, r"scikit-learn's digits: expected images of 28 x 28 pixels, got 8 x 8.*--data"),
        ({"widths": (2, 6, 3)}, {}, r"zoo\.widths is \(2, 6, 3\); expected 2 coordinates first"),
        ({"widths": (2, 1)}, {}, r"zoo\.widths is \(2, 1\)"),
        ({}, {"batch_size": 65}, r"train\.batch_size is 65; expected a number from 1 to 64"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, zoo_changes, train_changes, message):
    config = dataclasses.replace(
        TINY,
        out=tmp_path / "run",
        zoo=dataclasses.replace(TINY.zoo, **zoo_changes),
        train=dataclasses.replace(TINY.train, **train_changes),
    )
    with pytest.raises(ValueError, match=message):
        inr.main(config)
    assert not (tmp_path / "run").exists()


def test_images_of_training_selection_and_scoring_are_disjoint():
    images = runs.load_images(TINY, TINY.zoo)
    everything = np.concatenate([one.images.reshape(len(one.images), -1) for one in images.values()])
    assert len(everything) == 32 + 8 + 8
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_files_bring_their_own_scoring_images(tmp_path):
    """The official test part is used for scoring alone; training and selection share the rest."""
    rng = np.random.default_rng(0)
    arrays = {
        f"x_{part}": rng.integers(0, 256, (count, 6, 6), np.uint8) for part, count in (("train", 60), ("test", 20))
    }
    arrays |= {f"y_{part}": np.arange(count) % 10 for part, count in (("train", 60), ("test", 20))}
    np.savez(tmp_path / "mnist.npz", **arrays)
    images = runs.load_images(dataclasses.replace(TINY, data=tmp_path / "mnist.npz"), TINY.zoo)
    assert {name: len(one.images) for name, one in images.items()} == {"train": 32, "selection": 8, "scoring": 8}

    def known(one, part):
        return {image.tobytes() for image in one.images} <= {
            image.tobytes() for image in (arrays[f"x_{part}"] / 255).astype(np.float32)
        }

    assert known(images["scoring"], "test")
    assert known(images["train"], "train")
    assert known(images["selection"], "train")
    few = dataclasses.replace(TINY.zoo, scoring_images=21)
    with pytest.raises(ValueError, match=r"mnist\.npz: expected 21 test images for scoring, got 20"):
        runs.load_images(dataclasses.replace(TINY, data=tmp_path / "mnist.npz"), few)
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        inr.main(dataclasses.replace(TINY, out=tmp_path / "run", data=tmp_path / "absent.npz"))
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused_without_resume_and_with_other_options(run_without_learned):
    out, _ = run_without_learned
    with pytest.raises(SystemExit, match="--resume"):
        inr.main(dataclasses.replace(WITHOUT_LEARNED, out=out))
    with pytest.raises(SystemExit, match=r"other options.*seed"):
        inr.main(dataclasses.replace(WITHOUT_LEARNED, out=out, resume=True, seed=1))


def test_a_folder_that_was_moved_is_resumed_and_an_option_that_is_gone_is_named(tmp_path):
    there, here = (dataclasses.replace(TINY, out=tmp_path / name, resume=name == "b") for name in "ab")
    there.out.mkdir()
    runs.claim(there)
    there.out.rename(here.out)
    runs.claim(here)
    path = here.out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"out": "a", "former": 1}))
    with pytest.raises(SystemExit, match=r"other options \(former: 1 then, None now\)"):
        runs.claim(here)


def test_tables_are_wide_where_there_is_no_terminal_unless_columns_says_otherwise(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert progress.make_console().width == 120
    monkeypatch.setenv("COLUMNS", "90")
    assert progress.make_console().width == 90


def test_resuming_where_there_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="absent holds no run to resume"):
        inr.main(dataclasses.replace(TINY, out=tmp_path / "absent", resume=True))
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
def test_training_over_eight_devices_has_the_losses_of_training_on_one(run, tmp_path):
    out, results = run
    zoos = {
        split: zoo.concatenate([zoo.load(path) for path in sorted((out / "zoo").glob(f"{split}-*"))])
        for split in runs.SPLITS
    }
    settings = dataclasses.replace(TINY.train, data_parallel=True, micro_batch=1)
    config = dataclasses.replace(TINY, out=tmp_path, train=settings)
    with progress.Interruption() as interruption:
        variance = results["reconstruction"]["image_variance"]
        images = runs.load_images(TINY, TINY.zoo)["train"]
        assert float(images.images.var()) == pytest.approx(variance)
        history = inr.fit_autoencoder(config, zoos, images, interruption).history
    for shared, alone in zip(history, results["training"], strict=True):
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)
        assert shared["selection_loss"] == pytest.approx(alone["selection_loss"], rel=1e-3)


def test_too_many_images_are_refused():
    settings = dataclasses.replace(TINY.zoo, train_images=100_000)
    with pytest.raises(ValueError, match=r"zoo.train_images is 100000"):
        runs.load_images(TINY, settings)


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_resumes_to_the_same_numbers(run, tmp_path, monkeypatch):
    """The signal comes after the first checkpoint; the resumed run ends with the very same variables.

    What is scored follows from them, and is not computed again here.
    """
    whole, expected = run
    kept = ("merging", "orbit", "reconstruction")
    monkeypatch.setattr(inr, "score", lambda *_: ({name: expected[name] for name in kept}, {}))
    monkeypatch.setattr(inr.inr_report, "sections", lambda *_, **__: [])
    out = tmp_path / "stopped"
    save = checkpoint.Checkpoints.save

    def save_and_signal(self, *args, **options):
        save(self, *args, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save", save_and_signal)
        with pytest.raises(SystemExit, match=r"after epoch 1 of 3.*Continue with the same command and --resume"):
            inr.main(dataclasses.replace(TINY, out=out))
    assert not (out / "results.json").exists()
    results = inr.main(dataclasses.replace(TINY, out=out, resume=True))
    assert _histories(results) == _histories(expected)
    for folder in ("checkpoints", "alignment/matcher", "alignment/frame"):
        assert _variables(whole / folder) == _variables(out / folder)


@pytest.mark.slow
def test_a_finished_matcher_and_frame_are_not_trained_again(run, tmp_path, monkeypatch):
    out, results = run
    shutil.copytree(out / "alignment", tmp_path / "alignment")
    zoos = {split: zoo.concatenate([zoo.load(path) for path in (out / "zoo").glob(f"{split}-*")]) for split in SPLITS}
    monkeypatch.delattr(checkpoint.Checkpoints, "save")
    config = dataclasses.replace(TINY, out=tmp_path)
    x = jnp.zeros((4, 2))
    trained = alignment.fit_on_inrs(config, config.alignment, zoos, x, progress.Interruption())
    assert {name: one.history for name, one in trained.items()} == {
        name: one["training"] for name, one in results["alignment"].items()
    }
    for name, one in trained.items():
        assert [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(one.variables)] == _variables(
            out / "alignment" / name
        )
    other = dataclasses.replace(config.alignment, features=4)
    with pytest.raises(ValueError, match="another configuration"):
        alignment.fit_on_inrs(config, other, zoos, x, progress.Interruption())


@pytest.mark.slow
def test_a_frame_starts_as_the_trained_matcher(run, tmp_path, monkeypatch):
    """Its first loss is that of the frame of the first network, which random variables do not have."""
    out, _ = run
    shutil.copytree(out / "alignment" / "matcher", tmp_path / "alignment" / "matcher")
    zoos = {split: zoo.concatenate([zoo.load(path) for path in (out / "zoo").glob(f"{split}-*")]) for split in SPLITS}
    starts, init = [], training.init

    def spied(*args, **more):
        state = init(*args, **more)
        starts.append(jax.tree.map(np.asarray, state.variables))  # a copy: the training reuses their memory
        return state

    monkeypatch.setattr(training, "init", spied)
    config = dataclasses.replace(TINY, out=tmp_path)
    x = jnp.asarray(sg.network.coordinates(4, 4)).reshape(-1, 2)
    with progress.Interruption() as interruption:
        trained = alignment.fit_on_inrs(config, config.alignment, zoos, x, interruption)
    matcher, frame = trained["matcher"], trained["frame"]
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], alignment.pairs_of_fits(zoos["train"])[0])
    expected = matcher.model.as_frame(matcher.variables, first)[1]
    assert jax.tree.all(jax.tree.map(functools.partial(np.allclose, atol=1e-5), starts[-1], expected))
    assert not jax.tree.all(jax.tree.map(functools.partial(np.allclose, atol=1e-5), starts[-1], frame.variables))


def test_a_frame_is_trained_for_an_epoch_or_more(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path, alignment=dataclasses.replace(TINY.alignment, frame_epochs=0))
    with pytest.raises(ValueError, match=r"alignment.frame_epochs is 0; expected a number >= 1"):
        inr.main(config)


def test_pairs_are_all_fits_of_one_image():
    arch = sg.siren((2, 3, 1))
    shapes = sg.architecture.abstract_params(arch)
    params = jax.tree.map(lambda leaf: np.stack([np.full(leaf.shape, row, np.float32) for row in range(6)]), shapes)
    networks = zoo.Zoo(arch, params, {"image_index": np.array([0, 1, 2, 1, 1, 0])}, {})
    first, second = alignment.pairs_of_fits(networks)
    rows = [side["Dense_0"]["bias"][:, 0].tolist() for side in (first, second)]
    assert set(zip(*rows, strict=True)) == {(0, 5), (1, 3), (1, 4), (3, 4)}
    alone = zoo.Zoo(arch, params, {}, {})
    assert len(alignment.pairs_of_fits(alone)[0]["Dense_0"]["bias"]) == 0
    nothing = {"train": networks, "selection": alone}
    for settings in (dataclasses.replace(TINY.alignment, batch_size=2), dataclasses.replace(TINY.alignment, epochs=0)):
        assert alignment.fit_on_inrs(TINY, settings, nothing, jnp.zeros((4, 2)), progress.Interruption()) == {}


# --- options ------------------------------------------------------------------------------------------------------


def test_every_option_of_a_scalegmn_can_be_set():
    """With the defaults of the model, but for the sizes; each reaches the model."""
    own = {field.name: field.default for field in dataclasses.fields(autoencoders.ModelConfig)}
    theirs = {field.name: field.default for field in dataclasses.fields(models.ScaleGMN)}
    for name in ("arch", "parent", "name"):
        theirs.pop(name)
    assert own.keys() == theirs.keys()
    sizes = {"features", "num_layers"}
    assert {name: own[name] for name in own.keys() - sizes} == {name: theirs[name] for name in theirs.keys() - sizes}
    for config in (classify.ModelConfig, generalization.ModelConfig):
        assert {field.name for field in dataclasses.fields(config)} >= own.keys() - {"hidden"}

    other = {
        "features": 5,
        "num_layers": 1,
        "hidden": 7,
        "canonical": models.Canonical.ABSOLUTE,
        "io": models.IO.SHARED,
        "message_layers": 2,
        "update_layers": 3,
        "dropout": 0.25,
        "dtype": "bfloat16",
        "edges_at_once": 3,
    }
    other |= {name: not value for name, value in own.items() if isinstance(value, bool)}
    assert other.keys() == own.keys()
    arch = sg.siren((2, 3, 1))
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], sg.network.init(arch, jax.random.key(0)))
    made = autoencoders.make_model(autoencoders.ModelConfig(**other), zoo.Zoo(arch, params, {}, {}))
    assert {name: getattr(made.encoder.gmn, name) for name in other} == other


def test_the_command_line_sets_options_of_the_model_and_the_zoo():
    arguments = ["tiny", "--model.bidirectional", "--model.canonical", "ABSOLUTE", "--model.message-layers", "2"]
    config = tyro.extras.overridable_config_cli(inr.PRESETS, args=[*arguments, "--zoo", "a/b", "--zoo.offset", "0"])
    assert config.model == dataclasses.replace(
        TINY.model, bidirectional=True, canonical=models.Canonical.ABSOLUTE, message_layers=2
    )
    assert config.zoo_path == Path("a/b")
    assert config.zoo == dataclasses.replace(TINY.zoo, offset=0.0)


def test_compiled_programs_are_kept_in_the_users_folder_unless_told_otherwise(tmp_path, monkeypatch):
    """Only inside of a run, and never in place of a folder that the user names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir

    def folder(own, **options):
        jax.config.update("jax_compilation_cache_dir", own)
        try:
            with runs.Run(dataclasses.replace(TINY, out=tmp_path / str(len(list(tmp_path.iterdir()))), **options)):
                return jax.config.jax_compilation_cache_dir, jax.config.values["jax_disable_most_optimizations"]
        finally:
            assert jax.config.jax_compilation_cache_dir == own
            assert not jax.config.values["jax_disable_most_optimizations"]
            jax.config.update("jax_compilation_cache_dir", before)

    assert folder(None) == (str(tmp_path / "cache" / "jax_scalegmn" / "programs"), True)
    assert folder(None, compilation_cache=False, quick_compilation=False) == (None, False)
    assert folder(str(tmp_path / "mine"))[0] == str(tmp_path / "mine")


def test_every_program_is_kept_in_the_users_own_folder_too_unless_the_user_sets_a_limit(tmp_path):
    limit = "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", limit)}

    def limit_inside(own):
        jax.config.update(limit, own)
        with runs.compilation(TINY):
            return jax.config.values[limit]

    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        assert limit_inside(1.0) == 0
        assert limit_inside(2.5) == 2.5
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_flags_of_xla_join_those_of_the_user_and_unknown_ones_are_left_out(monkeypatch):
    """XLA would end the program at an unknown one."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    xla_flags.add({**xla_flags.QUICK, "xla_of_no_version": 1, "xla_cpu_enable_fast_math": "false"})
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=true --xla_cpu_enable_fast_math=false"


def test_chunks_compute_what_the_whole_would_and_compile_once():
    traced = []

    def double(x, y):
        traced.append(None)
        return {"sum": x + y["y"]}

    function = runs.in_chunks(double, 4)
    for count in (1, 4, 6, 9):
        x = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
        np.testing.assert_array_equal(function(x, {"y": x})["sum"], 2 * x)
    assert len(traced) == 1


def test_results_keep_their_values_and_put_a_list_of_numbers_on_one_line(tmp_path):
    values = {"path": [0.5, 1, None], "texts": ["a [\n1\n]", "b"], "of lists": [[1, 2], []], "one": {"two": [True]}}
    runs.write_json(tmp_path / "results.json", values)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == values
    assert '"path": [0.5, 1, null],\n' in text
    assert "[1, 2]" in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(tmp_path / "results.json", {"loss": float("nan")})


def test_numbers_of_results_have_the_digits_of_their_precision():
    thirds = np.array([[1 / 3, 1e-9]], dtype=np.float32)
    assert runs.numbers(thirds) == [[0.33333334, 1e-9]]
    np.testing.assert_array_equal(np.float32(runs.numbers(thirds)), thirds)
    assert runs.numbers(np.array([1 / 3])) == [1 / 3]
    assert [type(n) for n in runs.numbers(np.arange(2))] == [int, int]


@pytest.mark.parametrize("module", ["PIL", "rich", "sklearn", "tyro"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module):
    import experiments

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: None if name == module else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"jax-scalegmn\[experiments\]"):
        importlib.reload(experiments)


# --- zoos of others -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_the_zoo_of_another_run_trains_on_what_its_networks_draw(run, tmp_path):
    """Pairs of fits are found again, and no INR is fitted."""
    source, _ = run
    sizes = dataclasses.replace(TINY.zoo, train_images=16, selection_images=8, scoring_images=8)
    config = dataclasses.replace(
        TINY,
        out=tmp_path / "run",
        zoo_path=source / "zoo",
        zoo=sizes,
        drawn_size=(8, 8),
        alignment=dataclasses.replace(TINY.alignment, epochs=0),
    )
    results = inr.main(config)
    assert {name for kind in results["merging"].values() for name in kind} == {n for n in METHODS if "learned" not in n}
    assert not (config.out / "zoo").exists()
    assert {split: part["images"] for split, part in results["zoo"].items()} == {
        "train": 16,
        "selection": 8,
        "scoring": 8,
    }
    assert next(iter(results["merging"])) == inr.inr_report.INDEPENDENT
    assert results["reconstruction"]["image_variance"] > 0
    assert (config.out / "report.html").exists()


def _saved(tmp_path, images=12, widths=(2, 3, 3, 3), **records):
    """A file of `zoo.save` with two random networks for every image."""
    arch = sg.siren(widths, offset=0.0)
    keys = jax.random.split(jax.random.key(0), 2 * images)
    params = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: sg.network.init(arch, key)))(keys))
    index = np.tile(np.arange(images), 2)
    known = {"image_index": index, "label": index % 3} | records
    path = tmp_path / "inrs.safetensors"
    zoo.save(zoo.Zoo(arch, params, known, {}), path)
    return path


def test_a_saved_zoo_is_divided_by_images(tmp_path):
    settings = dataclasses.replace(TINY.zoo, train_images=None, selection_images=3, scoring_images=4)
    parts = inr_zoo.read(_saved(tmp_path), settings, 0)
    images = {split: set(part.records["image_index"].tolist()) for split, part in parts.items()}
    assert {split: len(some) for split, some in images.items()} == {"train": 5, "selection": 3, "scoring": 4}
    assert len(set.union(*images.values())) == 12
    assert {split: len(part) for split, part in parts.items()} == {"train": 10, "selection": 6, "scoring": 8}
    first, second = inr_zoo.pair_rows(parts["scoring"])
    index = parts["scoring"].records["image_index"]
    np.testing.assert_array_equal(index[first], index[second])
    assert not set(first) & set(second)


@pytest.mark.slow
def test_colored_inrs_run_to_their_report(tmp_path):
    settings = dataclasses.replace(TINY.zoo, train_images=None, selection_images=8, scoring_images=4)
    config = dataclasses.replace(
        TINY, out=tmp_path / "run", zoo_path=_saved(tmp_path, images=28), zoo=settings, drawn_size=(5, 6)
    )
    results = inr.main(config)
    assert results["zoo"]["scoring"]["networks"] == 8
    assert results["alignment"].keys() == {"matcher", "frame"}
    assert "data:image/png" in (config.out / "report.html").read_text()


def test_colored_inrs_draw_three_channels(tmp_path):
    parts = inr_zoo.read(_saved(tmp_path), dataclasses.replace(TINY.zoo, selection_images=3, scoring_images=4), 0)
    drawn = inr.drawn_images(parts, (5, 6))
    assert drawn["scoring"].images.shape == (8, 5, 6, 3)


def test_zoos_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    def refused(path, message, **sizes):
        settings = dataclasses.replace(TINY.zoo, selection_images=3, scoring_images=4, **sizes)
        config = dataclasses.replace(TINY, out=tmp_path / "run", zoo_path=path, zoo=settings)
        with pytest.raises(ValueError, match=message) as caught:
            inr.main(config)
        assert str(path) in str(caught.value)
        assert not config.out.exists()

    (tmp_path / "folder").mkdir()
    refused(tmp_path / "absent", "expected a folder of published INRs.*got no file and no folder")
    refused(tmp_path / "folder", "expected a folder of published INRs.*got a folder with 0 entries")
    refused(_saved(tmp_path, images=7), r"draw 7 images; expected more than the 3 .* Lower")
    refused(_saved(tmp_path, widths=(3, 3, 1)), "map 3 inputs to 1 outputs; expected INRs")
    refused(_saved(tmp_path, label=np.zeros(24, int)), "all training networks have one label")
    (tmp_path / "inrs.safetensors").write_bytes(b"nothing")
    refused(tmp_path / "inrs.safetensors", "expected a file of safetensors; got a file of 7 bytes")


# --- private ------------------------------------------------------------------------------------------------------


def _one(params: dict) -> dict:
    """A network as a stack of one."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], params)


def _variables(folder: Path) -> list:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(checkpoint.load(folder)[1])]


def _histories(results: dict) -> list:
    """Of the autoencoder, the matcher and the frame, without times."""
    trainings = [results["training"], *(one["training"] for one in results["alignment"].values())]
    return [
        [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in training]
        for training in trainings
    ]
