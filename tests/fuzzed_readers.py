"""The readers of files that are fuzzed, with small files that each of them takes, for `fuzzing`.

python tests/fuzzed_readers.py     # writes fixtures/orbax.zip and fixtures/checkpoints.zip anew
"""

import contextlib
import gzip
import io
import json
import math
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Reader(NamedTuple):
    """A function that reads files.

    Attributes:
      build: Writes samples, a folder of files each, into a folder.
      read: Reads the files of one sample in a folder.
      share: The reader's part of all cases.
      names_path: Whether its errors name the file.
      rewrites: Whether it may change the files of its folder.
    """

    build: Callable[[Path], None]
    read: Callable[[Path], Any]
    share: float = 1.0
    names_path: bool = True
    rewrites: bool = False


# --- the samples --------------------------------------------------------------------------------------------------


def _save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _arrays() -> dict[str, Any]:
    import numpy as np

    shapes = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
    return {
        name: np.linspace(-1, 1, 4 + i, dtype="f4")[np.arange(np.prod(shape)) % (4 + i)].reshape(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def _params() -> tuple[Any, Any]:
    """A network 3-4-2 and its params."""
    import jax_scalegmn as sg

    arch = sg.mlp((3, 4, 2), "relu")
    return arch, sg.io.from_torch(arch, _arrays())


def _fixtures(ending: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for path in sorted((HERE / "fixtures" / "pytorch").glob(f"*{ending}")):
            _save(folder / path.stem / f"x{ending}", path.read_bytes())

    return build


def _tensors(ending: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        from jax_scalegmn.io import tensors

        (folder / "mlp").mkdir(parents=True)
        tensors.write(folder / "mlp" / f"x{ending}", _arrays())

    return build


def _msgpack(folder: Path) -> None:
    from flax import serialization

    params = _params()[1]
    _save(folder / "params" / "x.msgpack", serialization.to_bytes(params))
    _save(folder / "variables" / "x.msgpack", serialization.to_bytes({"params": params}))


def _make_orbax(folder: Path) -> None:
    import orbax.checkpoint as ocp

    from jax_scalegmn.io import _trees

    params = _params()[1]
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
    _trees.write(folder / "one" / "x", params)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save((folder / "two" / "x").absolute(), params)


def _unpacked(name: str) -> Callable[[Path], None]:
    """Samples of a fixture: Orbax names its files by chance, and would write other ones."""

    def build(folder: Path) -> None:
        with zipfile.ZipFile(HERE / "fixtures" / f"{name}.zip") as archive:
            archive.extractall(folder)

    return build


def _zoo(folder: Path) -> None:
    import jax
    import numpy as np

    import jax_scalegmn as sg

    arch, params = _params()
    stack = jax.tree.map(lambda leaf: np.stack([leaf] * 3), params)
    zoo = sg.Zoo(arch, stack, {"label": np.arange(3), "seed": np.ones(3)}, {"steps": 3, "name": "x"})
    sg.zoo.save(zoo, folder / "signed" / "x.safetensors")
    content = (folder / "signed" / "x.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]["sha256"]  # as older versions wrote it: changes are not refused by the checksum
    text = json.dumps(header).encode()
    _save(folder / "older" / "x.safetensors", len(text).to_bytes(8, "little") + text + content[8 + length :])


def _small_cnn_zoo(folder: Path) -> None:
    import jax
    import numpy as np

    import jax_scalegmn as sg

    arch = sg.cnn((1, 2, 3), 2)
    stack = sg.architecture.unflatten(
        {path: np.full((6, *shape), 0.5, "f4") for path, shape in arch.array_shapes.items()}
    )
    records = {"step": np.array([40, 86] * 3), "test_accuracy": np.linspace(0, 1, 6), "name": np.arange(6) > 2}
    sg.zoo.small_cnn_zoo.save(folder / "six", sg.Zoo(arch, jax.tree.map(np.asarray, stack), records, {}))
    _save(folder / "six" / "index.csv", b"0\n" + b"".join(b"%d\n" % row for row in (3, 0, 1, 2, 5, 4)))
    metrics = gzip.decompress((folder / "six" / "metrics.csv.gz").read_bytes())
    _save(folder / "six" / "metrics.csv.gz", gzip.compress(metrics, mtime=0))


def _inr_folders(folder: Path) -> None:
    from jax_scalegmn.io import tensors

    names = ["mnist_png_training_5_0", "mnist_png_training_2_1", "mnist_png_testing_7_0"]
    paths = [f"{name}/checkpoints/model_final.pth" for name in names]
    for path in paths:
        (folder / "mnist" / path).parent.mkdir(parents=True)
        tensors.write(folder / "mnist" / path, _arrays())
    split = {"train": {"path": paths[:2], "label": ["5", 2]}, "val": paths[:1], "test": {"path": paths[2:]}}
    _save(folder / "mnist" / "split.json", json.dumps(split).encode())


def _images() -> dict[str, Any]:
    import numpy as np

    pixels = {
        f"x_{part}": np.arange(n * 12, dtype=np.uint8).reshape(n, 4, 3) for part, n in (("train", 5), ("test", 2))
    }
    return pixels | {f"y_{part}": np.arange(n, dtype=np.uint8) for part, n in (("train", 5), ("test", 2))}


def _idx(folder: Path) -> None:
    stems = {"x_train": "train-images", "y_train": "train-labels", "x_test": "t10k-images", "y_test": "t10k-labels"}
    for name, array in _images().items():
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
        _save(folder / "plain" / f"{stems[name]}-idx{array.ndim}-ubyte", content)
        _save(folder / "gzipped" / f"{stems[name]}-idx{array.ndim}-ubyte.gz", gzip.compress(content, mtime=0))


def _npz_images(folder: Path) -> None:
    import numpy as np

    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        (folder / name).mkdir(parents=True)
        save(folder / name / "x.npz", **_images())


def _cifar(folder: Path) -> None:
    import numpy as np

    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    pixels, labels = np.arange(6144).astype(np.uint8).reshape(2, 3072), [3, 9]
    pickled = pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x"}, 2)
    records = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))
    for suffix, content in (("", pickled), (".bin", records)):
        kind = "binary" if suffix else "python"
        for name in names:
            _save(folder / f"{kind}, unpacked" / f"{name}{suffix}", content)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name in names:
                member = tarfile.TarInfo(f"cifar-10-batches/{name}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        _save(folder / kind / "x.tar.gz", gzip.compress(out.getvalue(), mtime=0))


def _descriptions(folder: Path) -> None:
    import jax_scalegmn as sg

    archs = {
        "mlp": sg.mlp((3, 4, 2), "relu"),
        "siren": sg.siren((2, 4, 1)),
        "cnn": sg.cnn((1, 2, 3), 2, activation="tanh", padding="SAME", flatten=(4, 4)),
        "resnet": sg.resnet(8, widths=(2, 2, 4), outputs=2),
        "vgg": sg.vgg(((2,), (3,)), 2, norm="batch"),
    }
    for name, arch in archs.items():
        _save(folder / name / "x.json", json.dumps(arch.as_json()).encode())


def _layer_lists(folder: Path) -> None:
    from jax_scalegmn import layers

    some = [layers.Conv(4, 3, name="a"), layers.Activation("leaky_relu", slope=0.2)]
    some += [layers.Residual([layers.Block([layers.Conv(4, 3, padding=1), "relu"])]), layers.BasicBlock(6, stride=2)]
    some += [layers.Flatten(), layers.Dense(5)]
    _save(folder / "cnn" / "x.json", json.dumps(layers.as_json(some, (1, 9, 9))).encode())


def _models(folder: Path) -> None:
    import jax_scalegmn as sg

    siren = sg.siren((2, 4, 1))
    bucket = sg.models.graph.Bucket((siren, sg.siren((2, 3, 1))), 4)
    models = {
        "autoencoder": sg.autoencoder(siren, features=4, num_layers=1),
        "encoder": sg.Encoder(sg.ScaleGMN(siren, features=4, num_layers=1)),
        "bucket": sg.Encoder(sg.ScaleGMN(bucket, features=4, num_layers=1)),
    }
    for name, model in models.items():
        _save(folder / name / "x.json", json.dumps(sg.models.as_json(model)).encode())


def _expressions(folder: Path) -> None:
    from jax_scalegmn import architecture

    for name, text in architecture.EXAMPLES.items():
        _save(folder / name / "x.txt", text.encode())
    layers = "sequential([Conv(4, 3, name='a'), Activation('leaky_relu', slope=0.2), Flatten(), Dense(5)], (1, 9, 9))"
    _save(folder / "sequential" / "x.txt", layers.encode())


def _state() -> tuple[dict[str, Any], Any]:
    """The configuration and a state of a small training run."""
    import jax
    import jax.numpy as jnp

    import jax_scalegmn as sg

    model = sg.Encoder(sg.ScaleGMN(sg.siren((2, 2, 1)), features=1, num_layers=1))
    shapes = sg.models.abstract_variables(model)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)
    state = sg.training.State(variables, (), jax.random.key(0), jnp.asarray(1))
    return {"model": sg.models.as_json(model)}, state


def _make_checkpoints(folder: Path) -> None:
    import jax.numpy as jnp

    from jax_scalegmn.training import checkpoint

    config, state = _state()
    run = checkpoint.Checkpoints(folder / "two" / "run", config)
    for step in (1, 2):
        run.save(state._replace(step=jnp.asarray(step)), loss=1 / step, history=[{"loss": 0.5}])
    run.close()


def _network_and_description(folder: Path) -> None:
    import numpy as np

    from jax_scalegmn.io import tensors

    arch, _ = _params()

    for ending in (".pt", ".safetensors"):
        _save(folder / ending / "arch.json", json.dumps(arch.as_json()).encode())
        tensors.write(folder / ending / f"x{ending}", _arrays())
    _save(folder / "examples" / "arch.json", json.dumps(arch.as_json()).encode())
    tensors.write(folder / "examples" / "x.pt", _arrays())
    np.savez(folder / "examples" / "examples.npz", x=np.ones((5, 3), "f4"), y=np.arange(5) % 2)


# --- reading ------------------------------------------------------------------------------------------------------


def _only(folder: Path) -> Path:
    """The file or folder of a sample that has one."""
    return sorted(folder.iterdir())[0] if any(folder.iterdir()) else folder / "absent"


def _read_tensors(folder: Path) -> Any:
    from jax_scalegmn.io import tensors

    return tensors.read(_only(folder))


def _read_network(folder: Path) -> Any:
    from jax_scalegmn import io

    return io.read_network(_only(folder), _arch())


def _arch() -> Any:
    import jax_scalegmn as sg

    return sg.mlp((3, 4, 2), "relu")


def _read_zoo(folder: Path) -> Any:
    from jax_scalegmn import zoo

    return zoo.load(_only(folder))


def _read_parts_of_a_zoo(folder: Path) -> Any:
    from jax_scalegmn import zoo

    return list(zoo.parts(_only(folder), size=2))


def _read_small_cnn_zoo(folder: Path) -> Any:
    from jax_scalegmn.zoo import small_cnn_zoo

    index = folder / "index.csv"
    return small_cnn_zoo.load(folder, activation="relu", step=86, index_file=index, part="test")


def _read_inr_folders(folder: Path) -> Any:
    from jax_scalegmn.zoo import inr_folders

    parts = [inr_folders.load(folder / "split.json", _arch(), part=part) for part in ("train", "test")]
    return parts, inr_folders.split(folder, validation=0)


def _read_images(folder: Path) -> Any:
    from jax_scalegmn.io import images

    return images.load(folder)


def _read_image_file(folder: Path) -> Any:
    from jax_scalegmn.io import images

    files = sorted(folder.iterdir())
    return images.load(files[0] if len(files) == 1 else folder)


def _json(folder: Path) -> Any:
    """The value of a description; what is no JSON is no case for the reader of its value."""
    path = folder / "x.json"
    try:
        return json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({str(error)[:100]})") from None


def _bytes(path: Path) -> bytes:
    """The content of a file for a reader of values; what is no regular file is no case for it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no file")
    return path.read_bytes()


def _read_description(folder: Path) -> Any:
    from jax_scalegmn import architecture

    return architecture.from_json(_json(folder))


def _read_layers(folder: Path) -> Any:
    from jax_scalegmn import layers

    return layers.from_json(_json(folder))


def _read_model(folder: Path) -> Any:
    from jax_scalegmn import models

    return models.from_json(_json(folder))


def _read_expression(folder: Path) -> Any:
    from jax_scalegmn import architecture, layers

    text = _bytes(folder / "x.txt").decode(errors="replace")
    return layers.parse(text) if text.startswith("sequential") else architecture.parse(text)


def _read_checkpoint(folder: Path) -> Any:
    from jax_scalegmn.training import checkpoint

    return checkpoint.load(folder / "run")


def _restore(folder: Path) -> Any:
    from jax_scalegmn.training import checkpoint

    config, state = _state()
    run = checkpoint.Checkpoints(folder / "run", config)
    try:
        return run.restore_last(state)
    finally:
        run.close()


def _check(folder: Path) -> Any:
    """The command line, whose errors are one line and status 2."""
    from jax_scalegmn import cli

    network = next(iter(sorted(folder.glob("x.*"))), folder / "x.pt")
    examples = [word for path in folder.glob("examples.npz") for word in ("--data", str(path))]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["check", "--arch", str(folder / "arch.json"), str(network), *examples])
    lines = err.getvalue().splitlines()
    if status == 2 and len(lines) == 1 and lines[0].startswith("jax-scalegmn: "):
        raise ValueError(lines[0])
    if status != 0 or lines:
        raise AssertionError(f"status {status}, {len(lines)} lines of errors: {err.getvalue()[:300]}")
    return status


READERS: dict[str, Reader] = {
    "tensors.read, .pt": Reader(_fixtures(".pt"), _read_tensors, 4),
    "tensors.read, before PyTorch 1.6": Reader(_fixtures(".legacy"), _read_tensors, 3),
    "tensors.read, .npz": Reader(_tensors(".npz"), _read_tensors, 2),
    "tensors.read, .safetensors": Reader(_tensors(".safetensors"), _read_tensors, 2),
    "read_network, .pt": Reader(_tensors(".pt"), _read_network, 2),
    "read_network, .msgpack": Reader(_msgpack, _read_network, 3),
    "read_network, Orbax": Reader(_unpacked("orbax"), _read_network, 2),
    "zoo.load": Reader(_zoo, _read_zoo, 3),
    "zoo.parts": Reader(_zoo, _read_parts_of_a_zoo, 1),
    "small_cnn_zoo.load": Reader(_small_cnn_zoo, _read_small_cnn_zoo, 3),
    "inr_folders.load and split": Reader(_inr_folders, _read_inr_folders, 3),
    "images.load, IDX": Reader(_idx, _read_images, 2),
    "images.load, .npz": Reader(_npz_images, _read_image_file, 2),
    "images.load, CIFAR-10": Reader(_cifar, _read_image_file, 3),
    "architecture.from_json": Reader(_descriptions, _read_description, 3, names_path=False),
    "architecture.parse, layers.parse": Reader(_expressions, _read_expression, 2, names_path=False),
    "layers.from_json": Reader(_layer_lists, _read_layers, 1, names_path=False),
    "models.from_json": Reader(_models, _read_model, 2, names_path=False),
    "checkpoint.load": Reader(_unpacked("checkpoints"), _read_checkpoint, 0.5),
    "Checkpoints.restore_last": Reader(_unpacked("checkpoints"), _restore, 0.5, rewrites=True),
    "jax-scalegmn check --arch": Reader(_network_and_description, _check, 2),
}


def cases_by_reader(total: int) -> dict[str, int]:
    """How many cases each reader gets, in all at least that number."""
    shares = sum(reader.share for reader in READERS.values())
    return {name: math.ceil(total * reader.share / shares) for name, reader in READERS.items()}


def main() -> None:
    """Writes the fixtures of what Orbax writes."""
    for name, make in {"orbax": _make_orbax, "checkpoints": _make_checkpoints}.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            zipfile.ZipFile(HERE / "fixtures" / f"{name}.zip", "w") as archive,
        ):
            make(Path(folder))
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                archive.write(path, path.relative_to(folder), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
