"""Text to a prepared data set: read, convert, render, verify, store. Content-addressed, atomic, safe to run twice.

The same sources, template and tokenizer give the same folder name and the same bytes for any number of processes and
ranks, interrupted or not. Ranks share the work through the folder alone (data/partial.py): chunk c belongs to rank
c mod size. Never imports torch or starts process groups.
"""

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from functools import partial as bind
from importlib.metadata import version
from itertools import chain, islice
from math import ceil
from pathlib import Path

from sft_dist.config import DataConfig, ModelConfig, RecordFormat, SourceConfig
from sft_dist.data import formats, readers
from sft_dist.data.conversation import Record, RecordError, printable
from sft_dist.data.formats import Row
from sft_dist.data.manifest import build_manifest, check_refused
from sft_dist.data.partial import Counts, Partial, Summary
from sft_dist.data.progress import Progress, Reporter
from sft_dist.data.renderer import Renderer, load_renderer
from sft_dist.data.rendering import render
from sft_dist.data.sample import Sample
from sft_dist.data.store import PreparedDataset, Refused
from sft_dist.data.workers import Workers
from sft_dist.errors import ClusterError, DataError, Interrupted, StorageError, say

# Records in one shard, whatever the number of processes: the shards' bytes must not depend on it.
RECORDS_PER_SHARD = 2_000
# A rank waits this long without any sign of work from the others before it does theirs.
TAKE_OVER_S = 60.0
_SAY_WAITING_S = 10.0
_LOOK_EVERY_S = 0.5
_NAMED_RANKS = 10
# Roughly what one process renders, and how long new ones take to start: whether they pay.
_BYTES_PER_S = 3e6
_WORKERS_START_S = 1.5
_OBJECTS_PER_COLLECTION = 50_000
# Modules of this folder that do not decide what a record becomes; all others are in the key of what they made.
_INDIFFERENT = ("prepare", "partial", "workers", "progress", "manifest", "packing", "plan", "selection", "comparison")

Task = tuple[int, list[Row]]  # number of the chunk, its records


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the work is ours: ranks cooperate through data.cache_dir.

    `attempt` is the same for all ranks of one start of a job, and another one for the next: failures are told by it.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks on this machine
    attempt: int = 0


ALONE = Share()


def prepare(
    sources: Sequence[SourceConfig],
    model: ModelConfig,
    data: DataConfig,
    share: Share = ALONE,
    *,
    may_be_empty: bool = False,
) -> PreparedDataset:
    """Return the prepared data set of these sources, preparing it first where it does not exist.

    With a share every rank calls this; all return the same, or all raise the same. Raises DataError for broken files,
    for bad records as data.on_bad_record and data.max_refused say, and when nothing is left, unless it `may_be_empty`;
    StorageError when data.cache_dir cannot be written; ClusterError when processes or files vanish.
    """
    formats.check_sources(sources)
    renderer = load_renderer(model, data, is_labelled=_is_labelled(sources))
    fingerprints = list(map(_fingerprint, sources))
    partial = Partial(_folder(renderer, fingerprints, data))
    is_found = partial.is_finished
    if not is_found:
        _prepare_together(_Job(tuple(sources), fingerprints, renderer, model, data, share, partial))
    dataset = PreparedDataset(partial.folder)
    if is_found and share.rank == 0:
        _say_formats(sources, dataset.manifest["formats"])
    check_refused(dataset, data, may_be_empty=may_be_empty)
    return dataset


def is_prepared(sources: Sequence[SourceConfig], model: ModelConfig, data: DataConfig) -> bool:
    """Whether `prepare` would only have to read. Raises DataError for sources that are not there."""
    formats.check_sources(sources)
    renderer = load_renderer(model, data, is_labelled=_is_labelled(sources))
    return Partial(_folder(renderer, list(map(_fingerprint, sources)), data)).is_finished


def _is_labelled(sources: Sequence[SourceConfig]) -> bool:
    return bool(sources) and all(source.format == "labelled" for source in sources)


@dataclass(frozen=True, slots=True)
class _Job:
    sources: tuple[SourceConfig, ...]
    fingerprints: list[dict[str, str]]
    renderer: Renderer
    model: ModelConfig
    data: DataConfig
    share: Share
    partial: Partial


def _fingerprint(source: SourceConfig) -> dict[str, str]:
    return {
        "path": source.path,
        "name": formats.source_name(source),
        "format": source.format,
        "kind": formats.source_kind(source),
        "sha256": formats.source_fingerprint(source),
    }


def _folder(renderer: Renderer, fingerprints: Sequence[dict[str, str]], data: DataConfig) -> Path:
    return Path(data.cache_dir) / _key(renderer, fingerprints)


def _key(renderer: Renderer, fingerprints: Sequence[dict[str, str]]) -> str:
    # Not the folder: the same data elsewhere is the same data. Nor what is tolerated: that is asked afterwards.
    content = [[item["name"], item["format"], item["kind"], item["sha256"]] for item in fingerprints]
    text = json.dumps([_code_version(), RECORDS_PER_SHARD, renderer.fingerprint, content])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _code_version() -> list[str]:
    """Of all code that decides what a record becomes: what other code prepared must not be taken for ours."""
    folder = Path(__file__).parent
    decisive = sorted(path for path in folder.glob("*.py") if path.stem not in _INDIFFERENT)
    own = hashlib.sha256(b"".join(path.read_bytes() for path in decisive))
    return [own.hexdigest(), version("transformers"), version("tokenizers")]


def _prepare_together(job: _Job) -> None:
    partial, share = job.partial, job.share
    try:
        partial.open(share.attempt)
        if share.rank == 0:
            _say_formats(job.sources, _formats(job.sources))
        progress = Progress()
        with Reporter(partial, progress, is_main=share.rank == 0):
            num_chunks = _make_chunks(job, progress, lambda number: number % share.size == share.rank)
            _finish_together(job, progress, num_chunks)
        partial.remove()
    except (Interrupted, KeyboardInterrupt):
        if share.rank == 0:
            say(f"prepare: {len(partial.finished()):,} finished chunks are kept in {partial.path} for the next start")
        raise
    except Exception as error:
        if partial.is_finished:  # another run was faster, and took its folder away
            partial.remove()
            return
        if isinstance(error, OSError):
            told = _unwritable(job.partial, error)
            partial.write_failure(share.rank, told)
            raise told from error
        partial.write_failure(share.rank, error)
        # What ranks and disks do to us, the next start goes on from; else the next start has another key.
        is_over = share.size == 1 and not isinstance(error, (ClusterError, StorageError))
        if is_over and not partial.is_used_by_others(TAKE_OVER_S):
            partial.remove()
        raise


def _unwritable(partial: Partial, error: OSError) -> StorageError:
    return StorageError(f"data.cache_dir: {partial.folder.parent}: cannot be written: {error.strerror or error}")


def _make_chunks(job: _Job, progress: Progress, is_ours: Callable[[int], bool]) -> int:
    """Make those of our chunks that are not there yet; the number of all chunks."""
    num_chunks = 0

    def tasks() -> Iterator[Task]:
        nonlocal num_chunks
        rows = _all_rows(job.sources, progress)
        for number, chunk in enumerate(iter(lambda: list(islice(rows, RECORDS_PER_SHARD)), [])):
            num_chunks = number + 1
            progress.read_chunk(num_chunks)
            _go_on(job, progress)
            if job.partial.is_finished:
                return
            if is_ours(number) and job.partial.counts(number) is None:
                yield number, chunk

    progress.move()
    ours = tasks()
    first = list(islice(ours, 2))
    num_workers = _num_workers(job, progress, first)
    if num_workers == 0:
        for task in chain(first, ours):
            _make_chunk(job.renderer, job.partial, task)
            _go_on(job, progress)
    else:
        # A tokenizer that comes with its own code cannot be unpickled where that code was not imported.
        again = bind(load_renderer, job.model, job.data, is_labelled=_is_labelled(job.sources))
        load = again if job.model.trust_remote_code else bind(_same, job.renderer)
        with Workers[Task, None](num_workers, bind(_start_worker, load, job.partial)) as workers:
            for _ in workers.answers(chain(first, ours)):
                _go_on(job, progress)
    progress.rest()
    return num_chunks


def _go_on(job: _Job, progress: Progress) -> None:
    _raise_failure(job)
    progress.move()


def _raise_failure(job: _Job) -> None:
    """Raise what ended another rank. Alone there is none: other runs on one machine have the same `attempt`."""
    if job.share.size > 1:
        job.partial.raise_failure()


def _num_workers(job: _Job, progress: Progress, first: Sequence[Task]) -> int:
    """Processes beside this one; 0 where starting them takes longer than they save."""
    num = _num_processes(job)
    if num == 1 or len(first) < 2:
        return 0
    if progress.num_chunks is None:
        return num
    # Our chunks that are left, as far as the first ones tell.
    num_chunks = max(2.0, (progress.num_chunks - first[0][0]) / job.share.size)
    num = min(num, ceil(num_chunks))
    num_bytes = sum(len(row.payload if isinstance(row.payload, bytes) else str(row.payload)) for row in first[0][1])
    alone_s = num_chunks * num_bytes / _BYTES_PER_S
    return num if alone_s * (1 - 1 / num) > _WORKERS_START_S else 0


def _num_processes(job: _Job) -> int:
    """Those asked for, or one per core that is ours; shared with the other ranks of this machine."""
    cores, local_size = len(os.sched_getaffinity(0)), job.share.local_size
    if job.data.num_processes:
        return max(1, job.data.num_processes // local_size)
    # Launchers that bind ranks to cores leave each its own already.
    is_bound = cores * local_size <= (os.cpu_count() or 1)
    return cores if is_bound else max(1, cores // local_size)


def _same(renderer: Renderer) -> Renderer:
    return renderer


def _start_worker(load: Callable[[], Renderer], partial: Partial) -> Callable[[Task], None]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    renderer = load()
    # Most of what is made here lives until its chunk is written: to look for cycles in it, and in the vocabulary, again
    # and again costs a tenth.
    gc.freeze()
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    return bind(_make_chunk, renderer, partial)


def _make_chunk(renderer: Renderer, partial: Partial, task: Task) -> None:
    number, chunk = task
    converted = [_converted(row) for row in chunk]
    records = [record for record in converted if not isinstance(record, RecordError)]
    rendered = iter(render(renderer, records))
    samples: list[Sample] = []
    refused: list[Refused] = []
    by_source: dict[str, Counts] = {}
    num_split = 0
    for row, record in zip(chunk, converted, strict=True):
        result = record if isinstance(record, RecordError) else next(rendered)
        if isinstance(result, RecordError):
            identity = row.default_id if isinstance(record, RecordError) else record.id
            refused.append(Refused(printable(row.where), printable(identity), result.reason, result.detail))
            counts = Counts(num_records=1, num_refused=1)
        else:
            samples += result
            num_split += len(result) > 1
            num_tokens = sum(len(sample.ids) for sample in result)
            counts = Counts(num_records=1, num_samples=len(result), num_tokens=num_tokens)
        by_source[row.source] = by_source.get(row.source, Counts()) + counts
    ends = {int(s.ids[span.output_end - 1]) for s in samples for span in s.spans if span.turn and span.is_owned}
    stop_ids = ends & renderer.control_ids  # given tokens may end in any token
    summary = Summary(None, by_source, num_split, tuple(sorted(stop_ids)), tuple(refused))
    try:
        partial.publish(number, samples, summary)
    except OSError as error:
        if not partial.is_finished:
            raise _unwritable(partial, error) from error


def _converted(row: Row) -> Record | RecordError:
    try:
        return formats.to_record(row)
    except RecordError as error:
        return error


def _finish_together(job: _Job, progress: Progress, num_chunks: int) -> None:
    """Until the prepared data set exists: rank 0 finishes it when all chunks are there, the others wait for that.

    Where nothing moves any more, whoever waits does the work itself, so that nobody waits for ever.
    """
    partial, share = job.partial, job.share
    signs: object = None
    moved = said = time.monotonic()
    while not partial.is_finished:
        _raise_failure(job)
        missing = partial.missing(num_chunks)
        now = time.monotonic()
        if (latest := (len(missing), partial.pulse())) != signs:
            signs, moved = latest, now
        is_left_alone = now - moved > TAKE_OVER_S
        if not missing and (share.rank == 0 or is_left_alone):
            progress.move()
            _finish(job, num_chunks)
            progress.rest()
        elif missing and is_left_alone:
            _take_over(job, progress, missing)
            moved = time.monotonic()
        else:
            if now - said > _SAY_WAITING_S:
                said = now
                say(_waiting_for(share, missing, now - moved))
            time.sleep(_LOOK_EVERY_S)


def _take_over(job: _Job, progress: Progress, missing: Sequence[int]) -> None:
    share = job.share
    say(
        f"prepare: rank {share.rank} takes over {len(missing):,} chunk(s): nothing has come from the other ranks for "
        f"{TAKE_OVER_S:,.0f} s (is data.cache_dir, {job.data.cache_dir}, on a file system that all nodes share?)"
    )
    for part in (missing[share.rank % len(missing) :: share.size], missing):  # others may be doing the same
        num_chunks = _make_chunks(job, progress, set(part).__contains__)
    if not job.partial.is_finished and (lost := job.partial.missing(num_chunks)):
        raise ClusterError(
            f"data.cache_dir: {job.data.cache_dir}: {len(lost):,} file(s) that were written there cannot be found "
            "again; choose a folder that all ranks share and that nothing else cleans up"
        )


def _waiting_for(share: Share, missing: Sequence[int], quiet_s: float) -> str:
    ranks = sorted({number % share.size for number in missing}) or [0]
    named = ", ".join(map(str, ranks[:_NAMED_RANKS])) + (", …" if len(ranks) > _NAMED_RANKS else "")
    what = f"{len(missing):,} chunk(s)" if missing else "the manifest"
    return f"prepare: rank {share.rank} waits for {what} of rank(s) {named}; last sign of work {quiet_s:.0f} s ago"


def _finish(job: _Job, num_chunks: int) -> None:
    """Put the manifest to the shards and give the folder its name."""
    partial = job.partial
    summaries = [summary for number in range(num_chunks) if (summary := partial.summary(number)) is not None]
    if len(summaries) != num_chunks:
        partial.forget()  # files have gone since we saw them: another run has finished, or they were deleted
        return
    for source, before in zip(job.sources, job.fingerprints, strict=True):
        if _fingerprint(source) != before:
            partial.forget_chunks()
            raise DataError(f"{source.path}: changed while it was read; start again")
    manifest = build_manifest(job.fingerprints, job.renderer, summaries, partial.shard_paths(summaries))
    manifest["formats"] = _formats(job.sources)
    partial.finish(manifest, [item for summary in summaries for item in summary.refused])


def _all_rows(sources: Sequence[SourceConfig], progress: Progress) -> Iterator[Row]:
    index = 0
    sizes = [_size(source) for source in sources]
    for number, source in enumerate(sources):
        before = index
        reader = formats.SourceReader(source, index)
        for row in reader:
            index = row.index + 1
            read = sum(sizes[:number]) + reader.fraction * sizes[number]
            progress.share_read = read / sum(sizes)
            yield row
        if index == before:
            raise DataError(f"{source.path}: it holds no records")
    progress.share_read = 1.0


def _size(source: SourceConfig) -> int:
    """Bytes of the files of a source; of what lies elsewhere nothing is known."""
    files = [path for path, _ in readers.expand(source.path)]
    return sum(os.path.getsize(path) if os.path.isfile(path) else 1 for path in files)


def _formats(sources: Sequence[SourceConfig]) -> dict[str, RecordFormat]:
    """Name of each source -> format of its records, given or told by them."""
    return {formats.source_name(source): formats.detect_format(source) for source in sources}


def _say_formats(sources: Sequence[SourceConfig], format_of: Mapping[str, RecordFormat]) -> None:
    for source in sources:
        say(f"{source.path}: records of format {format_of[formats.source_name(source)]}")
