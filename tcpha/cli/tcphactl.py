# SPDX-License-Identifier: GPL-2.0-or-later
"""The tcphactl command."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tcpha import __version__
from tcpha.cli.ending import plain_ending
from tcpha.daemon.control_socket import NoAnswer, Refused, ask_for
from tcpha.daemon.rundir import DEFAULT

MOST_BACKENDS = 16  # of the lab


class Argument(NamedTuple):
    """Of ArgumentParser.add_argument()."""
    names: tuple[str, ...]
    options: dict[str, Any]


class Command(NamedTuple):
    """arguments: as a user reads them."""
    arguments: str
    what: str
    parsed: tuple[Argument, ...] = ()
    example: str = ""


def argument(*names: str, **options: Any) -> Argument:
    return Argument(names, options)


def _number(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {least:g} to {most:g}")
        return value
    return read


def _set(names: str) -> tuple[Argument, ...]:
    return (argument("name", metavar="NAME", choices=names.split("|"), help=names),
            argument("value", metavar="N", help="dbglevel: 0 (nothing) to 6 (everything); "
                     "dtcinterval: seconds, 0 never"))


_ADDR = (argument("addr", metavar="ADDR", help="the back end's, as its server line has it"),)
_BACKENDS = _number(int, 1, MOST_BACKENDS)
_DOCTOR = Command(
    "[-c FILE]", "checks this host and says what to do about each finding",
    (argument("-c", metavar="FILE", dest="file",
              help="the configuration (default: the one in /etc/tcpha)"),),
    "doctor -c tcphafe.conf")

COMMANDS: dict[str, dict[str, Command]] = {
    "fe": {
        "status": Command("", "state, workers, counters and back ends"),
        "servers": Command("", "back ends: state and why, connections"),
        "rules": Command("", "rules in order, and how many connections each has handed over"),
        "conns": Command("", "handed-over connections"),
        "top": Command(
            "[SECONDS [COUNT]]", "a live screen; q ends it",
            (argument("seconds", metavar="SECONDS", nargs="?", default=1.0,
                      type=_number(float, 0.1, 3600), help="between two screens (default: 1)"),
             argument("count", metavar="COUNT", nargs="?", default=0,
                      type=_number(int, 0, 10 ** 9), help="so many screens (default: until q)")),
            "fe top 0.5"),
        "stats": Command("", "times of the stages, slowest handoffs, control connections, events"),
        "test-request": Command(
            "METHOD TARGET [-H 'NAME: VALUE']... [--port N]",
            "which rule and back end a request would get, and why; sends nothing",
            (argument("method", metavar="METHOD", help="GET, POST, ..."),
             argument("target", metavar="TARGET", help="the request-target, as /a.jpg?size=2"),
             argument("-H", metavar="'NAME: VALUE'", dest="fields", action="append", default=[],
                      help="a header field; more than one may be given"),
             argument("--port", metavar="N", type=_number(int, 1, 65535), default=0,
                      help="of ours, at which it would come (default: the first one)")),
            "fe test-request GET /a.jpg -H 'Host: www.example.net'"),
        "doctor": _DOCTOR,
        "set": Command("dbglevel|dtcinterval N", "changes a level or interval at run time",
                       _set("dbglevel|dtcinterval"), "fe set dbglevel 3"),
        "reload": Command("", "takes the configuration's services, rules, servers and levels over"),
        "drain": Command("ADDR", "no new connections for a back end; the ones it has go on", _ADDR,
                         "fe drain 192.168.1.33"),
        "undrain": Command("ADDR", "takes that back", _ADDR, "fe undrain 192.168.1.33"),
        "unload": Command("",
                          "no new connections; stops with the last one; a second time: at once")},
    "be": {
        "status": Command("", "state, workers, counters and front ends"),
        "conns": Command("", "adopted connections"),
        "doctor": _DOCTOR,
        "set": Command("dbglevel N", "changes the level at run time", _set("dbglevel"),
                       "be set dbglevel 3"),
        "unload": Command("",
                          "adopts nothing more; stops with the last one; a second time: at once")},
    "lab": {
        "up": Command(
            "[BACKENDS]", "builds a cluster in network namespaces of this machine, to play",
            (argument("backends", metavar="BACKENDS", nargs="?", type=_BACKENDS, default=2,
                      help=f"how many back ends (default: 2; {MOST_BACKENDS} at most)"),
             argument("--backends", metavar="BACKENDS", type=_BACKENDS, dest="option",
                      help="the same")), "lab up 3"),
        "status": Command("", "says what it is and how to use it"),
        "down": Command("", "removes it")}}

ROLES = {"fe": "steers tcphafe, the front end of this host",
         "be": "steers tcphabe, the back end of this host",
         "lab": "a cluster on this machine to play with"}


def _listed(roles: list[str]) -> str:
    lines = []
    for role in roles:
        for name, command in COMMANDS[role].items():
            args, what = command.arguments, command.what
            lines.append(f"  {f'{role} {name} {args}'.rstrip():<46} {what}" if len(args) < 32 else
                         f"  {role} {name} {args}\n{'':49}{what}")
        lines.append("")
    return "commands:\n" + "\n".join(lines)


EPILOG = f"""{_listed(list(COMMANDS))}
examples:
  tcphactl fe servers                       are the back ends up?
  tcphactl fe test-request GET /a.jpg       who would serve this?
  tcphactl fe drain 192.168.1.33            before that host is serviced
  tcphactl --json fe status                 for programs
  tcphactl fe drain -h                      more about one command
  tcphactl doctor                           what is wrong on this host?

exit status: 0 done; 1 refused or failed (the reason is on stderr), for doctor: there is a fault;
2 wrong usage"""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _common(p: argparse.ArgumentParser, run_dir: bool = True, **default: Any) -> None:
    """Options that may stand before the command and behind it."""
    if run_dir:
        p.add_argument("--run-dir", metavar="DIR", type=Path, **default,
                       help=f"the daemon's run directory (default: {DEFAULT})")
    p.add_argument("--json", action="store_true", **default, help="print one JSON document")


def _parser() -> argparse.ArgumentParser:
    def parser(to: Any, name: str, **options: Any) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = to.add_parser(
            name, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
            **options)
        return added

    def of_command(to: Any, path: str, command: Command) -> None:
        lab = path.startswith("lab")
        p = parser(to, path.rpartition(" ")[2], description=_sentence(command.what),
                   prog=f"tcphactl {path}", usage=" ".join(filter(None, (
                       "tcphactl", path, command.arguments, "" if lab else "[--run-dir DIR]",
                       "[--json]"))),
                   epilog=f"example: tcphactl {command.example}" if command.example else None)
        for names, options in command.parsed:
            p.add_argument(*names, **options)
        _common(p, run_dir=not lab, default=argparse.SUPPRESS)

    top = argparse.ArgumentParser(
        prog="tcphactl", description="Look into and steer a running TCPHA daemon.", epilog=EPILOG,
        usage="tcphactl [-h] [-V] [--run-dir DIR] [--json] fe|be|lab COMMAND [ARG...]\n"
              "       tcphactl doctor [-c FILE]",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    _common(top)
    top.set_defaults(run_dir=DEFAULT)
    top.add_argument("-V", action="version", version=f"tcphactl {__version__}")
    roles = top.add_subparsers(dest="role", metavar="fe|be|lab|doctor", required=True,
                               help=argparse.SUPPRESS)
    for role, commands in COMMANDS.items():
        p = parser(roles, role, description=_sentence(ROLES[role]), epilog=_listed([role]),
                   prog=f"tcphactl {role}", usage=f"tcphactl {role} COMMAND [ARG...]\n"
                   f"       tcphactl {role} COMMAND -h")
        named = p.add_subparsers(dest="command", metavar="COMMAND", required=True,
                                 help=argparse.SUPPRESS)
        for name, command in commands.items():
            of_command(named, f"{role} {name}", command)
    of_command(roles, "doctor", _DOCTOR)
    return top


def main(argv: list[str] | None = None) -> None:
    with plain_ending("tcphactl"):
        _run(argv)


def _run(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    if args.role == "lab":
        from tcpha.lab import play
        backends = (args.option or args.backends) if args.command == "up" else 0
        sys.exit(play.main(args.command, backends, args.json))
    if args.role == "doctor" or args.command == "doctor":
        sys.exit(_doctor(None if args.role == "doctor" else args.role, args))
    socket = args.run_dir / f"tcpha{args.role}.sock"
    try:
        if args.command == "top":
            from tcpha.admin import top
            top.run(socket, args.seconds, args.count)
            return
        data = ask_for(socket, args.command, _words(args))
    except Refused as error:
        sys.exit(_say(str(error)))
    except NoAnswer as error:
        sys.exit(_say(f"no tcpha{args.role} answers at {socket} ({error.strerror or error}); is it "
                      "running with this --run-dir?"))
    try:
        _show(data, args.json)
    except Refused as error:
        sys.exit(_say(str(error)))


def _show(data: Any, as_json: bool) -> None:
    if not as_json:
        from tcpha.admin import console
        console.show(data)
    elif isinstance(data, Iterator):  # one document all the same
        print("[", end="")
        for n, row in enumerate(data):
            print(", " * bool(n), json.dumps(row), sep="", end="")
        print("]")
    else:
        print(json.dumps(data))


def _words(args: argparse.Namespace) -> list[str]:
    """The command's arguments as the daemon wants them."""
    if args.command == "test-request":
        return [*([f"port={args.port}"] if args.port else []), args.method, args.target,
                *args.fields]
    if args.command == "set":
        return [args.name, args.value]
    return [args.addr] if args.command in ("drain", "undrain") else []


def _doctor(role: str | None, args: argparse.Namespace) -> int:
    from tcpha.admin import console, doctor
    roles = [role] if role else doctor.roles(args.run_dir, args.file)
    if not roles:
        return _say("neither /etc/tcpha/tcphafe.conf nor tcphabe.conf is there; write 'tcphactl fe "
                    "doctor -c FILE' or 'tcphactl be doctor -c FILE'")
    findings = [f for r in roles for f in doctor.examine(r, args.file, args.run_dir)]
    if args.json:
        print(json.dumps(findings))
    else:
        console.show(findings)
    return 1 if any(f["state"] == "fault" for f in findings) else 0


def _say(text: str) -> int:
    print(f"tcphactl: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
