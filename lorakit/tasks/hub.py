"""Parquet files of a hub data set, from the hub or from its local cache, found or refused within seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import AssetError

TIMEOUT = 5.0  # seconds the hub has to say which revision of a data set it holds


def parquet_files(repository: str, patterns: Sequence[str]) -> dict[str, list[Path]]:
    """The data set's files matching each pattern (shell style), in order of name.

    Raises:
        AssetError: the hub cannot be reached and the files are not in its cache, or the data set has no such file.
    """
    folder = _snapshot(repository, patterns)
    found = {pattern: sorted(folder.glob(pattern)) for pattern in patterns}
    if missing := [pattern for pattern, files in found.items() if not files]:
        raise AssetError(_refusal(repository, f"no file {', '.join(missing)}"))
    return found


def _snapshot(repository: str, patterns: Sequence[str]) -> Path:
    """The hub's newest revision; the newest one in the local cache while the hub cannot be asked."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision, why = HfApi().dataset_info(repository, timeout=TIMEOUT).sha, None
    except Exception as error:  # whatever its HTTP client of the day raises
        revision, why = None, error
    try:
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=revision is None,
            )
        )
    except Exception as error:
        raise AssetError(_refusal(repository, why or error)) from None


def _refusal(repository: str, why: object) -> str:
    reason = " ".join(str(why).split())[:200]
    return (
        f"data set {repository} could not be had from the hub ({reason}). Offline: put the task's files in a folder "
        "and name it by data_dir=… or by the environment variable LORAKIT_DATA, or fill the hub's cache (HF_HOME) on a "
        "machine with a network"
    )
