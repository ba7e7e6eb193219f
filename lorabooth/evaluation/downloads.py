"""Metric models from the Hugging Face hub: a commit, only safetensors, only the files needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorabooth.errors import BaseModelError
from lorabooth.families import hub
from lorabooth.progress import Reporter

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Kind = Literal["image", "clip", "lpips"]

_WEIGHTS = "model.safetensors"
_CONFIGS = ("config.json", "preprocessor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# The hub's own bot offers the safetensors of older repositories as an open pull request; transformers looks
# there too. openai/clip-vit-base-patch32 is such a one.
_BOT = "SFconvertbot"


def needed_files(names: list[str], kind: Kind) -> list[str]:
    """Of a hub repository's files, those that a metric model needs, never pickles; empty: it is none."""
    wanted = {"image": _CONFIGS, "clip": (*_CONFIGS, *_TOKENIZER), "lpips": ()}[kind]
    found = [name for name in (*wanted, _WEIGHTS) if name in names]
    needs_words = kind == "clip" and not {"tokenizer.json", "vocab.json"} & set(found)
    whole = _WEIGHTS in found and (kind == "lpips" or set(_CONFIGS) <= set(found)) and not needs_words
    return found if whole else []


def model_folder(repo: str, kind: Kind, reporter: Reporter) -> tuple[Path, str]:
    """Folder and commit of a metric model; from the local cache where the hub cannot be asked.

    Args:
        repo: "owner/name".
        kind: what is needed of it.
        reporter: told of the download.

    Raises:
        BaseModelError: no such model, gated, without safetensors, or not reachable and not cached.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if hub.is_offline():
        return _from_cache(repo, kind, "offline")
    try:
        info = _model_info(repo, kind)
        wanted = needed_files([file.rfilename for file in info.siblings or ()], kind)
        return hub.download_files(repo, info, wanted, reporter), str(info.sha)
    except GatedRepoError as error:
        raise hub.gated(repo) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(f"{repo}: neither a folder here nor a model on the hub.") from error
    except hub.network_errors() as error:
        found = _from_cache(repo, kind, f"getting it failed: {type(error).__name__}: {str(error)[:120]}")
        reporter.warn(f"The hub cannot be reached; {repo} is taken from the local cache.")
        return found


def _model_info(repo: str, kind: Kind) -> ModelInfo:
    """The commit that has the needed files: the default branch's, or the bot's conversion of it."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="lorabooth")
    info = api.model_info(repo, files_metadata=True)
    if needed_files([file.rfilename for file in info.siblings or ()], kind):
        return info
    for offer in api.get_repo_discussions(
        repo, author=_BOT, discussion_type="pull_request", discussion_status="open"
    ):
        converted = api.model_info(repo, revision=offer.git_reference, files_metadata=True)
        if needed_files([file.rfilename for file in converted.siblings or ()], kind):
            return converted
    raise BaseModelError(
        f"{repo}: this hub repository has no {_WEIGHTS} with its config; pickles are not read."
    )


def _from_cache(repo: str, kind: Kind, why: str) -> tuple[Path, str]:
    """The whole copy in the cache that was last fetched.

    Not by the name of a branch: a bot's conversion is on none.

    Raises:
        BaseModelError: there is none.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"
    copies = sorted(cache.glob("*/"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in copies:
        if needed_files([file.name for file in folder.iterdir() if file.is_file()], kind):
            return folder, folder.name
    raise BaseModelError(
        f"{repo}: not a folder here, and not in the local hub cache ({why}).",
        "Go online once (HF_HUB_OFFLINE unset), or give a folder that holds it.",
    )
