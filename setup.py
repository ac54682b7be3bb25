"""The native CPU kernels. Everything else about the package stands in pyproject.toml.

Without a C compiler the build goes on without them, and Octavo computes with torch alone.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("octavo/kernels/cpu/csrc")

# Each file names the instruction set it is for. No contraction: the same row must give the same
# bits in every variant of a loop.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-pthread", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wno-psabi"]


class BuildNative(build_ext):
    """If the assembler is older than the compiler (RHEL 9), do without the newest instructions."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except CompileError:
            ext.define_macros.append(("OLD_ASSEMBLER", None))
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "octavo.kernels.cpu._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ],
)
