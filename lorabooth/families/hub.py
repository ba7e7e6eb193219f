"""Base models from the Hugging Face hub: a revision resolved to a commit, only the files needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabooth.errors import BaseModelError
from lorabooth.families.folder import PICKLE_SUFFIXES, pickle_error, similar_names
from lorabooth.progress import Reporter

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG_FILES = re.compile(
    r"model_index\.json|(?:unet|vae|text_encoder(?:_2)?)/config\.json|scheduler/scheduler_config\.json"
    r"|tokenizer(?:_2)?/(?:vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json)"
)
_WEIGHT_FILES = re.compile(
    r"(?P<part>unet|vae|text_encoder(?:_2)?)/(?:diffusion_pytorch_model|model)"
    r"(?P<variant>\.fp16)?(?:-\d{5}-of-\d{5})?(?P<late_variant>\.fp16)?"
    r"\.safetensors(?:\.index(?P<index_variant>\.fp16)?\.json)?"
)


def is_offline() -> bool:
    """Whether the user's environment forbids the hub (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def network_errors() -> tuple[type[Exception], ...]:
    """What the hub client raises when it cannot reach the hub; its HTTP library differs by version."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def get(
    repo: str, revision: str, online: bool, reporter: Reporter, *, configs_only: bool = False
) -> tuple[Path, str]:
    """Folder and commit of a hub model; from the local cache where it has the commit.

    Args:
        repo: "owner/name".
        revision: branch, tag or commit; empty is the default branch.
        online: whether the hub may be asked.
        reporter: told of the download.
        configs_only: no weights are needed; none are downloaded.

    Raises:
        BaseModelError: no such model or revision, gated, not safe, or not reachable and not cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if not online or _COMMIT.fullmatch(revision):
        cached = _from_cache(repo, revision, configs_only)
        if cached is not None:
            return cached
        if not online:
            raise _not_cached(repo, revision, "offline")
    try:
        info = HfApi(library_name="lorabooth").model_info(
            repo, revision=revision or None, files_metadata=True
        )
        return _download(repo, info, reporter, configs_only), str(info.sha)
    except GatedRepoError as error:
        raise gated(repo) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"{repo}: neither a folder here nor a model on the hub.",
            _did_you_mean(repo) + "Check the spelling; a private model needs `hf auth login` first.",
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"{repo}: the hub has no revision {revision!r} of it.",
            "Leave model.revision empty for the default.",
        ) from error
    except network_errors() as error:
        cached = _from_cache(repo, revision, configs_only)
        if cached is None:
            raise _not_cached(
                repo, revision, f"getting it failed: {type(error).__name__}: {str(error)[:120]}"
            ) from error
        reporter.warn(
            f"The hub cannot be reached; {repo} is taken from the local cache, commit {cached[1][:10]}."
        )
        return cached


def _from_cache(repo: str, revision: str, configs_only: bool) -> tuple[Path, str] | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # A snapshot folder may hold only a tokenizer that some other program wanted, or the configs of a plan.
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    if "model_index.json" not in names or not (configs_only or needed_files(names)):
        return None
    return folder, folder.name


def _download(repo: str, info: ModelInfo, reporter: Reporter, configs_only: bool) -> Path:
    """Get the files that are needed, and no others, into the hub cache: configs, tokenizer, safetensors."""
    names = [file.rfilename for file in info.siblings or ()]
    wanted = needed_files(names)
    if not wanted:
        pickles = any(Path(name).suffix in PICKLE_SUFFIXES for name in names)
        raise (
            pickle_error(Path(repo))
            if pickles
            else BaseModelError(
                f"{repo}: this hub repository holds no diffusers base model.",
                "Give one with a model_index.json, or download its .safetensors checkpoint and give that.",
            )
        )
    if configs_only:
        wanted = [name for name in wanted if _CONFIG_FILES.fullmatch(name)]
    return download_files(repo, info, wanted, reporter)


def download_files(repo: str, info: ModelInfo, wanted: Sequence[str], reporter: Reporter) -> Path:
    """The folder in the hub cache with some of a model's files, at one commit; those not there are fetched.

    Args:
        repo: "owner/name".
        info: of the commit, with the files' sizes.
        wanted: names of files.
        reporter: told of the download.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    shown = are_progress_bars_disabled()
    disable_progress_bars()
    total_mib = max(1, sum(sizes[name] for name in wanted) >> 20)
    try:
        with reporter.task(f"Getting {repo}", total_mib, "MiB") as task:
            for name in wanted:
                hf_hub_download(repo, name, revision=info.sha, library_name="lorabooth")
                task.advance(sizes[name] >> 20, file=name)
    finally:
        if not shown:
            enable_progress_bars()
    return Path(
        snapshot_download(repo, revision=info.sha, local_files_only=True, allow_patterns=list(wanted))
    )


def needed_files(names: list[str]) -> list[str]:
    """Of a hub repository's files, those that a Stable Diffusion base needs; pickles and duplicates never.

    SDXL's second text encoder is among them, so that such a base can be merged into.

    Full precision where a component has it, else its fp16 variant. Empty if there is no model_index.json, or
    a component has no safetensors.
    """
    if "model_index.json" not in names:
        return []
    wanted = [name for name in names if _CONFIG_FILES.fullmatch(name)]
    second = any(name.startswith("text_encoder_2/") for name in names)
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if second else ())):
        matches = [m for m in map(_WEIGHT_FILES.fullmatch, names) if m and m["part"] == part]
        plain = [m.string for m in matches if not (m["variant"] or m["late_variant"] or m["index_variant"])]
        chosen = plain or [m.string for m in matches]
        if not any(name.endswith(".safetensors") for name in chosen):
            return []
        wanted += chosen
    return sorted(wanted)


def _not_cached(repo: str, revision: str, why: str) -> BaseModelError:
    at = f" (revision {revision})" if revision else ""
    return BaseModelError(
        f"{repo}{at}: not a folder here, and not in the local hub cache ({why}).",
        _did_you_mean(repo) + "Give a folder or a .safetensors file, go online once (HF_HUB_OFFLINE unset), "
        "or use the built-in base: --base pocket",
    )


def _did_you_mean(repo: str) -> str:
    close = similar_names(Path(repo))
    return f"Did you mean the folder {close[0]}? " if close else ""


def gated(repo: str) -> BaseModelError:
    """What to do about a model whose licence has not been accepted."""
    return BaseModelError(
        f"{repo}: this model is gated: its licence has to be accepted first.",
        f"Open https://huggingface.co/{repo}, accept it, then log in once with `hf auth login`.",
    )
