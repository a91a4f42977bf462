"""Prepared data sets from samples at hand, through the real store."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_dist.data import store
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Policy, Selection
from sft_dist.data.store import PreparedDataset


def prepared(folder: Path, samples: Sequence[Sample]) -> PreparedDataset:
    folder.mkdir(parents=True, exist_ok=True)
    shard = store.write_shard(folder / "shard-00000.arrow", samples)
    store.write_refused(folder / store.REFUSED, [])
    manifest = {"shards": [asdict(shard)], "num_refused": {}, "num_records": len(samples), "stop_ids": []}
    store.write_manifest(folder / store.MANIFEST, manifest)
    return PreparedDataset(folder)


def select(folder: Path, samples: Sequence[Sample], **policy: Any) -> Selection:
    return Selection(prepared(folder, samples), Policy(**({"max_length": 10_000} | policy)))
