"""Predicted and measured peak memory of a run, down the ladder of techniques.

    python benchmarks/vram.py                     # predictions, and measurements where there is a GPU
    python benchmarks/vram.py --base sd21 --resolution 768

SD1.5 by its published architecture, 512 px, rank 16 on attention, one subject and one class example a step
(prior preservation), for a CUDA card with native bf16. Predicted is what torch's allocator should report as
its maximum in that phase (`torch.cuda.max_memory_allocated`); the CUDA context comes on top. Where there is a
GPU, each row is trained for some steps with random weights of that architecture, in a process of its own, and
its maximum, its step time and the miss of the prediction are written beside; elsewhere "not measured".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.facts import machine_facts  # noqa: E402
from benchmarks.published import write_config_folder  # noqa: E402
from benchmarks.training_recipe import own_class_images, write_recipe  # noqa: E402

NOT_MEASURED = "not measured"
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
TRAIN = """
import json, sys
from pathlib import Path
import lorabooth
from lorabooth.recipe import load
result = lorabooth.train(load(Path(sys.argv[1]), sys.argv[3:]), out=Path(sys.argv[2]))
"""


def predicted(base: Path, recipe: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The training phase by the forecast, in bytes; the context apart."""
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
        phases=("training",),
    ).phase("training")
    return {
        "allocated_bytes": found.allocated_bytes,
        "at_peak_bytes": dict(found.usage.at_peak),
        "seconds_to_predict": round(time.perf_counter() - began_s, 2),
    }


def measured(work: Path, recipe: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The same recipe trained on the GPU of this machine: the allocator's maximum, and the step's median."""
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
    return {
        "allocated_bytes": facts["peak_memory_by_phase_bytes"]["training"],
        "step_s": statistics.median([json.loads(line)["step_s"] for line in lines][3:]),
    }


def main() -> None:
    """Predict, measure where that can be done, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", choices=("sd15", "sd21"), default="sd15")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=13, help="of each measured row; three are left out")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vram.json")
    args = parser.parse_args()
    import torch

    has_gpu = torch.cuda.is_available()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        recipe = _prepare(work, args, whole=has_gpu)
        for name in args.rows:
            overrides = [f"{key}={json.dumps(value)}" for key, value in ROWS[name].items()]
            row = {"set": overrides, "predicted": predicted(work / "model", recipe, overrides)}
            row["measured"] = measured(work, recipe, name, overrides) if has_gpu else NOT_MEASURED
            rows[name] = row
            print(_line(name, row), file=sys.stderr, flush=True)
    result = {
        "what": __doc__.splitlines()[0],
        "machine": machine_facts(),
        "base": args.base,
        "resolution_px": args.resolution,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join([_HEADER, *(_line(name, row) for name, row in rows.items()), f"\nwritten to {args.out}"]))


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


_HEADER = f"{'training':<32} {'predicted':>10} {'measured':>13} {'miss':>7} {'step':>9}"


def _line(name: str, row: Mapping[str, Any]) -> str:
    wanted = row["predicted"]["allocated_bytes"]
    found = row["measured"]
    if not isinstance(found, dict):
        return f"{name:<32} {wanted / 2**30:>6.2f} GiB {found:>13}"
    if "failed" in found:
        return f"{name:<32} {wanted / 2**30:>6.2f} GiB {'failed':>13}"
    real = found["allocated_bytes"]
    return (
        f"{name:<32} {wanted / 2**30:>6.2f} GiB {real / 2**30:>9.2f} GiB {wanted / real - 1:>+7.1%} "
        f"{found['step_s']:>7.3f} s"
    )


if __name__ == "__main__":
    main()
