"""`tulu` of a million rows takes no more memory than of a hundred thousand (`make long`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SHARD = 50_000  # rows
BYTES = 48  # a row may cost: its place, its number in hash order and its length, each twice for a moment
LOADED = """
import sys, resource
from lorakit import models, tasks

def mine():  # memory that is not a file's, in bytes
    told = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(told["RssAnon"].split()[0]) * 1024

tokenizer = models.load("toy-decoder", "causal").tokenizer
before = mine()
task = tasks.load("tulu", tokenizer, data_files=sys.argv[1], max_length=64)
assert all(task.train["input_ids"][:1000])  # they can be read
print(len(task.train), mine() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def shards(folder: Path, rows: int) -> None:
    """Chats of a few words, all different."""
    folder.mkdir()
    for start in range(0, rows, SHARD):
        chats = [
            [{"role": "user", "content": f"add {row} and 1"}, {"role": "assistant", "content": f"{row + 1}"}]
            for row in range(start, start + SHARD)
        ]
        parquet.write_table(pyarrow.table({"messages": chats}), folder / f"{start}.parquet", row_group_size=1000)


def test_memory_is_flat_over_a_million_rows(tmp_path):
    kept = {}
    for rows in (2 * SHARD, 20 * SHARD):
        shards(tmp_path / str(rows), rows)
        out = subprocess.check_output([sys.executable, "-c", LOADED, str(tmp_path / str(rows))], text=True)
        count, grown, most = map(int, out.split())
        assert count == rows - 4000
        kept[rows] = grown
        print(json.dumps({"rows": rows, "grown, MiB": grown / 2**20, "most resident, MiB": most / 2**20}), flush=True)
    few, many = kept.values()
    assert many - few < BYTES * 18 * SHARD, kept
