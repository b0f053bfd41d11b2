"""How many processor cores there are for this process. Without torch, so that worker processes start quickly."""

import os


def available_cores():
    """-> number of cores that this process may use (a container or taskset may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
