"""Files from the network: taken up where an earlier connection, or run, left off."""

import hashlib
import http.client
import re
import urllib.error
import urllib.request

from tqdm import tqdm

TIMEOUT = 30     # seconds without a byte after which a connection counts as lost
PATIENCE = 3     # connections in a row that bring nothing before a download is given up
CHUNK = 1 << 20  # bytes


def resumed(url, part, name, md5_sum=None, room=None):
    """Fill the file `part` up to the whole, with a new connection as often as an old one brought something.

    Args:
        url: http or https; part: Path, what is there already is kept; name: beside the progress bar.
        md5_sum: of the whole file, by which one that is complete already is known; None where nobody has published it:
            then the length that the server says counts.
        room: (bytes that are still to come) -> None, may raise UserError; called before anything is written.
    Raises:
        OSError, http.client.HTTPException: no connection, no such file (urllib.error.HTTPError), a full disk.
    """
    idle = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _receive(url, part, name, before, room):
                return
            problem = ConnectionError("the connection was cut off")
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: the part is already as long as the file, or longer
                raise
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
            if md5(part) == md5_sum if md5_sum else whole and int(whole[1]) == before:
                return
            part.unlink()
            problem = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
        now = part.stat().st_size if part.exists() else 0
        idle = 0 if now > before else idle + 1
        if idle >= PATIENCE:
            raise problem


def _receive(url, part, name, have, room):
    """Append to `part`, which has `have` bytes, what one connection brings. -> True when the file is complete"""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:
            have = 0  # the server sends the whole file again
        length = answer.headers.get("Content-Length")
        whole = have + int(length) if length else None
        if room and length:
            room(int(length))
        with (open(part, "ab" if have else "wb") as file,
              tqdm(total=whole, initial=have, desc=name, unit="B", unit_scale=True, unit_divisor=1024,
                   ascii=True, dynamic_ncols=True) as bar):
            while block := answer.read(CHUNK):
                file.write(block)
                bar.update(len(block))
                have += len(block)
    return whole is None or have == whole


def reason(error):
    """-> what went wrong, in one line."""
    return (str(getattr(error, "reason", "") or error) or type(error).__name__).splitlines()[0]


def md5(path):
    """-> hex MD5 sum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
