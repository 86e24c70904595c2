"""The model hub: its newest commit, asked for within seconds; files of a data set or a model; else its local cache."""

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from lorakit.errors import AssetError, DataError

TIMEOUT = 5.0  # seconds for the one question asked before anything is downloaded


def newest_commit(repository: str, kind: Literal["model", "dataset"]) -> str:
    """The newest commit of a repository.

    Raises:
        AssetError: with the reason in words, which fit into a sentence.
    """
    try:
        return getattr(huggingface_hub.HfApi(), f"{kind}_info")(repository, timeout=TIMEOUT).sha
    except GatedRepoError:
        raise AssetError("on the hub it is gated (accept its terms there, then `hf auth login`)") from None
    except RepositoryNotFoundError:
        raise AssetError("not on the hub (or private)") from None
    except OfflineModeIsEnabled:
        raise AssetError("the hub is switched off (HF_HUB_OFFLINE) and its local cache does not have it") from None
    except Exception as error:  # the hub's client raises its transport's own exceptions, which differ by version
        raise AssetError(f"the hub is unreachable ({_line(error)})") from None


def cached_commit(model: str) -> str | None:
    """The newest commit of a model in the hub's local cache; None where it has none."""
    found = huggingface_hub.try_to_load_from_cache(model, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def download_model(model: str, commit: str, weights: Sequence[str]) -> None:
    """Put a model's files into the hub's local cache, progress bars shown; `weights` of the first pattern it has.

    Raises:
        AssetError: the connection was lost or the disk is full; finished files stay in the cache.
    """
    try:
        files = huggingface_hub.HfApi().list_repo_files(model, revision=commit)
        chosen = next((pattern for pattern in weights if fnmatch.filter(files, pattern)), weights[0])
        patterns = ["*.json", "*.txt", "*.model", chosen]
        huggingface_hub.snapshot_download(model, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as error:  # as above
        raise AssetError(f"model={model!r}: download from the hub failed: {_line(error)}") from None


class NoSnapshot(DataError):
    """A folder is not what the hub keeps of a data set."""


def data_files(repository: str, under: str, splits: Iterable[str], folder: Path | None = None) -> list[list[Path]]:
    """A data set's Parquet files by split, in order of name: of its newest commit, or from the local cache.

    Args:
        under: the folder they are in there.
        folder: a snapshot of the data set, which is read instead.

    Raises:
        AssetError: the hub cannot be reached and the files are not in its cache, or the data set has no such file.
        NoSnapshot: `folder` has none of these files.
        DataError: it lacks some.
    """
    patterns = [f"{under}/{split}-*.parquet" for split in splits]
    if folder is not None:
        found, missing = _matching(folder, patterns)
        if missing:
            told = f"data_files: {folder} is no snapshot of the hub's {repository}: no file {', '.join(missing)}"
            raise (DataError if any(found) else NoSnapshot)(told)
        return found
    commit = why = None
    try:
        commit = newest_commit(repository, "dataset")
    except AssetError as error:
        why = error
    options = {"revision": commit, "allow_patterns": patterns, "local_files_only": commit is None}
    try:
        snapshot = huggingface_hub.snapshot_download(repository, repo_type="dataset", **options)
        found, missing = _matching(Path(snapshot), patterns)
        if not missing:
            return found
        why = f"no file {', '.join(missing)}"
    except Exception as error:  # as above
        why = why or error
    raise AssetError(
        f"data set {repository} could not be had from the hub ({' '.join(str(why).split()):.200}). Offline: put "
        "the task's files in a folder and name it by data_files=… or by the environment variable LORAKIT_DATA, or fill "
        "the hub's cache (HF_HOME) on a machine with a network"
    )


def _matching(folder: Path, patterns: Sequence[str]) -> tuple[list[list[Path]], list[str]]:
    """The files of each pattern, in order of name, and the patterns without any."""
    found = [sorted(folder.glob(pattern)) for pattern in patterns]
    return found, [pattern for pattern, files in zip(patterns, found, strict=True) if not files]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
