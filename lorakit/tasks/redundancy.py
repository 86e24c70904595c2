"""Redundancy on purpose: of the N batches of a stream, exactly R = round(share · N) say what others say already.

A gate over batches can pay only where batches are redundant. Here that share is a knob, and which batches they are is
known. The same seed gives the same pool, the same place of each batch and the same fresh rows for both kinds, and the
same pool for every share.
"""

from collections.abc import Set
from typing import Any

import numpy as np
from datasets import Dataset

from lorakit.errors import require
from lorakit.head import IGNORED

DROP = 0.1  # share of a near-duplicate's ordinary tokens that it lacks; at least one stays


def redundant_stream(
    rows: Dataset, *, share: float, kind: str, batch_size: int, pool: int, seed: int, special: Set[int] = frozenset()
) -> tuple[Dataset, np.ndarray]:
    """Training rows as a stream to be read in order, `batch_size` at a time, of which a known share is redundant.

    The fresh batches walk through a shuffled permutation of the rows outside the pool, and through another one when
    it is used up. The redundant ones are

    "repeat": drawn from a pool of `pool` rows, without replacement inside a batch where the pool is large enough;
    "near": the same draws, but every copy has a share `DROP` of its ordinary tokens dropped at random.

    Of the batches of a pool the first ones are news; only from then on is a redundant one redundant.

    Args:
        rows: with `input_ids` and whatever a training row has; every list as long as `input_ids` is taken to be per
            token ("near").
        share: of the batches to be redundant; kind, pool: for their ranges see `lorakit.settings.DataSettings`.
        seed: of everything random, at least 0.
        special: token ids never dropped, beside a row's first, its last and the last it predicts.

    Returns:
        The stream, `batch_size · N` rows with N = rows // batch_size, and for each batch whether it is redundant, (N,).

    Raises:
        ParameterError: naming the run's parameter: `redundancy_kind`, `redundancy_pool`, `batch_size`.
    """
    require(1 <= batch_size <= len(rows), "batch_size", batch_size, f"must be in 1 to {len(rows)}, the training rows")
    require(1 <= pool < len(rows), "redundancy_pool", pool, f"must be at least 1 and less than the {len(rows)} rows")
    packed = "position_ids" in rows.column_names
    require(kind != "near" or not packed, "redundancy_kind", kind, "drops tokens, which packed rows cannot spare")
    for_rows, for_places, for_fresh, for_redundant = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
    batches = len(rows) // batch_size
    count = round(share * batches)
    pooled, outside = np.split(for_rows.permutation(len(rows)), [pool])
    # a row is twice in a batch only where the pool is smaller than the batch
    drawn = [for_redundant.choice(pooled, batch_size, replace=pool < batch_size) for _ in range(count)]
    redundant = for_places.permutation(batches) >= batches - count
    stream = np.empty((batches, batch_size), dtype=np.int64)
    stream[redundant] = np.array(drawn, dtype=np.int64).reshape(-1, batch_size)
    fresh = (batches - count) * batch_size  # rows: a permutation of those outside, then another
    walks = [for_fresh.permutation(outside) for _ in range(-(-fresh // max(1, len(outside))))]
    stream[~redundant] = np.concatenate([outside[:0], *walks])[:fresh].reshape(-1, batch_size)
    ordered_rows = rows.select(stream.ravel())
    if kind == "near":
        copied = zip(ordered_rows, redundant.repeat(batch_size), strict=True)
        made = [thinned(row, DROP, special, for_redundant) if it else row for row, it in copied]
        ordered_rows = Dataset.from_list(made, features=rows.features)
    return ordered_rows, redundant


# near-duplicates ------------------------------------------------------------------------------------


def thinned(row: dict[str, Any], drop: float, special: Set[int], rng: np.random.Generator) -> dict[str, Any]:
    """`row` without `drop` of its ordinary tokens, on average exactly; a row's class and other values stay."""
    length = len(row["input_ids"])
    labels, held = row.get("labels"), {0, length - 1}
    if isinstance(labels, list):  # the last one predicted is held as well, so that every row has a loss
        held |= set([place for place, label in enumerate(labels) if label != IGNORED][-1:])
    ordinary = [p for p, token in enumerate(row["input_ids"]) if p not in held and token not in special]
    count = min(int(drop * len(ordinary) + rng.random()), max(0, len(ordinary) - 1))
    gone = set(rng.choice(ordinary, count, replace=False).tolist()) if count else set()
    kept = [place for place in range(length) if place not in gone]
    per_token = {name for name, value in row.items() if isinstance(value, list) and len(value) == length}
    return {name: [value[p] for p in kept] if name in per_token else value for name, value in row.items()}
