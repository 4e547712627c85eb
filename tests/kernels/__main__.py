# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs TCPHA on other kernels: each in a virtual machine, then three machines of different ones."""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.kernels import images
from tests.kernels.images import Kernel
from tests.kernels.machine import Machine, die_with
from tests.kernels.results import Result, report

TOP = Path(__file__).parents[2]
HERE = TOP / "tests" / "kernels"
LOGS = images.CACHE / "logs"
# kernels of the front end and the back ends; the first arrangement is that of the short form
ARRANGEMENTS = ("6.12,6.12,newest", "6.12,6.1,newest", "6.1,6.12,newest")
SHORT = ("6.1", "6.12", "newest")
DEMO, PROBE, TESTS, TRIPLE = 600.0, 600.0, 7200.0, 7200.0  # seconds
SHORT_TRIPLE = "dispatch or large_download or (outlive_daemons and fe) or stands_still and be1"


def pytest(where: str, *options: str) -> list[str]:
    """A command: pytest knows nothing of the other tests."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
            "-o", f"pythonpath=. tests/kernels/{where}",
            f"--confcutdir=tests/kernels/{where}", *options]


def alone(kernel: Kernel, args: argparse.Namespace) -> Result:
    """All that one machine can show."""
    result = Result(kernel.version)
    with Machine(kernel, kernel.version, LOGS, cpus=args.cpus) as m:
        def python(*command: str, seconds: float) -> subprocess.CompletedProcess[str]:
            return m.run("env", "-C", str(TOP), "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", *command,
                         seconds=seconds, check=False)
        done = python(sys.executable, str(HERE / "inside" / "probe.py"), seconds=PROBE)
        if done.returncode:
            result.failed.append(f"probe.py: exit {done.returncode}\n{done.stdout}{done.stderr}")
            return result
        result.take_probe(kernel.number, json.loads(done.stdout))
        done = python(sys.executable, "-m", "tcpha.lab.demo", seconds=DEMO)
        result.check(done.returncode == 0, f"demo\n{done.stdout}{done.stderr}")
        if not args.short:
            done = python("bash", "-c", 'exec "$@" >/dev/console 2>&1', "tests",
                          *pytest("inside", "-v", "--color=no", "--junitxml=/run/results.xml",
                                  f"--ways={','.join(result.ways)}", "-k", args.k,
                                  str(HERE / "inside")), seconds=TESTS)
            xml = m.run("cat", "/run/results.xml", check=False).stdout
            if xml:
                result.take_junit(xml)
            else:
                result.failed.append(f"tests: exit {done.returncode}; see {m.console}")
    return result


def tests(command: list[str], seconds: float) -> tuple[int, str]:
    """Run pytest here: status, what it said. It takes away what it made, whatever ends it."""
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True, preexec_fn=die_with(signal.SIGINT),
                          env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            raise
    return process.returncode, said


def together(kernels: list[Kernel], args: argparse.Namespace) -> Result:
    """Three machines: the front end, two back ends."""
    result = Result(", ".join(k.short for k in kernels))
    with tempfile.TemporaryDirectory() as made:
        xml = Path(made) / "results.xml"
        name = "-".join(k.short for k in kernels)
        logs = LOGS / name
        logs.mkdir(exist_ok=True)
        short = ["--megabytes=16", "--downloads=100", "-k", SHORT_TRIPLE] if args.short else [
            "-k", args.k]
        status, said = tests(
            pytest("outside", f"--junitxml={xml}", f"--logs={logs}", f"--age={args.age}",
                   f"--datapath={args.datapath}",
                   "--versions=" + ",".join(k.version for k in kernels), *short,
                   str(HERE / "outside")), TRIPLE + args.age)
        if xml.exists():
            result.take_junit(xml.read_text())
        else:
            result.failed.append(f"tests: exit {status}\n{said}")
    return result


def timed(what: Callable[[], Result], name: str) -> Result:
    """Of one machine or three. What it raises is a failure, too."""
    start = time.monotonic()
    try:
        result = what()
    except Exception as error:
        result = Result(name, failed=[f"{type(error).__name__}: {error}"])
    result.seconds = time.monotonic() - start
    print(f"{result.name}: {result.passed} passed, {len(result.failed)} failed, "
          f"{result.seconds:.0f} s", flush=True)
    return result


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    p.add_argument("--short", action="store_true", help="what continuous integration has time for")
    p.add_argument("--kernels", default="", help="of single machines, as 5.10,newest; 'none'")
    p.add_argument("--arrangement", action="append", metavar="FE,BE,BE", help="of three machines; "
                   f"'none'. By default {' and '.join(ARRANGEMENTS)}")
    p.add_argument("--age", type=float, default=0, metavar="SECONDS",
                   help="the first of three machines is so much older than the others")
    p.add_argument("--datapath", default="auto,auto", metavar="FE,BE", help="of three machines")
    p.add_argument("--jobs", type=int, default=2, help="single machines at one time")
    p.add_argument("--cpus", type=int, default=1, help="of each single machine")
    p.add_argument("-k", default="", help="only tests of such names, as pytest has it")
    return p.parse_args()


def main() -> int:
    args = arguments()
    if os.geteuid() != 0:
        print("virtual machines here have network devices: run this as root", file=sys.stderr)
        return 1
    LOGS.mkdir(parents=True, exist_ok=True)
    kernels: dict[str, Kernel] = {}
    for suite in images.SUITES:
        kernel = images.get(suite)
        kernels[kernel.short] = kernels["newest"] = kernel
        print(f"{suite}: Linux {kernel.version}", flush=True)

    names = args.kernels.split(",") if args.kernels else SHORT if args.short else [
        *(k for k in kernels if k != "newest")]
    arrangements = args.arrangement or (ARRANGEMENTS[:1] if args.short else ARRANGEMENTS)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda name: timed(partial(alone, kernels[name], args), name),
                                [name for name in names if name != "none"]))
    results += [timed(partial(together, [kernels[n] for n in a.split(",")], args), a)
                for a in arrangements if a != "none"]
    print(report(results))
    print(f"consoles: {LOGS}")
    return 1 if any(r.failed for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
