"""Names of output files made of shards and keys: none leaves its folder, and no two become one.

Tools find the file of an image by the image's own name, so a name is changed only where no file can be called
so. A NUL, the dot in front of `.` and `..`, and a slash that does not separate two names become `%XX`, as in
URLs. A name too long for file systems is cut, and ends in `%~` and a digest of all of it. In a name that looks
as if it were made here, `%` becomes `%25`; `50%.jpg` and `a%20b.jpg` stay.
"""

import re
from hashlib import blake2b
from urllib.parse import quote

# File systems take 255 bytes; suffixes follow, and 34 bytes more while a file is written aside.
MAX_BYTES = 210

_SEPARATOR = re.compile(r"(?<=[^/])/(?=.)", re.DOTALL)
_MADE_HERE = re.compile("%(?:00|25|2E|2F|69|~)")
_FOLDER_IMAGES = re.compile("(?<![^/])images(?=/)")


def safe_path(path: str) -> str:
    """Return a relative path of safe names for `path`, which may be any text."""
    return "/".join(safe_name(name) for name in _SEPARATOR.split(path))


def safe_name(name: str) -> str:
    """Return one name without separators for `name`, which may be any text."""
    unsafe = "\0/%" if _MADE_HERE.search(name) else "\0/"
    characters = [quote(one, safe="") if one in unsafe else one for one in name]
    if name in (".", ".."):
        characters[0] = "%2E"
    if sum(len(one.encode()) for one in characters) <= MAX_BYTES:
        return "".join(characters)
    kept, used = [], 0
    for character in characters:
        used += len(character.encode())
        # The mark and 16 digits have their room.
        if used > MAX_BYTES - 18:
            break
        kept.append(character)
    return f"{''.join(kept)}%~{blake2b(name.encode(), digest_size=8).hexdigest()}"


def below_images(path: str) -> str:
    """Return a safe path for what lies below a folder `images`, whose labels lie below `labels`.

    Ultralytics takes the last folder of that name for the one to replace (`data.utils.img2label_paths`), so
    none below may be called so.
    """
    return _FOLDER_IMAGES.sub("%69mages", path)
