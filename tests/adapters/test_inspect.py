"""What `inspect` says is true: norms are the products' own, facts those that were written; little is read."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabooth.adapters import file, norms
from lorabooth.adapters.inspect import inspect_path
from lorabooth.adapters.metadata import Metadata
from lorabooth.adapters.peft_folder import export_peft
from lorabooth.checkpoints import tensors as plain_reads
from lorabooth.errors import AdapterError
from tests.adapters.conftest import Base
from tests.families.ldm import make_single_file

Trained = Callable[..., dict[str, Tensor]]
ABOUT = Metadata(
    family="sd1",
    base_id="pocket",
    rank=4,
    alpha=6.0,
    targets="all",
    trigger_words=("qzx mug",),
    steps=300,
    lorabooth_version="0.1.0",
)


@pytest.fixture
def adapter(sd1: Base, trained: Trained, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = trained(sd1.load())
    file.write(tmp_path / "mug.safetensors", tensors, ABOUT)
    return tmp_path / "mug.safetensors", tensors


def delta(tensors: dict[str, Tensor], module: str) -> Tensor:
    down, up = tensors[f"{module}.lora_A"].double(), tensors[f"{module}.lora_B"].double()
    scale = float(tensors[f"{module}.alpha"]) / down.shape[0]
    return scale * (up.flatten(1) @ down.flatten(1))


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


# ---- adapters ----


def test_facts_of_an_adapter_of_ours(adapter: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = adapter
    found = inspect_path(path)
    assert (found.kind, found.layout, found.family, found.is_adapter) == ("LoRA", "kohya", "sd1", True)
    assert (found.base, found.trigger_words, found.steps) == ("pocket", ("qzx mug",), 300)
    assert found.modules == len(tensors) // 3
    assert found.tensors == len(tensors)
    assert found.ranks == (2, 4)
    assert found.parameters == sum(value.numel() for key, value in tensors.items() if value.ndim)
    assert found.dtypes == {"F32": found.parameters}
    assert found.size_bytes == path.stat().st_size
    assert found.targets["attention q"] == found.targets["attention out"] == 8
    assert found.targets["text encoder feed-forward"] == 4
    assert sum(found.targets.values()) == found.modules
    assert "other layers" not in found.targets
    assert found.problems == ()


def test_norms_of_blocks_are_those_of_the_products(adapter: tuple[Path, dict[str, Tensor]]) -> None:
    path, tensors = adapter
    blocks = {block.name: block for block in inspect_path(path).blocks}
    squares: dict[str, list[float]] = {}
    for module in {key.rpartition(".")[0] for key in tensors}:
        parts = module.split(".")
        name = parts[0] if parts[0] != "denoiser" else parts[1]
        name = f"{name}.{parts[2]}" if name in ("down_blocks", "up_blocks") else name
        squares.setdefault(name, []).append(float(delta(tensors, module).square().sum()))
    assert blocks.keys() == squares.keys()
    for name, values in squares.items():
        assert blocks[name].modules == blocks[name].sampled == len(values)
        assert blocks[name].norm == pytest.approx(math.sqrt(sum(values) / len(values)), rel=1e-5)
    assert blocks["text_encoder"].alpha_min == blocks["text_encoder"].alpha_max == 5.0


def test_blocks_come_in_the_order_of_the_model(adapter: tuple[Path, dict[str, Tensor]]) -> None:
    names = [block.name for block in inspect_path(adapter[0]).blocks]
    wanted = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert [name for name in names if name in wanted] == wanted
    assert names[-1] == "text_encoder"


def test_json_has_all_attributes_and_only_plain_values(adapter: tuple[Path, dict[str, Tensor]]) -> None:
    found = inspect_path(adapter[0])
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert facts["blocks"][0].keys() >= {"name", "modules", "rank_min", "norm", "sampled"}
    documented = type(found).__doc__ or ""
    assert all(f"        {key}:" in documented for key in facts)


# ---- little is read ----


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A file of zeros that takes no space."""
    table, at = {}, 0
    for key, shape in shapes.items():
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + 2 * math.prod(shape)]}
        at = table[key]["data_offsets"][1]
    head = json.dumps(table).encode()
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        out.truncate(8 + len(head) + at)
    return path


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    original = plain_reads.read_bytes

    def counting(path: Path, begin: int, end: int) -> bytearray:
        counts.append(end - begin)
        return original(path, begin, end)

    monkeypatch.setattr(plain_reads, "read_bytes", counting)
    return counts


def test_of_a_gigabyte_of_adapter_little_is_read(tmp_path: Path, bytes_read: list[int]) -> None:
    shapes = {}
    for block in range(3):
        for layer in range(60):
            module = f"unet.down_blocks.{block}.attentions.0.transformer_blocks.{layer}.attn1.to_q"
            shapes |= {f"{module}.lora_A.weight": (1024, 1280), f"{module}.lora_B.weight": (1280, 1024)}
    found = inspect_path(sparse(tmp_path / "big.safetensors", shapes))
    assert found.size_bytes > 900_000_000
    assert (found.modules, len(found.blocks)) == (180, 3)
    assert 0 < found.sampled < 180
    assert 0 < sum(bytes_read) <= norms.BUDGET_BYTES


def test_of_six_gigabytes_of_base_little_is_read(tmp_path: Path, bytes_read: list[int]) -> None:
    unet = "model.diffusion_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}out.2.weight": (4, 320, 3, 3),
    }
    for i in range(2000):
        shapes[f"{unet}output_blocks.0.1.transformer_blocks.{i}.attn2.to_k.weight"] = (800, 2048)
    found = inspect_path(sparse(tmp_path / "base.safetensors", shapes))
    assert found.size_bytes > 6_000_000_000
    assert (found.kind, found.family) == ("UNet", "sdxl")
    assert 0 < sum(bytes_read) <= 4_000_000


@pytest.mark.parametrize("kind", ["adapter", "base", "folder"])
def test_no_heavy_import(
    kind: str, adapter: tuple[Path, dict[str, Tensor]], sd1: Base, tmp_path: Path
) -> None:
    path = {
        "adapter": adapter[0],
        "base": make_single_file(sd1.folder, tmp_path / "base.safetensors", configs=False),
        "folder": sd1.folder,
    }[kind]
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from lorabooth.adapters.inspect import inspect_path\n"
        "from lorabooth.cli.inspect import inspection_text\n"
        "assert inspection_text(inspect_path(Path(sys.argv[1])))\n"
        "heavy = ('torch', 'diffusers', 'transformers', 'peft', 'accelerate', 'safetensors', 'PIL', 'rich')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- broken and refused ----


def test_a_missing_half_is_a_problem_and_the_rest_is_told(
    adapter: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    stored = load_file(adapter[0])
    gone = next(key for key in stored if key.endswith("lora_up.weight"))
    stored.pop(gone)
    found = inspect_path(write(tmp_path / "half.safetensors", stored, {"lorabooth.steps": "7"}))
    assert len(found.problems) == 1
    assert found.problems[0].startswith("1 module is incomplete: ")
    assert "(no lora_B)" in found.problems[0]
    assert not found.notes
    assert found.modules == len(adapter[1]) // 3
    assert found.sampled == found.modules - 1
    assert found.steps == 7


def test_a_nan_is_a_problem_and_the_rest_is_told(
    adapter: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    stored = load_file(adapter[0])
    bad = next(key for key in stored if key.endswith("lora_up.weight"))
    stored[bad][0, 0] = math.nan
    found = inspect_path(write(tmp_path / "nan.safetensors", stored))
    assert any(bad in problem for problem in found.problems)
    assert found.sampled == found.modules - 1


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.ckpt", b"PK\x03\x04", "pickled checkpoint"),
        ("a.gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("b.safetensors", b"GGUF\x03\0\0\0", "GGUF"),
        ("a.safetensors", b"hello", "not a sound .safetensors file"),
    ],
)
def test_refused_by_name(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=text):
        inspect_path(tmp_path / name)


def test_absent_and_empty(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        inspect_path(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="holds no adapter"):
        inspect_path(tmp_path)


def test_a_file_of_nothing_known_is_said_to_be_that(tmp_path: Path) -> None:
    found = inspect_path(write(tmp_path / "a.safetensors", {"x": torch.ones(3)}))
    assert (found.kind, found.is_adapter, found.parameters) == ("", False, 3)
    assert found.notes


# ---- folders ----


def test_peft_folders(sd1: Base, trained: Trained, tmp_path: Path) -> None:
    tensors = trained(sd1.load())
    export_peft(tmp_path / "peft", tensors, ABOUT)
    found = inspect_path(tmp_path / "peft")
    assert (found.kind, found.layout, found.ranks, found.base) == ("LoRA", "peft", (2, 4), "pocket")
    assert found.modules == len(tensors) // 3
    assert {block.name: block.alpha_min for block in found.blocks}["text_encoder"] == 5.0
    one = inspect_path(tmp_path / "peft" / "unet")
    assert one.modules == sum(key.startswith("denoiser.") for key in tensors) // 3


def test_run_folder(adapter: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter.safetensors").write_bytes(adapter[0].read_bytes())
    found = inspect_path(run)
    assert (found.name, found.kind, found.steps) == ("run", "LoRA", 300)
