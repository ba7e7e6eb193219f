"""Fixtures shared by all rooms: a tiny base of each kind and photos, made once a session. Read only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports a hub client: a test never goes to the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two test processes on two cores: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job, and so what it starts, ignores SIGINT: the tests that send it would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Timings never decide a test; the same examples every time.
settings.register_profile("lorabooth", deadline=None, derandomize=True)
settings.load_profile("lorabooth")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole programs first: they take longest, and a process that gets one last would end alone."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent != here)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1-shaped folder, epsilon prediction."""
    from tests.tiny import make_sd_folder

    return make_sd_folder(tmp_path_factory.mktemp("bases") / "tiny-sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD2-shaped folder, v-prediction."""
    from tests.tiny import make_sd_folder

    return make_sd_folder(
        tmp_path_factory.mktemp("bases") / "tiny-sd2", family="sd2", prediction="v_prediction"
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three photos of one object."""
    from tests.tiny import make_photos

    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL-shaped folder, epsilon prediction."""
    from tests.tiny_sdxl import make_sdxl_folder

    return make_sdxl_folder(tmp_path_factory.mktemp("bases") / "tiny-sdxl")
