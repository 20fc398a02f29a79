"""Merges several networks into one: paths, averages, soups, REPAIR and task vectors."""

from jax_scalegmn.merge._many import Many, merge_many
from jax_scalegmn.merge._paths import Soup, average, greedy_soup, lerp, piecewise, slerp, soup
from jax_scalegmn.merge._repair import repair, reset_batch_norm, uncorrected
from jax_scalegmn.merge._task_vectors import task_arithmetic, task_vector, ties

__all__ = [
    "Many",
    "Soup",
    "average",
    "greedy_soup",
    "lerp",
    "merge_many",
    "piecewise",
    "repair",
    "reset_batch_norm",
    "slerp",
    "soup",
    "task_arithmetic",
    "task_vector",
    "ties",
    "uncorrected",
]
