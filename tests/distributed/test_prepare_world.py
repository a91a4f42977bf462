"""Preparation by many processes: the same bytes for any number of them, after any kill, and nobody waits for ever."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.helpers import warm
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_tokenizer
from tests.helpers.worlds import ROOT

pytestmark = pytest.mark.slow

MPIEXEC = Path(sys.executable).with_name("mpiexec")
NUM_CHUNKS = 7  # of tests.helpers.prepare_rank.RECORDS_PER_SHARD records


class Place:
    """A folder with a tokenizer, data, and what one process makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        build_tokenizer().save_pretrained(folder / "model")
        records = make_records(65)
        records[12] = records[3] | {"id": "repeated"}
        records[33] = {"id": "bad", "messages": []}
        write_jsonl(folder / "a.jsonl", records[:25])
        write_jsonl(folder / "b.jsonl", records[25:])

    def start(self, cache: Path, **options: Any) -> warm.Started:
        paths = [str(self.folder / "a.jsonl"), str(self.folder / "b.jsonl")]
        options = {"cache_dir": str(cache), "model": str(self.folder / "model"), "paths": paths} | options
        words = ["-m", "tests.helpers.prepare_rank", json.dumps(options)]
        return warm.start(words, warm.with_one_thread(os.environ), separate_stderr=True)

    def world(self, cache: Path, size: int, **options: Any) -> list[dict[str, Any]]:
        return answers([self.start(cache, rank=rank, size=size, **options) for rank in range(size)])


def answers(processes: Sequence[warm.Started], timeout_s: float = 120) -> list[dict[str, Any]]:
    """What each process printed, with its stderr; {} of one that was killed."""
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(json.loads(out.splitlines()[-1]) if out else {}) | {"stderr": err} for out, err in outputs]


def digests(cache: Path) -> dict[str, str]:
    """Every file below a cache folder; no other folder but the prepared set is left there."""
    folders = [path.name for path in cache.iterdir()]
    assert len(folders) == 1 and not folders[0].endswith(".partial"), folders
    return {str(f.relative_to(cache)): sha256(f.read_bytes()).hexdigest() for f in cache.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("prepare"))
    place.world(place.folder / "expected", 1)
    return place


@pytest.fixture(scope="module")
def expected(place: Place) -> dict[str, str]:
    return digests(place.folder / "expected")


@pytest.mark.parametrize(("size", "num_processes"), [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2)])
def test_bytes_do_not_depend_on_ranks_and_processes(
    place: Place, expected: dict[str, str], tmp_path: Path, size: int, num_processes: int
) -> None:
    done = place.world(tmp_path / "cache", size, num_processes=num_processes)
    assert {answer["kind"] for answer in done} == {"DataError"}, done  # of the one bad record
    assert len({answer["message"] for answer in done}) == 1
    assert digests(tmp_path / "cache") == expected
    if num_processes == 1:
        assert [set(answer["made"]) for answer in done] == [set(range(NUM_CHUNKS)[rank::size]) for rank in range(size)]


def test_the_manifest_counts_records_by_source(place: Place, expected: dict[str, str]) -> None:
    manifest = json.loads(next((place.folder / "expected").rglob("manifest.json")).read_text())
    assert manifest["num_records"] == 65 and manifest["num_rendered"] == 64 and manifest["num_duplicates"] == 1
    assert {name: counts["num_records"] for name, counts in manifest["by_source"].items()} == {"a": 25, "b": 40}
    assert manifest["by_source"]["b"]["num_refused"] == 1 and manifest["by_source"]["a"]["num_refused"] == 0
    assert manifest["num_tokens"] == sum(counts["num_tokens"] for counts in manifest["by_source"].values())
    assert len(manifest["shards"]) == NUM_CHUNKS


@pytest.mark.parametrize("fault", ["kill after 2", "kill inside shard 2", "kill before count 2"])
def test_a_killed_preparation_goes_on_where_it_was(
    place: Place, expected: dict[str, str], tmp_path: Path, fault: str
) -> None:
    killed = place.start(tmp_path / "cache", fault=fault)
    answers([killed])
    assert killed.returncode == -signal.SIGKILL
    finished = [0, 1, 2] if fault == "kill after 2" else [0, 1]
    [answer] = place.world(tmp_path / "cache", 1)
    assert answer["made"] == [number for number in range(NUM_CHUNKS) if number not in finished]
    assert digests(tmp_path / "cache") == expected


@pytest.mark.parametrize("damage", ["half a shard", "no shard", "half a count", "an empty count"])
def test_files_cut_short_by_a_crash_are_made_again(
    place: Place, expected: dict[str, str], tmp_path: Path, damage: str
) -> None:
    answers([place.start(tmp_path / "cache", fault="kill after 3")])
    [partial] = (tmp_path / "cache").iterdir()
    shard, count = partial / "data" / "shard-00001.arrow", partial / "chunk-00001.json"
    match damage:
        case "half a shard":
            os.truncate(shard, shard.stat().st_size // 2)
        case "no shard":
            shard.unlink()
        case "half a count":
            os.truncate(count, count.stat().st_size // 2)
        case "an empty count":
            os.truncate(count, 0)
    [answer] = place.world(tmp_path / "cache", 1)
    assert answer["made"] == [1, 4, 5, 6]
    assert digests(tmp_path / "cache") == expected


def test_unrelated_runs_may_prepare_the_same_data_at_once(
    place: Place, expected: dict[str, str], tmp_path: Path
) -> None:
    done = answers([place.start(tmp_path / "cache", attempt=number) for number in range(3)])
    assert [answer["kind"] for answer in done] == ["DataError"] * 3 and len({a["message"] for a in done}) == 1, done
    assert digests(tmp_path / "cache") == expected


def test_a_failure_of_one_rank_ends_all_with_its_message_and_not_the_next_attempt(
    place: Place, expected: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    # The failing rank starts when the other is at work: a failure from before is of an earlier attempt.
    at_work = str(cache / "*.partial" / "chunk-00000.json")
    waiting = place.start(cache, rank=0, size=2)
    failing = place.start(cache, rank=1, size=2, fault="full disk at 3", wait_for=at_work)
    first, second = answers([waiting, failing])  # the other rank is told: it does not wait ten minutes to take over
    assert first["kind"] == second["kind"] == "StorageError" and first["message"] == second["message"], first
    assert "No space left" in first["message"]
    done = place.world(cache, 2)
    assert [answer["kind"] for answer in done] == ["DataError"] * 2, done
    assert digests(cache) == expected


def test_a_broken_line_that_one_rank_sees_ends_all(place: Place, tmp_path: Path) -> None:
    lines = (place.folder / "a.jsonl").read_text().splitlines()
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:24], '{"messages": [}']))
    done = place.world(tmp_path / "cache", 2, paths=[str(tmp_path / "x.jsonl")])
    assert [answer["kind"] for answer in done] == ["DataError"] * 2, done
    assert all("x.jsonl:25" in answer["message"] for answer in done)


@pytest.mark.parametrize("alive", [0, 1])
def test_a_rank_that_is_left_alone_does_the_work_of_all(
    place: Place, expected: dict[str, str], tmp_path: Path, alive: int
) -> None:
    [answer] = answers([place.start(tmp_path / "cache", rank=alive, size=2, take_over_s=1)])
    assert "takes over" in answer["stderr"] and "cache" in answer["stderr"]
    assert sorted(answer["made"]) == list(range(NUM_CHUNKS))
    assert digests(tmp_path / "cache") == expected


def test_a_file_system_that_loses_files_is_named(place: Place, tmp_path: Path) -> None:
    [answer] = answers([place.start(tmp_path / "cache", take_over_s=1, fault="lose 4")])
    assert answer["kind"] == "ClusterError" and "data.cache_dir" in answer["message"]


@pytest.fixture
def big(place: Place, tmp_path: Path) -> Path:
    """A run file with work for a while, and long enough records that workers pay."""
    records = make_records(2_000, max_words=20)
    data = write_jsonl(tmp_path / "x.jsonl", [r | {"id": f"{n}-{r['id']}"} for n in range(12) for r in records])
    run_file = tmp_path / "run.yaml"
    tree = {
        "run_dir": "unused",
        "model": {"path": str(place.folder / "model")},
        "data": {"train": str(data), "cache_dir": str(tmp_path / "cache"), "num_processes": 2},
    }
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


def command(run_file: Path, *before: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*before, sys.executable, "-m", "sft_dist", "prepare", str(run_file)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def at_work(big: Path) -> "Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]":
    """A preparation whose workers have finished something, and its child processes."""
    process = command(big)
    children: list[psutil.Process] = []
    try:
        while not list(big.parent.glob("cache/*.partial/chunk-*.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        yield process, children
    finally:
        for child in (process, *children):
            if isinstance(child, subprocess.Popen) or child.is_running():
                child.kill()


def workers_among(children: list[psutil.Process]) -> list[psutil.Process]:
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_workers_and_keeps_what_is_done(
    at_work: "tuple[subprocess.Popen[str], list[psutil.Process]]", big: Path, number: int
) -> None:
    process, children = at_work
    assert len(workers_among(children)) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 128 + number and "are kept in" in err, err
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert list(big.parent.glob("cache/*.partial/chunk-*.json"))


def test_a_worker_that_is_killed_is_an_error_and_no_hang(
    at_work: "tuple[subprocess.Popen[str], list[psutil.Process]]",
) -> None:
    process, children = at_work
    workers_among(children)[0].kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 69 and "killed by SIGKILL" in err and "data.num_processes" in err, err
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_workers_end_when_their_parent_is_killed(
    at_work: "tuple[subprocess.Popen[str], list[psutil.Process]]",
) -> None:
    process, children = at_work
    process.kill()
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_progress_says_share_rate_and_time_to_go(big: Path) -> None:
    process = command(big)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if line.startswith("prepare  ")]
    shares = [int(line.split()[1].rstrip("%")) for line in lines if "records" in line and "%" in line]
    assert shares and min(shares) >= 0 and max(shares) <= 100 and shares[-1] >= shares[0], err
    assert any("tokens/s" in line and line.split()[-2] == "eta" and line[-1] == "s" for line in lines), err
    assert "24,000 read, 24,000 rendered" in out and "duplicates     22,0" in out


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs the mpiexec beside this Python")
def test_ranks_of_mpiexec_share_the_work(place: Place, expected: dict[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", make_records(4_500))
    tree = {
        "run_dir": "unused",
        "model": {"path": str(place.folder / "model")},
        "data": {"train": str(data), "cache_dir": str(tmp_path / "one"), "num_processes": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    alone = command(tmp_path / "run.yaml")
    one = alone.communicate(timeout=100)
    assert alone.returncode == 0, one
    tree["data"]["cache_dir"] = str(tmp_path / "two")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    together = command(tmp_path / "run.yaml", str(MPIEXEC), "-n", "2")
    two = together.communicate(timeout=100)
    assert together.returncode == 0, two
    assert two[0].count("train:") == 1, "one rank speaks"
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    shutil.rmtree(tmp_path / "two")
