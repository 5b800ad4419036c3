"""What goes wrong at a store that speaks S3: what may pass, and what to do about the rest."""

import botocore.exceptions

from jobs.redact import without_secrets
from jobs.store import DamagedError

FAILURES = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    DamagedError,
)

CHECKSUM = "checksum"
NO_STORE = "the answer is not that of a store: check that --endpoint-url is an S3 store"
# Trouble that may pass, by how it is counted. What is neither here nor below is permanent.
_PASSING_STATUS = (429, 500, 502, 503, 504)
_PASSING_CODES = {
    "RequestTimeout": "timeout",
    # Damaged on the way to the store, which compares it with the checksum that boto3 sends along.
    "BadDigest": CHECKSUM,
    "XAmzContentChecksumMismatch": CHECKSUM,
    # Another conditional put of the same object is under way.
    "ConditionalRequestConflict": "conflict",
    "OperationAborted": "conflict",
}
_PASSING_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (DamagedError, CHECKSUM),
    (botocore.exceptions.FlexibleChecksumError, CHECKSUM),
    (botocore.exceptions.ReadTimeoutError, "timeout"),
    (botocore.exceptions.ConnectTimeoutError, "timeout"),
    (botocore.exceptions.IncompleteReadError, "cut off"),
    (botocore.exceptions.ResponseStreamingError, "cut off"),
    (botocore.exceptions.ConnectionError, "connection"),
    (botocore.exceptions.HTTPClientError, "connection"),
)

_DENIED = "access is denied: check the credentials and the bucket's policy"
_EXPIRED = "the credentials have expired: renew them, and run the same command again to go on"
_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: check its name and --endpoint-url",
    "403": _DENIED,
    "AccessDenied": _DENIED,
    # A HEAD request has no body that would say more.
    "400": "the request is refused: check that the credentials have not expired, and AWS_DEFAULT_REGION",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": "the session token is not valid: check AWS_SESSION_TOKEN",
    "InvalidAccessKeyId": "the access key is unknown to this store: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is not that of the access key: check "
    "AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "the clocks of this machine and of the store differ: set this one's",
    "AuthorizationHeaderMalformed": "the bucket is in another region: check AWS_DEFAULT_REGION",
    "PermanentRedirect": "the bucket is in another region: check AWS_DEFAULT_REGION and --endpoint-url",
    "301": "the bucket is in another region: check AWS_DEFAULT_REGION and --endpoint-url",
    "InvalidObjectState": "the object is archived: restore it first",
    "NotImplemented": "the store does not know such a request: conditional puts and ranged reads "
    "are needed",
    # What botocore makes of an answer that is no XML, too: a web page.
    "500": "the store fails, or is none: check that --endpoint-url is an S3 store, and run the same "
    "command again to go on",
    "405": NO_STORE,
    "MethodNotAllowed": NO_STORE,
}
_ADVICE_FOR_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (
        botocore.exceptions.NoCredentialsError,
        ": set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role",
    ),
    (botocore.exceptions.SSLError, ": check --endpoint-url (http or https) and its certificate"),
    (botocore.exceptions.EndpointConnectionError, ": check --endpoint-url and the network"),
    (
        botocore.exceptions.HTTPClientError,
        ": the store or the network is in trouble; run the same command again to go on",
    ),
)


def code(error: Exception) -> str:
    """Return the code that a store answered with, an empty string where it did not answer."""
    if not isinstance(error, botocore.exceptions.ClientError):
        return ""
    return str(error.response["Error"].get("Code"))


def passing(error: Exception) -> str:
    """Return the kind of a trouble that may pass, an empty string for any other."""
    if not isinstance(error, botocore.exceptions.ClientError):
        return next((kind for type_, kind in _PASSING_ERRORS if isinstance(error, type_)), "")
    status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
    return _PASSING_CODES.get(code(error), str(status) if status in _PASSING_STATUS else "")


def advice(error: Exception) -> str:
    """Return what happened and what to do about it; it holds no secrets."""
    # Its own retries are off.
    words = without_secrets(str(error)).replace(" (reached max retries: 0)", "")
    if isinstance(error, botocore.exceptions.ClientError):
        return f"{_ADVICE.get(code(error), code(error))} ({words})"
    return words + next((a for kind, a in _ADVICE_FOR_ERRORS if isinstance(error, kind)), "")
