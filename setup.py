# SPDX-License-Identifier: GPL-2.0-or-later
"""Extensions and BPF objects; everything else is in pyproject.toml."""
import os
import platform
import shlex
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BPF = Path("tcpha/_bpf")
LIBRARIES = {"bpf": ["libbpf"], "ebpf": ["libbpf"], "match": ["libhs"], "fe_worker": ["libhs"],
             "tls": ["libssl", "libcrypto"]}


def pkg_config(packages: list[str], option: str) -> list[str]:
    if not packages:
        return []
    return shlex.split(subprocess.check_output(["pkg-config", option, *packages], text=True))


def extension(source: Path) -> Extension:
    packages = LIBRARIES.get(source.stem, [])
    return Extension(
        f"tcpha._fast.{source.stem}", [str(source)],
        include_dirs=[str(BPF)], depends=[str(p) for p in BPF.glob("*.h")],
        extra_compile_args=["-O2", "-g", "-pthread", "-Wall", "-Wno-unused-function",
                            *pkg_config(packages, "--cflags")],
        extra_link_args=["-pthread", *pkg_config(packages, "--libs")])


class BuildWithBpf(build_ext):
    """Compiles the BPF programs too, with clang; one object serves all kernels (CO-RE)."""

    def run(self) -> None:
        super().run()
        arch = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        out = BPF if self.inplace else Path(self.build_lib) / BPF
        out.mkdir(parents=True, exist_ok=True)
        newest = max(p.stat().st_mtime for p in BPF.glob("*.[ch]"))  # one includes another
        for source in sorted(BPF.glob("*.bpf.c")):
            target = out / (source.stem + ".o")
            if target.exists() and target.stat().st_mtime > newest:
                continue
            self.spawn([os.environ.get("CLANG", "clang"), "-O2", "-g", "-Wall", "-Wextra",
                        "-Werror", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{arch}",
                        f"-I/usr/include/{platform.machine()}-linux-gnu", "-c", str(source),
                        "-o", str(target)])
            self.spawn([os.environ.get("LLVM_STRIP", "llvm-strip"), "-g", str(target)])


setup(
    ext_modules=cythonize(
        [extension(p) for p in sorted(Path("tcpha/_fast").glob("*.pyx"))],
        compiler_directives={"language_level": 3, "boundscheck": False, "wraparound": False,
                             "cdivision": True, "initializedcheck": False,
                             "embedsignature": True}),
    cmdclass={"build_ext": BuildWithBpf})
