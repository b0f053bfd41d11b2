"""How OpenMP's threads wait for each other. Imported before torch, whose libgomp reads it once, when it is loaded.

A parallel section of an operation ends when its last thread does. By default a thread that waits spins for
milliseconds. On free cores that is right: sleeping and waking up for every section costs a third of SPDNet's speed.
Where other programs have the cores, it spins away the time in which the awaited thread could run, and the feature
demo trains at a quarter of its speed. So this looks how busy the machine is, and lets the threads sleep at once where
it is. Measured by benchmarks/busy_machine.py.
"""

import os
import time
from pathlib import Path

NO_SPIN = "0"                           # a waiting thread sleeps at once
LONG_SPIN = "300000"                    # libgomp's default
BUSY = 0.4                              # share of the cores' time that other programs take
LOOK_SECONDS = 0.1                      # during which it is measured

_USERS_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # whoever sets one of these knows better


def busy_share(seconds=LOOK_SECONDS):
    """-> share in [0, 1] of all cores' time that is in use while this process sleeps; 0.0 where Linux does not say."""
    try:
        before = _ticks()
        time.sleep(seconds)
        used, total = (after - start for after, start in zip(_ticks(), before, strict=True))
    except (OSError, ValueError, IndexError):
        return 0.0
    return used / total if total else 0.0


def _ticks():
    """-> (ticks in use, all ticks) of all cores since the machine started."""
    line = Path("/proc/stat").read_text(encoding="ascii", errors="replace").splitlines()[0]
    ticks = [int(word) for word in line.split()[1:9]]  # user nice system idle iowait irq softirq steal
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


if not any(name in os.environ for name in _USERS_OWN):
    # set in either case, so that worker processes need not look; other OpenMP libraries (Windows, macOS) ignore it
    os.environ["GOMP_SPINCOUNT"] = NO_SPIN if busy_share() > BUSY else LONG_SPIN
