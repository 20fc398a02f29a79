"""Flags of the XLA compiler, which reads them from the environment once, when JAX first uses a device."""

import importlib.util
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

# Programs compile in half to two thirds of the time, and may run more slowly.
QUICK = {"xla_cpu_use_fusion_emitters": "false"}
# CPU devices wait for each other at a collective. XLA warns where one is 20 seconds late, and aborts the process 40
# seconds after that: too soon for a busy machine, or for a device whose search takes long.
PATIENT = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 7200,
}


def add(flags: Mapping[str, object]) -> None:
    """Adds flags to the environment, except those that it has already or that the installed XLA does not know."""
    given = os.environ.get("XLA_FLAGS", "")
    new = [f"--{flag}={value}" for flag, value in flags.items() if f"--{flag}=" not in given and known(flag)]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([given, *new]).strip()


def known(flag: str) -> bool:
    """Whether the installed XLA has a flag: it stops at one that it does not know, and flags come and go."""
    spec = importlib.util.find_spec("jaxlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("*jax_common*"):  # .so, .dylib or .dll
            with library.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(flag.encode()) >= 0
    return flag == "xla_force_host_platform_device_count"
