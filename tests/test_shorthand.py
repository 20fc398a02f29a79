"""Architectures in short form are those of the builders, and errors say what is wrong with a text."""

import pytest

import jax_scalegmn as sg
from jax_scalegmn import architecture


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlp:784-64-64-10,relu", sg.mlp((784, 64, 64, 10), "relu")),
        ("mlp:3-5-4-2,tanh-gelu", sg.mlp((3, 5, 4, 2), ("tanh", "gelu"))),
        ("mlp:3-5-2,activation=silu", sg.mlp((3, 5, 2), "silu")),
        ("siren:2-32-32-1,w0=30", sg.siren((2, 32, 32, 1))),
        ("siren:2-4-1,offset=-0.5,w0=1e1", sg.siren((2, 4, 1), w0=10.0, offset=-0.5)),
        ("cnn:1-16-16,10,relu,strides=2", sg.cnn((1, 16, 16), 10)),
        (
            "cnn:2-3-4,3,tanh,kernel_size=3-2,padding=same,flatten=7-9",
            sg.cnn((2, 3, 4), 3, activation="tanh", kernel_size=(3, 2), padding="SAME", flatten=(7, 9)),
        ),
        ("cnn:2-3,3,tanh,kernel_size=5,flatten=none", sg.cnn((2, 3), 3, activation="tanh", kernel_size=5)),
        ("cnn:1-2-3,3,relu,padding=2,flatten=7-9", sg.cnn((1, 2, 3), 3, padding=2, flatten=(7, 9))),
        ("siren:2-3-4-1,w0=30-1.5", sg.siren((2, 3, 4, 1), w0=(30.0, 1.5))),
        ("siren:2-3-1,w0=-3e-1", sg.siren((2, 3, 1), w0=-0.3)),
        ("vgg:64+64-128+128,10,norm=batch", sg.vgg(((64, 64), (128, 128)), 10, norm="batch")),
        ("vgg:4,3,norm=group,groups=2,pooling=mean", sg.vgg(((4,),), 3, norm="group", groups=2, pooling="mean")),
        ("resnet:20,16-32-64,norm=batch", sg.resnet(20)),
        ("resnet:8,4-4-4,7,padding=1,norm=none", sg.resnet(8, widths=(4, 4, 4), outputs=7, padding=1, norm=None)),
        ("resnet:20,tanh,epsilon=1e-3", sg.resnet(20, activation="tanh", epsilon=1e-3)),
    ],
)
def test_short_forms_are_those_of_the_builders(text, expected):
    assert architecture.parse(text) == expected


def test_every_example_can_be_read():
    assert [architecture.parse(text).name.split()[0] for text in architecture.EXAMPLES.values()] == list(
        architecture.EXAMPLES
    )


def test_the_activation_may_be_given_apart_but_may_not_contradict_the_text():
    assert architecture.parse("mlp:3-5-2", activation="tanh") == architecture.parse("mlp:3-5-2,tanh")
    assert architecture.parse("mlp:3-5-2,tanh", activation="tanh") == architecture.parse("mlp:3-5-2,tanh")
    with pytest.raises(ValueError, match="has activation 'tanh', not 'relu'"):
        architecture.parse("mlp:3-5-2,tanh", activation="relu")
    with pytest.raises(ValueError, match="has activation 'sine', not 'relu'"):
        architecture.parse("siren:2-3-1", activation="relu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp", "expected one of mlp, siren, cnn, vgg, resnet"),
        ("transformer:3", "expected one of mlp"),
        ("mlp:3-4-2", "names no activation"),
        ("cnn:1-2,3", "names no activation"),
        ("mlp:3-x-2,relu", "widths is 'x'; expected a whole number"),
        ("mlp:3-4-2,relu,relu", "one option too many, 'relu'"),
        ("mlp:3-4-2,relu,activation=relu", "'activation', unknown or twice"),
        ("mlp:3-4-2,relu,depth=3", "'depth', unknown or twice; a mlp has widths, activation"),
        ("mlp:3-4-2,rely", "symmetry group is unknown"),
        ("siren:", "incomplete.*'widths'"),
        ("siren:2-4-1,w0=fast", "w0 is 'fast'; expected a finite number"),
        ("siren:2-4-1,w0=inf", "w0 is 'inf'"),
        ("siren:2-4-1,w0=30-1", r"w0 is \(30.0, 1.0\) for the 1 hidden layers"),
        ("mlp:3-4-2,prelu", "sg.sequential has PReLU"),
        ("siren:2-4-1,relu", "one option too many, 'relu'"),
        ("cnn:1-2,relu", "incomplete.*'outputs'"),
        ("cnn:1-2,3,relu,flatten=9", "flatten is '9'; expected height and width"),
        ("vgg:4,3,norm=group,groups=3", "divisor of every width"),
        ("resnet:9,4-4-4", "depth is 9"),
        ("resnet:600000002,16-32-64", r"number of layers is 600000002; .*limits\(layers=600000002\)"),
        ("mlp:" + "2-" * 6000 + "2,relu", "number of layers is 6001"),
        ("vgg:" + "2+2-" * 3000 + "2,10", "number of layers is 6001"),
        ("mlp:2-99999999999-1,relu", "'99999999999'; expected a whole number up to"),
        ("mlp:2-" + "9" * 5000 + "-1,relu", "expected a whole number up to"),
        ("siren:2-3-1,offset=nan", "offset is 'nan'; expected a finite number"),
        ("mlp:2-3-1," + "a" * 10**5, "activation is 'aaa"),
        ("resnet:20,norm=" + "a" * 10**5, "norm is 'aaa"),
        ("a" * 10**6, "expected one of mlp"),
    ],
)
def test_a_text_that_is_not_an_architecture_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        architecture.parse(text)
    assert (repr(text) if len(text) < 90 else repr(text)[:30]) in str(caught.value)
    assert len(str(caught.value)) < 2000
