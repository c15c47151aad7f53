"""What the paper is silent about: errors, settings, models, data, ranks, logs, checkpoints.

Importing this package, before torch is loaded, sets OpenMP's threads: one for each core that is idle, and a short spin.
All threads wait for the slowest: with one on a core that another process keeps busy, a loop of the toy takes 3 to 7
times as long. The user's own OMP_*, GOMP_* and KMP_* variables come first.
"""

import os
import time
from pathlib import Path


def cores():
    """How many cores this process may use: its CPUs, two threads of a core counted once, within its cgroup's quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in cpus:
        listed = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(listed.read_text() if listed.is_file() else cpu)
    quota = Path("/sys/fs/cgroup/cpu.max")
    allowed, period = quota.read_text().split() if quota.is_file() else ("max", "1")
    limit = len(siblings) if allowed == "max" else max(1, int(allowed) // int(period))
    return min(len(siblings), limit)


def others():
    """How many other threads keep a CPU busy: those that run at each of five looks, 10 ms apart. Linux; else 0."""
    loads = Path("/proc/loadavg")
    if not loads.is_file():
        return 0
    running = []
    for _ in range(5):
        running.append(int(loads.read_text().split()[3].split("/")[0]))
        time.sleep(0.01)
    return max(0, min(running) - 1)  # one of them is this one


def set_threads(environ):
    """Set OpenMP's variables in `environ`, unless one of them is there."""
    if any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in environ):
        return
    environ["OMP_NUM_THREADS"] = str(max(1, min(cores(), (os.cpu_count() or 1) - others())))
    environ["GOMP_SPINCOUNT"] = "1000"  # GNU's library, Linux; turns of an empty loop
    environ["KMP_BLOCKTIME"] = "0"  # LLVM's and Intel's library, macOS; milliseconds


set_threads(os.environ)
