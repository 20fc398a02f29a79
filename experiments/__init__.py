"""Experiments: importable programs with a command line each, `python -m experiments.inr --help`."""

import importlib.util
import sys

for _module, _package in {
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "ott": "ott-jax",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tyro": "tyro",
}.items():
    if importlib.util.find_spec(_module) is None:
        _message = (
            f"The experiments need {_package}, which is not installed; expected the extra 'experiments'. Run pip "
            "install 'jax-scalegmn[experiments]'."
        )
        if sys.argv[:1] == ["-m"]:  # python -m experiments.inr, as long as Python looks for the module
            print(_message, file=sys.stderr)
            raise SystemExit(2)
        raise ModuleNotFoundError(_message, name=_module)
