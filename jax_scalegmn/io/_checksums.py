"""Checksums, by which a damaged file is told from what was written."""

import hashlib
from typing import Any

import jax
import numpy as np


def checksum(tree: Any, *texts: str) -> str:
    """The SHA-256 of all arrays of a pytree with their dtypes and shapes, and of texts.

    The containers and their keys are not looked at: pass the names as a text where they matter.

    Args:
      tree: A pytree of arrays, in memory or on a device.
      *texts: Strings that belong to it.

    Returns:
      64 hexadecimal digits.

    >>> import numpy as np
    >>> from jax_scalegmn import io
    >>> io.checksum({"bias": np.zeros(2)}, "siren")[:8] == io.checksum([np.zeros(2)], "siren")[:8]
    True
    >>> io.checksum({"bias": np.zeros(2)}) == io.checksum({"bias": np.zeros(2, np.float32)})
    False
    """
    digest = hashlib.sha256(repr(texts).encode())
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
