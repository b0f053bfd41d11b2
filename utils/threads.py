"""How OpenMP's threads wait for each other. Imported before torch, whose libgomp reads it once, when it is loaded.

A parallel section of an operation ends when its last thread does. By default a thread that waits spins for
milliseconds, and where other programs have the cores it spins away the time in which the awaited thread could run:
the feature demo then trains at a quarter of its speed. After a short spin it sleeps instead. No spin at all would cost
a wake-up per section on free cores. Measured by benchmarks/busy_machine.py.
"""

import os

SPINS = 1000  # rounds of the waiting loop, some ten microseconds; libgomp's default is 300000

_USERS_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # whoever sets one of these knows better
if not any(name in os.environ for name in _USERS_OWN):
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)  # other OpenMP libraries (Windows, macOS) ignore it
