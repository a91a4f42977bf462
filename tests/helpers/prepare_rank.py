"""One rank of a shared preparation, as a process of its own: `python -m tests.helpers.prepare_rank '{...}'`.

Prints one JSON line: the folder, or the kind and message of the error, and the numbers of the chunks made here. `fault`
breaks the surroundings at a chosen place: a kill, a full disk, a file system that loses files.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from sft_dist.config import DataConfig, ModelConfig, SourceConfig
from sft_dist.data import partial as partials
from sft_dist.data import prepare as preparing
from sft_dist.data import store
from sft_dist.data.partial import Partial, Summary
from sft_dist.data.sample import Sample
from sft_dist.errors import UserError

RECORDS_PER_SHARD = 10


def main() -> None:
    options = json.loads(sys.argv[1])
    preparing.RECORDS_PER_SHARD = RECORDS_PER_SHARD
    preparing.TAKE_OVER_S = options.get("take_over_s", 600.0)
    preparing._WORKERS_START_S = 0.0
    made: list[int] = []
    _break(options.get("fault", ""), made)
    wait_for = options.get("wait_for")
    while wait_for and not glob(wait_for):
        time.sleep(0.05)
    data = DataConfig(cache_dir=options["cache_dir"], num_processes=options.get("num_processes", 1))
    share = preparing.Share(options.get("rank", 0), options.get("size", 1), 1, options.get("attempt", 0))
    answer: dict[str, Any] = {"made": made}
    try:
        sources = [SourceConfig(path=path) for path in options["paths"]]
        dataset = preparing.prepare(sources, ModelConfig(path=options["model"]), data, share)
        answer["folder"] = str(dataset.folder)
    except UserError as error:
        answer |= {"kind": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))


def _break(fault: str, made: list[int]) -> None:
    """`kill after 2`, `kill inside shard 2`, `kill before count 2`, `full disk at 3`, `lose 1`."""
    place = int(fault.split()[-1]) if fault else -1
    publish, write_shard, write_json = Partial.publish, store.write_shard, Partial._write_json

    def publish_then(self: Partial, number: int, samples: Sequence[Sample], summary: Summary) -> None:
        if fault.startswith("lose") and number == place:
            return
        if fault.startswith("full disk") and number == place:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(self, number, samples, summary)
        made.append(number)
        if fault.startswith("kill after") and number == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path: Path, samples: Sequence[Sample]) -> store.Shard:
        shard = write_shard(path, samples)
        if fault.startswith("kill inside") and path.name.endswith(f"-{place}"):
            os.truncate(path, shard.num_bytes // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return shard

    def write_json_after(self: Partial, path: Path, tree: Any) -> None:
        if fault.startswith("kill before count") and path == self._chunk(place):
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(self, path, tree)

    Partial.publish = publish_then  # type: ignore[method-assign]
    partials.store.write_shard = write_half  # type: ignore[assignment]
    Partial._write_json = write_json_after  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
