"""Reads and writes files: networks, state dicts, images."""

from jax_scalegmn.io import images, tensors, torch_layout
from jax_scalegmn.io._atomic import check_free, replacing
from jax_scalegmn.io._networks import (
    ORBAX,
    Contents,
    Format,
    NetworkFile,
    check_output,
    dense_chain,
    interpret,
    read_contents,
    read_network,
    write_network,
)
from jax_scalegmn.io.torch_layout import StateDict, from_torch, to_torch

__all__ = [
    "ORBAX",
    "Contents",
    "Format",
    "NetworkFile",
    "StateDict",
    "check_free",
    "check_output",
    "dense_chain",
    "from_torch",
    "images",
    "interpret",
    "read_contents",
    "read_network",
    "replacing",
    "tensors",
    "to_torch",
    "torch_layout",
    "write_network",
]
