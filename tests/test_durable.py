"""A file has the old or the new content, never a part."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorabooth import durable


def test_write_replace_and_sync(tmp_path):
    path = tmp_path / "a.txt"
    durable.write(path, b"one")
    durable.sync_file(path)
    assert path.read_bytes() == b"one"
    durable.replace(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_while_writing_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        durable.replace(path, b"new")
    assert path.read_bytes() == b"old"


def test_content_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("rename"), rename(self, to))[1])
    durable.replace(tmp_path / "a.txt", b"x")
    assert calls[:2] == ["fsync", "rename"]
