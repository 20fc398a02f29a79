"""Published folders of INRs are read as their authors wrote them; no file runs code, and no label is guessed."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import support
from test_tensors import HOSTILE, mapping, number, tensor, write_torch

import jax_scalegmn as sg
from jax_scalegmn import network, zoo
from jax_scalegmn.zoo import inr_folders

# --- folders of INRs, written byte by byte ----------------------------------------------------------------------------

INR = sg.siren((2, 3, 3, 1))
SHAPES = {"seq.0.weight": (3, 2), "seq.0.bias": (3,), "seq.1.weight": (3, 3), "seq.1.bias": (3,)} | {
    "seq.2.weight": (1, 3),
    "seq.2.bias": (1,),
}


def tensors(seed: int, dtype="<f4") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def write_inr(path: Path, values: dict[str, np.ndarray], **numbers: int) -> None:
    """Writes a checkpoint of torch.save, with whole numbers next to the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"f": "FloatStorage", "d": "DoubleStorage", "l": "LongStorage"}
    content, records = {}, {}
    for key, (name, value) in enumerate(values.items()):
        strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
        content[name] = tensor(kinds[value.dtype.char], str(key), value.size, 0, value.shape, strides)
        records[str(key)] = value.tobytes()
    write_torch(path, mapping(content | {name: number(value) for name, value in numbers.items()}), records)


MNIST = {  # labels and indices by folder
    "mnist_png_training_5_0": (5, 0),
    "mnist_png_training_0_1": (0, 1),
    "mnist_png_training_9_12": (9, 12),
    "mnist_png_testing_7_0": (7, 0),
}


def write_mnist(root: Path) -> list[str]:
    """Networks 0, 1, ... in the order of MNIST; their paths as mnist_splits.json has them."""
    for seed, name in enumerate(MNIST):
        write_inr(root / name / "checkpoints" / "model_final.pth", tensors(seed))
    return [f"data/mnist-inrs/{name}/checkpoints/model_final.pth" for name in MNIST]


@pytest.fixture
def mnist(tmp_path):
    """The published form: split and networks, the split's paths of another machine."""
    root = tmp_path / "inrs"
    paths = write_mnist(root)
    parts = {
        "train": {"path": [paths[2], paths[0]], "label": ["9", "5"]},
        "test": {"path": [paths[3]], "label": ["7"]},
        "val": {"path": [paths[1]], "label": ["0"]},
    }
    (root / "mnist_splits.json").write_text(json.dumps(parts))
    return root


def assert_networks(loaded: zoo.Zoo, seeds: list[int]) -> None:
    """The zoo holds the transposed tensors of these networks, in this order."""
    assert loaded.arch == INR
    assert len(loaded) == len(seeds)
    for row, seed in enumerate(seeds):
        values = tensors(seed)
        for layer in range(3):
            got = support.rows(loaded.params[f"Dense_{layer}"], row)
            np.testing.assert_array_equal(got["kernel"], values[f"seq.{layer}.weight"].T)
            np.testing.assert_array_equal(got["bias"], values[f"seq.{layer}.bias"])


def by_hand(values: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """A SIREN as PyTorch computes it, in float64."""
    for layer in range(3):
        x = values[f"seq.{layer}.weight"].astype(float) @ x + values[f"seq.{layer}.bias"].astype(float)
        x = np.sin(30 * x) if layer < 2 else x + 0.5
    return x


def test_the_published_form_is_read_in_the_order_of_its_split(mnist):
    split = mnist / "mnist_splits.json"
    for part, rows, labels in (("train", [2, 0], [9, 5]), ("validation", [1], [0]), ("test", [3], [7])):
        loaded = inr_folders.load(split, INR, part=part, root=mnist)
        assert_networks(loaded, rows)
        assert set(loaded.records) == {"label", "image_index"}
        assert loaded.records["label"].dtype == np.int32
        np.testing.assert_array_equal(loaded.records["label"], labels)
        np.testing.assert_array_equal(loaded.records["image_index"], [list(MNIST.values())[row][1] for row in rows])
        assert loaded.settings == {"source": str(split), "part": part}
    assert inr_folders.load(split, INR, part="val", root=mnist).settings["part"] == "validation"


def test_a_loaded_inr_computes_what_the_file_says(mnist):
    loaded = inr_folders.load(mnist / "mnist_splits.json", INR, part="train", root=mnist)
    x = np.array([0.3, -0.7])
    got = network.apply(INR, support.rows(loaded.params, 0), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, by_hand(tensors(2), x), atol=1e-4)  # phases of up to 100 radians in float32
    assert abs(got - by_hand(tensors(0), x)) > 1e-2


def test_a_loaded_zoo_is_saved_like_any_other(mnist, tmp_path):
    loaded = inr_folders.load(mnist / "mnist_splits.json", INR, part="train", root=mnist)
    zoo.save(loaded, tmp_path / "zoo.safetensors")
    again = zoo.load(tmp_path / "zoo.safetensors")
    support.assert_identical(again.params, loaded.params)
    assert again.settings == loaded.settings


@pytest.mark.parametrize("from_folder", ["of the split", "working"])
def test_without_a_root_paths_are_relative_to_the_split_or_the_working_folder(tmp_path, monkeypatch, from_folder):
    paths = write_mnist(tmp_path / "data" / "mnist-inrs")
    split = (tmp_path if from_folder == "of the split" else tmp_path / "elsewhere") / "splits.json"
    split.parent.mkdir(exist_ok=True)
    split.write_text(json.dumps({"test": {"path": paths[3:], "label": [7]}}))
    if from_folder == "working":
        monkeypatch.chdir(tmp_path)
    assert_networks(inr_folders.load(split, INR, part="test"), [3])


def test_absolute_paths_are_read_as_they_are(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "mnist_png_training_5_0" / "checkpoints" / "model_final.pth"
    loaded = inr_folders.load({"train": {"path": [str(path)]}}, INR, part="train")
    assert_networks(loaded, [0])
    assert loaded.settings["source"] == str(path.parent)


def test_labels_come_from_the_split_else_from_the_name(mnist):
    path = "mnist_png_training_5_0/checkpoints/model_final.pth"
    for part, label in (({"path": [path], "label": [3]}, 3), ({"path": [path]}, 5), ([path], 5)):
        loaded = inr_folders.load({"train": part}, INR, part="train", root=mnist)
        np.testing.assert_array_equal(loaded.records["label"], [label])


@pytest.mark.parametrize("stored", ["number", "tensor"])
def test_fashion_mnist_has_its_labels_in_the_files(tmp_path, stored):
    """Its splits.json lists paths of another machine, with labels nowhere but in the files."""
    for seed in (4, 17):
        label = np.array(seed % 10)
        values = tensors(seed) | ({"label": label} if stored == "tensor" else {})
        numbers = {} if stored == "tensor" else {"label": seed % 10}
        write_inr(tmp_path / "train" / f"model_{seed}.pth", values, **numbers)
    paths = [f"/home/other/fmnist_inrs/train/model_{seed}.pth" for seed in (17, 4)]
    (tmp_path / "splits.json").write_text(json.dumps({"train": paths, "val": [], "test": []}))
    loaded = inr_folders.load(tmp_path / "splits.json", INR, part="train", root=tmp_path)
    assert_networks(loaded, [17, 4])
    np.testing.assert_array_equal(loaded.records["label"], [7, 4])
    np.testing.assert_array_equal(loaded.records["image_index"], [17, 4])


def test_names_without_a_number_give_no_image_index(tmp_path):
    write_inr(tmp_path / "a_5_x" / "checkpoints" / "model_final.pth", tensors(0))
    part = {"path": ["a_5_x/checkpoints/model_final.pth"]}
    loaded = inr_folders.load({"test": part}, INR, part="test", root=tmp_path)
    assert set(loaded.records) == {"label"}


# --- splits of folders ----------------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_split_is_made_from_the_names_of_the_folders(tmp_path):
    for index in range(20):
        touch(tmp_path / f"mnist_png_training_{index % 10}_{index}" / "checkpoints" / "model_final.pth")
        touch(tmp_path / f"mnist_png_testing_{index % 7}_{index}" / "checkpoints" / "model_final.pth")
    split = inr_folders.split(tmp_path, validation=6)
    assert list(split) == ["train", "val", "test"]
    assert [len(part["path"]) for part in split.values()] == [14, 6, 20]
    assert json.loads(json.dumps(split)) == split
    names = {name: [Path(path).parts[-3] for path in part["path"]] for name, part in split.items()}
    assert all(name.startswith("mnist_png_testing") for name in names["test"])
    assert all(name.startswith("mnist_png_training") for name in names["train"] + names["val"])
    assert len(set(names["train"] + names["val"])) == 20
    for part in split.values():
        assert part["label"] == [int(Path(path).parts[-3].split("_")[-2]) for path in part["path"]]
    assert inr_folders.split(tmp_path, validation=6) == split
    assert inr_folders.split(tmp_path, validation=6, seed=1)["val"] != split["val"]
    assert inr_folders.split(tmp_path, validation=0)["val"] == {"path": [], "label": []}


def test_a_made_split_is_read_like_a_published_one(mnist, tmp_path):
    split = inr_folders.split(mnist, validation=1)
    (tmp_path / "split.json").write_text(json.dumps(split))
    for source in (split, tmp_path / "split.json"):
        loaded = [inr_folders.load(source, INR, part=part) for part in ("train", "val", "test")]
        assert [len(part) for part in loaded] == [2, 1, 1]
        assert_networks(loaded[2], [3])
        np.testing.assert_array_equal(np.sort(np.concatenate([part.records["label"] for part in loaded])), [0, 5, 7, 9])


def test_cifar_networks_are_split_by_their_numbers_without_augmented_copies(tmp_path):
    folders = {0: 3, 49_994: 1, 49_997: 3, 49_999: 0, 50_000: 9, 100_000: 3}
    for index, label in folders.items():
        write_inr(tmp_path / f"randinit_smaller_{label}s" / f"net{index}.pth", tensors(index))
        write_inr(tmp_path / f"randinit_smaller_aug0_{label}s" / f"net{index}.pth", tensors(index + 1))
    split = inr_folders.split(tmp_path, validation=2)
    for part, indices in (("train", [0, 49_994]), ("val", [49_997, 49_999]), ("test", [50_000, 100_000])):
        loaded = inr_folders.load(split, INR, part=part)
        assert_networks(loaded, indices)
        np.testing.assert_array_equal(loaded.records["label"], [folders[index] for index in indices])
        np.testing.assert_array_equal(loaded.records["image_index"], indices)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        ([], {}, FileNotFoundError, "expected folders like mnist_png_training_5_0/checkpoints.*got none"),
        (["x_testing_1_0", "x_5_1"], {}, ValueError, "x_5_1.*expected 'training' or 'testing'.*neither"),
        (["x_train_test_5_1"], {}, ValueError, "x_train_test_5_1.*neither or both"),
        (["x_training_5_1"], {}, ValueError, "fewer validation than training networks, got 5000 of 1"),
        (["x_training_5_1"], {"validation": -1}, ValueError, "got -1 of 1"),
        (["x_training_cat_1"], {"validation": 0}, ValueError, "x_training_cat_1.*label is 'cat'; expected the number"),
    ],
)
def test_folders_that_tell_no_split_are_refused(tmp_path, names, options, error, message):
    for name in names:
        touch(tmp_path / name / "checkpoints" / "model_final.pth")
    with pytest.raises(error, match=message):
        inr_folders.split(tmp_path, **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a_1s/net3.pth", "b_1s/net3.pth", "a_1s/net4.pth"], "1 networks have the number of another one"),
        (["a_1s/net3.pth", "a_1s/netx.pth"], "netx.*ends in a number"),
    ],
)
def test_cifar_networks_without_a_number_of_their_own_are_refused(tmp_path, names, message):
    for name in names:
        touch(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        inr_folders.split(tmp_path, validation=0)


# --- damaged splits and networks --------------------------------------------------------------------------------------

ONE = "mnist_png_training_5_0/checkpoints/model_final.pth"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        (b"[]", "expected an object with the parts.*got a list"),
        (b'{"val": {}}', r"has no part 'train'; it has \['val'\]"),
        (b'{"train": {}}', "expected the paths of part 'train' as a list of names, got None"),
        (b'{"train": {"path": []}}', r"expected the paths .* got \[\]"),
        (b'{"train": {"path": [1]}}', r"expected the paths .* got \[1\]"),
        (b'{"train": {"path": ["a", "b"], "label": [1]}}', "2 paths and as labels 1; expected a label for each path"),
        (b'{"train": {"path": ["a"], "label": 1}}', "1 paths and as labels a int"),
        (b'{"train": {"path": ["%s"], "label": ["cat"]}}', "label is 'cat'; expected the number of a class"),
        (b'{"train": {"path": ["%s"], "label": [1.5]}}', "label is 1.5"),
        (b'{"train": {"path": ["%s"], "label": [true]}}', "label is True"),
        (b'{"train": {"path": ["%s"], "label": [-1]}}', "label is -1"),
        (b'{"train": {"path": ["%s"], "label": [null]}}', "has no label"),
        (b'{"train": {"path": ["%s"], "label": ["99999999999"]}}', "label is '99999999999'"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_damaged_splits_are_refused(mnist, content, message):
    split = mnist / "damaged.json"
    split.write_bytes(content.replace(b"%s", ONE.encode()))
    with pytest.raises(ValueError, match=message) as caught:
        inr_folders.load(split, INR, part="train", root=mnist)
    assert str(mnist) in str(caught.value)


def test_missing_splits_parts_and_networks_are_named(mnist):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: there is no such split.*inr_folders.split"):
        inr_folders.load(mnist / "nowhere.json", INR, part="train")
    with pytest.raises(ValueError, match="part is 'training'; expected 'train', 'validation' or 'test'"):
        inr_folders.load(mnist / "mnist_splits.json", INR, part="training", root=mnist)
    with pytest.raises(FileNotFoundError, match=r"2 of 2 networks .* missing, the first is .*_9_12/.*Pass as `root`"):
        inr_folders.load(mnist / "mnist_splits.json", INR, part="train")
    (mnist / ONE).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 networks .* the first is .*inrs/mnist_png_training_5_0/"):
        inr_folders.load(mnist / "mnist_splits.json", INR, part="train", root=mnist)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq.1.weight": np.zeros((4, 3), "<f4")}, r"\['seq.1.weight'\] has shape \(4, 3\)"),
        ({"seq.3.weight": np.zeros((1, 1), "<f4")}, "4 modules .* expects 3"),
        ({"seq.1.bias": np.full(3, np.nan, "<f4")}, "3 NaN"),
        ({"step": np.array(3)}, r"\['step'\] is not a weight or bias"),
        ({"label": np.array(4)}, "says label 5, the file 4"),
        ({"label": np.array([5])}, r"label is \[5\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_networks_of_another_kind_are_named_by_their_file(mnist, changes, message):
    write_inr(mnist / ONE, tensors(0) | changes)
    with pytest.raises(ValueError, match=message) as caught:
        inr_folders.load(mnist / "mnist_splits.json", INR, part="train", root=mnist)
    assert "mnist_png_training_5_0" in str(caught.value)


def test_networks_of_two_precisions_are_not_mixed(mnist):
    with support.precision("float64"):
        write_inr(mnist / ONE, tensors(0, "<f8"))
        with pytest.raises(ValueError, match=r"training_5_0.*are float64, those of .*training_9_12.* float32"):
            inr_folders.load(mnist / "mnist_splits.json", INR, part="train", root=mnist)


def test_a_network_without_any_label_is_named(tmp_path):
    write_inr(tmp_path / "train" / "model_3.pth", tensors(3))
    with pytest.raises(ValueError, match=r"model_3\.pth: the network has no label"):
        inr_folders.load({"train": ["train/model_3.pth"]}, INR, part="train", root=tmp_path)


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_network_is_refused_and_not_run(mnist, attack):
    marker = mnist / "owned"
    write_torch(mnist / ONE, mapping({"seq.0.weight": HOSTILE[attack](marker)}), {})
    with pytest.raises(ValueError, match=r"training_5_0.*holds no dict of tensors"):
        inr_folders.load(mnist / "mnist_splits.json", INR, part="train", root=mnist)
    assert not marker.exists()


def test_a_label_beyond_all_integers_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    huge = b"\x8a\x0a" + (2**70).to_bytes(10, "little")
    content = mapping({"seq.0.bias": tensor("FloatStorage", "0", 1, 0, (1,), (1,)), "label": huge})
    write_torch(tmp_path / "train" / "model_1.pth", content, {"0": bytes(4)})
    with pytest.raises(ValueError, match=r"model_1\.pth: expected tensors by name.*OverflowError"):
        inr_folders.load({"train": ["train/model_1.pth"]}, INR, part="train", root=tmp_path)


def test_numbers_alone_are_no_network(tmp_path):
    write_inr(tmp_path / "a_1s" / "net1.pth", {}, label=1)
    with pytest.raises(ValueError, match=r"net1\.pth.*keys \['label'\]"):
        inr_folders.load({"train": ["a_1s/net1.pth"]}, INR, part="train", root=tmp_path)
