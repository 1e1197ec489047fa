"""Killed or failing at any moment, a save leaves the old artifact or the new one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import Tiny, contents, quantized_tiny, same
from lowbit import ArtifactError, load_quantized, save_quantized

# Every call through which a save changes the file system.
_CALLS = ["open", "pwrite", "fsync", "replace", "unlink"]


class Interrupted(BaseException):
    """Not an Exception, like KeyboardInterrupt: nothing may swallow it."""


def _fail_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException, after: bool) -> list[str]:
    """Let the calls succeed until call number `step`, which raises, before or after it has done its work."""
    made: list[str] = []

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) != step + 1:
                return call(*args, **kwargs)
            if after:
                call(*args, **kwargs)
            raise error

        return wrapped

    for name in _CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return made


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOSPC, "no space left")])
def test_failing_at_every_step(tmp_path: Path, error: BaseException, after: bool) -> None:
    old, new = quantized_tiny(), quantized_tiny("int8", seed=1)
    directory = tmp_path / "model"
    outcomes = []
    for step in range(200):
        save_quantized(old, directory, max_shard_bytes=2000)
        before = contents(directory)
        with pytest.MonkeyPatch.context() as patch:
            made = _fail_at(patch, step, error, after)
            try:
                save_quantized(new, directory, max_shard_bytes=2000)
                break
            except type(error):
                pass
        loaded = load_quantized(Tiny, directory)
        outcomes.append("new" if same(loaded, new) else "old")
        if outcomes[-1] == "old":
            assert same(loaded, old)
            assert contents(directory) == before or made[-1] == "unlink"  # nothing is left behind
    else:
        pytest.fail("a save takes more than 200 calls")
    assert outcomes.count("old") > 10
    assert "new" in outcomes  # failing after the commit, in the cleaning up
    assert outcomes == sorted(outcomes, reverse=True)


_KILLED = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from artifacts import Tiny, quantized_tiny, same
from lowbit import load_quantized, save_quantized

directory, count = sys.argv[1], int(sys.argv[2])
old, new = quantized_tiny(), quantized_tiny("int8", seed=1)
began = time.perf_counter()
save_quantized(old, directory, max_shard_bytes=2000)
span = time.perf_counter() - began
random.seed(0)
seen = {"old": 0, "new": 0}
for _ in range(count):
    started, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(start, b"x")
        while True:
            save_quantized(new, directory, max_shard_bytes=2000)
            save_quantized(old, directory, max_shard_bytes=2000)
    os.read(started, 1)
    os.close(started), os.close(start)
    time.sleep(random.choice((1, 10)) * random.uniform(0, 4 * span))  # in the first saves, or in later ones
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    loaded = load_quantized(Tiny, directory)
    kind = [name for name, model in (("old", old), ("new", new)) if same(loaded, model)]
    seen[kind[0]] += 1
save_quantized(old, directory, max_shard_bytes=2000)
print(json.dumps({"seen": seen, "files": sorted(os.listdir(directory))}))
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "model"), "50"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert min(result["seen"].values()) > 2  # kills fell on both sides of the commit
    manifest = json.loads((tmp_path / "model/lowbit.json").read_text())
    assert result["files"] == sorted(
        ["lowbit.json", *manifest["files"]]
    )  # the last save swept up after the killed ones


def test_two_saves_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    save_quantized(quantized_tiny(), tmp_path)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another process is saving"):
            save_quantized(quantized_tiny("int8"), tmp_path)
    finally:
        os.close(fd)
    assert same(load_quantized(Tiny, tmp_path), quantized_tiny())
