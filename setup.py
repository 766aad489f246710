"""Puts the compiled kernels into wheels; everything else about the package is in pyproject.toml.

A wheel carries one library per instruction set of the machine it is built on and is tagged for that
platform. Without a C++ compiler it is built without them, for any platform, and compiles them when
they are first used. Editable installs and source distributions never carry any.
"""

import logging
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "src"))  # not installed yet; needs no other package

from qwenkit.errors import KernelError
from qwenkit.kernels import build

_log = logging.getLogger("qwenkit.setup")


class PlatformDistribution(Distribution):
    """Belongs to a platform as soon as it carries libraries."""

    libraries_wanted = False

    def has_ext_modules(self) -> bool:
        return self.libraries_wanted


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.distribution.libraries_wanted and not self.editable_mode:
            place = Path(self.build_lib, "qwenkit", "kernels", "cpu", build.PREBUILT)
            shutil.rmtree(place, ignore_errors=True)  # what an earlier build left
            self.carried = [str(path) for path in build.prebuild(place)]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *getattr(self, "carried", [])]


class PlatformWheel(bdist_wheel):
    def finalize_options(self) -> None:
        try:
            build.find_compiler()
            self.distribution.libraries_wanted = True
        except KernelError as error:
            _log.warning("This wheel carries no compiled kernels. %s", error)
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform  # the libraries have a C interface of their own


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
)
