"""How the embedded base model is made: render, train tokenizer, autoencoder, CLIP, subject encoder, denoiser.

Every phase keeps its state in the work folder; a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from lorabooth.errors import RecipeError
from lorabooth.pocket import clip as clip_phase
from lorabooth.pocket import subject as subject_phase
from lorabooth.pocket import unet as unet_phase
from lorabooth.pocket import vae as vae_phase
from lorabooth.pocket.dataset import Rendered, rendered
from lorabooth.pocket.export import assemble, write_folder
from lorabooth.pocket.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from lorabooth.pocket.trainer import (
    Budget,
    Shard,
    Task,
    append_log,
    average_of,
    read_state,
    train,
    write_state,
)
from lorabooth.pocket.vocabulary import corpus
from lorabooth.rng import seed_for

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPModel

VAE_SHARE, CLIP_SHARE, SUBJECT_SHARE = 0.13, 0.06, 0.12
_FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a build is asked to do.

    Attributes:
        work: folder of training states, renderings and the log.
        out: folder of the finished pipeline, replaced file by file at every export.
        minutes: training time of all phases together; rendering comes on top.
        device: "cpu" or "cuda".
        seed: of every random draw.
        scenes: how many pictures are rendered.
        min_steps: optimizer steps that each phase makes even when the time is up.
        processes: training processes on a CPU, one thread each; a GPU has one.
        export_every_s: seconds between two exports while the denoiser trains.
    """

    work: Path
    out: Path
    minutes: float = 120.0
    device: str = "cpu"
    seed: int = 0
    scenes: int = 60_000
    min_steps: int = 2
    processes: int = 2
    export_every_s: float = 600.0

    def seconds(self, phase: str) -> float:
        """Training time of "vae", "clip", "subject" or "unet"."""
        shares = {"vae": VAE_SHARE, "clip": CLIP_SHARE, "subject": SUBJECT_SHARE}
        return self.minutes * 60.0 * (shares[phase] if phase in shares else 1.0 - sum(shares.values()))

    @property
    def world(self) -> int:
        """How many processes train together."""
        return self.processes if self.device == "cpu" else 1

    @property
    def log_file(self) -> Path:
        """The build's log, JSON lines."""
        return self.work / "log.jsonl"

    def state_file(self, phase: str) -> Path:
        """The training state of a phase."""
        return self.work / f"{phase}.safetensors"


@dataclass(frozen=True, slots=True)
class Parts:
    """What is trained before the denoiser, in evaluation mode on the CPU."""

    vae: AutoencoderKL
    clip: CLIPModel
    subject: subject_phase.SubjectEncoder


def _begin(plan: BuildPlan, name: str) -> None:
    append_log(plan.log_file, {"phase": name, "event": "begin"})


def _train_data(plan: BuildPlan, processes: int = 1) -> Rendered:
    return rendered(plan.seed, "train", plan.scenes, plan.work / "train.npy", processes)


def _seed_weights(plan: BuildPlan, phase: str) -> None:
    torch.manual_seed(seed_for(plan.seed, 0, 0, f"weights/{phase}") % 2**31)


def _task(plan: BuildPlan, phase: str, shard: Shard) -> Task:
    """The phase's network, data and losses, for one process."""
    device = torch.device(plan.device)
    data = _train_data(plan)
    _seed_weights(plan, phase)
    on_save: Callable[[dict[str, Tensor], int, float], None] | None = None
    if phase == "vae":
        vae = vae_phase.make_vae().to(device)
        module: torch.nn.Module = vae
        hyper = vae_phase.HYPER
        losses = vae_phase.vae_losses(vae, data.images, device, plan.seed, shard)
    elif phase == "clip":
        tokenizer = load_tokenizer(plan.work / "tokenizer")
        clip = clip_phase.make_clip(tokenizer).to(device)
        module, hyper = clip, clip_phase.HYPER
        losses = clip_phase.clip_losses(clip, tokenizer, data, device, plan.seed, shard)
    elif phase == "subject":
        encoder = subject_phase.SubjectEncoder().to(device)
        module, hyper = encoder, subject_phase.HYPER
        losses = subject_phase.subject_losses(encoder, _views(plan), device, plan.seed, shard)
    else:
        tokenizer = load_tokenizer(plan.work / "tokenizer")
        unet = unet_phase.make_unet().to(device)
        if device.type == "cpu":
            unet.set_attn_processor(unet_phase.ExplicitAttention())
        latents = read_state(plan.work / "latents.safetensors")[0]["latents"]
        text_encoder = clip_phase.text_half(load_parts(plan).clip).to(device)
        module, hyper = unet, unet_phase.HYPER
        losses = unet_phase.unet_losses(
            unet, text_encoder, tokenizer, latents, data.scenes, device, plan.seed, shard
        )
        on_save = _exporter(plan)
    budget = Budget(plan.seconds(phase), plan.min_steps)
    save_every_s = plan.export_every_s if phase == "unet" else 120.0
    return Task(
        phase,
        module,
        losses,
        hyper,
        budget,
        plan.state_file(phase),
        plan.log_file,
        save_every_s,
        shard,
        on_save,
    )


def _exporter(plan: BuildPlan) -> Callable[[dict[str, Tensor], int, float], None]:
    def export(average: dict[str, Tensor], step: int, progress: float) -> None:
        unet = unet_phase.make_unet()
        unet.load_state_dict(average)
        parts = load_parts(plan)
        tokenizer = load_tokenizer(plan.work / "tokenizer")
        pipeline = assemble(tokenizer, parts.clip, parts.vae, unet.eval())
        write_folder(pipeline, parts.clip, parts.subject, plan.out)
        append_log(plan.log_file, {"phase": "export", "step": step, "progress": round(progress, 4)})

    return export


def _worker(rank: int, plan: BuildPlan, phase: str, meeting: str) -> None:
    shard = Shard(rank, plan.world)
    if plan.world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.world)
    train(_task(plan, phase, shard))
    if plan.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _is_done(plan: BuildPlan, phase: str) -> bool:
    file = plan.state_file(phase)
    if not file.exists():
        return False
    info = read_state(file)[1]
    return Budget(plan.seconds(phase), plan.min_steps).progress(info["step"], info["elapsed_s"]) >= 1.0


def _train_phase(plan: BuildPlan, phase: str) -> None:
    if _is_done(plan, phase):
        return
    _begin(plan, phase)
    if plan.world == 1:
        _worker(0, plan, phase, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        start_processes(  # type: ignore[no-untyped-call]
            _worker, (plan, phase, str(Path(folder) / "meeting")), nprocs=plan.world, start_method="spawn"
        )


def load_parts(plan: BuildPlan) -> Parts:
    """The averaged autoencoder, its latents standardised once they are measured, CLIP and subject encoder."""
    vae = vae_phase.make_vae()
    vae.load_state_dict(average_of(plan.state_file("vae")))
    file = plan.work / "latents.safetensors"
    if file.exists():
        with safe_open(file, framework="pt") as latents:
            vae_phase.standardise(vae, latents.get_tensor("mean"), latents.get_tensor("std"))
    clip = clip_phase.make_clip(load_tokenizer(plan.work / "tokenizer"))
    clip.load_state_dict(average_of(plan.state_file("clip")))
    subject = subject_phase.SubjectEncoder()
    if plan.state_file("subject").exists():
        subject.load_state_dict(average_of(plan.state_file("subject")))
    return Parts(vae.eval(), clip.eval(), subject.eval())


def _views(plan: BuildPlan) -> subject_phase.Views:
    """Pictures of the subject encoder's specimens, a share of them through the autoencoder; made once."""
    count, file = plan.scenes // subject_phase.VIEWS, plan.work / "views.npy"
    if not file.exists():
        _begin(plan, "views")
        drawn = subject_phase.draw_views(
            plan.seed, "subject", count, subject_phase.VIEWS, processes=plan.processes
        )
        subject_phase.keep(subject_phase.through(load_parts(plan).vae, drawn, torch.device("cpu")), file)
    return subject_phase.kept(file)


def _encode(plan: BuildPlan, data: Rendered) -> None:
    """Latents of all pictures, every channel standardised, once per trained autoencoder."""
    file = plan.work / "latents.safetensors"
    stamp = {"vae_step": read_state(plan.state_file("vae"))[1]["step"], "count": len(data.images)}
    if file.exists():
        if read_state(file)[1] == stamp:
            return
        file.unlink()
    _begin(plan, "latents")
    vae = load_parts(plan).vae.to(plan.device)
    raw = vae_phase.encode_all(vae, data.images, torch.device(plan.device)).float()
    mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    latents = (raw - mean[:, None, None]) / std[:, None, None]
    write_state(file, {"latents": latents.half(), "mean": mean, "std": std}, stamp)


def build(plan: BuildPlan) -> Path:
    """Make the base model, or go on making it.

    Args:
        plan: what to do; the work folder remembers the seed.

    Returns:
        The folder of the pipeline, `plan.out`.

    Raises:
        RecipeError: the work folder belongs to a build with another seed or number of scenes.
        TrainingError: a phase diverged.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    _claim(plan)
    started = time.monotonic()
    tokenizer_folder = plan.work / "tokenizer"
    if not (tokenizer_folder / "tokenizer.json").exists():
        _begin(plan, "tokenizer")
        save_tokenizer(train_tokenizer(*corpus(plan.seed, 4_000)), tokenizer_folder)
    _begin(plan, "render")
    data = _train_data(plan, plan.processes)
    for phase in ("vae", "clip"):
        _train_phase(plan, phase)
    _encode(plan, data)
    del data
    if not _is_done(plan, "subject"):
        _views(plan)
    _train_phase(plan, "subject")
    _train_phase(plan, "unet")
    if not (plan.out / "model_index.json").exists():
        unet_state = read_state(plan.state_file("unet"))[1]
        _exporter(plan)(average_of(plan.state_file("unet")), unet_state["step"], 1.0)
    append_log(plan.log_file, {"phase": _FINISHED, "seconds": round(time.monotonic() - started, 1)})
    return plan.out


def _claim(plan: BuildPlan) -> None:
    """Write what the build is on first use; refuse to mix two builds in one work folder."""
    file = plan.work / "build.json"
    identity = {"seed": plan.seed, "scenes": plan.scenes}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in identity} != identity:
            raise RecipeError(
                f"{plan.work} holds another build: {found['seed']=}, {found['scenes']=}.",
                "Use its seed and number of scenes, or another work folder.",
            )
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(plan).items()}
    record = {**settings, "machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__}
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")
