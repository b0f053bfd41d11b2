"""Which files count as images and what may go wrong with them; without torch, which worker processes need not load."""

from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files


def require_eight_bits(image):
    """ValueError where an open PIL image has more than 8 bits per channel: as 8 bits it would be all white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
