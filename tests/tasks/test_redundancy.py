"""A stream with a known share of redundant batches: how many, which, from what, and how alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from lorakit.errors import ParameterError
from lorakit.params import Params
from lorakit.tasks.redundancy import redundant_stream, thinned

FIRST, LAST, MARK = 1, 2, 3  # special tokens
ROWS, SIZE, POOL = 203, 8, 12  # 25 batches, 3 rows over
TOPICS = 6
KINDS = ("repeat", "near")


def classified(rows: int = ROWS) -> Dataset:
    """Each row has a token of its own (100 + row) in the middle, and words of one of six topics."""
    rng = np.random.default_rng(0)
    columns = {"input_ids": [], "attention_mask": [], "labels": [], "row": []}
    for row in range(rows):
        words = (10 + 10 * (row % TOPICS) + rng.integers(10, size=int(rng.integers(20, 30)))).tolist()
        ids = [FIRST, *words[:9], 100 + row, MARK, *words[9:], LAST]
        for name, value in zip(columns, (ids, [1] * len(ids), row % 2, row), strict=True):
            columns[name].append(value)
    return Dataset.from_dict(columns)


def causal() -> Dataset:
    rows = classified()
    labels = [[-100] * 12 + ids[12:] for ids in rows["input_ids"]]
    return rows.remove_columns("labels").add_column("labels", labels)


def stream(rows: Dataset | None = None, **options):
    settings = {"share": 0.4, "kind": "repeat", "batch_size": SIZE, "pool": POOL, "seed": 0, "special": {MARK}}
    return redundant_stream(classified() if rows is None else rows, **settings | options)


def numbers(rows: Dataset) -> np.ndarray:
    return np.array(rows["row"]).reshape(-1, SIZE)


def pool_of(rows: Dataset, redundant: np.ndarray) -> set[int]:
    return set(numbers(rows)[redundant].ravel().tolist())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_the_share_is_exact_and_the_length_that_of_whole_batches(kind, share):
    rows, redundant = stream(share=share, kind=kind)
    assert redundant.shape == (25,) and redundant.dtype == bool
    assert redundant.sum() == round(share * 25)
    assert len(rows) == 25 * SIZE and rows.column_names == classified().column_names
    assert rows.features == classified().features


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides(kind):
    (first, places), (again, same), (other, moved) = stream(kind=kind), stream(kind=kind), stream(kind=kind, seed=1)
    assert first.to_dict() == again.to_dict() and (places == same).all()
    assert first["row"] != other["row"] and (places != moved).any()


def test_redundant_batches_are_spread_and_drawn_from_a_small_pool():
    rows, redundant = stream()
    pool = pool_of(rows, redundant)
    assert len(pool) == POOL  # ten batches of eight: every row of it came up
    assert not redundant[:10].all() and redundant[5:20].any()
    assert all(len(set(batch)) == SIZE for batch in numbers(rows)[redundant].tolist())
    fresh = numbers(rows)[~redundant].ravel()
    assert len(set(fresh)) == len(fresh) == 15 * SIZE  # each once
    assert not pool & set(fresh.tolist())
    assert sorted(fresh) != fresh.tolist()
    source = classified()
    assert all(row == source[row["row"]] for row in rows)  # whole rows, as they were
    assert len(pool_of(*stream(pool=3))) == 3  # smaller than a batch


def test_fresh_rows_start_over_when_used_up_and_never_enter_the_pool():
    rows, redundant = stream(share=0.0, pool=150)  # 53 rows for 200 places
    assert not redundant.any()
    times = Counter(numbers(rows).ravel().tolist())
    assert len(times) == ROWS - 150 and set(times.values()) == {3, 4}
    passes = numbers(rows).ravel()[: 3 * 53].reshape(3, 53).tolist()
    assert all(sorted(one) == sorted(times) for one in passes)
    assert passes[0] != passes[1] != passes[2]  # shuffled anew


def test_the_pool_and_the_walk_do_not_depend_on_share_or_kind():
    rows, redundant = stream(share=0.4)
    more, most = stream(share=0.8)
    near, same = stream(kind="near")
    assert pool_of(rows, redundant) == pool_of(more, most)
    assert near["row"] == rows["row"] and (same == redundant).all()
    fresh, fewer = numbers(rows)[~redundant].ravel(), numbers(more)[~most].ravel()
    assert (fresh[: len(fewer)] == fewer).all()


@pytest.mark.parametrize("build", [classified, causal])
def test_near_duplicates_lack_a_tenth_of_their_ordinary_tokens(build):
    source = build()
    rows, redundant = stream(source, kind="near")
    lost = ordinary = differing = 0
    for place, row in enumerate(rows):
        original = source[row["row"]]
        if not redundant[place // SIZE]:
            assert row == original
            continue
        kept = Counter(row["input_ids"])
        assert kept <= Counter(original["input_ids"])
        assert kept.total() > 0.8 * len(original["input_ids"])
        assert row["input_ids"][0] == FIRST and row["input_ids"][-1] == LAST and MARK in row["input_ids"]
        assert len(row["attention_mask"]) == len(row["input_ids"])
        ordinary += len(original["input_ids"]) - 3
        lost += len(original["input_ids"]) - len(row["input_ids"])
        differing += row["input_ids"] != original["input_ids"]
        if build is classified:
            assert row["labels"] == original["labels"]
        else:  # a label is the token it stands at, or none
            start = row["input_ids"].index(MARK) + 1
            assert row["labels"] == [-100] * start + row["input_ids"][start:]
    assert lost / ordinary == pytest.approx(0.1, abs=0.01)
    assert differing == redundant.sum() * SIZE
    copies = Counter(tuple(row["input_ids"]) for place, row in enumerate(rows) if redundant[place // SIZE])
    assert len(copies) > 5 * POOL  # not the same tokens each time


def test_tokens_keep_their_order_and_extra_columns_their_values():
    row = {"input_ids": list(range(50)), "token_type_ids": list(range(50)), "labels": 1, "spans": [4, 5]}
    copy = thinned(row, 0.5, frozenset(), np.random.default_rng(0))
    assert copy["input_ids"] == copy["token_type_ids"] == sorted(copy["input_ids"])
    assert len(copy["input_ids"]) in (26, 27)
    assert copy["labels"] == 1 and copy["spans"] == [4, 5]


def test_what_a_row_predicts_last_stays():
    rng = np.random.default_rng(0)
    row = {"input_ids": [1, 9, 8, 7, 6, 2], "labels": [-100, -100, -100, 7, 6, -100]}
    assert all(thinned(row, 0.9, frozenset(), rng)["labels"][-2] == 6 for _ in range(20))


@pytest.mark.parametrize("ids", [[1], [1, 2], [1, 9, 2], [1, 3, 2], [1, 9, 9, 2]])
def test_short_rows_keep_a_token_and_a_label(ids):
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert len(thinned({"input_ids": ids, "labels": 0}, 0.9, {3}, rng)["input_ids"]) >= min(3, len(ids))
        labels = [-100, *ids[1:-1], -100][: len(ids)]
        assert thinned({"input_ids": ids, "labels": labels}, 0.9, {3}, rng)["labels"][1:-1][-1:] == ids[1:-1][-1:]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"pool": 0}, "redundancy_pool=0"), ({"pool": ROWS}, f"redundancy_pool={ROWS}"),
     ({"batch_size": ROWS + 1}, f"batch_size={ROWS + 1}"), ({"batch_size": 0}, "batch_size=0")],
)  # fmt: skip
def test_bad_input(options, named):
    with pytest.raises(ParameterError, match=named):
        stream(**options)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"redundancy": 1.0}, r"redundancy=1\.0"), ({"redundancy": -0.1}, r"redundancy=-0\.1"),
     ({"redundancy": float("nan")}, "redundancy=nan"), ({"redundancy_pool": 0}, "redundancy_pool=0"),
     ({"redundancy_kind": "far"}, "redundancy_kind='far': .*'repeat' or 'near'")],
)  # fmt: skip
def test_a_run_cannot_ask_for_it(given, named):
    with pytest.raises(ParameterError, match=named):
        Params(**given)


def test_packed_rows_cannot_be_thinned():
    packed = causal().add_column("position_ids", [list(range(len(ids))) for ids in classified()["input_ids"]])
    with pytest.raises(ParameterError, match="redundancy_kind='near'.*packed"):
        stream(packed, kind="near")
    assert stream(packed)[0].column_names == packed.column_names
