"""Predicted and measured peak memory of a run, down the ladder of techniques.

    python benchmarks/vram.py                     # predictions, and measurements where there is a GPU
    python benchmarks/vram.py --base sd21 --resolution 768

SD1.5 by its published architecture, 512 px, rank 16 on attention, one subject and one class example a step
(prior preservation), for a CUDA card with native bf16. Predicted is what torch's allocator should report as
its maximum in that phase (`torch.cuda.max_memory_allocated`); the CUDA context comes on top. Where there is a
GPU, each row is trained for some steps with random weights of that architecture, in a process of its own, and
its maximum, its step time and the miss of the prediction are written beside; elsewhere "not measured".
So are the phases that draw and encode, with the techniques for them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.facts import machine_facts  # noqa: E402
from benchmarks.published import write_config_folder  # noqa: E402
from benchmarks.training_recipe import own_class_images, write_recipe  # noqa: E402

NOT_MEASURED = "not measured"
_SETTLING = 3
_ALL: Mapping[str, object] = MappingProxyType({"memory.checkpointing": True})
_NF4 = {**_ALL, "memory.base_precision": "nf4"}
# Name -> overrides; each row holds all that it needs, so that rows can be run alone.
ROWS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "bf16": {},
        "checkpointing, 2 blocks": {**_ALL, "memory.checkpoint_blocks": 2},
        "checkpointing, 4 blocks": {**_ALL, "memory.checkpoint_blocks": 4},
        "checkpointing, 8 blocks": {**_ALL, "memory.checkpoint_blocks": 8},
        "checkpointing, all blocks": _ALL,
        "+ 8-bit optimizer": {**_ALL, "optim.name": "adamw8bit"},
        "+ int8 base": {**_ALL, "memory.base_precision": "int8"},
        "+ fp8 base": {**_ALL, "memory.base_precision": "fp8"},
        "+ nf4 base": _NF4,
        "+ nf4 base, offload": {**_NF4, "memory.checkpoint_offload": True},
        "+ nf4 base, offload, streamed": {
            **_NF4,
            "memory.checkpoint_offload": True,
            "memory.stream": True,
        },
        "hollow": {"memory.hollow": True},
    }
)
# Likewise of the phases that draw and encode.
DRAWING: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "8 images at once": {},
        "one part at a time": {"memory.in_turn": True},
        "1 image at once": {"memory.images_at_once": 1},
        "1 image at once, in turn": {"memory.images_at_once": 1, "memory.in_turn": True},
        "VAE tiling": {"memory.vae_tiling": True},
        "streamed": {**_ALL, "memory.stream": True},
        "1 image at once, in turn, VAE tiling, streamed": {
            **_ALL,
            "memory.images_at_once": 1,
            "memory.in_turn": True,
            "memory.vae_tiling": True,
            "memory.stream": True,
        },
    }
)
DRAWING_PHASES = ("class images", "caching", "previews")
_DRAWS: Mapping[str, object] = MappingProxyType(
    {
        "prior.mode": "generated",
        "prior.images": "",
        "prior.count": 8,
        "prior.sampler_steps": 4,
        "optim.steps": 1,
        "run.sample_count": 4,
    }
)
TRAIN = """
import json, sys
from pathlib import Path
import lorabooth
from lorabooth.recipe import load
result = lorabooth.train(load(Path(sys.argv[1]), sys.argv[3:]), out=Path(sys.argv[2]))
"""


def predicted(
    base: Path, recipe: Path, overrides: Sequence[str], phases: Sequence[str] = ("training",)
) -> dict[str, dict[str, Any]]:
    """Phase -> its forecast, in bytes; the context apart."""
    from lorabooth.families import registry
    from lorabooth.families.source import resolve
    from lorabooth.planning.budget import GIB, card
    from lorabooth.planning.forecast import Forecaster
    from lorabooth.recipe import load

    source = resolve(str(base), configs_only=True)
    began_s = time.perf_counter()
    found = Forecaster()(
        load(recipe, overrides),
        source,
        registry.family(source.family),
        card(24 * GIB),
        phases=phases,
    )
    took_s = round(time.perf_counter() - began_s, 2)
    return {
        phase.name: {
            "allocated_bytes": phase.allocated_bytes,
            "at_peak_bytes": dict(phase.usage.at_peak),
            "seconds_to_predict": took_s,
        }
        for phase in found.phases
        if phase.name in phases
    }


def measured(work: Path, recipe: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The same recipe run on the GPU of this machine: the allocator's maxima, and the step's median."""
    out = work / f"run-{name.replace(' ', '-').replace(',', '')}"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(recipe), str(out), *overrides],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps_s = [json.loads(line)["step_s"] for line in lines][_SETTLING:]
    return {
        "allocated_bytes": facts["peak_memory_by_phase_bytes"],
        "step_s": statistics.median(steps_s) if steps_s else None,
    }


def main() -> None:
    """Predict, measure where that can be done, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", choices=("sd15", "sd21"), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=13, help="of each measured row; three are left out")
    names = [*ROWS, *DRAWING]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vram.json")
    args = parser.parse_args()
    import torch

    has_gpu = torch.cuda.is_available()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        recipe = _prepare(work, args, whole=has_gpu)
        for name in args.rows:
            draws = name in DRAWING
            settings = {**_DRAWS, **DRAWING[name]} if draws else ROWS[name]
            overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            phases = DRAWING_PHASES if draws else ("training",)
            row: dict[str, Any] = {
                "set": overrides,
                "predicted": predicted(work / "model", recipe, overrides, phases),
                "measured": measured(work, recipe, name, overrides) if has_gpu else NOT_MEASURED,
            }
            rows[name] = row
            print("\n".join(_lines(name, row)), file=sys.stderr, flush=True)
    result = {
        "what": __doc__.splitlines()[0],
        "machine": machine_facts(),
        "base": args.base,
        "resolution_px": args.resolution,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lines = [line for name, row in rows.items() for line in _lines(name, row)]
    print("\n".join([_HEADER, *lines, f"\nwritten to {args.out}"]))


def _prepare(work: Path, args: argparse.Namespace, *, whole: bool) -> Path:
    """Base, photos, class images and a recipe; the base with weights only where it is trained."""
    from benchmarks.model_folder import make_class_images, make_photos, make_published_folder

    make_photos(work / "photos", 5, args.resolution)
    make_class_images(work / "class", 10, args.resolution)
    if whole:
        import torch

        make_published_folder(work / "model", args.base, dtype=torch.float16)
    else:
        write_config_folder(work / "model", args.base)
    settings: dict[str, object] = {
        **own_class_images(work / "class"),
        "adapter.rank": 16,
        "optim.steps": args.steps,
        "images.resolution": args.resolution,
    }
    return write_recipe(work / "recipe.toml", work / "model", work / "photos", settings)


_HEADER = f"{'with':<46} {'in':<12} {'predicted':>10} {'measured':>13} {'miss':>7} {'step':>9}"


def _lines(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    found = row["measured"]
    for phase, told in row["predicted"].items():
        wanted = told["allocated_bytes"]
        begin = f"{name:<46} {phase:<12} {wanted / 2**30:>6.2f} GiB"
        if not isinstance(found, dict) or "failed" in found:
            yield f"{begin} {found if isinstance(found, str) else 'failed':>13}"
            continue
        real = found["allocated_bytes"][phase]
        step = f"{found['step_s']:>7.3f} s" if phase == "training" else ""
        yield f"{begin} {real / 2**30:>9.2f} GiB {wanted / real - 1:>+7.1%} {step}"


if __name__ == "__main__":
    main()
