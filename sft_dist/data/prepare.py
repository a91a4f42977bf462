"""Text to a prepared data set: read, convert, render, verify, store. Content-addressed, atomic, safe to run twice.

The same sources, template and tokenizer give the same folder name and the same bytes for any number of processes.
One process prepares under a file lock, others wait for the manifest. Never imports torch or starts process groups.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from filelock import FileLock

from sft_dist.config import DataConfig, ModelConfig, SourceConfig
from sft_dist.data import formats, store
from sft_dist.data.conversation import Record, RecordError
from sft_dist.data.formats import Row
from sft_dist.data.renderer import Renderer, load_renderer
from sft_dist.data.rendering import render
from sft_dist.data.sample import Sample
from sft_dist.data.store import PreparedDataset, Refused, Shard
from sft_dist.errors import DataError, StorageError

# Records in one shard, whatever the number of processes: the shards' bytes must not depend on it.
RECORDS_PER_SHARD = 2_000
_NAMED_REFUSALS = 10

OnBadRecord = Literal["error", "refuse"]


@dataclass(frozen=True, slots=True)
class _ShardResult:
    shard: Shard | None
    num_records: int
    num_rendered: int
    num_tokens: int
    refused: tuple[Refused, ...]
    stop_ids: tuple[int, ...]


def prepare(sources: Sequence[SourceConfig], model: ModelConfig, data: DataConfig) -> PreparedDataset:
    """Return the prepared data set of these sources, preparing it first where it does not exist.

    Raises DataError for broken files, for bad records when data.on_bad_record is `error`, and when nothing is left.
    """
    formats.check_sources(sources)
    renderer = load_renderer(model, data)
    fingerprints = [
        {
            "path": source.path,
            "name": formats.source_name(source),
            "format": source.format,
            "sha256": formats.source_fingerprint(source),
        }
        for source in sources
    ]
    key = _key(renderer, fingerprints, data)
    cache = Path(data.cache_dir)
    folder = cache / key
    if not (folder / store.MANIFEST).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{key}.lock"):
                if not (folder / store.MANIFEST).exists():
                    _prepare_into(folder, sources, fingerprints, renderer, model, data)
        except OSError as error:
            raise StorageError(f"data.cache_dir: {cache}: cannot be written: {error.strerror or error}") from error
    return PreparedDataset(folder)


def _key(renderer: Renderer, fingerprints: Sequence[dict[str, str]], data: DataConfig) -> str:
    # Not the folder: the same data elsewhere is the same data.
    content = [[item["name"], item["format"], item["sha256"]] for item in fingerprints]
    text = json.dumps([store.FORMAT, renderer.fingerprint, content, data.on_bad_record])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _prepare_into(
    folder: Path,
    sources: Sequence[SourceConfig],
    fingerprints: list[dict[str, str]],
    renderer: Renderer,
    model: ModelConfig,
    data: DataConfig,
) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died; we hold the lock
    temporary.mkdir()
    try:
        results = list(_progress(_shard_results(temporary, sources, renderer, model, data)))
        refused = [item for result in results for item in result.refused]
        if refused and data.on_bad_record == "error":
            raise DataError(_bad_records(refused))
        shards = [result.shard for result in results if result.shard is not None]
        num_samples = sum(shard.num_samples for shard in shards)
        if not num_samples:
            reasons = summarise(Counter(item.reason for item in refused)) if refused else "the sources hold no records"
            raise DataError(f"{', '.join(item['path'] for item in fingerprints)}: no conversation is left: {reasons}")
        store.write_refused(temporary, refused)
        manifest = {
            "format": store.FORMAT,
            "sources": fingerprints,
            "tokenizer_and_template": renderer.fingerprint,
            "template": renderer.template,
            "num_records": sum(result.num_records for result in results),
            "num_rendered": sum(result.num_rendered for result in results),
            "num_samples": num_samples,
            "num_tokens": sum(result.num_tokens for result in results),
            "num_refused": dict(sorted(Counter(item.reason for item in refused).items())),
            "stop_ids": sorted({i for result in results for i in result.stop_ids}),
            "shards": [asdict(shard) for shard in shards],
        }
        store.write_manifest(temporary, manifest)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def summarise(reasons: Counter[str]) -> str:
    """`9 too long, 3 unknown role`"""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def _bad_records(refused: Sequence[Refused]) -> str:
    named = "\n".join(f"  {item.where}: {item.reason}: {item.detail}" for item in refused[:_NAMED_REFUSALS])
    more = len(refused) - _NAMED_REFUSALS
    rest = f"\n  and {more:,} more" if more > 0 else ""
    return (
        f"{len(refused):,} record(s) cannot be trained on:\n{named}{rest}\n"
        "  mend them, or set data.on_bad_record: refuse to leave such records out, counted and listed"
    )


def _shard_results(
    folder: Path, sources: Sequence[SourceConfig], renderer: Renderer, model: ModelConfig, data: DataConfig
) -> Iterator[_ShardResult]:
    """One result per shard, in input order, from as many processes as asked for."""
    chunks = _chunks(_all_rows(sources))
    first = list(islice(chunks, 2))
    num_processes = data.num_processes or len(os.sched_getaffinity(0))
    if len(first) < 2 or num_processes == 1:
        for number, chunk in enumerate(chain(first, chunks)):
            yield _render_shard(renderer, folder, number, chunk)
        return
    # spawn: forking a process in which a tokenizer has started threads can deadlock.
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(model, data),
    )
    try:
        waiting: list[Future[_ShardResult]] = []
        for number, chunk in enumerate(chain(first, chunks)):
            waiting.append(pool.submit(_render_shard_in_worker, folder, number, chunk))
            if len(waiting) > 2 * num_processes:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _all_rows(sources: Sequence[SourceConfig]) -> Iterator[Row]:
    index = 0
    for source in sources:
        before = index
        for row in formats.read_rows(source, index):
            index = row.index + 1
            yield row
        if index == before:
            raise DataError(f"{source.path}: it holds no records")


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, RECORDS_PER_SHARD)):
        yield chunk


_worker_renderer: Renderer | None = None  # set once per worker process: a tokenizer takes seconds to load


def _start_worker(model: ModelConfig, data: DataConfig) -> None:
    global _worker_renderer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_renderer = load_renderer(model, data)


def _render_shard_in_worker(folder: Path, number: int, chunk: list[Row]) -> _ShardResult:
    assert _worker_renderer is not None
    return _render_shard(_worker_renderer, folder, number, chunk)


def _render_shard(renderer: Renderer, folder: Path, number: int, chunk: list[Row]) -> _ShardResult:
    records: list[Record] = []
    refused: list[Refused] = []
    for row in chunk:
        try:
            records.append(formats.to_record(row))
        except RecordError as error:
            refused.append(Refused(row.where, row.default_id, error.reason, error.detail))
    samples: list[Sample] = []
    for record, result in zip(records, render(renderer, records), strict=True):
        if isinstance(result, RecordError):
            refused.append(Refused(record.where, record.id, result.reason, result.detail))
        else:
            samples += result
    shard = store.write_shard(folder / f"shard-{number:05d}.arrow", samples) if samples else None
    stops = {int(s.ids[span.output_end - 1]) for s in samples for span in s.spans if span.turn and span.is_owned}
    return _ShardResult(
        shard,
        num_records=len(chunk),
        num_rendered=len(chunk) - len(refused),
        num_tokens=sum(len(sample.ids) for sample in samples),
        refused=tuple(refused),
        stop_ids=tuple(sorted(stops)),
    )


def _progress(results: Iterator[_ShardResult], every_s: float = 2.0) -> Iterator[_ShardResult]:
    """Pass results through and say every two seconds how far it is."""
    started = last = time.monotonic()
    records = tokens = 0
    for result in results:
        records += result.num_records
        tokens += result.num_tokens
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            rate = tokens / (now - started)
            print(f"prepare  {records:,} records  {tokens:,} tokens  {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        yield result
