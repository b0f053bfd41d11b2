"""How much memory a piece of code held at most."""

import threading

import psutil
import torch


class PeakMemory:
    """Within, watches this process; afterwards `gigabytes` is the most it held (on a GPU: what torch allocated)."""

    def __enter__(self):
        self.gigabytes, self.done = 0.0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def _watch(self):
        process = psutil.Process()
        while not self.done.wait(0.005):
            self.gigabytes = max(self.gigabytes, process.memory_info().rss / 2**30)

    def __exit__(self, *error):
        self.done.set()
        self.watcher.join()
        if torch.cuda.is_available():
            self.gigabytes = torch.cuda.max_memory_allocated() / 2**30
