"""Reads and writes files: networks, PyTorch tensors, images. No file can run code, and nothing is downloaded.

`read_network` and `write_network` know every format (PyTorch, safetensors, npz, Flax msgpack, Orbax). `read_arrays`
and `as_network` are the two halves of `read_network`, for a file whose architecture is not known yet.
"""

from jax_scalegmn._bounded import Limits, limits
from jax_scalegmn.io import images, tensors, torch_layout
from jax_scalegmn.io._atomic import atomic_path, in_use, is_unused
from jax_scalegmn.io._checksums import checksum
from jax_scalegmn.io._networks import (
    ArrayFile,
    FileFormat,
    NetworkFile,
    as_network,
    as_stored,
    check_writable,
    infer_mlp,
    read_arrays,
    read_network,
    write_network,
)
from jax_scalegmn.io.torch_layout import StateDict, from_torch, storable, to_torch

__all__ = [
    "ArrayFile",
    "FileFormat",
    "Limits",
    "NetworkFile",
    "StateDict",
    "as_network",
    "as_stored",
    "atomic_path",
    "check_writable",
    "checksum",
    "from_torch",
    "images",
    "in_use",
    "infer_mlp",
    "is_unused",
    "limits",
    "read_arrays",
    "read_network",
    "storable",
    "tensors",
    "to_torch",
    "torch_layout",
    "write_network",
]
