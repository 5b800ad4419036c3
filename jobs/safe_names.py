"""Names of output files made of shards and keys: none leaves its folder, all can be turned back.

Letters of any script, digits and most signs stay. Control characters, `%` and the signs that file
systems and shells read (`\\ : * ? " < > | #`) become `%XX` of their UTF-8 bytes, as in URLs; so does a
dot in front of a name (`.`, `..` and hidden files are none), and a slash that does not separate two
names. `urllib.parse.unquote` gives the path back. A name too long for file systems is cut, and ends
in `%~` and a digest of all of it.
"""

import re
from hashlib import blake2b
from urllib.parse import quote

# File systems take 255 bytes; suffixes follow, and names aside while they are written.
MAX_BYTES = 180

_SEPARATOR = re.compile(r"(?<=[^/])/(?=.)", re.DOTALL)
_UNSAFE = frozenset('%\\:*?"<>|#/')


def safe_path(path: str) -> str:
    """Return a relative path of safe names for `path`, which may be any text."""
    return "/".join(safe_name(name) for name in _SEPARATOR.split(path))


def safe_name(name: str) -> str:
    """Return one name without separators for `name`, which may be any text."""
    characters = [_escaped(character) for character in name]
    if name.startswith("."):
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


def _escaped(character: str) -> str:
    if character in _UNSAFE or not character.isprintable():
        return quote(character, safe="")
    return character
