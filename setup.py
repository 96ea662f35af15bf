"""Compiles the native kernels into the wheel where that can be done; everything else is in pyproject.toml.

It needs torch and a C++ compiler at build time: `pip install --no-build-isolation .`, in an environment that has
torch. Anywhere else, in editable installs and with `SPECDEC_NATIVE=0`, nothing is compiled here, and the kernels are at
their first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("specdec") / "kernels"


def _builder() -> ModuleType:
    """`specdec.kernels.build` by itself: the package cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("_specdec_build", Path(__file__).parent / KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Copies the package, and puts the compiled kernels beside their sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or os.environ.get("SPECDEC_NATIVE") == "0":
            return
        try:
            builder = _builder()
            made = builder.prebuild(Path(self.build_lib) / KERNELS / "prebuilt")
        except Exception as error:  # an install must not fail for what can still be done at first use
            print(f"native kernels are left for their first use: {error}", file=sys.stderr)
        else:
            print(f"native kernels: {made.name}", file=sys.stderr)


class WheelWithKernels(bdist_wheel):
    """Names the platform when the wheel holds a library for it."""

    def get_tag(self) -> tuple[str, str, str]:
        folder = Path(self.get_finalized_command("build_py").build_lib) / KERNELS / "prebuilt"
        if any(folder.glob("*.so")):
            self.plat_name_supplied = True
        return super().get_tag()


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
