"""What a prepared data set says about itself, and whether that is good enough for a run."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist.config import DataConfig
from sft_dist.data import store
from sft_dist.data.partial import Counts, Summary
from sft_dist.data.renderer import Renderer
from sft_dist.data.store import PreparedDataset, Refused
from sft_dist.errors import DataError

_NAMED_REFUSALS = 10


def build_manifest(
    fingerprints: Sequence[dict[str, str]], renderer: Renderer, summaries: Sequence[Summary], shards: Sequence[Path]
) -> dict[str, Any]:
    """All that store.py reads of a manifest but the formats of the sources.

    `summaries` of all chunks in input order, `shards` the files of those that have one. Records, not samples, are
    counted by num_records, num_rendered, num_refused, num_duplicates and num_split (records in several samples)."""
    by_source: dict[str, Counts] = {}
    for summary in summaries:
        for name, counts in summary.by_source.items():
            by_source[name] = by_source.get(name, Counts()) + counts
    total = sum(by_source.values(), Counts())
    reasons = Counter(item.reason for summary in summaries for item in summary.refused)
    return {
        "format": store.FORMAT,
        "sources": list(fingerprints),
        "tokenizer_and_template": renderer.fingerprint,
        "template": renderer.template,
        "num_records": total.num_records,
        "num_rendered": total.num_records - total.num_refused,
        "num_samples": total.num_samples,
        "num_tokens": total.num_tokens,
        "num_refused": dict(sorted(reasons.items())),
        "num_duplicates": _num_duplicates(shards),
        "num_split": sum(summary.num_split for summary in summaries),
        "by_source": {name: asdict(counts) for name, counts in by_source.items()},
        "stop_ids": sorted({i for summary in summaries for i in summary.stop_ids}),
        "shards": [asdict(summary.shard) for summary in summaries if summary.shard is not None],
    }


def summarise(reasons: Counter[str]) -> str:
    """`9 too long, 3 unknown role`"""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def _num_duplicates(paths: Sequence[Path]) -> int:
    """Records whose content an earlier one has already."""
    parts = [store.read_digests(path) for path in paths]
    if not parts:
        return 0
    digests, indices = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    _, first_sample = np.unique(indices, return_index=True)
    return len(first_sample) - len(np.unique(digests[first_sample].view("u8,u8")))


def check_refused(dataset: PreparedDataset, data: DataConfig, *, may_be_empty: bool = False) -> None:
    """Raise DataError where more is refused than the run file allows, or all is (unless it may be)."""
    manifest = dataset.manifest
    reasons = Counter(manifest["num_refused"])
    num_refused, num_records = sum(reasons.values()), manifest["num_records"]
    if data.on_bad_record == "error" and num_refused:
        raise DataError(
            f"{num_refused:,} record(s) cannot be trained on:\n{_named(dataset, num_refused)}\n"
            "  mend them, or set data.on_bad_record: refuse to leave such records out, counted and listed"
        )
    if not manifest["num_samples"] and not may_be_empty:
        paths = ", ".join(item["path"] for item in manifest["sources"])
        raise DataError(f"{paths}: no conversation is left: {summarise(reasons)}\n{_named(dataset, num_refused)}")
    if num_refused > data.max_refused * num_records:
        raise DataError(
            f"{num_refused:,} of {num_records:,} records ({num_refused / num_records:.1%}) cannot be trained on, more "
            f"than data.max_refused ({data.max_refused:.1%}, of all records of these sources together): "
            f"{summarise(reasons)}\n{_named(dataset, num_refused)}\n"
            "  mend them, or raise data.max_refused to go on without them"
        )


def _named(dataset: PreparedDataset, num_refused: int) -> str:
    with open(dataset.folder / store.REFUSED, encoding="utf-8") as file:
        items = [Refused(**json.loads(line)) for line in islice(file, _NAMED_REFUSALS)]
    lines = [f"  {item.where}: {item.reason}: {item.detail}" for item in items]
    if num_refused > len(items):
        lines.append(f"  and {num_refused - len(items):,} more (listed in {dataset.folder / store.REFUSED})")
    return "\n".join(lines)
