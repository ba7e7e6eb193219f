"""Hollowed Net beside plain LoRA on the pocket base: how much of the subject it learns, and what it holds.

    python benchmarks/hollow.py [--steps 300]

The demo's mug is learned with the demo's recipe at equal steps: by an adapter on all levels of the denoiser,
and by one on the outer levels while the deep middle is gone (memory.hollow). Each is judged by the pocket
base's own CLIP, whose text half conditions the denoiser:

- subject: mean cosine of pictures of the subject in new places with the photos (as CLIP-I);
- prompt: mean cosine of those pictures with their prompts without the identifier (as CLIP-T);
- class: mean cosine of pictures of "a mug" with the photos; lower is better, other mugs must stay others.

The rows "base" (no adapter: the identifier says nothing) and "photos" (each with the others) bound them. Step
times are of forward and backward passes that alternate in one process; only their ratio is meant.
Writes benchmarks/results/hollow.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812
from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402

import lorabooth  # noqa: E402
from benchmarks.facts import machine_facts  # noqa: E402
from lorabooth.data.cache import Store, default_root  # noqa: E402
from lorabooth.evaluation.apply import load_adapter  # noqa: E402
from lorabooth.evaluation.generate import generate  # noqa: E402
from lorabooth.families import registry, source  # noqa: E402
from lorabooth.pocket.base import pocket_dir  # noqa: E402
from lorabooth.pocket.clip import load_clip, tokenize  # noqa: E402
from lorabooth.progress import Silent  # noqa: E402
from lorabooth.recipe import load, with_overrides  # noqa: E402
from lorabooth.training import pool  # noqa: E402
from lorabooth.training.caching import cache_and_release  # noqa: E402
from lorabooth.training.compose import attach, compose  # noqa: E402
from lorabooth.training.loop import Session  # noqa: E402
from lorabooth.training.setting import Clock, open_setting  # noqa: E402
from lorabooth.training.step import class_rows, micro_step, noise_of  # noqa: E402

RECIPE = HERE.parent / "recipes" / "pocket-demo.toml"
TOKEN = "qzx"
ROWS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "hollow": ("memory.hollow=true",),
    "hollow, 2 levels kept": ("memory.hollow=true", "memory.hollow_keep=2"),
}
PLACES = ("on the beach", "in the snow", "on a wooden floor", "in a forest")


def main() -> int:
    """Train, draw, score, time, write."""
    options = _arguments()
    work = options.work or Path(tempfile.mkdtemp(prefix="hollow-"))
    os.environ["LORABOOTH_CACHE"] = str(work / "cache")
    clip = _Clip()
    photos = [
        Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for path in _photos()
    ]
    rows = {"base": clip.scores(None, photos, options.seeds), "photos": {"subject": clip.among(photos)}}
    for name, more in ROWS.items():
        out = work / name.replace(" ", "-").replace(",", "")
        result = lorabooth.train(_recipe(options, more), out=out)
        facts = json.loads((out / "run.json").read_text("utf-8"))
        rows[name] = {
            **clip.scores(result.adapter, photos, options.seeds),
            "adapter_modules": facts["adapter"]["modules"],
            "adapter_parameters": facts["adapter"]["parameters"],
            "denoiser_parameters_in_memory": _held(facts),
            "pool": facts.get("pool", {}),
        }
        print(name, json.dumps(rows[name]), flush=True)
    times = _step_times(options)
    for name, seconds in times.items():
        rows[name]["step_time_by_plain"] = round(seconds / times["plain"], 3)
    figures = {
        "steps": options.steps,
        "images_per_prompt": options.seeds,
        "prompts": len(PLACES),
        "load_average": os.getloadavg()[0],
        "rows": rows,
        "machine": machine_facts(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.out}")
    return 0


class _Clip:
    """The pocket base's CLIP, and pictures drawn on the base to show it."""

    def __init__(self) -> None:
        self.clip = load_clip(pocket_dir())
        found = source.resolve("pocket")
        self.family = registry.family(found.family)
        self.parts = self.family.load(found, torch.float32)
        self.pipeline = self.family.pipeline(self.parts)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """[N,D], unit length."""
        pixels = np.stack([np.asarray(picture, dtype=np.float32) / 127.5 - 1 for picture in pictures])
        output = self.clip.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        return F.normalize(self.clip.visual_projection(output.pooler_output), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """[N,D], unit length."""
        ids = tokenize(self.parts.tokenizers["tokenizer"], list(prompts), torch.device("cpu"))
        return F.normalize(self.clip.text_projection(self.clip.text_model(ids).pooler_output), dim=-1)

    def among(self, pictures: Sequence[Image.Image]) -> float:
        """Mean cosine of each picture with the others."""
        found = self.images(pictures)
        cosines = found @ found.T
        others = ~torch.eye(len(found), dtype=torch.bool)
        return round(float(cosines[others].mean()), 4)

    def scores(self, adapter: Path | None, photos: Sequence[Image.Image], seeds: int) -> dict[str, float]:
        """Of pictures drawn with an adapter, or without."""
        handle = None if adapter is None else load_adapter(self.pipeline, adapter)
        subject = [f"a photo of a {TOKEN} mug {place}" for place in PLACES for _ in range(seeds)]
        plain = [prompt.replace(f"{TOKEN} ", "") for prompt in subject]
        numbers = [*range(seeds)] * len(PLACES)
        drawn, other = (
            self._draw(subject, numbers),
            self._draw(["a photo of a mug"] * len(numbers), range(len(numbers))),
        )
        if handle is not None:
            handle.remove()
        mine, known = self.images(drawn), self.images(photos)
        return {
            "subject": round(float((mine @ known.T).mean()), 4),
            "prompt": round(float((mine * self.texts(plain)).sum(-1).mean()), 4),
            "class": round(float((self.images(other) @ known.T).mean()), 4),
        }

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return generate(self.pipeline, prompts, seeds, steps=20, guidance=4.0, batch_size=8)


def _photos() -> list[Path]:
    return sorted((HERE.parent / "lorabooth" / "pocket" / "demo" / "photos").glob("*.png"))


def _recipe(options: argparse.Namespace, more: Sequence[str]) -> lorabooth.Recipe:
    fixed = (
        f"optim.steps={options.steps}",
        f"subjects.0.token={TOKEN}",
        "run.sample_every=0",
        "run.sample_count=0",
        "run.checkpoint_every=0",
    )
    return with_overrides(load(RECIPE), [*fixed, *more])


def _held(facts: dict[str, Any]) -> int:
    """Numbers of the denoiser that are in memory while training, the adapter's left out."""
    kept = facts["hollow"].get("kept_parameters")
    if kept is not None:
        return int(kept) - int(facts["adapter"]["parameters"])
    found = source.resolve("pocket")
    return sum(
        p.numel() for p in registry.family(found.family).load(found, torch.float32).denoiser.parameters()
    )


def _step_times(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a forward and backward pass, the rows by turns."""
    sessions = {name: _session(options, more) for name, more in ROWS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(options.timed + 2):
        for name, session in sessions.items():
            (batch,) = session.batches(turn % options.steps)[0]
            eps, level = noise_of(session.step_parts.path, batch, session.seed, turn)
            began_s = time.perf_counter()
            counts = {"n_instance": session.n_instance, "n_class": session.n_class}
            terms = micro_step(session.step_parts, batch, eps, level, class_rows=class_rows(batch), **counts)
            terms.total.backward()  # type: ignore[no-untyped-call]
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began_s)
            for parameter in session.parameters:
                parameter.grad = None
    return {name: statistics.median(found) for name, found in seconds.items()}


def _session(options: argparse.Namespace, more: Sequence[str]) -> Session:
    """Up to its first step; the photos are their own class images here, which costs a step the same."""
    photos = str(_photos()[0].parent)
    own = ("prior.mode=images", f"prior.images={photos}")
    setting = open_setting(with_overrides(_recipe(options, more), own), Clock(), Silent())
    store = Store(default_root())
    from lorabooth.training import subjects

    classes = subjects.own_class_images(Path(photos), setting.subjects).records
    examples = cache_and_release(setting, classes, store, Silent())[0]
    accelerator = Accelerator(cpu=True)
    attached = attach(setting, accelerator.device, Silent())
    prepared = pool.prepare(
        setting, examples, device=accelerator.device, world=1, store=store, reporter=Silent()
    )
    pool.hollow_out(setting, attached, Silent())
    return compose(setting, examples, attached, accelerator=accelerator, reporter=Silent(), pool=prepared)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=6, help="pictures per prompt")
    parser.add_argument("--timed", type=int, default=30, help="timed passes per row")
    parser.add_argument("--work", type=Path, default=None, help="where runs go; a temporary folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "hollow.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
