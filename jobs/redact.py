"""What must not be seen: URLs lose passwords and signatures, texts the credentials of this process."""

import os
import re

# The token of a session is as good as its key while it lives.
_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_PASSWORD = re.compile(r"(?<=://)[^/\s\"'?#]*:[^/\s\"'?#]*@")
# A secret key may hold slashes; the key's id in front of it tells that it is one.
_KEYS = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}:[^\s\"'?#@]+@")
_SIGNED_QUERY = re.compile(
    r"\?[^\s\"'<>]*\b(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig)=[^\s\"'<>]*",
    re.IGNORECASE,
)


def holds_credentials(url: str) -> bool:
    """Say whether a URL has a password in front of its host, or is a signed one of http(s)."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return False
    signed = scheme.lower() in ("http", "https") and _SIGNED_QUERY.search(rest)
    return bool(signed or _KEYS.search(rest) or _PASSWORD.match(url, len(scheme) + len(separator)))


def without_secrets(text: str) -> str:
    """Return `text` without passwords and signatures in its URLs, and without our own secrets."""
    for name in _VARIABLES:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return _SIGNED_QUERY.sub("?***", _PASSWORD.sub("***@", _KEYS.sub("***@", text)))
