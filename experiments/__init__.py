"""Experiments: importable programs with a command line each, `python -m experiments.inr --help`."""

import importlib.util

for _module, _package in {
    "PIL": "pillow",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tyro": "tyro",
}.items():
    if importlib.util.find_spec(_module) is None:
        raise ModuleNotFoundError(
            f"The experiments need {_package}, which is not installed; expected the extra 'experiments'. Run pip "
            "install 'jax-scalegmn[experiments]'.",
            name=_module,
        )
