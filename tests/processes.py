"""Processes joined by gloo, for tests of what is spread over ranks."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A collective that not all ranks join ends here, in the test's failure.
TIMEOUT = timedelta(seconds=120)

# Processes are forked from one that has imported these: importing takes seconds, and every process would do it. Not
# from pytest's own, which has threads.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["covgrpo_kernels.testing", "transformers.models.qwen2.modeling_qwen2"])


class Processes:
    """``size`` processes that stay, each with one thread. What they run is given by name, so it stands at the top of a
    module; it finds its rank in `torch.distributed`."""

    def __init__(self, size: int) -> None:
        self.size, self.folder = size, tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            arguments = (rank, size, f"{self.folder.name}/store", there)
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank, all at once. Raises AssertionError with the traceback of a rank that
        fails, or where a rank does not return."""
        for connection in self.connections:
            connection.send((function, arguments))
        results: list[Any] = [None] * self.size
        failures, waiting = [], set(range(self.size))
        while waiting:
            seconds = 5 if failures else TIMEOUT.total_seconds()
            ready = wait([self.connections[rank] for rank in waiting], seconds)
            if not ready:
                failures += [f"rank {rank} of {self.size} does not return" for rank in sorted(waiting)]
                break
            for rank in [rank for rank in waiting if self.connections[rank] in ready]:
                waiting.remove(rank)
                try:
                    failed, results[rank] = self.connections[rank].recv()
                except EOFError:
                    failed, results[rank] = True, "the process ended"
                if failed:
                    failures.append(f"rank {rank} of {self.size}: {results[rank]}")
        if failures:
            self.stop()
            del _running[self.size]
        assert not failures, "\n".join(failures)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


_running: dict[int, Processes] = {}


def processes(size: int) -> Processes:
    if size not in _running:
        _running[size] = Processes(size)
    return _running[size]


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, function(*arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
