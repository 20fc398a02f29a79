"""What is written is read back bit for bit, and foreign content ends in short errors, for whatever hypothesis finds."""

import json
import tempfile
from pathlib import Path

import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_scalegmn as sg
from jax_scalegmn import architecture, layers, models
from jax_scalegmn.architecture import Axis, NeuronLayer, Parameter, Scaling
from jax_scalegmn.io import tensors

FEW = settings(max_examples=60, deadline=None, derandomize=True)  # the same examples in each run
MANY = settings(FEW, max_examples=3000)

SIZES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from(["?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16])
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def arrays(draw):
    """An array of any dtype and bits, NaNs and infinities included."""
    dtype, shape = np.dtype(draw(DTYPES)), draw(SIZES)
    bits = draw(st.binary(min_size=(size := dtype.itemsize * int(np.prod(shape))), max_size=size))
    if dtype.kind == "b":
        return (np.frombuffer(bits, "u1") % 2 == 1).reshape(shape)
    return np.frombuffer(bits, dtype).reshape(shape)


@st.composite
def descriptions(draw):
    """An architecture of a few neuron layers and of parameters that index them."""
    names = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    neurons = tuple(NeuronLayer(n, draw(st.integers(1, 5)), draw(st.sampled_from(Scaling))) for n in names)
    axis = st.builds(Axis, st.sampled_from(names), st.sampled_from([1, -1]), st.integers(1, 3)) | st.integers(1, 4)
    paths = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4, unique=True))
    parameters = tuple(Parameter(path, tuple(draw(st.lists(axis, min_size=1, max_size=3)))) for path in paths)
    return neurons, parameters


def check_round_trip(ending, stored):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        tensors.write(path, stored)
        read = tensors.read(path)
        assert set(read) == set(stored)
        if ending != ".safetensors":
            assert list(read) == list(stored)
        for name, array in stored.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
            assert read[name].tobytes() == array.tobytes()


def check_reading(read, value):
    """Reads it, or refuses it in few words."""
    message = "read"
    try:
        read(value)
    except jaxtyping.TypeCheckError:
        pass  # of the annotations, which tests alone check, before the function refuses the value
    except (ValueError, OSError) as error:
        message = str(error)
    assert 0 < len(message) < 2000


@pytest.mark.parametrize("ending", tensors.SUFFIXES)
def test_tensors_are_read_back_bit_for_bit(ending):
    names = st.dictionaries(TEXT, arrays(), min_size=1, max_size=4)
    if ending == ".npz":  # its members are files of an archive, and bfloat16 is unknown to NumPy
        names = names.filter(lambda some: all(array.dtype != ml_dtypes.bfloat16 for array in some.values()))
    FEW(given(names)(lambda stored: check_round_trip(ending, stored)))()


@FEW
@given(descriptions())
def test_descriptions_are_read_back_or_were_refused(parts):
    neurons, parameters = parts
    try:
        arch = architecture.Architecture("any", neurons, parameters)
    except ValueError:
        return
    assert architecture.from_json(json.loads(json.dumps(arch.as_json()))) == arch


@pytest.mark.parametrize("read", [architecture.from_json, layers.from_json, models.from_json])
@pytest.mark.parametrize("how", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_json_is_read_or_refused(read, how):
    how(given(JSON)(lambda value: check_reading(read, value)))()


@pytest.mark.parametrize("parse", [architecture.parse, layers.parse])
@pytest.mark.parametrize("how", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_text_is_parsed_or_refused(parse, how):
    calls = st.from_regex(r"(mlp|siren|cnn|vgg|resnet|sequential)[:(\[][-0-9a-z,()\[\]='\". ]{0,20}", fullmatch=True)
    how(given(st.text(max_size=20) | calls)(lambda text: check_reading(parse, text)))()


@pytest.mark.parametrize("ending", [*tensors.SUFFIXES, ".msgpack"])
@pytest.mark.parametrize("how", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_bytes_are_read_or_refused(ending, how):
    beginnings = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x93NUMPY\x01\x00", b"\x10\0\0\0\0\0\0\0{"])
    arch = sg.mlp((2, 2, 1), "relu")

    def read(content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"a{ending}"
            path.write_bytes(content)
            sg.io.read_network(path, arch)

    content = st.builds(bytes.__add__, beginnings, st.binary(max_size=200))
    how(given(content)(lambda some: check_reading(read, some)))()
