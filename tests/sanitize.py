# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests with the Cython modules under a sanitizer of the compiler.

    python tests/sanitize.py address [PYTEST ARGUMENT...]
    python tests/sanitize.py thread [PYTEST ARGUMENT...]

'address' (AddressSanitizer and UndefinedBehaviorSanitizer) or 'thread' (ThreadSanitizer) is
compiled into a copy of the package in build/. Daemons that the tests start run from the copy; with
'address' so do the tests themselves. What the sanitizer says goes to build/NAME/report.PID; the
exit status is 1 if there is any such report or a test failed.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"address": "-fsanitize=address,undefined -fno-sanitize=alignment -fno-omit-frame-pointer",
         "thread": "-fsanitize=thread"}
LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}


def library(name: str) -> str:
    out = subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True)
    return str(Path(out.strip()).resolve())


def build(kind: str) -> Path:
    """A copy of the package, compiled anew where a source changed."""
    copy = ROOT / "build" / kind
    for part in ("tcpha", "setup.py", "pyproject.toml", "README.md"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
                "*.so", "*.c", "__pycache__"))
            shutil.copytree(source / "_bpf", copy / part / "_bpf", dirs_exist_ok=True)
        else:
            shutil.copy2(source, copy / part)
    subprocess.run([sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"],
                   cwd=copy, check=True,
                   env={**os.environ, "CFLAGS": FLAGS[kind], "LDFLAGS": FLAGS[kind], "CC": "gcc"})
    return copy


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in FLAGS:
        print(__doc__, file=sys.stderr)
        return 2
    kind = sys.argv[1]
    copy = build(kind)
    for old in copy.glob("report.*"):
        old.unlink()
    # leaks: the interpreter frees nothing at its end; its own allocator would hide what is freed
    options = f"log_path={copy}/report:handle_segv=0"
    env = {"LD_PRELOAD": " ".join(map(library, LIBRARIES[kind])), "PYTHONPATH": str(copy),
           "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": f"{options}:detect_leaks=0",
           "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
           "TSAN_OPTIONS": f"{options}:suppressions={ROOT}/tests/tsan.supp:history_size=4:"
                           "exitcode=0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[2:]]
    if kind == "address":
        # 'tests' is found in ROOT, but 'tcpha' in the copy before
        command += ["-o", f"pythonpath={copy}", "--import-mode=append"]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}).returncode
    else:
        env["TCPHA_LAB_WRITABLE"] = str(copy)
        daemons = " ".join(f"{key}={value.replace(' ', ':')}" for key, value in env.items())
        status = subprocess.run(command, cwd=ROOT,
                                env={**os.environ, "TCPHA_LAB_DAEMONS": daemons}).returncode
    reports = sorted(copy.glob("report.*"))
    for report in reports:
        print(f"--- {report}\n{report.read_text(errors='replace')}")
    print(f"{kind}: {len(reports)} reports")
    return 1 if status or reports else 0


if __name__ == "__main__":
    sys.exit(main())
