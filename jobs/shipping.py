"""What travels to a cluster with a job: this code, its configuration files, and variables by name."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from jobs.config import ConfigError
from jobs.redact import holds_credentials

PACKAGES = ("segmodel", "jobs")
# The demo's model is 15 of 16 MB, and the demo runs on one machine.
LEFT_OUT = ("__pycache__", "demo_bundle")

# Variables that name a file or a profile are no secrets, whatever their names say. The short ones are whole words: PAT
# stands in PATH, and RAY_AUTH_MODE is none.
_SECRET = re.compile(
    r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|CONNECTION_?STRING|(?:^|_)API_?KEY|(?:^|_)(?:KEY|SAS|PAT)(?:_|$)"
    r"|(?:^|_)AUTH(?:ORIZATION)?(?:_HEADER)?$",
    re.IGNORECASE,
)
# Connection strings and signatures of Azure, keys of service accounts and of ssh, lines of .netrc and of settings.
_SECRET_VALUE = re.compile(
    r"\b(?:Account|SharedAccess)Key=|\bsig=|PRIVATE KEY|\bpassw(?:or)?d[\"']?\s*[=:\s]\s*\S",
    re.IGNORECASE,
)
_NAMES_A_FILE = re.compile(r"_(?:FILE|PATH|DIR)$", re.IGNORECASE)


def fill(folder: Path, files: Mapping[str, bytes], *, code: bool) -> None:
    """Put what is to travel into `folder`.

    Args:
        folder: An empty one; on the cluster it is the working directory of the driver and all tasks.
        files: Names in the folder, and contents.
        code: Whether this code travels. Its version is written down beside it, since a run's manifest asks
            for it as for that of an installed package.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not code:
        return
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (source,) = spec.submodule_search_locations
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    about = folder / f"segjobs-{version('segjobs')}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: segjobs\nVersion: {version('segjobs')}\n"
    )


def variables(names: Iterable[str]) -> dict[str, str]:
    """Return the variables that a job is to get, with their values.

    Ray writes them into the logs of its nodes (`Creating runtime env: ...`), keeps them in its control store, and
    hands them to whoever may ask its job API; its dashboard hides them from browsers only. So no credential
    goes this way.

    Raises:
        ConfigError: One is not set, or looks like a credential.
    """
    values = {}
    for name in names:
        value = os.environ.get(name)
        if value is None:
            raise ConfigError(f"--env {name}: it is not set here")
        secret = _SECRET.search(name) and not _NAMES_A_FILE.search(name)
        if secret or holds_credentials(value) or _SECRET_VALUE.search(value):
            raise ConfigError(
                f"--env {name}: it holds a credential, and Ray would write it into its logs. Give the cluster's nodes a "
                "role or a service account, or set it where they are started"
            )
        values[name] = value
    return values
