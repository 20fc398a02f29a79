"""Draws docs/_static/merge.svg, the README's figure: two INRs of one digit, interpolated before and after alignment.

python docs/make_readme_figure.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jax_scalegmn as sg
from jax_scalegmn.io import images

FIGURE = Path(__file__).resolve().parent / "_static" / "merge.svg"
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGIT = 13  # a three


def main() -> None:
    """Fits the digit from two seeds, aligns the second network to the first and draws both paths."""
    digit = images.digits().images[DIGIT]
    arch = sg.siren((2, 32, 32, 1))
    labels, rows = np.zeros(1, int), np.zeros(2, int)
    zoo = sg.zoo.fit_images(arch, digit[None], labels, image_index=rows, seed=0, num_steps=300)
    a, b = (sg.stacks.member(zoo.params, index) for index in (0, 1))
    paths = {"as trained": b, "aligned": sg.matching.align(arch, b, a)}
    ts = jnp.linspace(0, 1, 41)

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "merge", "axes.spines.right": False})
    figure = plt.figure(figsize=(8.2, 2.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    axes = left.subplots(2, len(TIMES))
    curves = right.subplots()
    curves.spines["top"].set_visible(False)
    for row, (label, other) in enumerate(paths.items()):

        def draw(t, other=other):
            return sg.network.render(arch, sg.merge.lerp(a, other, t), digit.shape)

        for axis, t in zip(axes[row], TIMES, strict=True):
            axis.imshow(np.asarray(draw(t)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"t = {t:g}", fontsize=9)
        axes[row, 0].set_ylabel(label)
        losses = jax.vmap(lambda t, draw=draw: ((draw(t) - digit) ** 2).mean())(ts)
        curves.plot(ts, losses, label=label, color=("#b5482f", "#2f6f8f")[row], linewidth=2)
    curves.set(
        xlabel="t", ylabel="mean squared error", ylim=(0, 1.25 * max(line.get_ydata().max() for line in curves.lines))
    )
    curves.legend(frameon=False, loc="upper right")
    figure.savefig(FIGURE, metadata={"Date": None}, transparent=False)


if __name__ == "__main__":
    main()
