"""Prepared data sets from samples at hand, through the real store."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_dist.data import store
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Policy, Selection
from sft_dist.data.store import PreparedDataset, Shard


def prepared(folder: Path, samples: Sequence[Sample]) -> PreparedDataset:
    folder.mkdir(parents=True, exist_ok=True)
    shard = store.write_shard(folder / "shard-00000.arrow", samples)
    store.write_refused(folder / store.REFUSED, [])
    return with_manifest(folder, [shard], num_records=len(samples))


def with_manifest(folder: Path, shards: Sequence[Shard], **facts: Any) -> PreparedDataset:
    """The data set of shards that lie in a folder, one sample a record unless `facts` say otherwise."""
    num_samples = sum(shard.num_samples for shard in shards)
    manifest: dict[str, Any] = dict.fromkeys(("num_records", "num_rendered", "num_samples"), num_samples)
    manifest |= {"format": store.FORMAT, "num_split": 0, "num_duplicates": 0, "num_refused": {}, "template": None}
    manifest |= {"sources": [], "formats": {}, "stop_ids": [], "shards": list(map(asdict, shards))}
    store.write_manifest(folder / store.MANIFEST, manifest | facts)
    return PreparedDataset(folder)


def select(folder: Path, samples: Sequence[Sample], **policy: Any) -> Selection:
    return Selection(prepared(folder, samples), Policy(**({"max_length": 10_000} | policy)))
