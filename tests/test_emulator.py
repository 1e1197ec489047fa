"""The emulator of CUDA kernels (tests/emulator): it computes what PTX says, and finds what is wrong with a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emulator import build

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator is tried on Linux only")

SANITIZERS = "address,undefined"

#: Mistakes in the kernels of emulator/self_test.cu, and what finds them: text of the error, "orders" (another order of
#: threads gives other bits) or "NaN". The plain build and the sanitized one find them alike.
FOUND = {
    "missing_barrier": "NaN",
    "missing_second_barrier": "orders",
    "missing_sync_warp": "NaN",
    "missing_sync_warp_before_ldmatrix": "NaN",
    "exit_before_barrier": "divergent barrier: .*at sync_block .*thread 77 has returned",
    "two_barriers": "divergent barrier: .*at sync_block .* is at sync_block",
    "divergent_shuffle": "divergent collective: .*at shuffle_xor .*has returned",
    "barrier_beside_sync_warp": "divergent collective: thread 5 is at sync_warp .* is at sync_block",
    "missing_wait": "NaN",
    "missing_commit": "NaN",
    "refill_without_barrier": "orders",
    "source_changes": "source of a cp.async changed while it was in flight",
    "wait_for_too_few": "NaN",
    "undrained_copy": "destination of a cp.async was written while it was in flight",
    "misaligned_copy": "source of a cp.async is not aligned to 16 bytes: it ends in 4",
    "misaligned_ldmatrix": "ldmatrix_x4: the row's address is not aligned to 16 bytes",
    "shared_copy": "a cp.async to byte 2048 of the 2048 bytes of shared memory",
    "unwritten_shared": "NaN",
    "race": "orders",
    "block_race": "orders",
    "missing_fence": "without a fence_device and a sync_block between it and the block's writes",
    "fp8_below_sm_89": "mma_e4m3 needs sm_89, this is sm_86",
    "too_much_shared_memory": "101377 bytes of shared memory per block, the device has 101376",
    "too_many_threads": "1025 threads per block",
    "part_of_a_warp": "shuffle_xor in a warp of 16 threads",
    "trap": "thread 12: __trap",
    # emulator/self_test_hopper.cu
    "missing_full_wait": "an arrival past the 1 that the mbarrier at byte 0",
    "missing_empty_wait": "an arrival past the 1 that the mbarrier at byte 0|refills a stage that nobody has waited for",
    "refill_of_what_nobody_read": "a bulk copy refills a stage that nobody has waited for",
    "missing_arrive": "deadlock: thread 0 waits for .* mbarrier at byte 0 .* lacks 1 of 1 arrivals and 0 bytes",
    "missing_expect_tx": "a bulk copy to where another one is in flight",
    "too_many_bytes_expected": "deadlock: thread 0 waits for .* lacks 0 of 1 arrivals and 16 bytes",
    "more_bytes_than_a_barrier_counts": "1048576 bytes are announced to the mbarrier",
    "extra_arrive": "an arrival past the 1 that the mbarrier at byte 8",
    "missing_init_fence": "whose initialisation no fence_mbarrier_init followed",
    "missing_init": "the mbarrier at byte 0 of shared memory was not initialised",
    "two_inits": "the mbarrier at byte 16 of shared memory was initialised before",
    "barrier_overwritten": "the mbarrier at byte 16 of shared memory was overwritten",
    "copy_onto_barrier": "a bulk copy onto the mbarrier at byte 0",
    "misaligned_bulk_copy": "source of a bulk copy is not a multiple of 16: it ends in 4",
    "odd_bulk_copy": "size of a bulk copy is not a multiple of 16: it ends in 8",
    "bulk_copy_past_the_end": "a bulk copy of 64 bytes to byte 4672 of the 3136 bytes of shared memory",
    "undrained_bulk_copy": "a bulk copy is in flight when its block ends",
    "bulk_source_changes": "the source of a bulk copy changed while it was in flight",
    "bulk_destination_written": "the destination of a bulk copy was written while it was in flight",
    "missing_async_arrive": "deadlock: .* lacks 1 of 128 arrivals",
    "missing_async_wait": "a cp.async is in flight when its block ends",
    "missing_cluster_barrier": "load_cluster: no barrier of the cluster before it",
    "missing_second_cluster_barrier": "orders",
    "missing_last_cluster_barrier": "load_cluster: block [012] of the cluster has ended",
    "half_of_a_block_arrives": "load_cluster: no barrier of the cluster before it",
    "cluster_wait_alone": "a cluster_wait without a cluster_arrive",
    "rank_outside_the_cluster": "load_cluster: rank 4 of a cluster of 4",
    "missing_remote_arrive": "deadlock: .* lacks 1 of 128 arrivals",
    "missing_grid_wait": "a dependent launch's block ended without a grid_wait",
    "read_before_grid_wait": "NaN",
    "copy_before_grid_wait": "a copy of what this launch depends on, before the thread's grid_wait",
    "grid_wait_below_sm_90": "grid_wait needs sm_90, this is sm_89",
    "ragged_clusters": "clusters of 4 in a grid of 6 blocks",
    # emulator/self_test_shared.cu
    "expect_of_own_copies_only": "that no expect_tx has announced|a copy_box to where another one is in flight",
    "missing_expect_of_the_others": "a copy_box to where another one is in flight|that no expect_tx has announced",
    "copy_to_one_block": "deadlock: .* mbarrier at byte 6144 .* lacks 0 of 1 arrivals and 1024 bytes",
    "copy_past_the_cluster": "copy_box: rank 2 of a cluster of 2",
    "copy_to_no_block": "a copy_box to no block",
    "arrive_at_own_block_only": "deadlock: thread 0 waits for .* mbarrier at byte 6144 .* lacks 1 of 1 arrivals and 0 bytes",
    "count_of_own_readers_only": "a copy_box to where another one is in flight",
    "copy_before_cluster_barrier": "copy_box: no barrier of the cluster before it",
    "arrive_after_the_others_end": "mbarrier_arrive_remote: block [01] of the cluster has ended",
    # emulator/self_test_wgmma.cu
    "wgmma_without_fence": "wgmma without a wgmma_fence before it",
    "wgmma_fenced_once": "wgmma: registers of A were written after the last wgmma_fence",
    "missing_wgmma_commit": "warp 0 ended with a bf16 wgmma in flight",
    "missing_wgmma_wait": "warp 0 ended with a bf16 wgmma in flight",
    "wgmma_wait_for_fewer": "warp 0 ended with a bf16 wgmma in flight",
    "read_before_wgmma_wait": "NaN",
    "released_while_in_flight": "an operand of a wgmma in shared memory changed while it was in flight",
    "a_written_in_flight": "registers of A changed while a wgmma was in flight",
    "d_written_in_flight": "registers of D were written while a wgmma was in flight",
    "descriptor_inside_a_pattern": "a swizzled operand whose pattern does not begin at a multiple of 1024 bytes",
    "descriptor_past_the_end": "wgmma: column 9 of B at byte 4240 of the 4160 bytes of shared memory",
    "misaligned_box": "copy_box to byte 128, which is no multiple of 1024",
    "missing_expect_of_a_box": "a copy_box to where another one is in flight",
    "missing_arrive_of_a_warp": "deadlock: .* lacks 1 of 4 arrivals and 0 bytes|deadlock: .* lacks 1 of 1 arrivals",
    "missing_proxy_fence": "was written by ordinary stores, without a fence_proxy_async after them",
    "three_warps": "divergent wgmma: warp 3 issued 5, another one of its warpgroup 6",
    "descriptors_differ": "divergent wgmma: warp \\d and another one of its warpgroup issue different instructions",
    "wider_than_its_registers": "wgmma number 8 of those for up to 64 columns",
    "register_budgets_differ": "warps 0 and 1 of a warpgroup have different register budgets",
    "too_many_registers": "register budgets of 73728 in all, the block was launched with 64512",
    "missing_at_a_barrier": "deadlock: thread 0 is at barrier 1, where 96 of 128 threads are",
    "wgmma_on_sm_100": "wgmma needs sm_90, this is sm_100",
    "tensor_map_stride": "a tensor map of rows 104 bytes apart",
}
#: The same, where only some orders show it.
FOUND_IN_SOME_ORDER = {
    "missing_barrier_before_count": "without a fence_device and a sync_block",
    "refill_of_what_is_read": "a bulk copy refills a stage that warp [012] still reads",
    "missing_barrier_after_init": "the mbarrier at byte 0 of shared memory was not initialised",
}
#: What the plain build alone says in an error of its own: there the sanitizer stops the process first.
FOUND_PLAIN = {
    "misaligned_vector": "an address that ends in 8, which is not aligned to 16 bytes",
    "shared_write": "wrote past the 512 bytes of shared memory",
}
#: The line that the sanitizers complain about: a piece of its text.
FOUND_SANITIZED = {
    "misaligned_vector": "p.out[thread] = from->w;",
    "shared_read": "p.out[thread] = shared[thread + 1 < kThreads || p.wrong ? thread + 1 : 0];",
    "shared_write": "shared[thread + (p.wrong ? 1 : 0)] = p.in[thread];",
    "global_read": "p.out[i] = p.in[i + (p.wrong ? 1 : 0)];",
    "global_write": "p.out[i] = p.in[inside(i, p.n) ? i : 0];",
    "global_copy": "ptx::cp_async_16(dynamic_shared() + 16 * thread, bytes > 0",
}


@pytest.fixture(scope="module")
def programs():
    """The self test without and with sanitizers."""
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build.build, "self_test", sanitize, jobs=1) for sanitize in ("", SANITIZERS)]
        return {"plain": builds[0].result(), "sanitized": builds[1].result()}


def run(program, *words):
    return subprocess.run(
        [program, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **build.SANITIZER_OPTIONS},
    )


def names(kind):
    """Of the checks or planted mistakes, read from the source, because collecting must not compile."""
    texts = [path.read_text() for path in sorted(Path(build.HERE).glob("self_test*.cu"))]
    table = r"k\w*Planted = \{(.*?)\n\};" if kind == "planted" else r"Checks = \{(.*?)\n\};"
    return [name for text in texts for rows in re.findall(table, text, re.S) for name in re.findall(r'\{"(\w+)"', rows)]


def signatures(text):
    """(name, types of the parameters) of the functions declared in a PTX header."""
    text = re.sub(r"//.*", "", text)
    text = text[text.index("namespace lowbit::cuda::ptx") :]
    found = set()
    head = r"^(?:__device__ )?(?:inline |constexpr )*(?:void|float2?|double|bool|u?int\w*) (\w+)"
    for name, parameters in re.findall(head + r"\(((?:[^()]|\([^()]*\))*)\)(?=;| \{)", text, re.M):
        kinds = []
        for parameter in re.sub(r"\s+", " ", parameters).split(", "):
            if parameter and not parameter.startswith("Site "):
                kind = re.match(r"(?:const )?\w+(?: ?\*| \(&\w*\)\[\d\])?", parameter)
                assert kind, parameter
                kinds.append(re.sub(r"\(&\w*\)", "(&)", kind.group()).replace(" *", "*"))
        found.add((name, *kinds))
    return found


@pytest.mark.parametrize(("header", "count"), [("ptx", 30), ("ptx_hopper", 15), ("ptx_wgmma", 5)])
def test_defines_every_ptx_function_and_no_other(header, count):
    device = signatures((ROOT / f"csrc/cuda/{header}.cuh").read_text())
    emulated = signatures((ROOT / f"tests/emulator/{header}.h").read_text())
    assert len(device) > count, "the pattern finds too few"
    assert device == emulated


@pytest.mark.parametrize("name", names("check"))
def test_agrees_with_plain_arithmetic(programs, name):
    assert run(programs["plain"], "check", name).stdout == "ok\n"


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
@pytest.mark.parametrize("name", names("planted"))
def test_accepts_a_kernel_without_the_mistake(programs, kind, name):
    """Without NaN and with the same bits in every order."""
    done = run(programs[kind], "planted", name, "right")
    outcomes = done.stdout.splitlines()
    assert done.returncode == 0 and len(outcomes) == 5, done.stderr
    assert len(set(outcomes)) == 1 and re.fullmatch(r"bits \w+ nans 0", outcomes[0]), outcomes


@pytest.mark.parametrize("kind", ["plain", "sanitized"])
@pytest.mark.parametrize("name", FOUND)
def test_finds(programs, kind, name):
    outcomes = run(programs[kind], "planted", name, "wrong").stdout.splitlines()
    assert len(outcomes) == 5
    if FOUND[name] == "orders":
        assert len(set(outcomes)) > 1, outcomes
    elif FOUND[name] == "NaN":
        assert not all(outcome.endswith("nans 0") for outcome in outcomes), outcomes
    else:
        for outcome in outcomes:
            assert re.search(FOUND[name], outcome), outcome


@pytest.mark.parametrize("name", FOUND_IN_SOME_ORDER)
def test_finds_in_some_order(programs, name):
    assert re.search(FOUND_IN_SOME_ORDER[name], run(programs["plain"], "planted", name, "wrong").stdout)


@pytest.mark.parametrize("name", FOUND_PLAIN)
def test_finds_without_a_sanitizer(programs, name):
    for outcome in run(programs["plain"], "planted", name, "wrong").stdout.splitlines():
        assert re.search(FOUND_PLAIN[name], outcome), outcome


@pytest.mark.parametrize("name", FOUND_SANITIZED)
def test_finds_with_a_sanitizer(programs, name):
    """The report's first frame outside of the emulator is the faulty line."""
    done = run(programs["sanitized"], "planted", name, "wrong")
    assert done.returncode != 0 and done.stdout == ""
    lines = [int(number) for number in re.findall(r"self_test\.cu:(\d+)", done.stderr)]
    source = Path(build.HERE, "self_test.cu").read_text().splitlines()
    text = re.sub(r"\s+", "", "".join(source[lines[0] - 1 : lines[0] + 1]))
    assert re.sub(r"\s+", "", FOUND_SANITIZED[name]) in text, (text, done.stderr)


def test_every_planted_mistake_is_looked_for():
    found = set(FOUND) | set(FOUND_IN_SOME_ORDER) | set(FOUND_PLAIN) | set(FOUND_SANITIZED)
    assert set(names("planted")) == found


def test_messages_name_kernel_block_thread_and_line(programs):
    outcome = run(programs["plain"], "planted", "source_changes", "wrong").stdout.splitlines()[0]
    assert re.fullmatch(
        r"error planted: block \(0, 0, 0\), thread 0: the source of .* \(tests/emulator/self_test\.cu:\d+\)", outcome
    )


@pytest.mark.slow
def test_runs_without_assembly_for_the_machine():
    program = build.build("self_test", ucontext=True)
    for name in ("mma_f16", "block_orders"):
        assert run(program, "check", name).stdout == "ok\n"
    assert "divergent barrier" in run(program, "planted", "exit_before_barrier", "wrong").stdout
