"""Where things are kept from run to run that belong to no run."""

import os
from pathlib import Path


def cache_folder():
    """-> Path of the folder for downloaded weights and the like: RAINSIGHT_CACHE, else ~/.cache/rainsight."""
    return Path(os.environ.get("RAINSIGHT_CACHE") or Path.home() / ".cache" / "rainsight")
