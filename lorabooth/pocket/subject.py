"""The pocket world's subject encoder: near for two pictures of one specimen, apart for two specimens.

It does for pocket pictures what DINO (arXiv 2104.14294) does for photos. It is trained by contrast between
pictures of the same specimen in other scenes and pictures of other specimens of the same class (InfoNCE,
arXiv 1807.03748), so a class noun, a place or a style tells it nothing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from lorabooth.pocket.dataset import SIZE_PX, batch_indices, pixels_of
from lorabooth.pocket.scenes import CLASSES, STYLES, Scene, Specimen, render, sample_scene, sample_specimen
from lorabooth.pocket.trainer import ALONE, Hyper, Shard
from lorabooth.pocket.vae import reconstruct
from lorabooth.rng import generator_for, seed_for

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

VIEWS = 4
HYPER = Hyper(lr=2e-3, warmup_steps=100, final_lr_ratio=0.01, weight_decay=0.05, ema_decay=0.998)
BATCH = 96
"""Specimens a step, two pictures each."""
CLASSES_A_STEP = 1
TEMPERATURE = 0.07
CODED_SHARE = 0.25
"""Share of the pictures that have been through the autoencoder, as everything the base draws has."""
TRAINED_STYLES = (0.4, 0.4, 0.2)
"""Shares of the styles among the pictures that are trained on, beside a photo of each specimen."""
INPUT_PX = 80
"""Pictures are enlarged to this before they are read: the network's first layers halve twice."""
HELD_OUT = "subject held-out"
"""The stream of specimens that the encoder is judged by and never trained on."""
_CHUNK = 250


class SubjectEncoder(nn.Module):
    """A network, and the linear projection in which two pictures are compared.

    The projection is kept, where SimCLR (arXiv 2002.05709) throws its head away: what is asked of this
    encoder is what it was trained for; its pooled features find a pencil sketch's specimen half as often.

    Attributes:
        encoder: transformers' ResNet.
        projection: of its pooled output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make_encoder()
        width = self.encoder.config.hidden_sizes[-1]
        self.projection = nn.Linear(width, width, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pictures [B,3,64,64] in [-1, 1] -> unit vectors [B,D], float32 under autocast too."""
        large = F.interpolate(x_BCHW, size=(INPUT_PX, INPUT_PX), mode="bicubic", antialias=True)
        pooled: Tensor = self.encoder(large).pooler_output
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return F.normalize(self.projection(pooled.float().flatten(1)), dim=-1)


def make_encoder() -> ResNetModel:
    """An untrained encoder for pictures of `INPUT_PX`: 0.5 million parameters."""
    config = ResNetConfig(
        embedding_size=48,
        hidden_sizes=[48, 80, 128],
        depths=[2, 2, 1],
        layer_type="basic",
        hidden_act="relu",
    )
    return ResNetModel(config)


def save_subject_encoder(model: SubjectEncoder, folder: Path) -> None:
    """Write the network as transformers reads it, and the projection beside it, in half precision.

    Batch statistics stay as they are: their counters are integers, and none overflows half precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.encoder.config.save_pretrained(folder)
    for name, part in (("model", model.encoder), ("projection", model.projection)):
        weights = {
            key: (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
            for key, tensor in part.state_dict().items()
        }
        save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})


def load_subject_encoder(folder: Path) -> SubjectEncoder:
    """The subject encoder of a pocket folder, in float32, in evaluation mode."""
    model, home = SubjectEncoder(), folder / "subject_encoder"
    model.encoder.load_state_dict(load_file(home / "model.safetensors"))
    model.projection.load_state_dict(load_file(home / "projection.safetensors"))
    return model.float().eval()


@dataclass(frozen=True, slots=True)
class Views:
    """Several pictures of each of many specimens.

    Attributes:
        images: uint8 [N,V,64,64,3].
        classes: [N] index into CLASSES.
    """

    images: NDArray[np.uint8]
    classes: NDArray[np.int64]


def specimen_at(seed: int, purpose: str, index: int) -> Specimen:
    """Specimen `index` of a stream; classes take turns."""
    rng = np.random.default_rng(seed_for(seed, 0, 0, f"specimen/{purpose}", index))
    return sample_specimen(rng, CLASSES[index % len(CLASSES)])


def view_scene(seed: int, purpose: str, index: int, number: int) -> Scene:
    """Scene of picture `number` of specimen `index`: any place, pose and accessory.

    The first is a photo, as all that is known of a subject is; the others are of any style, and when they
    are trained on most of them are no photos: a sketch shares no colour with what it shows.
    """
    rng = np.random.default_rng(seed_for(seed, number, 0, f"view/{purpose}", index))
    style: str | None = None
    if number == 0:
        style = "photo"
    elif purpose != HELD_OUT:
        style = str(rng.choice(STYLES, p=TRAINED_STYLES))
    return sample_scene(rng, specimen_at(seed, purpose, index), style=style)


def view(seed: int, purpose: str, index: int, number: int) -> NDArray[np.uint8]:
    """Its picture, uint8 [64,64,3]."""
    return render(view_scene(seed, purpose, index, number), SIZE_PX)


def _render(job: tuple[int, str, int, int, int]) -> NDArray[np.uint8]:
    seed, purpose, start, stop, views = job
    return np.stack([np.stack([view(seed, purpose, i, v) for v in range(views)]) for i in range(start, stop)])


def draw_views(seed: int, purpose: str, count: int, views: int, processes: int = 1) -> Views:
    """`views` pictures of each of the first `count` specimens of a stream.

    Args:
        seed: the build's seed.
        purpose: names the stream.
        count: specimens.
        views: pictures of each.
        processes: worker processes for rendering.
    """
    jobs = [(seed, purpose, i, min(i + _CHUNK, count), views) for i in range(0, count, _CHUNK)]
    if processes <= 1:
        parts = [_render(job) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_render, jobs))
    return _with_classes(np.concatenate(parts))


def _with_classes(images: NDArray[np.uint8]) -> Views:
    return Views(images, np.arange(len(images), dtype=np.int64) % len(CLASSES))


def keep(drawn: Views, file: Path) -> None:
    """Write the pixels (.npy), whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name("partial-" + file.name)
    np.save(partial, drawn.images)
    partial.replace(file)


def kept(file: Path) -> Views:
    """What `keep` wrote."""
    return _with_classes(np.load(file))


def through(vae: AutoencoderKL, drawn: Views, device: torch.device, share: float = CODED_SHARE) -> Views:
    """The same, every other picture of the last `share` of the specimens through the autoencoder."""
    first = len(drawn.images) - round(share * len(drawn.images))
    # Only every other picture, beginning with the second: a subject's photos are taken, not drawn.
    chosen = drawn.images[first:, 1::2]
    if not chosen.size:
        return drawn
    flat = np.ascontiguousarray(chosen.reshape(-1, *chosen.shape[2:]))
    coded = ((reconstruct(vae, flat, device).permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    images = drawn.images.copy()
    images[first:, 1::2] = coded.reshape(chosen.shape)
    return replace(drawn, images=images)


def _picks(drawn: Views, seed: int, place: int, size: int) -> NDArray[np.int64]:
    """The specimens of a step: a few classes, so that what is told apart is of one kind."""
    rng = np.random.default_rng(seed_for(seed, place, 0, "subject classes"))
    chosen = rng.choice(len(CLASSES), CLASSES_A_STEP, replace=False)
    each = size // CLASSES_A_STEP
    parts = []
    for name in chosen:
        members = np.flatnonzero(drawn.classes == name)
        parts.append(members[batch_indices(seed, place, f"subject/{name}", len(members), each)])
    return np.concatenate(parts)


def _changed(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture shifted by up to four pixels, a little brighter or darker, with a little noise."""
    size, count = x_BCHW.shape[-1], len(x_BCHW)
    padded = F.pad(x_BCHW, (4, 4, 4, 4), mode="reflect")
    shifts = torch.randint(0, 9, (count, 2), generator=generator).tolist()
    moved = torch.stack([p[:, t : t + size, s : s + size] for p, (t, s) in zip(padded, shifts, strict=True)])
    gain = 1.0 + 0.08 * (2 * torch.rand((count, 1, 1, 1), generator=generator) - 1)
    noise = torch.randn(moved.shape, generator=generator)
    strength = 0.08 * torch.rand((count, 1, 1, 1), generator=generator)
    return moved * gain.to(moved.device) + (strength * noise).to(moved.device)


def subject_losses(
    model: SubjectEncoder, drawn: Views, device: torch.device, seed: int, shard: Shard = ALONE
) -> Callable[[int], Mapping[str, Tensor]]:
    """The losses of a step: two pictures of each specimen must find each other among all of the step.

    Convolutions compute in bfloat16 over pixels whose channels lie together: 2.6 times as fast on a processor
    that has such instructions.

    Args:
        model: the module that trains; its weights are laid out likewise.
        drawn: pictures of the training specimens.
        device: where it trains.
        seed: of every draw.
        shard: this process's share; each contrasts within its own.
    """
    module: Any = model  # its stubs know no memory format
    module.to(memory_format=torch.channels_last)

    def losses(step: int) -> Mapping[str, Tensor]:
        place = step * shard.world + shard.rank
        picks = _picks(drawn, seed, place, BATCH // shard.world)
        rng = np.random.default_rng(seed_for(seed, place, 0, "subject views"))
        pairs = rng.permuted(np.tile(np.arange(drawn.images.shape[1]), (len(picks), 1)), axis=1)[:, :2]
        generator = generator_for(seed, place, 0, "subject change")
        images = np.concatenate([drawn.images[picks, pairs[:, 0]], drawn.images[picks, pairs[:, 1]]])
        changed = _changed(pixels_of(images, device), generator).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            z = model(changed)
        logits = z @ z.T / TEMPERATURE
        logits.fill_diagonal_(-1e4)
        count = len(picks)
        aims = torch.arange(2 * count, device=device).roll(count)
        right = (logits.argmax(dim=1) == aims).float().mean()
        return {"loss": F.cross_entropy(logits, aims), "top1": right}

    return losses


@torch.no_grad()
def embed_all(model: SubjectEncoder, images: NDArray[np.uint8], batch: int = 250) -> Tensor:
    """Unit vectors [N,D] of uint8 [N,64,64,3]; the model is in evaluation mode."""
    device = next(model.parameters()).device
    return torch.cat(
        [model(pixels_of(images[i : i + batch], device)).cpu() for i in range(0, len(images), batch)]
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a picture was nearest to the photo of its own specimen.

    Attributes:
        class_name: of the specimen, and of all that it was sought among.
        style: of the picture.
        right: whether it was.
    """

    class_name: str
    style: str
    right: bool


def retrieval(
    model: SubjectEncoder, seed: int, *, per_class: int = 100, classes: Sequence[str] = CLASSES
) -> list[Answer]:
    """Find every specimen by another picture of it among one photo of each of its class.

    Args:
        model: judged.
        seed: of the specimens: a stream that training never sees.
        per_class: specimens of each class: a photo, and a picture in any style, place, pose and accessory.
        classes: which ones.

    Returns:
        An answer for each specimen.
    """
    answers = []
    for name in classes:
        mine = range(CLASSES.index(name), per_class * len(CLASSES), len(CLASSES))
        photos, asked = (
            embed_all(model, np.stack([view(seed, HELD_OUT, index, number) for index in mine]))
            for number in (0, 1)
        )
        best = (asked @ photos.T).argmax(dim=1).tolist()
        styles = [view_scene(seed, HELD_OUT, index, 1).style for index in mine]
        answers += [
            Answer(name, style, found == at)
            for at, (style, found) in enumerate(zip(styles, best, strict=True))
        ]
    return answers
