"""Model bundles at any URI."""

from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.storage import open_store
from segmodel import bundle as bundles
from segmodel.bundle import Bundle, BundleError


def load_bundle(uri: str, endpoint_url: str | None) -> Bundle:
    """Read the bundle at `uri`.

    Raises:
        BundleError: There is none, or it is damaged.
    """
    store = open_store(uri, endpoint_url)
    try:
        description = store.read(bundles.DESCRIPTION)
        weights = store.read(bundles.WEIGHTS)
    except FileNotFoundError as error:
        raise BundleError(
            f"{uri} is not a model bundle: {error}. "
            "Make one: segjobs init --arch small --weights random --categories FILE --output DIR"
        ) from error
    return bundles.parse(description, weights, uri)


def save_bundle(uri: str, bundle: Bundle, endpoint_url: str | None) -> None:
    """Write `bundle` to `uri`."""
    store = open_store(uri, endpoint_url)
    with TemporaryDirectory() as folder:
        bundles.save(folder, bundle)
        # The description last: a bundle without it is none, so a half-written one is not taken for
        # whole.
        for name in (bundles.WEIGHTS, bundles.CARD, bundles.DESCRIPTION):
            store.put(name, (Path(folder) / name).read_bytes())
