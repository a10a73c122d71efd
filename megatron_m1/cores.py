"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the cores that this process may use, at least 1: its affinity, or less if a cgroup's quota is less.

    ``os.cpu_count`` counts the machine's cores, which are too many under ``taskset``, in cpusets and in containers.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_CGROUPS, _MEMBERSHIP)
    return cores if quota is None else max(1, min(cores, quota))


def cpu_quota(cgroups: Path, membership: Path) -> int | None:
    """Return the cores that cgroup v2 grants, rounded up; None without a quota.

    Args:
        cgroups: where the hierarchy is mounted.
        membership: a file such as ``/proc/self/cgroup``, whose line ``0::/path`` names the process's group.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    group = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    shares = []
    # The groups above bind as well. A container may see its own group as the root, whatever the path says.
    for folder in (cgroups / group, *(cgroups / group).parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            shares.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue  # no file, no limit ("max"), or a kernel that words it otherwise
    return min(shares, default=None)
