# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine: another kernel over this machine's root, and a way to run commands in it."""
from __future__ import annotations

import ctypes
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernels.images import Kernel

INSIDE = Path(__file__).parent / "inside"
BOOT = 240.0  # seconds; a slow machine with others on it
GRACE = 60.0  # for an answer, after a command's time is over
PR_SET_PDEATHSIG = 1


def die_with(number: int) -> Callable[[], object]:
    """For a child: be sent this signal when the parent ends, however that does."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, number)


class Lost(Exception):
    """The machine does not answer."""



class Machine:
    """name: of its files in logs, what its console said among them. tap: a device in the network
    namespace ns that becomes its eth0."""

    def __init__(self, kernel: Kernel, name: str, logs: Path, cpus: int = 1, memory: int = 3000,
                 ns: str = "", tap: str = "", mac: str = ""):
        self.kernel, self.name = kernel, name
        self.console = logs / f"{name}.console"
        self.dir = tempfile.TemporaryDirectory(prefix="tcpha-vm-")
        self.born = time.monotonic()
        paths = {what: f"{self.dir.name}/{what}" for what in ("agent", "monitor")}
        network = ["-netdev", f"tap,id=eth0,ifname={tap},script=no,downscript=no", "-device",
                   f"virtio-net-pci,netdev=eth0,mac={mac},mrg_rxbuf=on,romfile="] if tap else []
        # stock kernels hang with nested KVM, and emulation is the same everywhere
        self.process = subprocess.Popen(
            [*(["nsenter", f"--net=/run/netns/{ns}"] if ns else []), "qemu-system-x86_64",
             "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off", "-smp", str(cpus),
             "-m", str(memory), "-display", "none", "-nodefaults", "-no-reboot",
             "-serial", f"file:{self.console}",
             "-serial", f"unix:{paths['agent']},server=on,wait=off",
             "-qmp", f"unix:{paths['monitor']},server=on,wait=off",
             "-kernel", str(kernel.root / "vmlinuz"), "-initrd", str(kernel.root / "initrd"),
             "-append", "console=ttyS0 quiet panic=-1 mitigations=off "
             f"modules={kernel.root}/lib/modules/{kernel.version} python={sys.executable} "
             f"next={INSIDE}/start",
             "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,"
             "multidevs=remap", *network],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=die_with(signal.SIGKILL))
        try:
            self.agent = self._connect(paths["agent"])
            self.monitor = self._connect(paths["monitor"])
            self._ask(self.monitor, "qmp_capabilities", GRACE)
            self.pending = b""
            self._answer(BOOT)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self, path: str) -> socket.socket:
        """QEMU makes its sockets before it runs the machine."""
        end = time.monotonic() + GRACE
        while True:
            s = socket.socket(socket.AF_UNIX)
            try:
                s.connect(path)
                return s
            except OSError as error:
                s.close()
                if self.process.poll() is not None:
                    assert self.process.stderr
                    raise Lost(f"{self.name}: {self.process.stderr.read()}") from None
                if time.monotonic() > end:
                    raise Lost(f"{self.name}: {error}") from None
            time.sleep(0.02)

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The agent's next line."""
        self.agent.settimeout(seconds)
        while b"\n" not in self.pending:
            try:
                piece = self.agent.recv(1 << 16)
            except TimeoutError:
                piece = b""
            if not piece:
                raise Lost(f"{self.name} (Linux {self.kernel.version}) does not answer; its "
                           f"console: {self.console}")
            self.pending += piece
        line, _, self.pending = self.pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, *command: str, stdin: str = "", seconds: float = 120.0,
            check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as root and wait for it."""
        request = {"command": command, "stdin": stdin, "seconds": seconds}
        self.agent.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answer(seconds + GRACE)
        done = subprocess.CompletedProcess(command, answer["status"], answer["out"], answer["err"])
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: exit {done.returncode}\n"
                               f"{done.stdout}{done.stderr}")
        return done

    def _ask(self, monitor: socket.socket, command: str, seconds: float) -> None:
        monitor.settimeout(seconds)
        monitor.sendall(json.dumps({"execute": command}).encode() + b"\n")
        said = b""
        while b'"return"' not in said:  # greeting and events come between
            piece = monitor.recv(1 << 16)
            if not piece:
                raise Lost(f"{self.name}: {said.decode()}")
            said += piece

    def pause(self, paused: bool) -> None:
        """Stop its processors, and with them its clock."""
        self._ask(self.monitor, "stop" if paused else "cont", GRACE)

    def close(self) -> None:
        """Pull the plug: nothing in it lasts."""
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        for name in ("agent", "monitor"):
            if hasattr(self, name):
                getattr(self, name).close()
        self.dir.cleanup()
