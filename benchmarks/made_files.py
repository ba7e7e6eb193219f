"""The files that benchmarks/merge.py works on, each made when first asked for, in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measured import files_in, remove

SDXL_BYTES = 6_938_040_062
"""Of the single file, in fp16; the folder is as large."""
SD15_BYTES = 2_132_000_000


@dataclass(frozen=True)
class Files:
    """Files in a temporary folder.

    Attributes:
        work: the folder.
        tiny: of a few megabytes, to see that everything runs.
    """

    work: Path
    tiny: bool

    @property
    def base(self) -> Path:
        """SDXL as one checkpoint in the original layout."""
        return self._made("base.safetensors")

    @property
    def folder(self) -> Path:
        """SDXL as a diffusers folder."""
        return self._made("folder")

    @property
    def sd15(self) -> Path:
        """Stable Diffusion 1.5 as a diffusers folder."""
        return self._made("sd15")

    @property
    def tuned(self) -> Path:
        """The same with every weight changed a little."""
        _ = self.sd15
        return self._made("tuned")

    def adapter(self, rank: int, which: str = "a") -> Path:
        """An fp16 adapter for SDXL's attention, feed-forward and projections, in kohya's layout."""
        return self._made(f"{which}-{rank}.safetensors")

    def out(self, name: str) -> Path:
        """Where a command may write."""
        return self.work / "out" / name

    def drop(self, *names: str) -> None:
        """Remove what is not needed any more."""
        remove(self.work / name for name in names)

    def _made(self, name: str) -> Path:
        path = self.work / name
        if not path.exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                pool.submit(_make, path, self.tiny).result()
        return path


def size_bytes(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in files_in(path))


def _make(path: Path, tiny: bool) -> None:
    """By the name of the file."""
    from benchmarks import base_folder, sdxl_size

    size = sdxl_size.TINY_SDXL if tiny else sdxl_size.SDXL
    if path.name == "base.safetensors":
        sdxl_size.write_single_file(path, size)
    elif path.name == "folder":
        base_folder.write_folder(path, size)
    elif path.name == "sd15":
        base_folder.write_folder(path, sdxl_size.TINY_SD15 if tiny else sdxl_size.SD15)
    elif path.name == "tuned":
        base_folder.write_tuned(path.with_name("sd15"), path)
    else:
        which, _, rank = path.stem.partition("-")
        sdxl_size.write_adapter(path, int(rank), seed=ord(which), size=size)
