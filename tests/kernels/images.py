# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels of Debian's suites: fetched by apt, and made bootable over this machine's own root."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports")
CACHE = Path(os.environ.get("TCPHA_KERNELS") or Path(
    os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tcpha-kernels")
# neither -cloud, -rt, -dbg nor -unsigned
PACKAGE = re.compile(r"linux-(?:image|binary)-(\d[\d.]*(?:-\d+|\+[\w.]+)?-amd64)")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DAY = 86400.0
# what a kernel needs before it has a root: that, and the network of tests with several machines
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_net")
UNPACK = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-qdc"]}
INIT = Path(__file__).parent / "inside" / "init"


@dataclass(frozen=True)
class Kernel:
    """root holds vmlinuz, initrd and lib/modules."""

    version: str
    root: Path

    @property
    def number(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def short(self) -> str:
        return ".".join(map(str, self.number))


def run(*args: str, cwd: Path | None = None) -> str:
    done = subprocess.run(args, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def mirror() -> str:
    """Where this machine takes Debian's packages from."""
    for _ in range(2):
        for line in run("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)",
                        "Created-By: Packages").splitlines():
            label, _, uri = line.partition(" ")
            if label == "Debian":
                return uri
        run("apt-get", "-qq", "update")  # labels are known only then
    raise RuntimeError("kernels come from Debian's suites, and apt knows no mirror of Debian here")


class Suite:
    """A suite by itself: an apt that knows no other, nor what is installed here."""

    def __init__(self, name: str):
        self.name = name
        self.dir = CACHE / "apt" / name
        for part in ("lists/partial", "cache/archives/partial"):
            (self.dir / part).mkdir(parents=True, exist_ok=True)
        self.options = ["-o", f"Dir::Etc::sourcelist={self.dir}/list", "-o",
                        "Dir::Etc::sourceparts=-", "-o", f"Dir::State::lists={self.dir}/lists",
                        "-o", "Dir::State::status=/dev/null", "-o", f"Dir::Cache={self.dir}/cache",
                        "-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=root"]

    def update(self) -> None:
        """Once a day."""
        stamp = self.dir / "list"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < DAY:
            return
        stamp.unlink(missing_ok=True)
        fresh = self.dir / "list.new"
        signed = f" signed-by={KEYS}" if KEYS.exists() else ""
        fresh.write_text(f"deb [arch=amd64{signed}] {mirror()} {self.name} main\n")
        fresh.rename(stamp)
        try:
            run("apt-get", *self.options, "-qq", "update")
        except RuntimeError:
            stamp.unlink()
            raise

    def packages(self) -> tuple[str, list[str]]:
        """Its newest kernel, and the packages that make it."""
        names = run("apt-cache", *self.options, "pkgnames", "linux-").split()
        versions = {found[1] for name in names if (found := PACKAGE.fullmatch(name))}
        if not versions:
            raise RuntimeError(f"no kernel in {self.name}")
        newest = max(versions, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])
        split = f"linux-binary-{newest}" in names
        return newest, [f"linux-{part}-{newest}" for part in (
            ("binary", "modules") if split else ("image",))]

    def unpack(self, package: str, into: Path) -> None:
        """Download a package, and take what it holds. Nothing of it is run."""
        run("apt-get", *self.options, "-qq", "download", package, cwd=into)
        (deb,) = into.glob("*.deb")
        run("dpkg-deb", "--extract", str(deb), str(into / package))
        deb.unlink()
        merge(into / package, into)


def merge(source: Path, into: Path) -> None:
    """What a package holds of a kernel: its image, and its modules below lib."""
    for image in source.rglob("vmlinuz*"):
        if image.is_file() and not image.is_symlink():
            shutil.copyfile(image, into / "vmlinuz")
    for modules in (source / "lib/modules", source / "usr/lib/modules"):
        if modules.is_dir():
            shutil.copytree(modules, into / "lib/modules", symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(source)


def get(suite: str) -> Kernel:
    """The newest kernel of a suite, bootable; downloaded unless it is in the cache."""
    source = Suite(suite)
    source.update()
    version, packages = source.packages()
    kernel = cached(version)
    root = kernel.root
    if not (root / "vmlinuz").exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as made:
            into = Path(made) / version
            into.mkdir()
            for package in packages:
                source.unpack(package, into)
            run("depmod", "-b", str(into), version)
            shutil.rmtree(root, ignore_errors=True)
            into.rename(root)
    make_initrd(kernel)
    return kernel


def cached(version: str) -> Kernel:
    """What get() has got."""
    return Kernel(version, CACHE / "kernels" / version)


def wanted(kernel: Kernel) -> list[Path]:
    """MODULES and what those need, in the order of loading."""
    files: list[Path] = []
    for module in MODULES:
        done = subprocess.run(
            ["modprobe", "-d", str(kernel.root), "-S", kernel.version, "--show-depends", module],
            capture_output=True, text=True)  # it fails for what is built in, with some versions
        for line in done.stdout.splitlines():
            if line.startswith("insmod") and (path := Path(line.split()[1])) not in files:
                files.append(path)
    return files


def make_initrd(kernel: Kernel) -> None:
    """busybox, the modules that a root over 9p needs, and inside/init."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is missing"
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        for name in ("bin", "modules", "proc", "sys", "dev", "ro", "rw", "new"):
            (top / name).mkdir()
        shutil.copy(busybox, top / "bin")
        shutil.copy(INIT, top / "init")
        for n, module in enumerate(wanted(kernel)):
            with open(top / "modules" / f"{n:02}.ko", "wb") as out:
                subprocess.run([*UNPACK.get(module.suffix, ["cat"]), str(module)], stdout=out,
                               check=True)
        fresh = kernel.root / f"initrd.{os.getpid()}"
        with open(fresh, "wb") as out:
            names = subprocess.run(["find", "."], cwd=top, stdout=subprocess.PIPE, check=True)
            subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=top, input=names.stdout,
                           stdout=out, check=True)
        fresh.rename(kernel.root / "initrd")
