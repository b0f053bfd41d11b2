"""Reading ahead and writing behind, in threads: while the model works on a batch, the next one is decoded and the last
one drawn and encoded. OpenCV, Pillow's codecs and torch release Python's lock, so the three do run at once.
"""

import contextlib
import queue
import threading

_PATIENCE = 0.1  # seconds: a wait without end would not notice Ctrl+C on Windows


class _End:
    """After the last item: the exception that ended it, or None."""

    def __init__(self, error=None):
        self.error = error


def ahead(items, size=1):
    """Yield what an iterable yields; a thread asks it for up to `size` + 1 items more than were taken.

    An exception of the iterable is raised here, in its place. Closing this generator ends the thread.
    """
    waiting, ended = queue.Queue(size), threading.Event()

    def read():
        last = _End()
        try:
            for item in items:
                if not _put(waiting, item, ended):
                    return
        except BaseException as error:
            last = _End(error)
        _put(waiting, last, ended)
    thread = threading.Thread(target=read, name="reading", daemon=True)
    thread.start()
    try:
        while not isinstance(item := _get(waiting), _End):
            yield item
            del item  # a frame must not live until the next one is there
        if item.error:
            raise item.error
    finally:
        ended.set()
        thread.join()


class Behind:
    """Call work(*item) for every item in a thread, in order; a context, which at its end waits for all of them.

    An exception of `work` is raised by the next `put`, or at the end. After Ctrl+C what was put before is still done.

    Args:
        work: function; size: items that may wait before `put` waits too.
    """

    def __init__(self, work, size):
        self.work, self.waiting, self.failed = work, queue.Queue(size), threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self._run, name="writing", daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, *rest):
        _put(self.waiting, _End(), self.failed)
        while self.thread.is_alive():
            self.thread.join(_PATIENCE)
        if self.error and (kind is None or kind is KeyboardInterrupt):
            raise self.error

    def put(self, *item):
        """Have work(*item) done soon."""
        if not _put(self.waiting, item, self.failed):
            raise self.error

    def _run(self):
        while not isinstance(item := _get(self.waiting), _End):
            try:
                self.work(*item)
            except BaseException as error:
                self.error = error
                self.failed.set()
                return
            del item


def _put(waiting, item, ended):
    """-> whether the item was taken before `ended` was set."""
    while not ended.is_set():
        with contextlib.suppress(queue.Full):
            waiting.put(item, timeout=_PATIENCE)
            return True
    return False


def _get(waiting):
    while True:
        with contextlib.suppress(queue.Empty):
            return waiting.get(timeout=_PATIENCE)
