"""Keeps diffusers, transformers and the hub client silent while they load; what matters is said by us."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context: no progress bars, no log lines below ERROR, no FutureWarning from model libraries.

    Telemetry of the hub client is switched off for good, unless the user's environment says otherwise (it is
    read once, when the client is first imported). All else is put back when the context is left.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # bitsandbytes reports missing optional kernels at import; what works is `doctor`'s to say.
    loggers = [
        logging.getLogger(name) for name in ("diffusers", "transformers", "bitsandbytes", "huggingface_hub")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logger in loggers:  # importing the libraries set their own level
        logger.setLevel(logging.ERROR)
    bars = [(lib, lib.is_progress_bar_enabled()) for lib in (diffusers_logging, transformers_logging)]
    for lib, _ in bars:
        lib.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for lib, was_on in bars:
            if was_on:
                lib.enable_progress_bar()
