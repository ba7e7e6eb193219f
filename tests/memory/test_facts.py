"""Facts of the machine: complete, JSON, and nothing that identifies a person or a place."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from pathlib import Path

import pytest
import torch

from lorabooth.memory import facts


def test_versions_hold_the_installed_and_name_the_absent() -> None:
    versions = facts.versions()
    assert versions["torch"] == torch.__version__
    assert set(facts.PACKAGES) < set(versions)
    assert all(versions.values())


def test_device_facts_are_json_and_plausible() -> None:
    found = json.loads(json.dumps(facts.device_facts(torch.device("cpu"))))
    assert found["kind"] == "cpu"
    assert 0 < found["free_bytes"] <= found["total_bytes"]
    assert facts.devices()[-1].kind == "cpu"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True, "amx_bf16": False}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)],
)
def test_a_processor_says_whether_it_has_bf16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    if platform.machine() == "x86_64":
        assert {"avx512_bf16", "amx_bf16"} <= set(torch.cpu.get_capabilities())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert facts.describe_device("cpu").bf16 is expected


def test_nothing_private_is_told() -> None:
    text = json.dumps([facts.versions(), [facts.device_facts(d.kind) for d in facts.devices()]])
    private = {socket.gethostname(), str(Path.cwd()), str(Path.home()), os.environ.get("PATH", "/bin")}
    private |= {getpass.getuser()} if len(getpass.getuser()) > 4 else set()
    assert not [word for word in private if len(word) > 2 and word in text]


def test_a_cpu_build_beside_an_nvidia_driver_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a working GPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.mismatches() == []
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in facts.mismatches()[0]
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert "driver may be older" in facts.mismatches()[0]


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_80", "sm_86"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_cards_that_torch_has_no_kernels_for_are_named(
    capability: tuple[int, int], built_for: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A Card")
    assert (facts.mismatches() == []) == runs
