"""What starting and resuming cost at corpus scale, measured on an index without any shards.

    python benchmarks/data_plan.py --shards 6000 --rows 300_000_000
    python benchmarks/data_plan.py --orders py1s:64 py1e:64:262144 none:64 --resume 0.5

Streaming plans a whole epoch when it begins: which row goes to which rank, worker and batch. For each order
(shuffle algorithm, paths, shuffle block) a process of its own builds the dataset as the loader does, then plans
an epoch from its start and from the middle. Seconds are of processor time, of which it uses one core, and the peak
memory is what it took on top of the imported libraries. Reading rows is no part of it.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ORDERS = ["py1s:64", "py1s:1", "py1br:64", "py1e:64", "naive:1", "none:64"]


def write_index(folder: Path, shards: int, rows: int) -> None:
    """Write the index of shards that do not exist."""
    per_shard = rows // shards
    entry: dict[str, Any] = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["xxh64"],
        "size_limit": 1 << 26,
        "samples": per_shard,
        "column_names": ["tokens", "lengths"],
        "column_encodings": ["ndarray:uint16", "ndarray:uint16"],
        "column_sizes": [None, None],
        "zip_data": None,
    }
    size = per_shard * 270
    entries = [
        {**entry, "raw_data": {"basename": f"shard.{number:05}.mds", "bytes": size, "hashes": {"xxh64": "0" * 16}}}
        for number in range(shards)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def peak_gb() -> float:
    """Return the most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(send: Any, folder: str, order: str, done: float, workers: int) -> None:
    """Build a dataset and plan one epoch from the share `done` of it; send seconds and peak GB."""
    from streaming import Stream, StreamingDataset
    from streaming.base.batching import generate_work

    algorithm, paths, *block = order.split(":")
    base = peak_gb()
    begin = time.process_time()
    dataset = StreamingDataset(
        # A remote, so that nobody looks for the shards.
        streams=[Stream(local=folder, remote=f"{folder}/remote")],
        batch_size=256,
        shuffle=algorithm != "none",
        shuffle_algo="py1s" if algorithm == "none" else algorithm,
        num_canonical_nodes=int(paths),
        shuffle_block_size=int(block[0]) if block else None,
        partition_algo="orig",
    )
    built = time.process_time()
    dataset._set_shuffle_block_size(dataset._unique_rank_world)
    world = dataset._parallel_rank_world.copy()
    world.workers_per_rank = workers
    generate_work(dataset.batching_method, dataset, world, 0, int(done * dataset.epoch_size))
    send.send((built - begin, time.process_time() - built, peak_gb() - base))


def in_own_process(*arguments: Any) -> tuple[float, float, float]:
    """Run `measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(send, *arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return (float("nan"),) * 3
    finally:
        process.join()


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=300_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--resume", type=float, default=0.5, help="share of the epoch done when resuming")
    parser.add_argument(
        "--orders", nargs="+", default=ORDERS, metavar="ALGORITHM:PATHS[:BLOCK]", help="none: unshuffled"
    )
    options = parser.parse_args()
    table = Table("order", "build s", "plan s", "peak GB", "resumed: plan s", "peak GB")
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), options.shards, options.rows)
        for order in options.orders:
            build, fresh, memory = in_own_process(folder, order, 0.0, options.workers)
            _, resumed, resumed_memory = in_own_process(folder, order, options.resume, options.workers)
            figures = (build, fresh, memory, resumed, resumed_memory)
            table.add_row(order, *(f"{figure:.1f}" for figure in figures))
            print(order, *(f"{figure:.2f}" for figure in figures), flush=True)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
