"""Loading and building a pipeline prints nothing, and leaves the libraries' settings as they were."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from lorabooth.families.quiet import quiet_libraries

LOAD = """
import sys, torch
from lorabooth.families import registry, source
found = source.resolve(sys.argv[1])
family = registry.family(found.family)
parts = family.load(found, torch.float32)
family.encode_prompts(parts, ["a dog " * 200])
family.count_tokens(parts, ["a dog " * 200])
family.pipeline(parts)("a dog", num_inference_steps=2, output_type="latent")
"""


def test_not_a_word_from_a_fresh_process(tiny_sd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tiny_sd)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_levels_and_bars_are_put_back() -> None:
    from diffusers.utils import logging as diffusers_logging

    logger = logging.getLogger("diffusers")
    before = logger.level, diffusers_logging.is_progress_bar_enabled()
    with quiet_libraries():
        assert logger.level == logging.ERROR
        assert not diffusers_logging.is_progress_bar_enabled()
    assert (logger.level, diffusers_logging.is_progress_bar_enabled()) == before
