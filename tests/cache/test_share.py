"""What a process may use: quotas of both versions of cgroups, limits of memory, affinity masks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.share import cores, cores_in_mask, memory_bytes, share
from tests.conftest import ROOT

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def files(root: Path, cgroup: str, contents: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **contents}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


TOP = "sys/fs/cgroup"


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("cgroup", "contents", "expected"),
    [
        ("0::/\n", {f"{TOP}/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {f"{TOP}/cpu.max": "150000 100000\n"}, 2),  # one and a half
        ("0::/\n", {f"{TOP}/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {f"{TOP}/cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {f"{TOP}/cpu.max": "nonsense"}, 64),
        # A limit above counts, too.
        (
            "0::/a.slice/b\n",
            {f"{TOP}/a.slice/cpu.max": "300000 100000", f"{TOP}/a.slice/b/cpu.max": "max 100000"},
            3,
        ),
        # A container's own view: the path is outside of what it sees.
        ("0::/../../docker/12ab\n", {f"{TOP}/cpu.max": "400000 100000"}, 4),
        # Version 1.
        (
            "4:cpu,cpuacct:/docker/x\n0::/\n",
            {
                f"{TOP}/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000",
                f"{TOP}/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {f"{TOP}/cpu/cpu.cfs_quota_us": "200000", f"{TOP}/cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        (
            "1:cpu:/\n",
            {f"{TOP}/cpu/cpu.cfs_quota_us": "-1", f"{TOP}/cpu/cpu.cfs_period_us": "100000"},
            64,
        ),
        # Both versions at once.
        ("3:memory:/\n0::/x\n", {f"{TOP}/unified/x/cpu.max": "500000 100000"}, 5),
    ],
)
def test_a_quota_of_cores(
    tmp_path: Path, cgroup: str, contents: dict[str, str], expected: int
) -> None:
    assert cores(files(tmp_path, cgroup, contents)) == expected


@pytest.mark.parametrize(
    ("cgroup", "contents", "expected"),
    [
        ("0::/\n", {f"{TOP}/memory.max": "1000000\n"}, 1_000_000),
        ("0::/\n", {f"{TOP}/memory.max": "max\n"}, MEMORY),
        ("0::/\n", {f"{TOP}/memory.max": "max\n", f"{TOP}/memory.high": "2000000"}, 2_000_000),
        (
            "0::/a/b\n",
            {f"{TOP}/a/memory.max": "3000000", f"{TOP}/a/b/memory.max": "9223372036854771712"},
            3_000_000,
        ),
        (
            "4:memory:/docker/x\n",
            {f"{TOP}/memory/docker/x/memory.limit_in_bytes": "4000000"},
            4_000_000,
        ),
        (
            "4:memory:/docker/x\n",
            {f"{TOP}/memory/memory.limit_in_bytes": "9223372036854771712"},
            MEMORY,
        ),
    ],
)
def test_a_limit_of_memory(
    tmp_path: Path, cgroup: str, contents: dict[str, str], expected: int
) -> None:
    assert memory_bytes(files(tmp_path, cgroup, contents)) == expected


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    assert cores(tmp_path) == cores_in_mask()
    assert memory_bytes(tmp_path) == MEMORY


SHOWN = "from cache.share import share; print(share().cores, share().memory_bytes)"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_a_mask_is_obeyed() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); {SHOWN}"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert int(said.stdout.split()[0]) == 1


@pytest.fixture
def cgroup() -> Iterator[tuple[Path, Path]]:
    """Real cgroups for (cores, memory) of version 1 or 2, where this process may make them."""
    top, name = Path("/sys/fs/cgroup"), f"cap-test-{os.getpid()}"
    made = []
    try:
        parents = (
            [top, top] if (top / "cgroup.controllers").exists() else [top / "cpu", top / "memory"]
        )
        for parent in parents:
            folder = parent / name
            if folder not in made:
                if not (parent / "cgroup.procs").exists():
                    pytest.skip("no cgroups are mounted here")
                folder.mkdir()
                made.append(folder)
        yield made[0], made[-1]
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here ({error.strerror})")
    finally:
        for folder in made:
            folder.rmdir()


def test_a_real_cgroup_is_obeyed(cgroup: tuple[Path, Path]) -> None:
    of_cores, of_memory = cgroup
    try:
        if (of_cores / "cpu.max").exists():
            (of_cores / "cpu.max").write_text("100000 100000")
        else:
            (of_cores / "cpu.cfs_quota_us").write_text("100000")
        limit = of_memory / "memory.max"
        if not limit.exists():
            limit = of_memory / "memory.limit_in_bytes"
        limit.write_text(str(1 << 30))
    except OSError as error:
        pytest.skip(f"this cgroup has no controllers ({error.strerror})")
    code = textwrap.dedent(
        f"""
        import os
        for folder in {[str(of_cores), str(of_memory)]!r}:
            with open(folder + "/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
        {SHOWN}
        """
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["1", str(1 << 30)]


def test_the_share_is_told_in_words() -> None:
    found = share()
    assert 1 <= found.cores <= found.all_cores
    assert f"{found.cores} of {found.all_cores} cores" in str(found)
