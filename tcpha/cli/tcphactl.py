# SPDX-License-Identifier: GPL-2.0-or-later
"""The tcphactl command."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tcpha import __version__
from tcpha.admin import render
from tcpha.admin.rundir import DEFAULT
from tcpha.admin.server import Refused, ask

COMMANDS = {
    "fe": {"status": "", "conns": "", "servers": "", "rules": "", "set": "dbglevel|dtcinterval N",
           "reload": "", "drain": "ADDR", "undrain": "ADDR", "unload": ""},
    "be": {"status": "", "conns": "", "set": "dbglevel N", "unload": ""},
}
EPILOG = "commands:\n" + "\n".join(
    f"  {role} {name} {args}".rstrip() for role, names in COMMANDS.items()
    for name, args in names.items()) + \
    "\n\nexit status: 0 done, 1 refused or failed (the reason is on stderr), 2 wrong usage"


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="tcphactl", description="Look into and steer a running TCPHA "
                                "daemon.", epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run-dir", metavar="DIR", type=Path, default=DEFAULT,
                   help="the daemon's run directory (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("-V", action="version", version=f"tcphactl {__version__}")
    p.add_argument("role", choices=sorted(COMMANDS))
    p.add_argument("command")
    p.add_argument("args", nargs="*")
    args = p.parse_args(argv)
    known = COMMANDS[args.role]
    if args.command not in known:
        p.error(f"unknown command '{args.command}' for {args.role}; choose from {', '.join(known)}")
    if len(args.args) != len(known[args.command].split()):
        p.error(f"usage: tcphactl {args.role} {args.command} {known[args.command]}".rstrip())
    socket = args.run_dir / f"tcpha{args.role}.sock"
    try:
        data = ask(socket, args.command, args.args)
    except Refused as error:
        sys.exit(_say(str(error)))
    except OSError as error:
        sys.exit(_say(f"no tcpha{args.role} answers at {socket} ({error.strerror or error}); is it "
                      "running with this --run-dir?"))
    if args.json:
        print(json.dumps(data))
    else:
        print("\n".join(render.document(data)))


def _say(text: str) -> int:
    print(f"tcphactl: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
