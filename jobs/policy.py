"""Policy files: YAML at any URI to a `segmodel.policy.Policy`."""

import difflib
import hashlib
import json
from collections.abc import Collection

import yaml

from jobs.config import ConfigError
from jobs.storage import open_uri
from segmodel import policy as policies
from segmodel.policy import Policy, PolicyError


def _each_key_once(document: yaml.Node | None) -> None:
    """YAML is silent about a key that comes twice, of which the last one would win."""
    seen, waiting = set(), [document]
    while waiting:  # no recursion: an alias may stand within what it names
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, key.value) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise PolicyError(f"the key {key[1]!r} comes twice")
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def load(uri: str, endpoint_url: str | None, categories: Collection[str]) -> Policy:
    """Read a policy.

    Args:
        uri: A YAML file.
        endpoint_url: See `storage.open_store`.
        categories: The model's, by name: the policy may not name others.

    Raises:
        ConfigError: There is none, it is no YAML, or it says what cannot be.
    """
    store, name = open_uri(uri, endpoint_url)
    try:
        text = store.read(name)
        _each_key_once(yaml.compose(text, yaml.SafeLoader))
        found = policies.parse(yaml.safe_load(text))
    except FileNotFoundError:
        raise ConfigError(f"--policy: there is no file {store.url(name)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--policy {store.url(name)} is no YAML: {error}") from error
    except PolicyError as error:
        raise ConfigError(f"--policy {store.url(name)}: {error}") from error
    for category in found.categories:
        if category not in categories:
            close = difflib.get_close_matches(category, list(categories), n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"--policy {store.url(name)} names the category {category!r}, which the model has not{hint}"
            )
    return found


def digest(policy: Policy) -> str:
    """Return a digest of what a policy says, however it was written."""
    return hashlib.sha256(json.dumps(policy.to_dict(), sort_keys=True).encode()).hexdigest()
