"""Writes the result tables, and the numbers that the results pages name, from `benchmarks/results`.

`conf.py` calls this before every build, so that no number of the documentation is typed by hand:

    python docs/tables.py        # writes docs/_generated/*.md and prints what it wrote

A table is a function in `TABLES` that receives the `Results`. A file, a key or a row that is missing is an error.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
GENERATED = HERE / "_generated"

NOISES = ("0", "0.001", "0.002", "0.005")
DIGITS = "python -m experiments.merging digits"
MNIST = "python -m experiments.merging mnist --data mnist.npz"
MANY_MNIST = f"{MNIST} --many-of mlp:784-32-32-10,relu"
CNN_ACCURATE = "python -m experiments.cnn accurate --data cifar10_gray.npz"
CNN_ACCURATE_ZOOS = {"relu": "runs/cnn-zoo-cifar/zoo", "tanh": "runs/cnn-zoo-cifar-tanh/zoo"}
CNN_CIFAR = (
    "python -m experiments.cnn cifar --data cifar10_gray.npz --train.epochs 30 --train.images-per-step 16 "
    "--alignment.epochs 0"
)
MANY = {"naive": "unchanged", "canonical": "canonical forms", "first": "all to the first", "mean": "to their mean"}
MERGED_DIGITS = {
    "mlp:64-32-32-10,relu": "relu 32",
    "mlp:64-128-128-10,relu": "relu 128",
    "mlp:64-512-512-10,relu": "relu 512",
    "mlp:64-128-128-10,tanh": "tanh 128",
    "cnn:1-16-32-32,10,relu,strides=1,padding=SAME,flatten=8-8,dense=64": "CNN",
    "resnet:8,16-16-32,input_channels=1": "ResNet-8",
}
MERGED_MNIST = {f"mlp:784-{width}-{width}-10,relu": f"784-{width}-{width}-10" for width in (32, 64, 128, 256, 512)}
MERGED_CIFAR = {
    "cnn:1-32-64-64,10,relu,strides=2,padding=SAME,flatten=32-32,dense=128": "CNN",
    "resnet:8,16-16-32,input_channels=1": "ResNet-8",
}


ACCURATE = "accurate --data cifar10_gray.npz"
GENERALIZATION = {
    "digits": ("digits --zoo-from runs/cnn-digits", "scikit-learn's digits"),
    "cifar": ("cifar --data cifar10_gray.npz", "gray CIFAR-10"),
    "accurate_relu": (
        f"{ACCURATE} --activations relu --zoo-from runs/cnn-zoo-cifar",
        "gray CIFAR-10, trained longer",
    ),
    "accurate_tanh": (
        f"{ACCURATE} --activations tanh --zoo.steps 8000 --zoo-from runs/cnn-zoo-cifar-tanh",
        "gray CIFAR-10, trained longer",
    ),
}

ACCURATE_CNNS = ["cnn_zoo.json", "cnn_zoo_tanh.json", "cnn_zoo_tanh_more.json"]
ACCELERATOR = "accelerator.jsonl"
ALIGNERS = "aligners.json"
ALIGNERS_COMMAND = "python -m experiments.aligners digits --data mnist.npz"
ALIGNERS_MORE = "aligners_more.json"
ALIGNERS_MORE_COMMAND = (
    "python -m experiments.aligners digits --seeds 0 --no-both-ways --zoo.train-fits 8 --alignment.epochs 12 "
    "--alignment.frame-start matcher --alignment.frame-epochs 12"
)
FUNCTION_DIGITS, FUNCTION_MNIST = "merging_function_digits.json", "merging_function_mnist.json"
FUNCTION_IMAGES, FUNCTION_MNIST_2 = "merging_function_images.json", "merging_function_mnist_2.json"
FUNCTION_CIFAR, FUNCTION_CIFAR_FEW = "merging_function_cifar_1000.json", "merging_function_cifar.json"
SCALES_DIGITS, SCALES_RESNET = "merging_scales_digits.json", "merging_scales_resnet.json"
SCALES_CIFAR = "merging_scales_cifar.json"
SCALES_MNIST, SCALES_MNIST_512 = "merging_scales_mnist.json", "merging_scales_mnist_512.json"
DRAWN_MNIST, DRAWN_MNIST_512 = "merging_drawn_mnist.json", "merging_drawn_mnist_512.json"
DRAWN_MNIST_MORE, DRAWN_RESNET = "merging_drawn_mnist_more.json", "merging_drawn_resnet.json"
DRAWN_CIFAR = "merging_drawn_cifar.json"
KICKS_DIGITS, KICKS_MNIST = "merging_kicks_digits.json", "merging_kicks_mnist.json"
FUNCTION_MORE, FUNCTION_MORE_512 = "merging_function_mnist_more.json", "merging_function_mnist_512.json"
# The preset of experiments.merging by the file of images.
MERGING_PRESETS = {None: "digits", "mnist.npz": "mnist", "cifar10_gray.npz": "cifar"}
# By the kind of networks, the options of the methods that compare functions, and their defaults.
FUNCTION_OPTIONS = {
    "mlp": {"function_examples": 1000, "function_values": 2**17, "function_steps": 100},
    "cnn": {"image_examples": 256, "function_steps": 100},
    "resnet": {"image_examples": 256, "function_steps": 100},
}
SEARCH_OPTIONS = {"search_kicks": 0, "scale_steps": 200, "scale_batch": None}
MANY_BY_FUNCTION = {
    "first": "weights, to the first",
    "mean": "weights, to their mean",
    "search": "search",
    "search_gradient": "search after gradient steps",
    "search_last": "and a last round",
    "search_scales": "search after gradient steps, scales fitted",
}
CLASSIFY_MNIST = "classify_mnist.json"
SEARCH = "search_cpu.jsonl"
RECIPES = "recipes_cpu.jsonl"
FUZZING = "fuzzing.jsonl"


class Results:
    """The result files of one folder, each read once.

    Args:
      folder: The folder with the JSON and JSON-lines files.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The content of a file, like "digits.json"; of a JSON-lines file the list of its rows."""
        if name not in self._read:
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path}: expected a result file; it does not exist. Run its experiment first.")
            text = path.read_text()
            lines = path.suffix == ".jsonl"
            self._read[name] = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        return self._read[name]

    def row(self, name: str, **wanted: Any) -> Any:
        """The one row of a JSON-lines file that has all the wanted values."""
        rows = [row for row in self[name] if all(row.get(key) == value for key, value in wanted.items())]
        if len(rows) != 1:
            raise ValueError(f"{self.folder / name}: expected one row with {wanted}, got {len(rows)}.")
        return rows[0]

    def rows(self, name: str, **wanted: Any) -> list[Any]:
        """All rows of a JSON-lines file that have the wanted values: at least one."""
        rows = [row for row in self[name] if all(row.get(key) == value for key, value in wanted.items())]
        if not rows:
            raise ValueError(f"{self.folder / name}: expected rows with {wanted}, got none.")
        return rows


class Table(NamedTuple):
    """A table of a results page.

    Attributes:
      caption: What it shows, one sentence.
      command: The command that prints its numbers.
      sources: The files that hold them.
      header: The names of the columns.
      rows: The cells of every row, as they are shown.
    """

    caption: str
    command: str
    sources: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


# --- the autoencoder of INRs --------------------------------------------------------------------------------------


def inr_methods(results: Results) -> Table:
    return _inr_methods(results, "digits.json", "python -m experiments.inr digits --cpu-devices 2")


MNIST_ON_A_GPU = (
    "python -m experiments.inr mnist --data mnist.npz --zoo.train-images 40000 --zoo.selection-images 500 "
    "--zoo.scoring-images 200 --zoo.chunk 2048 --train.micro-batch None --train.epochs 22 --train.warmup-steps 300 "
    "--train.orbit-weight 0 --train.minutes 4"
)


def inr_methods_mnist(results: Results) -> Table:
    return _inr_methods(results, "mnist_h200.json", MNIST_ON_A_GPU)


MNIST_SMALL = "python -m experiments.inr mnist-small --data mnist.npz"
BOTH_ENCODERS = (
    "python -m experiments.inr digits --train.optimizer adamw --train.epochs 32 --train.batch-size 64 "
    "--train.warmup-steps 200 --train.moves.turn 0 --train.moves.shift 0 --train.moves.stretch 0 --alignment.epochs 0 "
    "--evaluation.noises 0 --encoder "
)


def inr_methods_mnist_small(results: Results) -> Table:
    return _inr_methods(results, "mnist_small.json", MNIST_SMALL)


def inr_noise_mnist_small(results: Results) -> Table:
    return _inr_noise(results, "mnist_small.json", MNIST_SMALL)


def inr_controls(results: Results) -> Table:
    files = {"digits": "digits_equivariant.json", "MNIST": "mnist_small.json"}
    parts = [results[file]["reconstruction"] for file in files.values()]
    several = [
        {"the decoded network": part | {"recognized": part["recognized"]["decoded"]}}
        | {CONTROLS[name]: control for name, control in part["controls"].items()}
        for part in parts
    ]
    rows = [
        (
            label,
            *(
                cell
                for one in several
                for cell in (percent(one[label]["share_of_variance"]), percent(one[label]["recognized"]))
            ),
        )
        for label in several[0]
    ]
    return Table(
        "What is drawn in place of unseen networks: mean squared error against what they draw, as a share of the "
        "training images' variance, and digits read",
        MNIST_SMALL,
        list(files.values()),
        ("drawn by", *(f"{name}: {what}" for name in files for what in ("error", "read"))),
        rows,
    )


EDIT_MNIST = "python -m experiments.edit mnist-small --data mnist.npz --train.epochs 1"


def editing(results: Results) -> Table:
    rows = [
        (
            networks,
            f"{one['parameters']:,}",
            str(one["features"]),
            interval(one["mse"], 2, factor=100),
            f"{100 * one['moved_mse']:.2f}",
            f"{sum(epoch['seconds'] for epoch in one['training']) / 60:.1f}",
        )
        for networks, one in results["edit_mnist.json"]["editors"].items()
    ]
    return Table(
        "Dilation of INRs of unseen MNIST images: mean squared error x 100 of what the edited networks draw on "
        "average, for networks as they are and moved by random group elements",
        EDIT_MNIST,
        ["edit_mnist.json"],
        ("networks", "parameters", "features", "MSE x 100", "moved", "minutes"),
        rows,
    )


CONTROLS = {
    "mean_image": "nothing: the mean training image",
    "mean_network": "the mean of the training networks",
    "mean_aligned": "the mean of training networks, aligned to one",
    "nearest": "the training network that draws the nearest image",
    "noise_0.05": "the network itself, with noise of 5%",
    "noise_0.1": "the network itself, with noise of 10%",
    "noise_0.2": "the network itself, with noise of 20%",
    "noise_0.4": "the network itself, with noise of 40%",
}


def inr_encoders(results: Results) -> Table:
    files = ("digits_equivariant.json", "digits_permutation.json")
    return _inr_encoders(results, files, BOTH_ENCODERS + "permutation", "on digits")


def inr_encoders_mnist_small(results: Results) -> Table:
    files = ("mnist_small.json", "mnist_small_permutation.json")
    command = f"{MNIST_SMALL} --encoder permutation --alignment.epochs 0"
    return _inr_encoders(results, files, command, "on MNIST at 28 x 28")


def _inr_encoders(results: Results, files: tuple[str, str], command: str, where: str) -> Table:
    rows = []
    for label, name in zip(("the whole group", "permutations alone"), files, strict=True):
        file = results[name]
        merged = file["merging"]["independent fits"]["autoencoder"]
        rows.append(
            (
                label,
                f"{file['model']['parameters']:,}",
                *(power_of_ten(file["orbits"][group]["ratio"]) for group in ("P", "D", "PD")),
                percent(file["reconstruction"]["share_of_variance"]),
                percent(file["reconstruction"]["recognized"]["decoded"]),
                interval(merged["midpoint"], 4),
            )
        )
    return Table(
        f"Autoencoders of one decoder, size and training {where}, whose encoders follow different groups: how far "
        "embeddings of an orbit spread, over the spread of different networks; reconstruction; and the midpoint of "
        "independent fits",
        command,
        list(files),
        ("encoder follows", "parameters", "permuted", "signs", "both", "reconstruction", "decoded read", "midpoint"),
        rows,
    )


def _inr_methods(results: Results, file: str, command: str) -> Table:
    methods = results[file]["merging"]["independent fits"]
    timed = all("milliseconds" in method for method in methods.values())
    rows = [
        (
            method["label"],
            interval(method["midpoint"], 4),
            f"{method['barrier']['mean']:.4f}",
            f"{method['end_point_gap']['mean']:.4f}",
            percent(method["recognized"]),
            *([f"{method['milliseconds']:.1f}"] if timed else []),
        )
        for method in methods.values()
    ]
    return Table(
        "Two independent fits of each unseen image, merged: mean squared error against the true image"
        + (", and the milliseconds of aligning a pair, all pairs at once" if timed else ""),
        command,
        [file],
        ("method", "midpoint", "barrier", "end-point gap", "digits read", *(["ms"] if timed else [])),
        rows,
    )


def inr_noise(results: Results) -> Table:
    return _inr_noise(results, "digits.json", "python -m experiments.inr digits --cpu-devices 2")


def _inr_noise(results: Results, file: str, command: str) -> Table:
    merging = results[file]["merging"]
    kinds = [merging[f"PD, noise {noise}"] for noise in NOISES]
    rows = [
        (kinds[0][name]["label"], *(f"{kind[name]['midpoint']['mean']:.4f}" for kind in kinds)) for name in kinds[0]
    ]
    return Table(
        "A network and a transformed, perturbed copy of itself (permutations and signs), merged at t = 1/2: "
        "mean squared error, over the size of the noise",
        command,
        [file],
        ("method", *(f"noise {noise}" for noise in NOISES)),
        rows,
    )


def inr_orbit_weight(results: Results) -> Table:
    methods = ("matching_pd_forward", "fixed_frame", "canonical_frame", "autoencoder")
    rows = [
        (
            str(row["options"]["model.features"]),
            str(row["options"]["train.epochs"]),
            f"{row['options']['train.orbit_weight']:.1f}",
            percent(row["results"]["reconstruction.share_of_variance"]),
            *(f"{row['results'][f'merging.independent fits.{method}.midpoint.mean']:.4f}" for method in methods),
        )
        for row in results["orbit_weight.json"]["rows"]
    ]
    return Table(
        "The orbit-distance term of the loss: reconstruction error as a share of the images' variance, and midpoints "
        "of independent fits",
        "jax-scalegmn sweep make experiments/studies/orbit_weight.toml --storage sqlite:///runs/orbit_weight.db",
        ["orbit_weight.json"],
        (
            "features",
            "epochs",
            "weight",
            "reconstruction",
            "pairwise",
            "one fixed network",
            "canonical frame",
            "autoencoder",
        ),
        rows,
    )


# --- aligned and merged classifiers -------------------------------------------------------------------------------


def merging_digits(results: Results) -> Table:
    return _merged(results, "merging_digits.json", MERGED_DIGITS, DIGITS, "Classifiers of scikit-learn's digits")


def merging_mnist(results: Results) -> Table:
    return _merged(results, "merging_mnist.json", MERGED_MNIST, MNIST, "Perceptrons of MNIST")


def merging_cifar(results: Results) -> Table:
    command = "python -m experiments.merging cifar --data cifar10_gray.npz"
    return _merged(results, "merging_cifar.json", MERGED_CIFAR, command, "Classifiers of gray CIFAR-10")


def accurate_cnns(results: Results) -> Table:
    """How well the CNNs classify that are all trained with the same options."""
    rows = []
    for file in ACCURATE_CNNS:
        config = results[file]["config"]
        ((activation, cnns),) = results[file]["zoos"].items()
        quantiles = (accuracy(cnns["scoring_accuracy"][quantile]) for quantile in ("5", "25", "50", "100"))
        counts = (str(config["seed"]), str(cnns["networks"]), f"{config['zoo']['steps']:,}")
        rows.append((activation, *counts, *quantiles, str(_above_half(cnns))))
    return Table(
        "CNNs 1-16-16-16-10, those with one activation trained alike: accuracy in % on 5,000 test images",
        "python -m experiments.cnn_zoo cifar --data cifar10_gray.npz --activations ACTIVATION --seed SEED "
        "--zoo.networks NETWORKS --zoo.steps UPDATES",
        ACCURATE_CNNS,
        (
            "activation",
            "seed",
            "networks",
            "updates",
            "worst twentieth",
            "worst quarter",
            "median",
            "best",
            "above 50%",
        ),
        rows,
    )


def merging_cnn_zoo(results: Results) -> Table:
    return _merged_pairs(results, "relu", "merging_cnn_zoo.json", "runs/cnn-zoo-cifar")


def merging_cnn_zoo_tanh(results: Results) -> Table:
    return _merged_pairs(results, "tanh", "merging_cnn_zoo_tanh.json", "runs/cnn-zoo-cifar-tanh --pairs 4")


def _merged_pairs(results: Results, activation: str, name: str, zoo: str) -> Table:
    """Pairs of a zoo's best: accuracies and losses without and with REPAIR, and the losses with one temperature."""
    (network,) = results[name]["pairs"].values()
    ends = [accuracy(average(network["test_accuracy"])), "", f"{average(network['test_loss']):.3f}", "", ""]
    rows = [("end points", *ends)]
    for method in network["methods"].values():
        losses = (
            f"{average(pair[kind]['loss'] for pair in method['pairs']):.3f}"
            for kind in ("middle", "repaired", "tempered")
        )
        rows.append((method["label"], *map(accuracy, merged_accuracy(method["pairs"])), *losses))
    return Table(
        f"CNNs 1-16-16-16-10 with {activation} of gray CIFAR-10: test accuracy in % and loss in nats at the midpoint",
        f"python -m experiments.merging_zoo cifar --data cifar10_gray.npz --zoo {zoo} --activations {activation}",
        [name],
        ("method", "accuracy", "with REPAIR", "loss", "with REPAIR", "with one temperature"),
        rows,
    )


def many_digits(results: Results) -> Table:
    return _many(results, "merging_digits.json", DIGITS)


def many_mnist(results: Results) -> Table:
    return _many(results, "merging_mnist.json", MANY_MNIST)


def recovery(results: Results) -> Table:
    noises = sorted({row["noise"] for row in results["recovery.jsonl"]})
    networks = dict.fromkeys(row["network"] for row in results["recovery.jsonl"])

    def cell(network: str, noise: float) -> str:
        row = results.row("recovery.jsonl", network=network, noise=noise)
        return f"{100 * row['forward']:.0f} / {100 * row['identity']:.0f}"

    return Table(
        "How often a planted element is found again, in %: forward start / identity start, over the size of the noise "
        "relative to the weights",
        "python -m benchmarks.recovery",
        ["recovery.jsonl"],
        ("network", *(f"noise {noise:g}" for noise in noises)),
        [(f"`{network}`", *(cell(network, noise) for noise in noises)) for network in networks],
    )


def function_digits(results: Results) -> Table:
    return _by_function(results, [FUNCTION_DIGITS], MERGED_DIGITS, "Perceptrons of scikit-learn's digits")


def function_images(results: Results) -> Table:
    return _by_function(results, [FUNCTION_IMAGES], MERGED_DIGITS, "Convolutional networks of scikit-learn's digits")


def function_mnist(results: Results) -> Table:
    return _by_function(results, [FUNCTION_MNIST, FUNCTION_MNIST_2], MERGED_MNIST, "Perceptrons of MNIST")


def function_mnist_more(results: Results) -> Table:
    match = results[FUNCTION_MORE_512]["config"]["match"]
    examples, fewer = match["function_examples"], match["function_values"] // 512
    title = f"Perceptrons of MNIST, compared on {examples:,} images, on {fewer:,} at width 512"
    return _by_function(results, [FUNCTION_MORE, FUNCTION_MORE_512], MERGED_MNIST, title)


def function_cifar(results: Results) -> Table:
    examples = results[FUNCTION_CIFAR]["config"]["match"]["image_examples"]
    title = f"One pair of CNNs of gray CIFAR-10, compared on {examples:,} images"
    return _by_function(results, [FUNCTION_CIFAR], MERGED_CIFAR, title)


def scales_digits(results: Results) -> Table:
    what = "Networks of scikit-learn's digits, scales fitted"
    return _by_function(results, [SCALES_DIGITS, SCALES_RESNET], MERGED_DIGITS, what)


def scales_mnist(results: Results) -> Table:
    return _by_function(results, [SCALES_MNIST, SCALES_MNIST_512], MERGED_MNIST, "Perceptrons of MNIST, scales fitted")


def scales_cifar(results: Results) -> Table:
    return _by_function(results, [SCALES_CIFAR], MERGED_CIFAR, "One pair of CNNs of gray CIFAR-10, scales fitted")


def drawn_mnist(results: Results) -> Table:
    what = "Perceptrons of MNIST, scales fitted to all training images"
    return _by_function(results, [DRAWN_MNIST, DRAWN_MNIST_512], MERGED_MNIST, what)


def drawn_mnist_more(results: Results) -> Table:
    what = (
        f"Perceptrons of MNIST, searched on {_searched_images(results, DRAWN_MNIST_MORE)} images, scales fitted to all"
    )
    return _by_function(results, [DRAWN_MNIST_MORE], MERGED_MNIST, what)


def drawn_digits(results: Results) -> Table:
    what = "Networks of scikit-learn's digits, scales fitted to all training images"
    return _by_function(results, [DRAWN_RESNET], MERGED_DIGITS, what)


def drawn_cifar(results: Results) -> Table:
    what = "One pair of CNNs of gray CIFAR-10, scales fitted to all training images"
    return _by_function(results, [DRAWN_CIFAR], MERGED_CIFAR, what)


def kicks_digits(results: Results) -> Table:
    what = f"A perceptron of scikit-learn's digits, searched with {_kicks(results, KICKS_DIGITS)} kicks"
    return _by_function(results, [KICKS_DIGITS], MERGED_DIGITS, what)


def kicks_mnist(results: Results) -> Table:
    what = f"A perceptron of MNIST, searched with {_kicks(results, KICKS_MNIST)} kicks"
    return _by_function(results, [KICKS_MNIST], MERGED_MNIST, what)


def _kicks(results: Results, file: str) -> int:
    return int(results[file]["config"]["match"]["search_kicks"])


def many_function(results: Results) -> Table:
    ways = {name: label for name, label in MANY_BY_FUNCTION.items() if name != "search_scales"}
    return _many_by_function(results, FUNCTION_DIGITS, ways)


def scales_many(results: Results) -> Table:
    ways = {name: MANY_BY_FUNCTION[name] for name in ("mean", "search_gradient", "search_scales")}
    return _many_by_function(results, SCALES_DIGITS, ways)


def _many_by_function(results: Results, file: str, ways: Mapping[str, str]) -> Table:
    many = results[file]["many"]
    rows = [
        (
            number,
            accuracy(row["end_points"]),
            *(f"{accuracy(row[way]['accuracy'])} / {accuracy(row[way]['repaired_accuracy'])}" for way in ways),
        )
        for number, row in many["by_number"].items()
    ]
    return Table(
        f"N networks `{many['network']}` merged into one by what they compute: test accuracy in %, without / with "
        "REPAIR",
        _command_of(results, file),
        [file],
        ("N", "end points", *ways.values()),
        rows,
    )


def _by_function(results: Results, files: Sequence[str], names: Mapping[str, str], what: str) -> Table:
    """Accuracies with the seconds of CPU time that aligning a pair takes, without compilation."""
    found = {name: one for file in files for name, one in results[file]["pairs"].items()}
    networks = {name: found[name] for name in names if name in found}
    ends = ["end points", *(accuracy(average(one["test_accuracy"])) for one in networks.values())]
    rows = [ends]
    for method, first in next(iter(networks.values()))["methods"].items():
        cells = []
        for one in networks.values():
            if method not in one["methods"]:
                cells.append("")
                continue
            pairs = one["methods"][method]["pairs"]
            plain, repaired = merged_accuracy(pairs)
            cells.append(f"{accuracy(plain)} / {accuracy(repaired)}")
            if len(pairs) > 1:  # the first pair's time includes compilation
                cells[-1] += f" ({_about(1000 * average(pair['cpu_seconds'] for pair in pairs[1:]))})"
        rows.append([first["label"], *cells])
    return Table(
        f"{what}: test accuracy at the midpoint in %, without / with REPAIR (milliseconds of CPU time for a pair)",
        "` and `".join(_command_of(results, file) for file in files),
        files,
        ("method", *(names[name] for name in networks)),
        rows,
    )


def _command_of(results: Results, file: str) -> str:
    """The command of a run of `experiments.merging` on some networks by some methods."""
    config = results[file]["config"]
    words = ["python -m experiments.merging", MERGING_PRESETS[config["data"]]]
    words += ["--data", config["data"]] if config["data"] else []
    words += ["--networks", *config["networks"], "--models", str(config["models"]), "--methods", *config["methods"]]
    if config["many"]:
        words += ["--many-of", config["many_of"], "--ways", *config["ways"]]
    else:
        words.append("--many")
    kinds = {network.partition(":")[0] for network in config["networks"]}
    options = {name: value for kind in sorted(kinds) for name, value in FUNCTION_OPTIONS[kind].items()}
    for name, default in (options | SEARCH_OPTIONS).items():
        if (value := config["match"].get(name, default)) != default:
            words += [f"--match.{name.replace('_', '-')}", str(value)]
    return " ".join(words)


def _about(milliseconds: float) -> str:
    """A time to two digits: "3", "47", "1,300"."""
    if milliseconds < 1:
        return "< 1"
    digit = math.floor(math.log10(milliseconds))
    return f"{round(milliseconds, min(0, 1 - digit)):,.0f}"


def learned_seeds(results: Results) -> Table:
    seeds = results[ALIGNERS]["seeds"]
    rows = []
    for method, first in next(iter(seeds.values()))["methods"].items():
        several = [one["methods"][method] for one in seeds.values()]
        middles = [one["midpoint"]["mean"] for one in several]
        mean = average(middles)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in middles) / (len(middles) - 1))
        between = average(one["between_pixels"] for one in several)
        cells = (f"{mean:.4f} ± {deviation:.4f}", f"{between:.4f}", *(f"{value:.4f}" for value in middles))
        rows.append((first["label"], *cells))
    pairs = next(iter(next(iter(seeds.values()))["methods"].values()))["pairs"]
    return Table(
        f"{len(seeds)} seeds of images, INRs and training, {pairs} unseen pairs each: squared error at t = 1/2 (mean "
        "and standard deviation over seeds), and between the pixels to the mean of both networks' outputs",
        ALIGNERS_COMMAND,
        [ALIGNERS],
        ("method", "midpoint", "between pixels", *(f"seed {seed}" for seed in seeds)),
        rows,
    )


def learned_more(results: Results) -> Table:
    rows, names = [], ("learned_matching", "learned_frame", "learned_search")
    for file in (ALIGNERS, ALIGNERS_MORE):
        config, methods = results[file]["config"], results[file]["seeds"]["0"]["methods"]
        passes = config["alignment"]["epochs"]
        middles = (interval(methods[name]["midpoint"], 4) for name in names)
        rows.append((str(config["zoo"]["train_fits"]), str(passes), *middles))
    return Table(
        "Matcher and frame of seed 0, trained on more pairs of networks and for longer: squared error at t = 1/2",
        ALIGNERS_MORE_COMMAND,
        [ALIGNERS, ALIGNERS_MORE],
        ("fits of an image", "passes", "learned matching", "learned frame", "search from the learned matching"),
        rows,
    )


def learned_transfer(results: Results) -> Table:
    rows = [
        (name, one["label"], interval(one["midpoint"], 4), f"{one['between_pixels']:.4f}")
        for name, several in results[ALIGNERS]["transfer"].items()
        for one in several.values()
    ]
    return Table(
        "Models trained on INRs 2-16-16-1 of digits or of MNIST shrunk to 8 x 8 (the other images), tried on each "
        "other's scoring pairs, and those of digits on 100 pairs of wider networks (2-32-32-1): squared error at t = "
        "1/2, and between the pixels to the mean of both networks' outputs",
        ALIGNERS_COMMAND,
        [ALIGNERS],
        ("networks", "method", "midpoint", "between pixels"),
        rows,
    )


def speed_search(results: Results) -> Table:
    rows = [
        (
            f"`{row['network']}`",
            f"{row['inputs']:,}",
            str(row["pairs"]),
            f"{row['evaluations']:,}",
            significant(row["ms"]),
            significant(row["us_an_evaluation"]),
            significant(row["temporary_mib"]),
        )
        for row in results.rows(SEARCH, job="cost")
    ]
    return Table(
        "One sweep of search matching with at most 32 exchanges tried at a time, in CPU time for a pair",
        "python -m benchmarks.search --jobs cost",
        [SEARCH],
        ("networks", "inputs", "pairs at once", "evaluations", "ms", "microseconds an evaluation", "MiB"),
        rows,
    )


def search_inrs(results: Results) -> Table:
    rows = []
    for row in results.rows("search_cpu.jsonl", job="inr"):
        middle = f"{row['midpoint']:.4f} ± {row['half_interval']:.4f}"
        numbers = f"{row['path']:.4f}", f"{row['half_pixel']:.4f}"
        rows.append((row["method"], middle, *numbers, significant(row["ms"]) if "ms" in row else ""))
    pairs = results["search_cpu.jsonl"][0]["pairs"]
    return Table(
        f"{pairs} pairs of INRs of digits, two fits of one image each: squared error of the merged network to the "
        "image at t = 1/2 (with its 95% interval) and over the path, to the mean of both networks' outputs between the "
        "pixels, and milliseconds of CPU time for a pair, those of a search without its start",
        "python -m benchmarks.search",
        ["search_cpu.jsonl"],
        ("method", "midpoint", "path", "between pixels", "ms"),
        rows,
    )


def search_classifiers(results: Results) -> Table:
    rows = []
    for row in results.rows("search_cpu.jsonl", job="classifier"):
        network = MERGED_DIGITS[row["network"]]
        rows.append((network, row["method"], percent(row["ends"]), percent(row["accuracy"]), significant(row["ms"])))
    return Table(
        "Pairs of classifiers of digits, merged at t = 1/2 without REPAIR: test accuracy of the end points and of the "
        "merged networks, and milliseconds of CPU time for a pair. The search sees 1,000 training images, no labels",
        "python -m benchmarks.search",
        ["search_cpu.jsonl"],
        ("network", "method", "end points", "merged", "ms"),
        rows,
    )


def _merged(results: Results, file: str, names: Mapping[str, str], command: str, what: str) -> Table:
    networks = results[file]["pairs"]
    unknown = networks.keys() ^ names.keys()
    if unknown:
        raise ValueError(f"{results.folder / file}: expected the networks {list(names)}, got {list(networks)}.")
    ends = ["end points", *(accuracy(average(networks[name]["test_accuracy"])) for name in names)]
    rows = [ends]
    for method, first in networks[next(iter(names))]["methods"].items():
        cells = []
        for name in names:
            plain, repaired = merged_accuracy(networks[name]["methods"][method]["pairs"])
            cells.append(f"{accuracy(plain)} / {accuracy(repaired)}")
        rows.append([first["label"], *cells])
    return Table(
        f"{what}: test accuracy at the midpoint in %, without / with REPAIR",
        command,
        [file],
        ("method", *names.values()),
        rows,
    )


def _many(results: Results, file: str, command: str) -> Table:
    many = results[file]["many"]
    rows = [
        (
            number,
            accuracy(row["end_points"]),
            *(f"{accuracy(row[way]['accuracy'])} / {accuracy(row[way]['repaired_accuracy'])}" for way in MANY),
        )
        for number, row in many["by_number"].items()
    ]
    return Table(
        f"N networks `{many['network']}` merged into one: test accuracy in %, without / with REPAIR",
        command,
        [file],
        ("N", "end points", *MANY.values()),
        rows,
    )


# --- CNNs ---------------------------------------------------------------------------------------------------------


def cnn_digits_relu(results: Results) -> Table:
    return _cnn(results, "cnn_digits.json", "relu", "python -m experiments.cnn digits", "scikit-learn's digits")


def cnn_digits_tanh(results: Results) -> Table:
    return _cnn(results, "cnn_digits.json", "tanh", "python -m experiments.cnn digits", "scikit-learn's digits")


def cnn_cifar_relu(results: Results) -> Table:
    return _cnn(results, "cnn_cifar.json", "relu", CNN_CIFAR, "gray CIFAR-10")


def cnn_cifar_tanh(results: Results) -> Table:
    return _cnn(results, "cnn_cifar.json", "tanh", CNN_CIFAR, "gray CIFAR-10")


def cnn_accurate_relu(results: Results) -> Table:
    return _cnn_accurate(results, "relu")


def cnn_accurate_tanh(results: Results) -> Table:
    return _cnn_accurate(results, "tanh")


def _cnn_accurate(results: Results, activation: str) -> Table:
    command = f"{CNN_ACCURATE} --activations {activation} --zoo {CNN_ACCURATE_ZOOS[activation]}"
    data = "gray CIFAR-10 that were trained longer"
    return _cnn(results, f"cnn_accurate_{activation}.json", activation, command, data)


def _cnn(results: Results, file: str, activation: str, command: str, data: str) -> Table:
    group = results[file]["activations"][activation]
    rows = [("end points", accuracy(group["end_points"]), "", "", "")]
    for method in group["merging"].values():
        plain, repaired = method["plain"], method["repaired"]
        rows.append(
            (
                method["label"],
                interval(plain["accuracy"], 1, factor=100),
                accuracy(repaired["accuracy"]["mean"]),
                f"{plain['barrier']['mean']:.2f}",
                f"{repaired['barrier']['mean']:.2f}",
            )
        )
    return Table(
        f"CNNs with {activation} of {data}, merged at t = 1/2: accuracy in % and loss barriers in nats",
        command,
        [file],
        ("method", "accuracy", "with REPAIR", "barrier", "with REPAIR"),
        rows,
    )


# --- metanetworks that predict ------------------------------------------------------------------------------------


def generalization_digits_relu(results: Results) -> Table:
    return _generalization(results, "digits", "relu")


def generalization_digits_tanh(results: Results) -> Table:
    return _generalization(results, "digits", "tanh")


def generalization_cifar_relu(results: Results) -> Table:
    return _generalization(results, "cifar", "relu")


def generalization_cifar_tanh(results: Results) -> Table:
    return _generalization(results, "cifar", "tanh")


def generalization_accurate_relu(results: Results) -> Table:
    return _generalization(results, "accurate_relu", "relu")


def generalization_accurate_tanh(results: Results) -> Table:
    return _generalization(results, "accurate_tanh", "tanh")


def _generalization(results: Results, name: str, activation: str) -> Table:
    file, (options, data) = f"generalization_{name}.json", GENERALIZATION[name]
    encoders = results[file]["activations"][activation]["encoders"]
    columns = {"tau": 2, "moved_tau": 2, "r2": 2, "moved_r2": 2, "l1": 3, "moved_l1": 3}
    rows = [
        (encoder["label"], f"{encoder['parameters']:,}", *(spread(encoder[name], columns[name]) for name in columns))
        for encoder in encoders.values()
    ]
    return Table(
        f"Accuracy of CNNs with {activation} of {data}, predicted from their weights",
        f"python -m experiments.generalization {options}",
        [file],
        ("encoder", "parameters", "τ", "moved τ", "R²", "moved R²", "L1", "moved L1"),
        rows,
    )


def classify_digits(results: Results) -> Table:
    rows = [
        (
            encoder["label"],
            f"{encoder['parameters']:,}",
            spread(encoder["accuracy"], 1, factor=100, unit="%"),
            spread(encoder["moved_accuracy"], 1, factor=100, unit="%"),
            percent(encoder["agreement"]["mean"]),
            f"{encoder['networks_per_second']['mean']:,.0f}",
        )
        for encoder in results["classify_digits.json"]["encoders"].values()
    ]
    return Table(
        "Which digit does an INR draw? Four encoders of one size",
        "python -m experiments.classify digits",
        ["classify_digits.json"],
        ("encoder", "parameters", "accuracy", "on moved networks", "same prediction", "networks/s in training"),
        rows,
    )


def classify_mnist(results: Results) -> Table:
    found = results[CLASSIFY_MNIST]
    whole = {"networks": found["zoo"]["train"]["networks"], "encoders": found["encoders"]}
    shares = {float(name): one for name, one in found["smaller"].items()} | {1.0: whole}
    rows = [
        (
            encoder["label"],
            *(
                f"{spread(share['encoders'][name]['accuracy'], 1, factor=100, unit='%')} "
                f"({share['encoders'][name]['learning_rate']:g})"
                for share in shares.values()
            ),
            spread(encoder["moved_accuracy"], 1, factor=100, unit="%"),
            percent(encoder["agreement"]["mean"]),
        )
        for name, encoder in found["encoders"].items()
    ]
    heads = (f"{100 * share:g}%: {one['networks']:,} networks" for share, one in shares.items())
    return Table(
        "Which digit of MNIST does an INR draw? Accuracy by the share of the training images (and the learning rate "
        "that suited best), and after training on all of them on moved networks",
        _classify_command(found["config"]),
        [CLASSIFY_MNIST],
        ("encoder", *heads, "on moved networks", "same prediction"),
        rows,
    )


def _classify_command(config: Mapping[str, Any]) -> str:
    fractions, rates = (" ".join(f"{value:g}" for value in config[name]) for name in ("fractions", "learning_rates"))
    return (
        f"python -m experiments.classify mnist-small --data {config['data']} --fractions {fractions} "
        f"--learning-rates {rates} --seeds {config['seeds']}"
    )


# --- speed --------------------------------------------------------------------------------------------------------


def speed_scalegmn(results: Results) -> Table:
    file = "scalegmn_cpu.jsonl"
    blocks = results.rows(file, implementation="blocks", dtype="float32")
    rows = []
    for row in sorted(blocks, key=lambda row: (row["width"], row["batch_size"], row["benchmark"])):
        alike = {key: row[key] for key in ("benchmark", "dtype", "width", "batch_size")}
        sums = [
            other
            for other in results[file]
            if other["implementation"] == "segment_sum" and all(other[key] == value for key, value in alike.items())
        ]
        rows.append(
            (
                f"2-{row['width']}-{row['width']}-1",
                str(row["batch_size"]),
                {"forward": "forward", "step": "training step"}[row["benchmark"]],
                digits(row["graphs_per_second"]),
                digits(sums[0]["graphs_per_second"]) if sums else "",
                significant(row["gflop_per_graph"]),
                f"{row['share_of_matmul_rate']:.0%}",
                f"{row['peak_mib']:,.0f}",
                f"{row['compile_seconds']:.1f}",
            )
        )
    return Table(
        "The encoder of INRs with 128 features and 4 layers, float32, on blocks and edge by edge with `segment_sum`",
        "python -m benchmarks.scalegmn",
        [file],
        (
            "INRs",
            "batch",
            "",
            "INRs/s",
            "by segment sums",
            "GFLOP per INR",
            "share of product rate",
            "peak MiB",
            "to compile, s",
        ),
        rows,
    )


def speed_embed(results: Results) -> Table:
    ways = {"embed": "`models.embed`", "vmap": "one `vmap`"}
    rows = [
        (
            f"2-{row['width']}-{row['width']}-1",
            str(row["features"]),
            *(digits(row["networks_per_second"][way]) for way in ways),
            digits(max(rate for way, rate in row["networks_per_second"].items() if way not in ways)),
        )
        for row in results["embed_cpu.jsonl"]
    ]
    return Table(
        "Embeddings of 256 INRs, an encoder of 4 layers: INRs a second",
        "python -m benchmarks.embed",
        ["embed_cpu.jsonl"],
        ("INRs", "features", *ways.values(), "best of 1, 4, 16, 64 at once"),
        rows,
    )


def speed_inr(results: Results) -> Table:
    names = {
        "encoder_forward": "encoder forward",
        "training_step": "training step",
        "training_step_micro_2": "training step, micro-batches of 2",
    }
    rows = [
        (
            names[row["benchmark"]],
            str(row["batch_size"]),
            digits(row["graphs_per_second"]),
            f"{row['share_of_matmul_rate']:.0%}",
            f"{row['compile_seconds']:.1f}",
            f"{row['peak_mib']:,.0f}",
        )
        for row in results["inr_cpu.jsonl"]
        if row["benchmark"] in names
    ]
    return Table(
        "The autoencoder of INRs at its published size",
        "python -m benchmarks.inr",
        ["inr_cpu.jsonl"],
        ("", "batch", "INRs/s", "share of product rate", "compilation, s", "peak MiB"),
        rows,
    )


def speed_matching(results: Results) -> Table:
    rows = []
    for job in ("width", "depth", "batch"):
        found = results.rows("matching_cpu.jsonl", job=job)
        for row in sorted(found, key=lambda row: (row["parameters"], row["batch"])):
            milliseconds = {where: f"{1000 * time['median_s']:,.1f}" for where, time in row["seconds"].items()}
            rows.append(
                (
                    f"`{shorthand(row['network'])}`",
                    f"{row['batch']:,}",
                    milliseconds["host"],
                    milliseconds.get("device", ""),
                    f"{row['peak_mib']['host']:,.1f}",
                    f"{row['networks_mib']:,.2f}",
                )
            )
    return Table(
        "One alignment of relu perceptrons, the assignment problems solved on the host or in the compiled program",
        "python -m benchmarks.matching",
        ["matching_cpu.jsonl"],
        ("network", "pairs", "host, ms", "device, ms", "peak MiB", "two networks, MiB"),
        rows,
    )


def speed_independent(results: Results) -> Table:
    rows = [
        (
            f"{row['batch']:,}",
            *(f"{1000 * row['seconds'][code]['median_s'] / row['batch']:.2f}" for code in ("ours", "published")),
            f"{row['seconds']['published']['median_s'] / row['seconds']['ours']['median_s']:.1f}",
            *(f"{row['objective'][code]:.3f}" for code in ("ours", "published")),
        )
        for row in results.rows("matching_cpu.jsonl", job="independent")
    ]
    return Table(
        "Pairs of SIRENs 2-32-32-1 of different images in one call, and the published loop over the same pairs",
        "python -m benchmarks.matching",
        ["matching_cpu.jsonl"],
        (
            "pairs",
            "ours, ms a pair",
            "published, ms a pair",
            "published / ours",
            "product with the target, ours",
            "published",
        ),
        rows,
    )


def speed_solvers(results: Results) -> Table:
    rows = [
        (
            str(row["width"]),
            f"{row['batch']:,}",
            *(f"{1000 * row['seconds'][where]['median_s']:,.2f}" for where in ("host", "device")),
        )
        for row in sorted(
            results.rows("matching_cpu.jsonl", job="solver"), key=lambda row: (row["batch"], row["width"])
        )
        if {"host", "device"} <= row["seconds"].keys()
    ]
    return Table(
        "Assignment problems alone",
        "python -m benchmarks.matching",
        ["matching_cpu.jsonl"],
        ("neurons", "problems", "host, ms", "device, ms"),
        rows,
    )


def speed_frames(results: Results) -> Table:
    rows = [
        (
            str(row["number"]),
            f"{1000 * row['seconds']['canonical']['median_s']:.1f}",
            *(f"{1000 * row['seconds'][way]['median_s']:,.0f}" for way in ("first", "mean")),
        )
        for row in results.rows("matching_cpu.jsonl", job="frame")
    ]
    return Table(
        "One frame for N random perceptrons 64-128-128-10, in milliseconds",
        "python -m benchmarks.matching",
        ["matching_cpu.jsonl"],
        ("N", "canonical forms", "all to the first", "to their mean"),
        rows,
    )


def speed_cnn_zoo(results: Results) -> Table:
    fits = results.rows("cnn_cpu.jsonl", benchmark="zoo_fit")
    chunks = sorted({row["chunk"] for row in fits})
    rows = []
    for side, examples in sorted({(row["side"], row["examples"]) for row in fits}, reverse=True):
        rates = {row["chunk"]: row["networks_times_epochs_per_second"] for row in fits if row["side"] == side}
        rows.append(
            (
                f"{side} x {side}",
                f"{examples:,}",
                *(f"{rates[chunk]:.1f}" if chunk in rates else "" for chunk in chunks),
            )
        )
    return Table(
        "Training CNNs 1-16-16-16-10 in one compiled program: networks times epochs a second, by how many of them are "
        "computed at a time",
        "python -m benchmarks.cnn",
        ["cnn_cpu.jsonl"],
        ("images", "an epoch", *(f"{chunk} at a time" for chunk in chunks)),
        rows,
    )


def speed_cnn_autoencoder(results: Results) -> Table:
    names = {
        "encoder_forward": "encoder forward",
        "training_step_micro_8": "training step, micro-batches of 8",
        "training_step_micro_2": "training step, micro-batches of 2",
    }
    rows = []
    for activation in ("relu", "tanh"):
        for name, shown in names.items():
            row = results.row("cnn_cpu.jsonl", benchmark=name, network=f"cnn 1-16-16-16-10 {activation}")
            rows.append(
                (
                    activation,
                    shown,
                    f"{row['graphs_per_second']:.1f}",
                    f"{row['compile_seconds']:.1f}",
                    f"{row['peak_mib']:,.0f}",
                )
            )
    return Table(
        "The autoencoder of CNNs at its published size: 256 features, 4 layers, batches of 64, distilled on 64 images "
        "of 32 x 32 a step",
        "python -m benchmarks.cnn",
        ["cnn_cpu.jsonl"],
        ("networks", "", "graphs/s", "compilation, s", "peak MiB"),
        rows,
    )


def speed_recipes(results: Results) -> Table:
    """Recipes of equal length together, the best of them first; means over seeds."""
    groups: dict[tuple[float, str], list[Mapping[str, float]]] = {}
    for row in results[RECIPES]:
        groups.setdefault((row["epochs"], row["label"]), []).append(row["curve"][-1])

    def mean(points: Sequence[Mapping[str, float]], name: str) -> float:
        return average(point[name] for point in points)

    rows = [
        (
            label,
            f"{epochs:g}",
            str(len(points)),
            f"{mean(points, 'cpu_s'):.0f}",
            *(percent(mean(points, split)) for split in ("selection", "scoring")),
        )
        for (epochs, label), points in sorted(
            groups.items(), key=lambda group: (group[0][0], mean(group[1], "selection"))
        )
    ]
    return Table(
        "The autoencoder of digits by several recipes: passes over the networks, CPU seconds of gradients and updates "
        "on one thread, and the reconstruction error as a share of the variance, means over seeds",
        "python -m benchmarks.recipes --zoo runs/digits/zoo --epochs PASSES --seed SEED",
        [RECIPES],
        ("recipe", "passes", "seeds", "CPU seconds", "selection networks", "scoring networks"),
        rows,
    )


# --- mutated files ------------------------------------------------------------------------------------------------


def fuzzed_readers(results: Results) -> Table:
    by_reader: dict[str, list[Any]] = {}
    for row in results[FUZZING]:
        by_reader.setdefault(row["reader"], []).append(row)
    columns = ("cases", "returned", "ValueError", "OSError", "failures")
    rows = []
    for reader, runs in by_reader.items():
        sums = (f"{sum(run[column] for run in runs):,}" for column in columns)
        seconds, most = (max(run[column] for run in runs) for column in ("seconds", "mebibytes"))
        rows.append((f"`{reader}`", *sums, f"{seconds:.1f}", f"{most:,}"))
    return Table(
        "Mutated files by reader: what came of them, the longest CPU time of one and the most memory it took",
        "python tests/fuzzing.py --cases 10000 --seed 1",
        [FUZZING],
        ("reader", "cases", "returned", "`ValueError`", "`OSError`", "failures", "s", "MiB"),
        rows,
    )


TABLES: dict[str, Callable[[Results], Table]] = {
    table.__name__: table
    for table in (
        inr_methods,
        inr_methods_mnist,
        inr_methods_mnist_small,
        inr_noise,
        inr_noise_mnist_small,
        inr_controls,
        inr_encoders,
        inr_encoders_mnist_small,
        editing,
        inr_orbit_weight,
        merging_digits,
        merging_mnist,
        merging_cifar,
        accurate_cnns,
        merging_cnn_zoo,
        merging_cnn_zoo_tanh,
        many_digits,
        many_mnist,
        recovery,
        search_inrs,
        search_classifiers,
        function_digits,
        function_images,
        function_mnist,
        function_mnist_more,
        function_cifar,
        scales_digits,
        scales_mnist,
        scales_cifar,
        scales_many,
        drawn_mnist,
        drawn_mnist_more,
        drawn_digits,
        drawn_cifar,
        kicks_digits,
        kicks_mnist,
        many_function,
        learned_seeds,
        learned_more,
        learned_transfer,
        cnn_digits_relu,
        cnn_digits_tanh,
        cnn_cifar_relu,
        cnn_cifar_tanh,
        cnn_accurate_relu,
        cnn_accurate_tanh,
        generalization_digits_relu,
        generalization_digits_tanh,
        generalization_cifar_relu,
        generalization_cifar_tanh,
        generalization_accurate_relu,
        generalization_accurate_tanh,
        classify_digits,
        classify_mnist,
        speed_scalegmn,
        speed_embed,
        speed_inr,
        speed_matching,
        speed_independent,
        speed_solvers,
        speed_search,
        speed_frames,
        speed_cnn_zoo,
        speed_cnn_autoencoder,
        speed_recipes,
        fuzzed_readers,
    )
}


def accelerator_rates(results: Results) -> Table:
    rows = [
        (
            f"product of {row['size']} x {row['size']} matrices, {row['dtype']}, {row['precision']} precision"
            if row["benchmark"] == "matmul"
            else f"pass over {row['mib']} MiB",
            f"{row['tflop_per_second']:,.0f} TFLOP/s" if row["benchmark"] == "matmul" else _bandwidth(row),
        )
        for row in _measured(results, "rates")
    ]
    return _on_accelerator(results, "What the card does at best", ("", "rate"), rows)


def accelerator_models(results: Results) -> Table:
    names = {"encoder_forward": "encoder forward", "training_step": "training step"}
    rows = [
        (
            row["network"],
            names[row["benchmark"]],
            row["dtype"],
            str(row["batch_size"]),
            digits(row["graphs_per_second"]),
            significant(row["gflop_per_graph"] * row["graphs_per_second"] / 1000),
            f"{row['share_of_matmul_rate']:.0%}",
            f"{row['compile_seconds']:.0f}",
            f"{row['peak_mib']:,.0f}",
        )
        for row in (*_measured(results, "inr"), *_measured(results, "cnn"))
    ]
    header = ("networks", "", "dtype", "batch", "networks/s", "TFLOP/s", "share of product rate")
    return _on_accelerator(
        results, "Autoencoders at their published sizes", (*header, "compilation, s", "peak MiB"), rows
    )


def accelerator_jobs(results: Results) -> Table:
    fits = [
        (f"fitting {row['network']}, {row['side']} x {row['side']}, {row['chunk']} at once", _steps(row))
        for row in _measured(results, "zoo")
    ]
    matchings = [
        (f"{row['batch']:,} matchings of {row['network']}, solved on the {row['solver']}", _each(row))
        for row in _measured(results, "matching")
    ]
    trained = [
        (
            f"{row['train_networks']:,} MNIST INRs fitted in {row['zoo_seconds']:.0f} s, the preset `mnist` trained "
            f"for {row['curve'][-1]['seconds']:.0f} s",
            f"{percent(row['curve'][-1]['share_of_variance'])} of the variance",
        )
        for row in _measured(results, "mnist")
    ]
    return _on_accelerator(results, "Zoos, matchings and training", ("", "measured"), [*fits, *matchings, *trained])


def _measured(results: Results, section: str) -> list[Any]:
    """The rows of a section of `benchmarks.accelerator`, without those of failures."""
    return [row for row in results[ACCELERATOR] if row["section"] == section and "benchmark" in row]


def _on_accelerator(results: Results, caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    device = next(row["environment"] for row in results[ACCELERATOR] if "environment" in row)
    shown = f"{caption}: {device['device']}, jax {device['jax']}"
    return Table(shown, "python -m benchmarks.accelerator --data mnist.npz", [ACCELERATOR], header, rows)


def _bandwidth(row: Mapping[str, Any]) -> str:
    return f"{row['gb_per_second']:,.0f} GB/s"


def _steps(row: Mapping[str, Any]) -> str:
    return f"{digits(row['network_steps_per_second'])} network steps/s"


def _each(row: Mapping[str, Any]) -> str:
    return f"{significant(row['ms_per_pair'])} ms a pair"


# Tables of machines that are not always at hand: without their file they say that nothing is measured yet.
ACCELERATOR_TABLES: dict[str, Callable[[Results], Table]] = {
    table.__name__: table for table in (accelerator_rates, accelerator_models, accelerator_jobs)
}


# --- numbers in prose ---------------------------------------------------------------------------------------------


def values(results: Results) -> dict[str, dict[str, str]]:
    """The numbers that the pages' sentences name, as text, by topic: `{{ inr.reconstruction }}` in Markdown."""
    return {
        "inr": _inr_values(results, "digits.json") | _learned_values(results["digits.json"]),
        "inr_mnist": _inr_values(results, "mnist_h200.json"),
        "inr_mnist_small": _inr_values(results, "mnist_small.json")
        | _small_values(results["mnist_small.json"])
        | _learned_values(results["mnist_small.json"]),
        "inr_permutation": _inr_values(results, "digits_permutation.json"),
        "editing": _editing_values(results["edit_mnist.json"]),
        "merging": _merging_values(results),
        "function": _function_values(results),
        "cnn_zoo": _cnn_zoo_values(results["merging_cnn_zoo.json"]),
        "cnn_zoo_tanh": _cnn_zoo_values(results["merging_cnn_zoo_tanh.json"]),
        "accurate_cnns": _accurate_cnns_values(results),
        "cnn_digits": _cnn_values(results, "cnn_digits.json"),
        "cnn_cifar": _cnn_values(results, "cnn_cifar.json"),
        "cnn_accurate": _accurate_values(results, "tanh") | _accurate_values(results, "relu"),
        "accuracy_digits": _generalization_values(results, "generalization_digits.json"),
        "accuracy_cifar": _generalization_values(results, "generalization_cifar.json"),
        "accuracy_accurate_relu": _generalization_values(results, "generalization_accurate_relu.json"),
        "accuracy_accurate_tanh": _generalization_values(results, "generalization_accurate_tanh.json"),
        "classify": _classify_values(results),
        "classify_mnist": _classify_mnist_values(results[CLASSIFY_MNIST]),
        "scales": _scales_values(results),
        "drawn": _drawn_values(results),
        "frames": _frame_values(results),
        "narrow": _narrow_values(results),
        "speed": _speed_values(results),
        "recipes": {
            f"{name}_{split}": percent(results.row(RECIPES, label=recipe, epochs=epochs)["curve"][-1][split])
            for name, recipe, epochs in (
                ("muon", "muon, batches of 32", 16),
                ("adamw", "baseline", 32),
                ("moved", "muon, moved images", 16),
                ("short", "muon, images moved less", 14),
                ("long", "muon, images moved less", 32),
                ("slow", "muon, images moved less, rate 8e-3", 32),
            )
            for split in ("train", "selection")
        },
        "fuzzing": {
            "cases": f"{sum(row['cases'] for row in results[FUZZING]):,}",
            "failures": str(sum(row["failures"] for row in results[FUZZING])),
            "seeds": " and ".join(sorted({str(row["seed"]) for row in results[FUZZING]})),
        },
    }


def _inr_values(results: Results, name: str) -> dict[str, str]:
    file = results[name]
    reconstruction, zoo = file["reconstruction"], file["zoo"]
    merging = file["merging"]["independent fits"]
    return {
        "networks": f"{sum(part['networks'] for part in zoo.values()):,}",
        "train_networks": f"{zoo['train']['networks']:,}",
        "scoring_images": str(zoo["scoring"]["images"]),
        "variance": f"{reconstruction['image_variance']:.4f}",
        "mean_image": f"{reconstruction['mean_image_mse']:.4f}",
        "reconstruction": percent(reconstruction["share_of_variance"]),
        "decoded_read": percent(reconstruction["recognized"]["decoded"]),
        "originals_read": percent(reconstruction["recognized"]["original"]),
        "orbit_ratio": power_of_ten(file["orbit"]["ratio"]),
        "parameters": f"{file['model']['parameters']:,}",
        "minutes": f"{file['seconds']['total'] / 60:.0f}",
        "epochs": str(len(file["training"])),
        "psnr": f"{zoo['train']['psnr_db']['50']:.1f} dB",
        "naive": f"{merging['naive']['midpoint']['mean']:.3f}",
        "pairwise": f"{merging['matching_pd_forward']['midpoint']['mean']:.4f}",
        "fixed_frame": f"{merging['fixed_frame']['midpoint']['mean']:.4f}",
        "canonical_frame": f"{merging['canonical_frame']['midpoint']['mean']:.4f}",
        "autoencoder": f"{merging['autoencoder']['midpoint']['mean']:.4f}",
        "autoencoder_gap": f"{merging['autoencoder']['end_point_gap']['mean']:.4f}",
    }


def _small_values(file: Mapping[str, Any]) -> dict[str, str]:
    reconstruction, settings = file["reconstruction"], file["config"]
    return {
        "train_images": f"{file['zoo']['train']['images']:,}",
        "training_minutes": f"{sum(epoch['seconds'] for epoch in file['training']) / 60:.0f}",
        "copies": str(settings["evaluation"]["copies"]),
        "mean_image_share": percent(reconstruction["controls"]["mean_image"]["share_of_variance"]),
        "nearest_share": percent(reconstruction["controls"]["nearest"]["share_of_variance"]),
        "nearest_read": percent(reconstruction["controls"]["nearest"]["recognized"]),
        "search_read": percent(file["merging"]["independent fits"]["search"]["recognized"]),
        "autoencoder_read": percent(file["merging"]["independent fits"]["autoencoder"]["recognized"]),
    }


def _editing_values(file: Mapping[str, Any]) -> dict[str, str]:
    editors, base = file["editors"], file["baselines"]
    return {
        "train_networks": f"{file['zoo']['train']['networks']:,}",
        "scoring_images": str(file["zoo"]["scoring"]["images"]),
        "epochs": str(max(len(one["training"]) for one in editors.values())),
        "one": f"{100 * editors['1']['mse']['mean']:.2f}",
        "most": f"{100 * list(editors.values())[-1]['mse']['mean']:.2f}",
        **{name: f"{100 * error:.2f}" for name, error in base.items()},
    }


def _learned_values(file: Mapping[str, Any]) -> dict[str, str]:
    merging = file["merging"]["independent fits"]
    names = ("search", "learned_matching", "learned_frame", "learned_search")
    midpoints = {name: f"{merging[name]['midpoint']['mean']:.4f}" for name in names}
    gaps = [merging[name]["end_point_gap"]["mean"] for name in names]
    times = {f"{name}_ms": significant(merging[name]["milliseconds"]) for name in names}
    return (
        midpoints
        | times
        | {
            "learned_minutes": f"{file['seconds']['alignment'] / 60:.0f}",
            "learned_epochs": str(len(file["alignment"]["matcher"]["training"])),
            "frame_epochs": str(len(file["alignment"]["frame"]["training"])),
            "exact_gap": power_of_ten(max(gaps)),
        }
    )


def _above_half(cnns: Mapping[str, Any]) -> int:
    """How many networks of a zoo classify more than half of the test images rightly."""
    return sum(value > 0.5 for value in cnns["scoring_accuracies"])


def _accurate_cnns_values(results: Results) -> dict[str, str]:
    """The tanh networks of all seeds."""
    cnns = [results[file]["zoos"]["tanh"] for file in ACCURATE_CNNS if "tanh" in results[file]["zoos"]]
    return {
        "tanh_above": str(sum(map(_above_half, cnns))),
        "tanh_networks": str(sum(one["networks"] for one in cnns)),
    }


def _cnn_zoo_values(file: Mapping[str, Any]) -> dict[str, str]:
    (network,) = file["pairs"].values()
    naive = network["methods"]["naive"]["pairs"]
    return {
        "pairs": str(file["config"]["pairs"]),
        "updates": f"{file['zoo']['zoo']['steps']:,}",
        "reset": accuracy(merged_accuracy(naive)[1]),
        "tempered": f"{average(pair['tempered']['loss'] for pair in naive):.2f}",
        "closed_activations": _closed(network, "activations", repaired=True),
        "closed_search": _closed(network, "search", repaired=False),
        "closed_search_activations": _closed(network, "search_activations", repaired=False),
    }


def _merging_values(results: Results) -> dict[str, str]:
    files = {name: results[f"merging_{name}.json"] for name in ("digits", "mnist", "cifar")}
    changes = [
        pair["function_change"]
        for file in files.values()
        for network in file["pairs"].values()
        for method in network["methods"].values()
        for pair in method["pairs"]
    ]
    widest = files["mnist"]["pairs"]["mlp:784-512-512-10,relu"]
    cifar_cnn, cifar_resnet = (files["cifar"]["pairs"][name] for name in MERGED_CIFAR)
    digits_cnn, digits_resnet = (files["digits"]["pairs"][name] for name in list(MERGED_DIGITS)[-2:])
    aligned = merged_accuracy(widest["methods"]["weights"]["pairs"])[0]
    return {
        "pairs": str(len(widest["methods"]["weights"]["pairs"])),
        "function_change": power_of_ten(max(changes)),
        "mnist_512_loss": f"{100 * (average(widest['test_accuracy']) - aligned):.1f}",
        "cifar_closed_activations": _closed(cifar_cnn, "activations", repaired=False),
        "cifar_closed_activations_repaired": _closed(cifar_cnn, "activations", repaired=True),
        "cifar_closed_weights": _closed(cifar_cnn, "weights", repaired=False),
        "cifar_closed_weights_repaired": _closed(cifar_cnn, "weights", repaired=True),
        "digits_cnn_permutations": _accuracies(digits_cnn, "weights_permutation"),
        "digits_cnn_whole": _accuracies(digits_cnn, "weights"),
        "digits_resnet_best": f"{100 * _best_repaired(digits_resnet):.0f}",
        "cifar_resnet_best": f"{100 * _best_repaired(cifar_resnet):.0f}",
        "digits_minutes": f"{files['digits']['seconds'] / 60:.0f}",
        "mnist_minutes": f"{files['mnist']['seconds'] / 60:.0f}",
        "cifar_minutes": f"{files['cifar']['seconds'] / 60:.0f}",
        "recovery_pairs": str(results["recovery.jsonl"][0]["pairs"]),
    }


def _function_values(results: Results) -> dict[str, str]:
    digits_file, mnist_file = results[FUNCTION_DIGITS], results[FUNCTION_MNIST]

    def shown(file: Mapping[str, Any], network: str, name: str, method: str = "search_gradient") -> dict[str, str]:
        one = file["pairs"][network]
        ends = average(one["test_accuracy"])
        best = merged_accuracy(one["methods"][method]["pairs"])[0]
        weights, repaired = merged_accuracy(one["methods"]["weights"]["pairs"])
        return {
            name: accuracy(best),
            f"{name}_ends": accuracy(ends),
            f"{name}_weights": accuracy(weights),
            f"{name}_repaired": accuracy(repaired),
            f"{name}_gap": f"{100 * (ends - best):.1f}",
        }

    eight, cifar = digits_file["many"]["by_number"]["8"], next(iter(MERGED_CIFAR))
    more, few = (results[file]["pairs"][cifar] for file in (FUNCTION_CIFAR, FUNCTION_CIFAR_FEW))
    names = {label: name for name, label in MERGED_DIGITS.items()}
    return {
        "steps": str(digits_file["config"]["match"]["function_steps"]),
        "eight_ends": accuracy(eight["end_points"]),
        "eight_search": accuracy(eight["search"]["accuracy"]),
        "eight_weights": accuracy(eight["mean"]["accuracy"]),
        **shown(digits_file, "mlp:64-32-32-10,relu", "digits_32"),
        **shown(results[FUNCTION_IMAGES], names["CNN"], "images_cnn", "search_activations"),
        **shown(results[FUNCTION_IMAGES], names["ResNet-8"], "images_resnet", "search_activations"),
        **shown(mnist_file, "mlp:784-32-32-10,relu", "mnist_32"),
        **shown(mnist_file, "mlp:784-128-128-10,relu", "mnist_128"),
        **shown(mnist_file, "mlp:784-512-512-10,relu", "mnist_512"),
        **shown(results[FUNCTION_MORE], "mlp:784-32-32-10,relu", "more_32"),
        **shown(results[FUNCTION_MORE], "mlp:784-128-128-10,relu", "more_128"),
        **shown(results[FUNCTION_MORE_512], "mlp:784-512-512-10,relu", "more_512", "search"),
        **shown(results[FUNCTION_CIFAR], cifar, "cifar"),
        "mnist_examples": f"{mnist_file['config']['match']['function_examples']:,}",
        "more_examples": f"{results[FUNCTION_MORE]['config']['match']['function_examples']:,}",
        "more_steps": str(results[FUNCTION_MORE]["config"]["match"]["function_steps"]),
        "cifar_examples": f"{results[FUNCTION_CIFAR]['config']['match']['image_examples']:,}",
        "cifar_few_examples": str(results[FUNCTION_CIFAR_FEW]["config"]["match"]["image_examples"]),
        "cifar_closed": _closed(more, "search_gradient", repaired=False),
        "cifar_closed_weights": _closed(more, "search", repaired=False),
        "cifar_closed_activations": _closed(more, "activations", repaired=False),
        "cifar_closed_few": _closed(few, "search_activations", repaired=False),
        "cifar_minutes": f"{more['methods']['search_gradient']['pairs'][0]['cpu_seconds'] / 60:.0f}",
    }


def _scales_values(results: Results) -> dict[str, str]:
    """What is said of scales that were fitted to some images."""
    cases = [
        ("digits_32", SCALES_DIGITS, "mlp:64-32-32-10,relu"),
        ("digits_512", SCALES_DIGITS, "mlp:64-512-512-10,relu"),
        *(
            (label.lower().replace("-", "_"), file, name)
            for name, label in MERGED_DIGITS.items()
            for file in (SCALES_DIGITS, SCALES_RESNET)
            if label in ("CNN", "ResNet-8") and name in results[file]["pairs"]
        ),
        ("mnist_32", SCALES_MNIST, "mlp:784-32-32-10,relu"),
        ("mnist_128", SCALES_MNIST, "mlp:784-128-128-10,relu"),
        ("mnist_512", SCALES_MNIST_512, "mlp:784-512-512-10,relu"),
        ("cifar", SCALES_CIFAR, next(iter(MERGED_CIFAR))),
    ]
    return _merged_values(results, cases) | _steps_of(results, SCALES_DIGITS)


def _frame_values(results: Results) -> dict[str, str]:
    """What was tried to make a learned frame better; of each idea the midpoints of selection and of scoring pairs."""
    kinds = ("selection", "selection_soft", "scoring")
    rows = results["frame_ideas.jsonl"]
    return {f"{row['name']}_{kind}": f"{row[kind]:.4f}" for row in rows for kind in kinds if row[kind] is not None}


def _narrow_values(results: Results) -> dict[str, str]:
    """How far narrow perceptrons of MNIST merge if the test labels may be seen."""
    rows = results["merging_ideas.jsonl"]
    found = {row["name"]: f"{100 * row['test_accuracy']:.1f}" for row in rows}
    return found | {"ends": f"{100 * rows[0]['ends']:.1f}"}


def _drawn_values(results: Results) -> dict[str, str]:
    """What is said of scales that were fitted to all images, some in every step."""
    cases = [
        ("mnist_32", DRAWN_MNIST, "mlp:784-32-32-10,relu"),
        ("mnist_128", DRAWN_MNIST, "mlp:784-128-128-10,relu"),
        ("mnist_512", DRAWN_MNIST_512, "mlp:784-512-512-10,relu"),
        ("mnist_32_more", DRAWN_MNIST_MORE, "mlp:784-32-32-10,relu"),
        ("mnist_128_more", DRAWN_MNIST_MORE, "mlp:784-128-128-10,relu"),
        ("resnet", DRAWN_RESNET, next(iter(results[DRAWN_RESNET]["pairs"]))),
        ("cifar", DRAWN_CIFAR, next(iter(MERGED_CIFAR))),
    ]
    values = _merged_values(results, cases) | _steps_of(results, DRAWN_MNIST)
    return values | {
        "images": _searched_images(results, DRAWN_MNIST),
        "more_images": _searched_images(results, DRAWN_MNIST_MORE),
        "more_batch": _steps_of(results, DRAWN_MNIST_MORE)["batch"],
    }


def _searched_images(results: Results, file: str) -> str:
    return f"{results[file]['config']['match']['function_examples']:,}"


def _steps_of(results: Results, file: str) -> dict[str, str]:
    settings = results[file]["config"]["match"]
    return {"steps": f"{settings['scale_steps']:,}", "batch": str(settings.get("scale_batch"))}


def _merged_values(results: Results, cases: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """By name, file and network: what methods reach without REPAIR, what that closes, and milliseconds of CPU time."""
    found = {}
    for name, file, network in cases:
        one = results[file]["pairs"][network]
        ends = average(one["test_accuracy"])
        found[f"{name}_ends"] = accuracy(ends)
        for method, row in one["methods"].items():
            reached = merged_accuracy(row["pairs"])[0]
            found[f"{name}_{method}"] = accuracy(reached)
            found[f"{name}_{method}_gap"] = f"{100 * (ends - reached):.1f}"
            found[f"{name}_{method}_closed"] = _closed(one, method, repaired=False)
            if len(row["pairs"]) > 1:  # the first pair's time includes compilation
                seconds = average(pair["cpu_seconds"] for pair in row["pairs"][1:])
                found[f"{name}_{method}_milliseconds"] = _about(1000 * seconds)
    return found


def _closed(network: Mapping[str, Any], method: str, *, repaired: bool) -> str:
    """The share of the gap between naive merging and the end points that a method closes, in %."""
    ends = average(network["test_accuracy"])
    naive = merged_accuracy(network["methods"]["naive"]["pairs"])[0]
    merged = merged_accuracy(network["methods"][method]["pairs"])[int(repaired)]
    return f"{100 * (merged - naive) / (ends - naive):.0f}"


def _accuracies(network: Mapping[str, Any], method: str) -> str:
    plain, repaired = merged_accuracy(network["methods"][method]["pairs"])
    return f"{accuracy(plain)}% without and {accuracy(repaired)}% with REPAIR"


def _best_repaired(network: Mapping[str, Any]) -> float:
    return max(max(merged_accuracy(method["pairs"])) for method in network["methods"].values())


def _cnn_values(results: Results, file: str) -> dict[str, str]:
    found = results[file]
    shown = {
        "networks": str(found["config"]["zoo"]["networks"]),
        "minutes": f"{found['seconds']['total'] / 60:.0f}",
        "pairs": str(found["config"]["evaluation"]["pairs"]),
        "best": str(found["config"]["evaluation"]["best"]),
    }
    for activation, group in found["activations"].items():
        best = min(group["training"], key=lambda epoch: epoch["selection_loss"])
        merging, ends = group["merging"], group["end_points"]
        naive = merging["naive"]["plain"]["accuracy"]["mean"]
        repaired = merging["activations"]["repaired"]["accuracy"]["mean"]
        shown |= {
            f"{activation}_parameters": f"{group['model']['parameters'] / 1e6:.2f}",
            f"{activation}_agreement": f"{100 * best['selection_agreement']:.0f}",
            f"{activation}_tau": _or_undefined(group["distillation"]["kendall_tau"]),
            f"{activation}_orbit_ratio": power_of_ten(group["orbit"]["ratio"]),
            f"{activation}_closed": f"{100 * (repaired - naive) / (ends - naive):.0f}",
            f"{activation}_permutations": f"{100 * merging['matching_p_forward']['plain']['accuracy']['mean']:.1f}",
            f"{activation}_whole": f"{100 * merging['matching_pd_forward']['plain']['accuracy']['mean']:.1f}",
            f"{activation}_ends": f"{100 * ends:.1f}",
            f"{activation}_decoded": f"{100 * merging['autoencoder']['plain']['accuracy']['mean']:.1f}",
            f"{activation}_canonical": f"{100 * merging['canonical_frame']['plain']['accuracy']['mean']:.1f}",
            f"{activation}_fixed": f"{100 * merging['fixed_frame']['plain']['accuracy']['mean']:.1f}",
        }
        shown |= {
            f"{activation}_{method}": f"{100 * merging[method]['plain']['accuracy']['mean']:.1f}"
            for method in ("activations", "learned_matching", "learned_frame", "learned_search", "search_activations")
            if method in merging
        }
    return shown


def _or_undefined(tau: float | None) -> str:
    """A rank correlation, which is none where all accuracies are one."""
    return "undefined" if tau is None else f"{tau:.2f}"


def _accurate_values(results: Results, activation: str) -> dict[str, str]:
    """What is said of CNNs that were trained longer: with the share of the gap that methods close without REPAIR."""
    file = f"cnn_accurate_{activation}.json"
    group = results[file]["activations"][activation]
    found = {name: method["plain"]["accuracy"]["mean"] for name, method in group["merging"].items()}
    ends, naive = group["end_points"], found["naive"]
    closed = {name: f"{100 * (value - naive) / (ends - naive):.0f}" for name, value in found.items()}
    return _cnn_values(results, file) | {
        f"{activation}_activations_closed": closed["activations"],
        f"{activation}_search_closed": closed["search_activations"],
    }


def _generalization_values(results: Results, file: str) -> dict[str, str]:
    shown = {"minutes": f"{results[file]['seconds']['total'] / 60:.0f}"}
    for activation, group in results[file]["activations"].items():
        statistics = group["encoders"]["statistics"]
        shown |= {
            f"{activation}_ceiling": f"{group['ceiling']:.3f}",
            f"{activation}_constant": f"{group['constant_l1']:.3f}",
            f"{activation}_statistics": f"{statistics['tau']['mean']:.2f}",
            f"{activation}_moved_statistics": f"{statistics['moved_tau']['mean']:.2f}",
            f"{activation}_train": str(group["parts"]["train"]["checkpoints"]),
            f"{activation}_train_networks": str(group["parts"]["train"]["networks"]),
            f"{activation}_scoring": str(group["parts"]["scoring"]["checkpoints"]),
            f"{activation}_scoring_networks": str(group["parts"]["scoring"]["networks"]),
            f"{activation}_median": f"{100 * group['zoo']['scoring_accuracy']['50']:.0f}",
        }
    return shown


def _classify_values(results: Results) -> dict[str, str]:
    file = results["classify_digits.json"]
    encoders = file["encoders"]
    rates = {name: encoder["networks_per_second"]["mean"] for name, encoder in encoders.items()}
    last = [seed["history"][-1]["train_accuracy"] for seed in encoders["permutation"]["seeds"]]
    return {
        "minutes": f"{file['seconds']['total'] / 60:.0f}",
        "train_networks": f"{file['zoo']['train']['networks']:,}",
        "scoring_networks": str(file["zoo"]["scoring"]["networks"]),
        "copies": str(file["config"]["copies"]),
        "seeds": str(file["config"]["seeds"]),
        "queries": str(file["config"]["model"]["queries"]),
        "query_speedup": f"{rates['query'] / rates['equivariant']:.0f}",
        "permutation_train": percent(average(last), 0),
        "query_accuracy": percent(encoders["query"]["accuracy"]["mean"]),
        "equivariant_accuracy": percent(encoders["equivariant"]["accuracy"]["mean"]),
    }


def _classify_mnist_values(file: Mapping[str, Any]) -> dict[str, str]:
    config = file["config"]
    return {
        "images": f"{file['zoo']['train']['images']:,}",
        "rates": {2: "two", 3: "three"}[len(config["learning_rates"])],
        "updates": str(config["least_updates"]),
        "epochs": str(config["train"]["epochs"]),
        "seeds": {1: "one training", 3: "three trainings"}[config["seeds"]],
    }


def _speed_values(results: Results) -> dict[str, str]:
    scalegmn = results["scalegmn_cpu.jsonl"]
    float32 = results.rows("scalegmn_cpu.jsonl", implementation="blocks", dtype="float32")
    usual = [row for row in float32 if row["width"] == 32]
    edge = [row["edge_product_share_of_matmul_rate"] for row in usual]
    gradients = [row["weight_gradient_product_share_of_matmul_rate"] for row in usual]
    steps = [row["share_of_matmul_rate"] for row in float32 if row["benchmark"] == "step"]
    fit = results.row("inr_cpu.jsonl", benchmark="zoo_fit")
    ideas = {row["about"].split(", ")[1]: row for row in results["speed_ideas_cpu.jsonl"] if "mib" in row}
    parts = {width: ideas[f"2-{width}-{width}-1"] for width in (64, 512)}
    return {
        "jax": scalegmn[0]["environment"]["jax"],
        "step_share": percent(max(steps), 0),
        "step_share_least": percent(min(steps), 0),
        "edge_share": f"{100 * min(edge):.0f} to {100 * max(edge):.0f}%",
        "gradient_share": f"{100 * min(gradients):.0f} to {100 * max(gradients):.0f}%",
        "parts_narrow": f"{parts[64]['ratio']:.1f}",
        "parts_wide": f"{parts[512]['ratio']:.1f}",
        "parts_gib": f"{parts[512]['mib'] / 1024:.1f}",
        "whole_gib": f"{parts[512]['base_mib'] / 1024:.1f}",
        "fit_steps": f"{fit['network_steps_per_second']:.0f}",
    } | {row["benchmark"]: f"{row['times_as_fast']:.1f}" for row in results["sine_cpu.jsonl"]}


# --- how numbers are written --------------------------------------------------------------------------------------


def average(numbers: Iterable[float]) -> float:
    """The mean of at least one number."""
    listed = list(numbers)
    return math.fsum(listed) / len(listed)


def merged_accuracy(pairs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The mean accuracy of the merged networks of all pairs, without and with REPAIR."""
    return (
        average(pair["middle"]["accuracy"] for pair in pairs),
        average(pair["repaired"]["accuracy"] for pair in pairs),
    )


def accuracy(share: float) -> str:
    """An accuracy in percent, without the sign: "97.1"."""
    return f"{100 * share:.1f}"


def interval(value: Mapping[str, float], decimals: int, *, factor: float = 1) -> str:
    """A mean with its confidence interval, like "0.20 [0.19, 0.21]"."""
    mean, low, high = (f"{factor * value[name]:.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def spread(value: Mapping[str, Any], decimals: int, *, factor: float = 1, unit: str = "") -> str:
    """A mean and a standard deviation, like "88.7% ± 1.9"; of a single value itself."""
    mean = f"{factor * value['mean']:.{decimals}f}{unit}"
    return mean if value["std"] is None else f"{mean} ± {factor * value['std']:.{decimals}f}"


def percent(share: float, decimals: int = 1) -> str:
    """A share in percent, like "97.6%"."""
    return f"{100 * share:.{decimals}f}%"


def power_of_ten(number: float) -> str:
    """A small number to one digit, like "2e-7"."""
    digit, exponent = f"{number:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


def digits(number: float) -> str:
    """A rate: one decimal from 1 on, two below."""
    return f"{number:,.1f}" if number >= 1 else f"{number:.2f}"


def significant(number: float) -> str:
    """A positive number to three digits at least: "1.02", "13.0", "1,025"."""
    decimals = max(0, 2 - math.floor(math.log10(number)))
    return f"{number:,.{decimals}f}"


def shorthand(network: str) -> str:
    """ "mlp 64-64-10 relu" as its widths, long runs of one width shortened: "128 x 9 - 10"."""
    widths = network.split()[1].split("-")
    hidden, output = widths[:-1], widths[-1]
    if len(hidden) > 4 and len(set(hidden)) == 1:
        return f"{hidden[0]} (x {len(hidden)})-{output}"
    return "-".join(widths)


def is_number(cell: str) -> bool:
    """Whether a cell is empty or begins with a number, so that its column is aligned to the right."""
    return not cell or cell.lstrip("-\\*")[:1].isdigit() or cell == "\\*"


NOT_MEASURED = "Not measured yet: `python -m benchmarks.accelerator` writes these numbers.\n"

# --- files --------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """A table as MyST Markdown: caption, cells, the command that prints the numbers, the files that hold them."""
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"{table.caption}: expected {len(table.header)} cells in every row, got {row}.")
    _, *columns = zip(*table.rows, strict=True)
    alignment = [":---", *("---:" if all(map(is_number, column)) else ":---" for column in columns)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.header, alignment, *table.rows)]
    files = " and ".join(f"`benchmarks/results/{source}`" for source in table.sources)
    return "\n".join(
        (
            f":::{{table}} {table.caption}",
            ":class: results",
            "",
            *lines,
            ":::",
            "",
            ":::{div} table-source",
            f"Printed by `{table.command}`, from {files}.",
            ":::",
            "",
        )
    )


def write(results: Results, folder: Path = GENERATED) -> list[Path]:
    """Writes all tables, each to a file of its name; files that would not change are left alone.

    Args:
      results: The result files.
      folder: Where to write.

    Returns:
      The paths of all tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (TABLES | ACCELERATOR_TABLES).items():
        path, text = folder / f"{name}.md", NOT_MEASURED
        if name in TABLES or (results.folder / ACCELERATOR).is_file():
            table = make(results)
            text = markdown(table) if table.rows else NOT_MEASURED
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write(Results()):
        print(written.relative_to(HERE.parent))
