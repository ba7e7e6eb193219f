"""The files of an adapter and their headers, whatever is in them: what `inspect` and `check` begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabooth.adapters import folders, layouts, lora_config
from lorabooth.adapters.family import family_of
from lorabooth.adapters.gather import FoundModule, Gathered, gather, joined
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.stored import open_adapter
from lorabooth.checkpoints.header import Header, read_header
from lorabooth.errors import AdapterError

ADAPTER_KINDS = frozenset(
    {"LoRA", "LoHa", "LoKr", "DoRA", "GLoRA", "OFT", "(IA)3", "Tucker LoRA", "full difference"}
)
"""Those of `layouts.kind_of` that change a base's weights."""
_GGUF = b"GGUF"


@dataclass(frozen=True)
class OpenedFile:
    """One file.

    Attributes:
        path: where it is.
        component: whose adapter it is, if its names are PEFT's and do not say.
        header: what it holds.
    """

    path: Path
    component: str
    header: Header


def open_files(path: Path) -> tuple[OpenedFile, ...]:
    """The headers of a file, or of the files of an adapter's folder.

    Raises:
        AdapterError: absent, a pickle, a GGUF, no sound .safetensors file, or a folder that holds no adapter.
    """
    if not path.exists():
        raise AdapterError(f"{path}: there is no such file or folder.", "Check the path.")
    _refuse_gguf(path)
    return tuple(OpenedFile(file, component, read_header(file)) for file, component in _files_of(path))


def kind_of(files: Sequence[OpenedFile]) -> str:
    """As `layouts.kind_of`, of all files together."""
    return layouts.kind_of([key for file in files for key in file.header.entries])


def gather_all(files: Sequence[OpenedFile]) -> Gathered:
    """The modules of all files.

    Raises:
        AdapterError: a file cannot be read.
    """
    try:
        return joined([gather(file.path, file.header, file.component) for file in files])
    except OSError as error:
        raise AdapterError(f"{files[0].path} cannot be read: {error.strerror or error}.") from error


def own_metadata(files: Sequence[OpenedFile]) -> Metadata:
    """Lorabooth's own entries, also of a file that is otherwise broken."""
    try:
        return Metadata.from_dict(files[0].header.metadata)
    except AdapterError:
        return Metadata()


def family_by_layers(modules: Mapping[str, FoundModule]) -> str:
    """The family, by the layers' names and widths; "" where they leave it open."""
    shapes = {
        name: ((module.rank, dims[1]), (dims[0], module.rank))
        for name, module in modules.items()
        if (dims := module.dims) is not None
    }
    if found := family_of(shapes):
        return found
    if any("double_blocks" in name for name in modules):
        return "flux"
    return "sd3" if any("joint_blocks" in name for name in modules) else ""


def _refuse_gguf(path: Path) -> None:
    named = path.suffix.lower() == ".gguf"
    if not named and path.is_file():
        try:
            with path.open("rb") as file:
                named = file.read(4) == _GGUF
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror or error}.") from error
    if named:
        raise AdapterError(
            f"{path.name} is a GGUF file (weights quantized for llama.cpp, ComfyUI-GGUF), which is not read.",
            "Get the .safetensors version of the model.",
        )


def _files_of(path: Path) -> list[tuple[Path, str]]:
    """An adapter's files, each with the component that a PEFT file would belong to."""
    if not path.is_dir():
        return [(path, "denoiser")]
    component = lora_config.COMPONENTS.get(path.name, "denoiser")
    for name in (folders.WEIGHTS_NAME, folders.RUN_NAME, folders.DIFFUSERS_NAME):
        if (path / name).is_file():
            return [(path / name, component)]
    parts = {name: path / name / folders.WEIGHTS_NAME for name in lora_config.COMPONENTS}
    found = [(file, lora_config.COMPONENTS[name]) for name, file in parts.items() if file.is_file()]
    if found:
        return found
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    # Whatever else it is, opening it says what is wrong with it.
    return [(files[0], component)] if len(files) == 1 else [(open_adapter(path).path, component)]
