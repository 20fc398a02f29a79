"""Infers the `Architecture` of a network from its own function."""

from jax_scalegmn.inference._trace import Inference, infer

__all__ = ["Inference", "infer"]
