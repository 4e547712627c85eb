# SPDX-License-Identifier: GPL-2.0-or-later
"""Command line of tcphafe and tcphabe."""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from tcpha import __version__
from tcpha.config import Config, ConfigError, load, to_toml
from tcpha.daemon import capabilities, logs
from tcpha.daemon.rundir import DEFAULT, RunDir, RunDirError, daemonise
from tcpha.daemon.service import Service

ROLES = {"tcphafe": "fe", "tcphabe": "be"}


def parse(name: str, argv: list[str] | None) -> argparse.Namespace:
    what = {"tcphafe": "front end: accepts connections and hands them over by rule",
            "tcphabe": "back end: adopts connections for the server on this host"}[name]
    p = argparse.ArgumentParser(prog=name, description=f"TCPHA {what}.")
    p.add_argument("-c", metavar="FILE", dest="config", default=f"/etc/tcpha/{name}.conf",
                   help="configuration; .toml is TOML, any other name the legacy format "
                        "(default: %(default)s)")
    p.add_argument("-f", action="store_true", dest="foreground",
                   help="stay in the foreground and log to stderr")
    p.add_argument("-t", action="store_true", dest="test",
                   help="check the configuration and exit: 0 good, 2 bad")
    p.add_argument("--print-toml", action="store_true",
                   help="check the configuration, print what it sets as TOML, and exit as -t")
    p.add_argument("--run-dir", metavar="DIR", type=Path, default=DEFAULT,
                   help="pid file, control socket and control files (default: %(default)s)")
    p.add_argument("--datapath", choices=("auto", "ebpf", "nfqueue"),
                   help="overrides the configuration's datapath")
    p.add_argument("-V", action="version", version=f"{name} {__version__}")
    return p.parse_args(argv)


def _make(role: str, config: Config, run: RunDir, foreground: bool) -> Service:
    if role == "fe":
        from tcpha.frontend.service import FrontEndService
        return FrontEndService(config, run, foreground)
    from tcpha.backend.service import BackEndService
    return BackEndService(config, run, foreground)


def main(name: str, argv: list[str] | None = None) -> int:
    """Run a daemon. Exit status: 0 stopped as asked, 1 failed, 2 bad configuration or usage."""
    args = parse(name, argv)
    role = ROLES[name]
    capabilities.hold_back()
    try:
        config = load(role, args.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for warning in config.warnings:
        print(warning, file=sys.stderr)
    if args.print_toml:
        try:
            print(to_toml(config), end="")
        except ValueError as error:
            print(f"{args.config}: {error}", file=sys.stderr)
            return 2
        return 0
    if args.test:
        print(f"{args.config}: good")
        return 0
    if args.datapath:
        config.values["datapath"] = args.datapath
    if os.geteuid() != 0 and not capabilities.has_all():
        print(f"{name}: needs root (CAP_NET_ADMIN, CAP_BPF); use sudo", file=sys.stderr)
        return 1
    args.run_dir = args.run_dir.absolute()
    config.file = os.path.abspath(config.file)
    os.umask(os.umask(0o077) | stat.S_IWGRP | stat.S_IWOTH)  # nobody else writes what is ours
    report: Callable[[str], None] = (lambda _: None) if args.foreground else daemonise()
    try:
        logs.set_up(name, args.foreground, config.logfile)
        run = RunDir(args.run_dir, name)
    except (OSError, RunDirError) as error:
        return _failed(name, str(error), args.foreground, report)
    try:
        asyncio.run(_serve(role, config, run, args.foreground, report))
    except Exception as error:
        expected = type(error).__module__.startswith("tcpha") or isinstance(error, OSError)
        if not expected:
            logging.getLogger("tcpha").exception("internal error")
        return _failed(name, str(error) or type(error).__name__, args.foreground, report)
    finally:
        run.close()
    return 0


async def _serve(role: str, config: Config, run: RunDir, foreground: bool,
                 report: Callable[[str], None]) -> None:
    await _make(role, config, run, foreground).run(report)


def _failed(name: str, reason: str, foreground: bool, report: Callable[[str], None]) -> int:
    for line in f"cannot serve: {reason}".splitlines():  # the verifier has said more than one
        logging.getLogger("tcpha").error("%s", line)
    if not foreground:
        with contextlib.suppress(OSError):  # it was serving already
            report(f"{name}: {reason}")
    return 1
