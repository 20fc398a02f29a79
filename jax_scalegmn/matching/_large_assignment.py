"""Large assignment problems on the host: a few entries of every row and column decide most of them.

SciPy's sparse solver (Jonker and Volgenant 1987) assigns among the largest entries. Prices of the columns then say
whether any other entry of the whole score would do better; those join, and the problem is solved again. So what is
returned is the assignment of the dense problem, on the scores of layers of 4096 neurons in half of its time.
"""

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

__all__ = ["solve"]

_CANDIDATES = 48  # of every row and of every column, about
# Beyond these all want the same few, and the sparse solver takes longer than the dense one.
_MOST_WANTED = 480  # times that one row or column may be a candidate
_MOST_UNWANTED = 0.1  # the share of rows or columns that never are one
_SAMPLED = 512  # entries, by which the largest are told apart
_ROUNDS = 8
_MOST_VIOLATIONS = 64  # for each row, on average; with more the candidates were no good ones
_LONGEST_PATH = 500  # columns
_BLOCK = 256  # rows


def solve(score: np.ndarray) -> np.ndarray | None:
    """The columns [n] that maximize sum_i score[i, columns[i]], or None where the entries chosen here do not decide it.

    Args:
      score: Finite scores, [n, n], n of some hundreds or more.
    """
    n = len(score)
    span = float(score.max()) - float(score.min())
    tolerance = 1e-12 * (span or 1.0)
    by_row, by_column = _largest(score), _largest(score.T).T
    for wanted in (by_row.sum(0), by_column.sum(1)):
        if wanted.max() > _MOST_WANTED or np.mean(wanted == 0) > _MOST_UNWANTED:
            return None
    chosen = by_row | by_column
    np.fill_diagonal(chosen, True)  # so that there is an assignment
    for _ in range(_ROUNDS):
        rows, columns = np.nonzero(chosen)
        values = score[rows, columns].astype(np.float64)
        costs = values.max() - values + (span or 1.0)  # positive: zeros would be no entries
        assigned, to = min_weight_full_bipartite_matching(csr_matrix((costs, (rows, columns)), (n, n)))
        found = np.empty(n, int)
        found[assigned] = to
        own = score[np.arange(n), found].astype(np.float64)
        prices = _prices(rows, columns, values - own[rows], found, tolerance)
        if prices is None:
            return None
        better = _better(score, prices[found] - own, prices, tolerance)
        count = np.count_nonzero(better)
        if count == 0:
            return found
        if count > _MOST_VIOLATIONS * n:
            return None
        chosen |= better
    return None


def _largest(score: np.ndarray) -> np.ndarray:
    """Which entries are about the `_CANDIDATES` largest of their row, judged by some of the row's entries."""
    sample = score[:, :: max(1, len(score) // _SAMPLED)]
    rank = max(1, round(_CANDIDATES * sample.shape[1] / len(score)))
    threshold = np.partition(sample, -rank, axis=1)[:, -rank]
    largest: np.ndarray = score >= threshold[:, None]
    return largest


def _prices(
    rows: np.ndarray, columns: np.ndarray, gains: np.ndarray, found: np.ndarray, tolerance: float
) -> np.ndarray | None:
    """Prices of the columns at which no row prefers another chosen entry: longest paths (Bellman and Ford).

    The gains of entries are their scores, less that of the row's own column. None where paths are too long to follow.
    """
    order = np.argsort(columns, kind="stable")
    gains, origins = gains[order], found[rows[order]]
    starts = np.searchsorted(columns[order], np.arange(len(found)))
    prices = np.zeros(len(found))
    for _ in range(_LONGEST_PATH):
        raised = np.maximum.reduceat(prices[origins] + gains, starts)
        if (raised <= prices + tolerance).all():
            return prices
        prices = np.maximum(prices, raised)
    return None


def _better(score: np.ndarray, surplus: np.ndarray, prices: np.ndarray, tolerance: float) -> np.ndarray:
    """Which entries of the whole score their row prefers at these prices, in blocks of rows."""
    better = np.zeros(score.shape, bool)
    for start in range(0, len(score), _BLOCK):
        block = slice(start, start + _BLOCK)
        better[block] = score[block] + surplus[block, None] - prices > tolerance
    return better
