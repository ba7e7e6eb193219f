"""Secrets: what is taken out of a text, and that a run leaves none anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from lorabooth.secrets import HIDDEN, VARIABLES, redact

# Made up, of the shapes that real ones have.
PLANTED = {
    "HF_TOKEN": "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi",
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "ZyXwVuTsRqPoNmLkJiHgFeDcBaZyXwVuTs",
    "HUGGINGFACE_TOKEN": "an-older+token/of=another shape",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
# In a message, and in nobody's environment.
FOREIGN = "hf_" + "StRaNgErStRaNgErStRaNgErStRaNgErAb"


@pytest.fixture
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def test_all_that_are_planted_are_known() -> None:
    assert set(PLANTED) == set(VARIABLES)


@pytest.mark.usefixtures("_planted")
@pytest.mark.parametrize("value", PLANTED.values())
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "the token {} is refused",
        "https://user:{}@huggingface.co/x",
        "https://{}@huggingface.co/x",
        "401 for https://huggingface.co/api?a=1&token={}&b=2",
        "{{'authorization': 'Bearer {}'}}",
        "a\nb={}\nc={}",
        "x{}y",
    ],
)
def test_known_secrets_go_and_the_rest_stays(text: str, value: str) -> None:
    for spelled in (value, quote(value, safe="")):
        found = redact(text.format(spelled, spelled))
        assert value not in found
        assert quote(value, safe="") not in found
        assert HIDDEN in found
        for word in text.replace("{{", "{").replace("}}", "}").split("{}"):
            assert word in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"no entry for {FOREIGN}.", "no entry for ***."),
        (f"https://{FOREIGN}@huggingface.co/a", "https://***@huggingface.co/a"),
        (f"https://me:{FOREIGN}@huggingface.co/a", "https://me:***@huggingface.co/a"),
        ("https://me:pa55@host:80/a", "https://me:***@host:80/a"),
        ("https://civitai.com/api/1?token=abc123&x=1", "https://civitai.com/api/1?token=***&x=1"),
        ("Authorization: Bearer abc.def-12345", "Authorization: Bearer ***"),
        ("wandb_v1_abcdefghij0123456789", "***"),
    ],
)
def test_what_looks_like_a_secret_goes(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download failed for hf_transfer and hf-internal-testing/tiny",
        "https://huggingface.co:443/a/b@main?download=true",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "a token like sks, and someone@example.com",
        "C:\\models\\hf_models\\x.safetensors, ratio 3:4@2",
        "",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_value_too_short_to_be_a_secret_takes_no_text_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", " ", "1", "true"):
        monkeypatch.setenv("HF_TOKEN", value)
        assert redact("true: 11 of 1 1") == "true: 11 of 1 1"


def test_a_secret_that_holds_another_goes_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abcdefgh")
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh-12345678")
    assert redact("x abcdefgh-12345678 abcdefgh") == "x *** ***"


# ---- a run, as a user starts it ----


def _forms(value: str) -> Iterator[bytes]:
    yield value.encode()
    yield quote(value, safe="").encode()
    yield value.encode("utf-16-le")


def _holding(folder: Path) -> list[str]:
    """Every file, and every name of one, that holds a planted secret."""
    secrets = [form for value in (*PLANTED.values(), FOREIGN) for form in _forms(value)]
    found = []
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder)).encode()
        content = path.read_bytes() if path.is_file() else b""
        found += [str(path) for secret in secrets if secret in content or secret in name]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


def _run(home: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """With planted secrets, and all that is written by default below `home`."""
    places = {"HOME", "USERPROFILE", "XDG_CACHE_HOME", "HF_HOME", "LOCALAPPDATA", "MPLCONFIGDIR", "TMPDIR"}
    environment = {**os.environ, **PLANTED, **{name: str(home / "user") for name in places}}
    (home / "user").mkdir(exist_ok=True)
    name = f"output-{len(list(home.glob('output-*')))}"
    done = subprocess.run(
        [sys.executable, "-m", "lorabooth", *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        check=False,
    )
    (home / f"{name}.txt").write_bytes(done.stdout + b"\n" + done.stderr)
    return done


@pytest.fixture(scope="module")
def quick(tiny_sd: Path, photos: Path) -> list[str]:
    settings = ("prior.count=2", "prior.sampler_steps=1", "images.resolution=32", "run.sample_count=1")
    given = [word for setting in settings for word in ("--set", setting)]
    return ["--base", str(tiny_sd), "--images", str(photos), "--noun", "dog", "--steps", "2", *given]


def test_a_good_run_leaves_no_secret(home: Path, quick: list[str]) -> None:
    done = _run(home, "train", *quick, "--out", "good")
    assert done.returncode == 0, done.stderr
    assert (home / "good" / "adapter.safetensors").is_file()
    assert (home / "good" / "report.html").is_file()
    assert any((home / "user").rglob("*.safetensors")), "the cache is not where it is looked for"
    assert _holding(home) == []


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_failing_runs_tell_no_secret(home: Path, quick: list[str], debug: list[str]) -> None:
    # A base that is written as a URL with tokens in it: the message repeats it.
    url = f"https://{FOREIGN}:{PLANTED['HF_TOKEN']}@huggingface.co/{PLANTED['WANDB_API_KEY']}/some/model"
    done = _run(home, *debug, "train", *quick, "--out", "bad", "--set", f"model.base='{url}'")
    assert done.returncode != 0
    assert b"@huggingface.co/***/some/model" in done.stderr
    assert (b"Traceback" in done.stderr) == bool(debug)
    assert _holding(home) == []


@pytest.mark.slow
def test_debugging_a_good_run_tells_no_secret(home: Path, quick: list[str]) -> None:
    done = _run(home, "--debug", "train", *quick, "--out", "debugged")
    assert done.returncode == 0, done.stderr
    assert _holding(home) == []


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0" + PLANTED["WANDB_API_KEY"].encode("utf-16-le"))
    (tmp_path / "b").write_text(f"https://x/?t={quote(PLANTED['HUGGINGFACE_TOKEN'], safe='')}")
    (tmp_path / PLANTED["HF_TOKEN"]).touch()
    assert {Path(path).name for path in _holding(tmp_path)} == {"a", "b", PLANTED["HF_TOKEN"]}
