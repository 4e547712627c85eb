# SPDX-License-Identifier: GPL-2.0-or-later
"""The tcphactl command."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tcpha import __version__
from tcpha.admin.rundir import DEFAULT
from tcpha.admin.server import Refused, ask

# role: {command: (arguments, what it does)}; a last argument "..." stands for any number
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "fe": {
        "status": ("", "state, workers, counters and back ends"),
        "servers": ("", "back ends: state and why, connections"),
        "rules": ("", "rules in order, and how many connections each has handed over"),
        "conns": ("", "handed-over connections"),
        "top": ("[SECONDS [COUNT]]", "a live screen; q ends it"),
        "stats": ("", "times of the stages, slowest handoffs, control connections, events"),
        "test-request": ("METHOD TARGET [-H 'NAME: VALUE']...",
                         "which rule and back end a request would get, and why; sends nothing"),
        "doctor": ("[-c FILE]", "checks this host and says what to do about each finding"),
        "set": ("dbglevel|dtcinterval N", "changes a level or interval at run time"),
        "reload": ("", "takes rules, servers and levels of the configuration over"),
        "drain": ("ADDR", "no new connections for a back end; the ones it has go on"),
        "undrain": ("ADDR", "takes that back"),
        "unload": ("", "no new connections; stops with the last one; a second time: at once")},
    "be": {
        "status": ("", "state, workers, counters and front ends"),
        "conns": ("", "adopted connections"),
        "doctor": ("[-c FILE]", "checks this host and says what to do about each finding"),
        "set": ("dbglevel N", "changes the level at run time"),
        "unload": ("", "adopts nothing more; stops with the last one; a second time: at once")},
    "lab": {
        "up": ("[BACKENDS]", "builds a cluster in network namespaces of this machine, to play"),
        "status": ("", "says what it is and how to use it"),
        "down": ("", "removes it")}}


def _commands() -> str:
    lines = []
    for role, commands in COMMANDS.items():
        for name, (args, what) in commands.items():
            lines.append(f"  {f'{role} {name} {args}'.rstrip():<46} {what}" if len(args) < 32 else
                         f"  {role} {name} {args}\n{'':49}{what}")
        lines.append("")
    return "\n".join(lines)


EPILOG = f"""commands:
{_commands()}
examples:
  tcphactl fe servers                       are the back ends up?
  tcphactl fe test-request GET /a.jpg       who would serve this?
  tcphactl fe drain 192.168.1.33            before that host is serviced
  tcphactl --json fe status                 for programs
  tcphactl doctor                           what is wrong on this host?

exit status: 0 done; 1 refused or failed (the reason is on stderr), for doctor: there is a fault;
2 wrong usage"""


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="tcphactl", description="Look into and steer a running TCPHA "
                                "daemon.", epilog=EPILOG,
                                usage="tcphactl [-h] [-V] [--run-dir DIR] [--json] fe|be|lab "
                                      "COMMAND [ARG...]\n       tcphactl doctor [-c FILE]",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run-dir", metavar="DIR", type=Path, default=DEFAULT,
                   help="the daemon's run directory (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("-V", action="version", version=f"tcphactl {__version__}")
    p.add_argument("role", choices=[*COMMANDS, "doctor"], help=argparse.SUPPRESS)
    p.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.role == "doctor":
        sys.exit(_doctor(p, None, args, args.words))
    known = COMMANDS[args.role]
    if not args.words or args.words[0] not in known:
        said = f"unknown command '{args.words[0]}'" if args.words else "a command is missing"
        p.error(f"{said} for {args.role}; choose from {', '.join(known)}")
    command, *words = args.words
    if "--json" in words:  # where people write it, too
        words.remove("--json")
        args.json = True
    usage = f"usage: tcphactl {args.role} {command} {known[command][0]}".rstrip()
    if args.role == "lab":
        from tcpha.lab import play
        sys.exit(play.main(command, words, args.json, lambda: p.error(usage)))
    if command == "doctor":
        sys.exit(_doctor(p, args.role, args, words))
    if command == "test-request":
        words = _request(words) or p.error(usage)
    elif command != "top" and len(words) != len(known[command][0].split()):
        p.error(usage)
    socket = args.run_dir / f"tcpha{args.role}.sock"
    try:
        if command == "top":
            _top(p, socket, words, usage)
            return
        data = ask(socket, command, words)
    except Refused as error:
        sys.exit(_say(str(error)))
    except OSError as error:
        sys.exit(_say(f"no tcpha{args.role} answers at {socket} ({error.strerror or error}); is it "
                      "running with this --run-dir?"))
    if args.json:
        print(json.dumps(data))
    else:
        from tcpha.admin import console
        console.show(data)


def _request(words: list[str]) -> list[str]:
    """METHOD TARGET [-H FIELD]... as the daemon wants it; [] if that is not what it is."""
    p = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    p.add_argument("method")
    p.add_argument("target")
    p.add_argument("-H", action="append", default=[], dest="fields")
    try:
        args, rest = p.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit):
        return []
    return [] if rest else [args.method, args.target, *args.fields]


def _top(p: argparse.ArgumentParser, socket: Path, words: list[str], usage: str) -> None:
    try:
        interval = float(words[0]) if words else 1.0
        count = int(words[1]) if len(words) > 1 else 0
    except ValueError:
        p.error(usage)
    if len(words) > 2 or not 0.1 <= interval <= 3600 or count < 0:
        p.error(usage)
    from tcpha.admin import top
    top.run(socket, interval, count)


def _doctor(p: argparse.ArgumentParser, role: str | None, args: argparse.Namespace,
            words: list[str]) -> int:
    from tcpha.admin import console, doctor
    if words not in ([], words[:2]) or (words and words[0] != "-c") or len(words) == 1:
        p.error("usage: tcphactl [fe|be] doctor [-c FILE]")
    file = words[1] if words else None
    roles = [role] if role else doctor.roles(args.run_dir, file)
    if not roles:
        return _say("neither /etc/tcpha/tcphafe.conf nor tcphabe.conf is there; write 'tcphactl fe "
                    "doctor -c FILE' or 'tcphactl be doctor -c FILE'")
    findings = [f for r in roles for f in doctor.examine(r, file, args.run_dir)]
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
