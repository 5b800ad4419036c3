"""What must not be seen: URLs lose passwords and signatures, texts the credentials of this process."""

import os
import re

# The token of a session is as good as its key while it lives.
_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_PASSWORD = re.compile(r"(?<=://)[^/\s\"'?#]*:[^/\s\"'?#]*@")
# A secret key may hold slashes; the key's id in front of it tells that it is one.
_KEYS = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}:[^\s\"'?#@]+@")
_SIGNED_QUERY = re.compile(
    r"\?[^\s\"'<>]*\b(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig|token|access_token|client_secret)="
    r"[^\s\"'<>]*",
    re.IGNORECASE,
)


def holds_credentials(url: str) -> bool:
    """Say whether a URL has a password in front of its host, or is a signed one of http(s) or Azure."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return False
    web = scheme.lower() in ("http", "https")
    # In `s3://` and `gs://` a question mark is a letter of the key; `abfs://CONTAINER@ACCOUNT` is no secret.
    signed = (web or scheme.lower() in ("abfs", "abfss")) and _SIGNED_QUERY.search(rest)
    named = web and "@" in rest.partition("/")[0]
    return bool(
        signed or named or _KEYS.search(rest) or _PASSWORD.match(url, len(scheme) + len(separator))
    )


def without_secrets(text: str) -> str:
    """Return `text` without passwords and signatures in its URLs, and without our own secrets."""
    for name in _VARIABLES:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return _SIGNED_QUERY.sub("?***", _PASSWORD.sub("***@", _KEYS.sub("***@", text)))
