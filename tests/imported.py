"""Imports what a run imports on its way, for processes that are forked from one that has it."""

from __future__ import annotations

import importlib

from lorabooth.families.quiet import quiet_libraries

with quiet_libraries():
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import lorabooth.api
    import lorabooth.cli.train  # noqa: F401
for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "requests"):
    importlib.import_module(name)
