"""Benches in a process of their own: a kernel that crashes takes the CUDA context with it, and a peer may hang."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection
from typing import Any

from device.cells import Case

__all__ = ["Worker"]

#: For importing torch on a machine that has just started.
_START_SECONDS = 120


def _serve(connection: Connection, device: str) -> None:
    """Answers cases until there are no more; ends itself after an error that leaves CUDA unusable."""
    import torch

    from device.measure import measure_case
    from device.timing import make_timer

    timer = make_timer(device)
    connection.send("ready")
    while True:
        try:
            case, seconds = connection.recv()
        except EOFError:
            return
        try:
            result = measure_case(case, device, timer, seconds)
            if device != "cpu":
                gpu = torch.cuda if device == "cuda" else torch.mps
                gpu.synchronize()
                gpu.empty_cache()
        except Exception as error:
            trace = traceback.format_exc(limit=-6)
            # After an illegal access, say, every later call of this process would fail too.
            last = "CUDA" in str(error) and "out of memory" not in str(error)
            connection.send({"ok": False, "error": f"{type(error).__name__}: {error}", "trace": trace, "last": last})
            if last:
                return
        else:
            connection.send(result)


class Worker:
    """Measures cases one at a time; starts again after a crash."""

    def __init__(self, device: str):
        self.device = device
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def measure(self, case: Case, seconds: float, limit: float) -> dict[str, Any]:
        """Measures for `seconds`; given up after `limit`, making weights and compiling included."""
        try:
            connection = self._start()
        except (EOFError, ConnectionError, TimeoutError):
            self.stop()
            return {"ok": False, "fatal": True, "error": "the process that measures does not start; see above"}
        connection.send((case, seconds))
        try:
            if connection.poll(limit):
                result = dict(connection.recv())
                if result.pop("last", False):
                    self.stop()
                return result
            reason = f"gave up after {limit:.0f} s"
        except (EOFError, ConnectionError):
            assert self.process is not None
            self.process.join(10)
            reason = f"the process ended with status {self.process.exitcode}"
        self.stop()
        return {"ok": False, "error": reason}

    def _start(self) -> Connection:
        if self.process is None or self.connection is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.device), daemon=True)
            self.process.start()
            theirs.close()
            if not self.connection.poll(_START_SECONDS):
                raise TimeoutError
            self.connection.recv()
        return self.connection

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None
