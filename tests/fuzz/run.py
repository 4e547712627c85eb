# SPDX-License-Identifier: GPL-2.0-or-later
"""Coverage-guided fuzzing of whatever reads bytes of strangers.

    python tests/fuzz/run.py TARGET [--runs N | --seconds N] [--seed N]
    python tests/fuzz/run.py TARGET FILE...        what was found, once more

TARGET is one of:
  head       the request-head parser, whole and in pieces
  messages   the decoder of control messages
  packet     the parsers of TCP options and ICMP errors, and the rewriting
  smuggling  a head that we take must be read alike by llhttp
  config     both readers of configuration files, for both daemons
  proof      reads a byte too far, to show that it would be found

The Cython modules are compiled a second time, by clang with AddressSanitizer,
UndefinedBehaviorSanitizer and libFuzzer's coverage, into build/fuzz; atheris runs them. New inputs
that reach new code go to build/fuzz/found/TARGET, an input that fails to build/fuzz/crash-TARGET-*.
Exit status: 0, or libFuzzer's where something was found.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/fuzz"
# in the order in which they import one another
MODULES = {name: ROOT / f"tcpha/_fast/{name}.pyx"
           for name in ("packet", "rewrite", "http", "message", "match")}
MODULES["bounds"] = ROOT / "tests/fuzz/bounds.pyx"
# alignment: x86 and arm64 load from any address, and the compiled Cython relies on it nowhere else
SANITIZE = ["-fsanitize=address,undefined,fuzzer-no-link", "-fno-sanitize=alignment",
            "-fno-sanitize-recover=undefined"]
CORPUS = {"head": "head", "smuggling": "head", "messages": "messages", "packet": "packet"}
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def build() -> None:
    """Compile what is older than its source."""
    from Cython.Build import cythonize
    from setuptools import Extension
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("tcpha/_fast/*.pxd"), *ROOT.glob("tcpha/_bpf/*.h"), Path(__file__)]
    newest = max(p.stat().st_mtime for p in headers)
    for name, source in MODULES.items():
        out = BUILD / f"{name}{SUFFIX}"
        if out.exists() and out.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        module = name if name == "bounds" else f"tcpha._fast.{name}"
        [made] = cythonize([Extension(module, [str(source)])], build_dir=str(BUILD), quiet=True,
                           force=True, compiler_directives={
                               "language_level": 3, "boundscheck": False, "wraparound": False,
                               "cdivision": True, "initializedcheck": False})
        flags, libraries = "", ""
        if name == "match":
            flags, libraries = (subprocess.check_output(["pkg-config", o, "libhs"], text=True)
                                for o in ("--cflags", "--libs"))
        thing = BUILD / f"{name}.o"
        subprocess.run([os.environ.get("CLANG", "clang"), "-O1", "-g", "-fPIC", "-pthread", "-w",
                        *SANITIZE, f"-I{sysconfig.get_path('include')}", f"-I{ROOT}/tcpha/_bpf",
                        *shlex.split(flags), "-c", made.sources[0], "-o", str(thing)], check=True)
        # the sanitizers' run time is atheris' own, see preloaded()
        subprocess.run(["cc", "-shared", str(thing), "-o", str(out), *shlex.split(libraries)],
                       check=True)


def preloaded() -> dict[str, str]:
    """The environment in which instrumented modules can be loaded."""
    spec = importlib.util.find_spec("atheris")
    if spec is None or spec.origin is None:
        sys.exit("tests/fuzz/run.py: atheris is missing; pip install atheris")
    library = Path(spec.origin).parents[1] / "asan_with_fuzzer.so"
    # leaks: the interpreter never frees everything; its own allocator would hide what is freed
    return {"LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1"}


def load() -> Any:
    """The instrumented modules in place of the others. Returns 'bounds'."""
    sys.path.insert(0, str(ROOT))
    for name in MODULES:
        module = name if name == "bounds" else f"tcpha._fast.{name}"
        spec = importlib.util.spec_from_file_location(module, BUILD / f"{name}{SUFFIX}")
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules["bounds"]


def smuggling(data: bytes) -> None:
    """Where llhttp knows the method, it takes what we take. We pass on any method."""
    from tests.support import llhttp
    head = llhttp.taken(data)
    if head is None:
        return
    method, _, _, length = head
    start = data.index(method)
    known = method if method in (b"HEAD", b"POST", b"CONNECT", b"OPTIONS") else b"GET"
    llhttp.agree(known + data[start + len(method):length])


def config(data: bytes) -> None:
    """A file is read, or refused with a place and a reason; what is read can be written as TOML and
    means the same."""
    from tcpha.config import load
    from tcpha.config.model import ConfigError
    from tcpha.config.writers import to_toml
    if not data:
        return
    role = ("fe", "be")[data[0] & 1]
    kind = ("conf", "toml")[data[0] >> 1 & 1]
    work = BUILD / f"work-{os.getpid()}"
    work.mkdir(exist_ok=True)
    file = work / f"f.{kind}"
    file.write_bytes(data[1:])
    try:
        first = load(role, str(file))
    except ConfigError as error:
        assert error.faults and all(str(f).count("\n") == 0 for f in error.faults), error.faults
        return
    again = work / "again.toml"
    again.write_text(to_toml(first))
    assert to_toml(load(role, str(again))) == to_toml(first)


def fuzz(target: str, arguments: list[str]) -> None:
    """In the preloaded process."""
    import atheris
    bounds = load()
    one: Callable[[bytes], object] = {"smuggling": smuggling, "config": config}.get(target) \
        or getattr(bounds, target)
    if target == "config":
        with atheris.instrument_imports(include=["tcpha.config", "toml"]):
            import tcpha.config
        assert tcpha.config
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["head", "messages", "packet", "smuggling", "config",
                                           "proof"])
    parser.add_argument("file", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    options = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        build()
        return subprocess.run([sys.executable, *sys.argv],
                              env={**os.environ, **preloaded()}).returncode
    arguments = [str(f) for f in options.file]
    if not arguments:
        found = BUILD / "found" / options.target
        found.mkdir(parents=True, exist_ok=True)
        seeds = ROOT / "tests/fuzz/corpus" / CORPUS.get(options.target, "config")
        arguments = [f"-runs={options.runs}", f"-max_total_time={options.seconds}",
                     f"-seed={options.seed}", "-max_len=4096", "-print_final_stats=1",
                     f"-artifact_prefix={BUILD}/crash-{options.target}-", str(found), str(seeds)]
    fuzz(options.target, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
