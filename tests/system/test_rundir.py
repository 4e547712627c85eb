# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose run directory it is: what is in it is obeyed."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tcpha.daemon.rundir import RunDir, RunDirError
from tcpha.lab.bed import Cluster, Daemon, program
from tcpha.net.host import Host

NOBODY = 65534


@pytest.mark.parametrize("what, why", [
    ("directory", "belongs to user"), ("writable directory", "others can write"),
    ("link", "belongs to user"), ("journal", "belongs to user"),
    ("writable journal", "others can write"), ("link for a journal", "belongs to user"),
    ("in a directory", "belongs to user")])
def test_what_others_may_have_written_is_refused(tmp_path: Path, what: str, why: str) -> None:
    path = tmp_path / "run"
    path.mkdir()
    journal = path / "tcphafe.journal"
    if what == "link":
        path.rmdir()
        (tmp_path / "other").mkdir()
        path.symlink_to(tmp_path / "other")
    elif what == "link for a journal":
        journal.symlink_to("/etc/hosts")
    elif what == "in a directory":
        journal = path / "ktcphafe" / "unload"
        journal.parent.mkdir()
        journal.write_text("0\n")
    elif "journal" in what:
        journal.write_text("[]")
    place = path if what in ("directory", "writable directory", "link") else journal
    if "writable" in what:
        place.chmod(0o777)
    else:
        os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(RunDirError, match=why):
        RunDir(path, "tcphafe")


def test_what_is_ours_is_not(tmp_path: Path) -> None:
    """A directory that only others may read, and a link of our own."""
    (tmp_path / "run").mkdir(0o755)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "tcphafe.journal").write_text("[]")
    RunDir(tmp_path / "link", "tcphafe").close()


@pytest.mark.parametrize("name", ["{}", "../..{}", "net/../../..{}", "kernel/core_pattern"])
def test_a_journal_writes_to_no_other_file(tmp_path: Path, name: str,
                                           caplog: pytest.LogCaptureFixture) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    change = {"what": "sysctl", "name": name.format(victim), "old": before.strip()}
    (tmp_path / "tcphafe.journal").write_text(json.dumps([change]))
    host = Host(tmp_path / "tcphafe.journal")
    host.recover()
    host.settle()
    assert victim.read_text() == "untouched"
    assert host.undo == []
    assert "cannot undo" in caplog.text


def test_nobody_else_writes_what_is_ours() -> None:
    """Whatever umask we were started with."""
    c = Cluster(1, start=False)
    try:
        host = c.be_hosts[0]
        be = Daemon(host, "be", c.be_text(host))
        be.stop()
        host.run("sh", "-c", f"umask 0; exec {program('tcphabe')} -c {be.config} --run-dir "
                 f"{be.run_dir}")
        found = list(be.run_dir.rglob("*"))
        assert any(path.suffix == ".journal" for path in found)
        assert not [path for path in found if path.lstat().st_mode & 0o022]
        be.ctl("unload")
    finally:
        c.close()
