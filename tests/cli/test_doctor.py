"""Doctor tells facts that were proven, and nothing about whose machine it is."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

from typer.testing import CliRunner

from lorabooth.cli.app import app


def test_json_holds_proven_facts_and_no_personal_ones(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"]
    assert facts["devices"][-1]["kind"] == "cpu"
    assert facts["optimizers"]["adamw"] == ""
    assert set(facts["optimizers"]) == {"adamw", "adamw8bit", "paged_adamw8bit"}
    assert facts["attention"]["math"] == ""  # every device can do plain attention
    assert isinstance(facts["problems"], list)
    for private in (str(Path.home()), str(Path.cwd()), socket.gethostname(), "secretsecret"):
        assert private not in result.stdout
    user = getpass.getuser()
    assert f'"{user}"' not in result.stdout


def test_text_is_the_same_for_people() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for title in ("Versions", "Devices", "Optimizers, proven", "Attention, proven", "Problems"):
        assert title in result.stdout
    assert "math" in result.stdout
