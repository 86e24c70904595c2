"""Parquet files of a hub data set, from the hub or from its local cache, found or refused within seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import AssetError

TIMEOUT = 10.0  # seconds the hub has to answer a question about what it holds


def parquet_files(repository: str, patterns: Sequence[str]) -> dict[str, list[Path]]:
    """The data set's files matching each pattern (shell style), in order of name.

    Raises:
        AssetError: the hub cannot be reached and the files are not in its cache, or the data set has no such file.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns), etag_timeout=TIMEOUT)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AssetError(_unreachable(repository, error)) from None
    found = {pattern: sorted(folder.glob(pattern)) for pattern in patterns}
    if missing := [pattern for pattern, files in found.items() if not files]:
        raise AssetError(_unreachable(repository, f"no file {', '.join(missing)} in {folder}"))
    return found


def _unreachable(repository: str, why: object) -> str:
    reason = " ".join(str(why).split())
    return (
        f"data set {repository} could not be had from the hub: {reason[:300]} Offline: put the task's files in a folder "
        "and name it by data_dir=… or by the environment variable LORAKIT_DATA, or fill the hub's cache (HF_HOME) on a "
        "machine with a network."
    )
