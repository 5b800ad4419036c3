"""JSON documents that carry a digest of themselves: a store may have none, and JSON has none either."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jobs.store import Store

DIGEST = "digest"


def dump(document: Mapping[str, Any]) -> bytes:
    """Return a document as JSON for people to read, with the digest of the rest in it."""
    assert DIGEST not in document
    sealed = {**document, DIGEST: _digest(document)}
    return json.dumps(sealed, indent=2, ensure_ascii=False).encode()


def read(store: Store, path: str, *, made_by_us: bool = True) -> dict[str, Any]:
    """Return the document at `path`, without its digest.

    Args:
        store: Where it is.
        path: In the store.
        made_by_us: Whether it has a digest for sure.

    Raises:
        FileNotFoundError: There is none.
        DamagedError: It is not what was written.
    """
    try:
        document = json.loads(store.read(path))
    except ValueError as error:
        raise store.damaged(path, f"it is no JSON: {error}") from None
    if not isinstance(document, dict) or (made_by_us and DIGEST not in document):
        raise store.damaged(path, "it has no digest")
    if document.pop(DIGEST, None) not in (None, _digest(document)):
        raise store.damaged(path, "it does not have the digest that stands in it")
    return document


def _digest(document: Mapping[str, Any]) -> str:
    # As it will be read: tuples are lists then, and all keys are text.
    plain = json.loads(json.dumps(document))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
