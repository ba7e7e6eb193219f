"""torch.compile of a denoiser's repeated blocks, and whether it pays.

Regional: only the blocks that a model repeats are compiled (diffusers names their classes), so that one
compilation serves all blocks of a shape and takes seconds rather than minutes. What inductor makes is kept
between runs in its own cache. Rounding differs from eager steps in the last bits.

A compiler may make a step slower, on CPUs above all. So "auto" measures: some steps as they are, then, if
what is left of the run could pay for it, some compiled ones; and it goes back if they are not faster.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lorabooth import durable
from lorabooth.data.cache import default_root
from lorabooth.errors import RecipeError
from lorabooth.memory.units import Call
from lorabooth.progress import Reporter
from lorabooth.recipe import SpeedSection

MEASURED_STEPS = 5
"""Steps whose median is a step's time."""
SETTLING_STEPS = 2
"""Steps before those: allocators and caches fill."""
HOPED_GAIN = 0.2
"""Share of a step's time that compiling is taken to save, to decide on a try, where nothing was measured."""
FIRST_COMPILE_S = 45.0
"""What compiling is taken to cost where nothing was measured yet."""
_WORTH = 0.97
"""Compiled steps must be below this share of an eager step's time: less is noise."""
_RECOMPILES = 64
"""A block's code is compiled once for each shape, and with the adapter off (previews, distillation) again."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a compiled run measured, for the next one.

    Attributes:
        eager_step_s: median seconds of a step.
        compiled_step_s: likewise, compiled.
        compile_s: seconds of compiling.
    """

    eager_step_s: float
    compiled_step_s: float
    compile_s: float


class Blocks:
    """The repeated blocks of a denoiser, whose forward is compiled or as it was.

    Args:
        denoiser: a diffusers model.
        cache: folder for what is compiled.
    """

    def __init__(self, denoiser: nn.Module, cache: Path) -> None:
        names = getattr(denoiser, "_repeated_blocks", None) or ()
        self._blocks: list[Any] = [m for m in denoiser.modules() if type(m).__name__ in names]
        self._cache = cache
        self._plain: list[tuple[Any, str, Any]] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def on(self) -> None:
        """Compile: at the first call of each shape."""
        if self._plain:
            return
        # Read by inductor when it is first used; a user's own choice stands.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self._cache))
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _RECOMPILES)
        for block in self._blocks:
            # A unit that is recomputed or streamed keeps that around its compiled inside.
            call = vars(block).get("forward")
            owner, name = (call, "plain") if isinstance(call, Call) else (block, "forward")
            plain = getattr(owner, name)
            self._plain.append((owner, name, plain))
            setattr(owner, name, torch.compile(plain, dynamic=False))

    def off(self) -> None:
        """As before."""
        for owner, name, plain in self._plain:
            if owner in self._blocks:
                delattr(owner, name)
            else:
                setattr(owner, name, plain)
        self._plain = []


class Pace:
    """Switches compiled blocks by the recipe, and by how long steps take. Called after every step.

    Args:
        mode: of the recipe.
        blocks: of the denoiser.
        attempt: one forward and backward pass that leaves nothing behind; compiles what is to be compiled.
        memory: where `Timing` is kept; None keeps none.
        reporter: hears of the choice.
        clock: seconds.
        unit: what is timed, for messages.
        settling: of these, the first so many are not counted.
        measured: then so many are timed.
    """

    def __init__(
        self,
        mode: Literal["on", "auto"],
        blocks: Blocks,
        attempt: Callable[[], object],
        *,
        memory: TimingFile | None,
        reporter: Reporter,
        clock: Callable[[], float] = time.perf_counter,
        unit: str = "step",
        settling: int = SETTLING_STEPS,
        measured: int = MEASURED_STEPS,
    ) -> None:
        self._blocks, self._attempt, self._memory = blocks, attempt, memory
        self._reporter, self._clock, self._unit = reporter, clock, unit
        self._settling, self._measured = settling, measured
        self._seconds: list[float] = []
        self._eager_s: float | None = None
        self._compile_s: float | None = None
        self._decided = mode == "on"
        self.facts: dict[str, object] = {"compile": "off", "reason": "not decided: the run was too short"}
        if mode == "on":
            self._compile()
            self._say("on", "as the recipe says")

    def __call__(self, done: int, stop: int, seconds: float) -> None:
        """A step is done.

        Args:
            done: finished steps.
            stop: steps of the whole run.
            seconds: of the last one.
        """
        if self._decided:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < self._settling + self._measured:
            return
        median_s = statistics.median(self._seconds[self._settling :])
        self._seconds = []
        if self._eager_s is None:
            self._eager_s = median_s
            self._begin(stop - done)
        else:
            self._end(self._eager_s, median_s)

    def _begin(self, left: int) -> None:
        """Try it, or say why not."""
        eager_s = self._eager_s or 0.0
        known = self._memory.read() if self._memory is not None else None
        if known is not None and known.compiled_step_s > _WORTH * known.eager_step_s:
            self._finish(
                "off",
                f"an earlier run measured {known.compiled_step_s:.3g} s compiled, "
                f"{known.eager_step_s:.3g} s as it is",
            )
            return
        gain = HOPED_GAIN if known is None else 1 - known.compiled_step_s / known.eager_step_s
        cost_s = FIRST_COMPILE_S if known is None else known.compile_s
        if left * eager_s * gain <= cost_s:
            self._finish(
                "off",
                f"the {left} {self._unit}s that are left take about {left * eager_s:.0f} s: a gain of "
                f"{gain:.0%} would not pay for compiling ({cost_s:.0f} s)",
            )
            return
        try:
            self._compile()
        except RecipeError as error:
            self._blocks.off()
            self._finish("off", error.what)

    def _end(self, eager_s: float, compiled_s: float) -> None:
        """Keep what is faster."""
        compile_s = self._compile_s or 0.0
        if self._memory is not None:
            self._memory.write(Timing(eager_s, compiled_s, compile_s))
        measured = f"a {self._unit} takes {compiled_s:.3g} s compiled and {eager_s:.3g} s as it is"
        if compiled_s > _WORTH * eager_s:
            self._blocks.off()
            self._finish("off", measured)
        else:
            paid = compile_s / (eager_s - compiled_s)
            self._finish(
                "on", f"{measured}; compiling took {compile_s:.0f} s, paid by {paid:.0f} {self._unit}s"
            )
        self.facts |= {"eager_s": eager_s, "compiled_s": compiled_s}

    def _compile(self) -> None:
        """Compile now, by one pass that leaves nothing behind.

        Raises:
            RecipeError: it cannot be compiled.
        """
        began_s = self._clock()
        self._blocks.on()
        try:
            self._attempt()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError) as error:
            self._blocks.off()
            raise _cannot(error) from error
        self._compile_s = self._clock() - began_s

    def _finish(self, state: str, reason: str) -> None:
        self._decided = True
        self._say(state, reason)

    def _say(self, state: str, reason: str) -> None:
        self.facts = {"compile": state, "reason": reason, "compile_s": self._compile_s}
        self._reporter.say(f"speed.compile: {state}: {reason}")


@dataclass(frozen=True)
class TimingFile:
    """A `Timing` in a small file, found by all that decides it.

    Attributes:
        path: of the file.
    """

    path: Path

    @classmethod
    def of(cls, folder: Path, facts: Mapping[str, object]) -> TimingFile:
        """The file for these facts: base, shapes, precision, techniques, device, versions."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return cls(folder / f"timing-{digest[:16]}.json")

    def read(self) -> Timing | None:
        """What is known; None if nothing is, or the file is no such thing."""
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            timing = Timing(**{key: float(value) for key, value in raw.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return timing if min(timing.eager_step_s, timing.compiled_step_s) > 0 else None

    def write(self, timing: Timing) -> None:
        """Keep it; where that cannot be, nothing is lost but the next run's knowledge."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(self.path, (json.dumps(asdict(timing)) + "\n").encode())
        except OSError:
            return


def compile_cache() -> Path:
    """Folder for what is compiled, shared by runs."""
    return default_root() / "compiled"


def require_speed(speed: SpeedSection, device: torch.device) -> None:
    """What a recipe's [speed] asks for can be done on this device.

    Raises:
        RecipeError: it cannot; what is missing, and what to do.
    """
    if speed.cuda_graph and device.type != "cuda":
        raise RecipeError(
            f"speed.cuda_graph = true needs a CUDA GPU, and this run is on {device.type}.",
            "Set speed.cuda_graph = false.",
        )
    # With "auto" whatever does not work is a reason not to; with "on" the user wants to know now.
    if speed.compile == "on":
        require_compiler(device, compile_cache())


def require_compiler(device: torch.device, cache: Path) -> None:
    """Prove, by a small function, that something can be compiled for a device here.

    Raises:
        RecipeError: no compiler, no triton, no headers, ...: what torch says.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    x = torch.linspace(0, 1, 64, device=device)
    try:
        made = torch.compile(_small)(x)
    except (RuntimeError, OSError, ImportError) as error:
        raise _cannot(error) from error
    if not torch.allclose(made, _small(x), atol=1e-5):
        raise RecipeError("speed.compile: a compiled function computes wrong numbers here.", _FIX)


_FIX = 'Set speed.compile = "off"; to compile, torch needs a C++ compiler on a CPU and triton on a GPU.'


def _small(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) * 2 + x.cos()


def _cannot(error: BaseException) -> RecipeError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RecipeError(
        f"speed.compile: torch cannot compile here ({(lines or [type(error).__name__])[0][:200]}).", _FIX
    )
