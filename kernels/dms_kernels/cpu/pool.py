"""Independent pieces of work on a thread each: torch's own threads share one small operation badly."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Workers in which an operation uses one thread; the caller's number of threads stays."""
    barrier = Barrier(threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(threads, "dms", alone)
    for _ in range(threads):
        pool.submit(int)
    barrier.wait()
    torch.set_num_threads(threads)  # the workers' setting is also the default of threads to come
    return pool


def run(work: Callable, pieces: Iterable[tuple]) -> list:
    """[work(*piece), ...], as many at once as torch has threads; those share each of a few.  No graph is built."""
    pieces, threads, inference = list(pieces), torch.get_num_threads(), torch.is_inference_mode_enabled()
    if threads == 1 or len(pieces) <= threads:
        with torch.no_grad():
            return [work(*piece) for piece in pieces]

    def apart(piece: tuple):
        with torch.inference_mode() if inference else torch.no_grad():
            return work(*piece)

    return list(_pool(threads).map(apart, pieces))
