"""What two experiments share, once."""

import sys


def _show_interrupt(kind, error, traceback, otherwise=sys.excepthook):
    """Ctrl+C while a script still imports, which takes seconds, ends with a word instead of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        otherwise(kind, error, traceback)


sys.excepthook = _show_interrupt
