"""What boto3's exceptions mean to the person who can mend them: one line each, no traceback.

HEAD answers carry no error code, only a status, so 403 and 404 are read as denied and absent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from appliance.errors import NotFoundError, PreconditionFailedError, StoreError

_REFUSED = {
    "403", "AccessDenied", "AuthorizationHeaderMalformed", "ExpiredToken", "Forbidden", "InvalidAccessKeyId",
    "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired", "UnauthorizedAccess",
}  # fmt: skip
_OTHER_BYTES = "the bytes that arrived at {endpoint} are not those of the expected SHA-256; publish again"
_OTHER_REGION = "the bucket is in another region; set AWS_REGION to it"
_ADVICE = {
    "NoSuchBucket": "{endpoint} has no such bucket; create it or correct the store URL",
    "BadDigest": _OTHER_BYTES,
    "XAmzContentSHA256Mismatch": _OTHER_BYTES,
    "PermanentRedirect": _OTHER_REGION,
    "301": _OTHER_REGION,
}


@contextlib.contextmanager
def translate_faults(subject: str, *, endpoint: str) -> Iterator[None]:
    """Turn what boto3 raises about `subject` (`s3://bucket/key`) into the store's own errors."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as fault:
        raise describe_answer(fault, subject=subject, endpoint=endpoint) from fault
    except BotoCoreError as fault:
        raise describe_failure(fault, subject=subject, endpoint=endpoint) from fault


def renew_credentials(credentials: Any, *, subject: str) -> None:
    """Have boto3's `credentials` (`None`: it found none) valid now: a role's are asked for anew before they run out.

    Raises `StoreError` about `subject` (`s3://bucket/prefix`) when there are none to be had. boto3 raises there what
    its ways to credentials meet: the answer of another service, a token file that is gone, a wrong clock.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        if credentials is not None:
            credentials.get_frozen_credentials()
    except (BotoCoreError, ClientError, OSError, RuntimeError) as fault:
        found = " ".join(str(fault).split())
        raise StoreError(f"{subject}: no credentials ({found}); {_advise_on_credentials(fault)}") from fault


def _advise_on_credentials(fault: Exception) -> str:
    """What to do when the way to credentials failed."""
    from botocore import exceptions

    if isinstance(fault, exceptions.ClientError) and fault.operation_name == "AssumeRoleWithWebIdentity":
        if read_answer(fault)[0].startswith("ExpiredToken"):
            return "mint a new token into AWS_WEB_IDENTITY_TOKEN_FILE and run the same command again"
        return "check AWS_ROLE_ARN, and that the role trusts the issuer, audience and subject of this token"
    if isinstance(fault, exceptions.ConnectionError | exceptions.HTTPClientError):
        return "check AWS_ENDPOINT_URL_STS, AWS_ENDPOINT_URL, AWS_REGION and the network"
    if isinstance(fault, OSError | exceptions.ParamValidationError):
        return "check AWS_ROLE_ARN, and that AWS_WEB_IDENTITY_TOKEN_FILE names a file with this job's token"
    if isinstance(fault, RuntimeError):  # botocore's: what was just made has run out already
        return "set the clock of this machine"
    return "check the AWS settings (environment, ~/.aws)"


def describe_answer(fault: Any, *, subject: str, endpoint: str) -> StoreError:
    """The error for an answer of the server (a botocore `ClientError`)."""
    code, status = read_answer(fault)
    if code in ("NoSuchKey", "NoSuchUpload", "404", "NotFound"):
        return NotFoundError(f"{subject}: no such object at {endpoint}")
    if status == 412:
        return PreconditionFailedError(f"{subject}: exists already or was changed by another writer")
    if code in _REFUSED or status in (401, 403):
        return StoreError(
            f"{subject}: credentials refused by {endpoint} ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and the rights of this identity"
        )
    message = fault.response.get("Error", {}).get("Message") or "no message"
    if code in _ADVICE:
        return StoreError(f"{subject}: {_ADVICE[code].format(endpoint=endpoint)}")
    return StoreError(f"{subject}: {endpoint} answered {status} {code}: {message}; look at the store and try again")


def describe_failure(fault: Exception, *, subject: str, endpoint: str) -> StoreError:
    """The error for a request without an answer (a botocore `BotoCoreError`)."""
    from botocore import exceptions

    if isinstance(fault, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return StoreError(
            f"{subject}: no complete credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
        )
    if isinstance(fault, exceptions.ConnectionError | exceptions.HTTPClientError):
        return StoreError(
            f"{subject}: cannot reach {endpoint} ({type(fault).__name__}); check AWS_ENDPOINT_URL, "
            "the network and that the store runs"
        )
    return StoreError(f"{subject}: {fault}; check the AWS settings (environment, ~/.aws)")


def read_answer(fault: Any) -> tuple[str, int]:
    """Error code and HTTP status of a botocore `ClientError`."""
    answer = fault.response
    return str(answer.get("Error", {}).get("Code", "")), int(
        answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    )
