"""The exception tree: everything a user can cause or meet has a class here.

A message names the subject (file:line or key), what was found, what was expected and the next
action. The library raises; only `appliance.cli` turns an error into a line and an exit code.
A failed quality gate is a `Verdict`, not an exception.
A stop signal is no failure: nothing that handles failures, here or in a library, may take it for one.
"""

from __future__ import annotations

import errno
import re


class ApplianceError(Exception):
    """An expected failure, with a message for the person who can mend it."""

    exit_code = 1


class RecipeError(ApplianceError):
    """A recipe cannot be read or asks for something that cannot be done."""


class DatasetError(ApplianceError):
    """A dataset, its pointer or a row of it is missing, broken or breaks its contract."""


class UnreachableDataError(DatasetError):
    """The DVC remote cannot be asked from here (no credentials, refused ones, no network): nothing is known of it."""


class ModelError(ApplianceError):
    """A base model cannot be found, is refused (pickled weights) or is damaged."""


class TrainingError(ApplianceError):
    """Training refused to start, or stopped because its result would be worthless."""


class EvaluationError(ApplianceError):
    """Generation or scoring could not be completed on every held-out row."""


class RegistryError(ApplianceError):
    """A version, alias or manifest is missing, damaged or refused by a registry rule."""


class StoreError(ApplianceError):
    """The object store or a local disk did not do what was asked of it."""


class PreconditionFailedError(StoreError):
    """A conditional write lost: the key exists already, or its ETag is not the expected one."""


class NotFoundError(StoreError):
    """The store has no object under this key."""


class CommandError(ApplianceError):
    """An external program (git, dvc, a worker) is missing or failed."""

    @property
    def last_line(self) -> str:
        """What the program said last, without the name of an error of this module that ended it."""
        return re.sub(rf"^{re.escape(__name__)}\.\w+: ", "", str(self).strip().splitlines()[-1])


class InterruptedRunError(BaseException):
    """A signal stopped the run; what was finished is kept and the same command resumes it."""

    exit_code = 33


class DeviceError(ApplianceError):
    """A transient device fault (out of memory after every retry, a lost GPU)."""

    exit_code = 34


class LostDeviceError(DeviceError):
    """The device itself failed, not for want of memory: what a child says to its parent, see `appliance.child`."""

    exit_code = 35


class UnexpectedError(ApplianceError):
    """A bug that ended one part of the work and not the others; its cause has the traceback."""

    exit_code = 70


# The last one is torch.save's: its writer (caffe2/serialize/inline_container.cc) loses the errno.
_DISK_FULL = ("No space left on device", "file write failed", "File too large", "unexpected pos")


def is_disk_full(fault: BaseException) -> bool:
    """Whether a failure means that the disk or the quota is full; torch and safetensors say it in words only."""
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(words in str(fault) for words in _DISK_FULL)


def is_denied(fault: BaseException) -> bool:
    """Whether a failure means that this user may not read or write a place, or that nobody may write there."""
    return isinstance(fault, OSError) and fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def describe_place(fault: BaseException) -> str:
    """What is wrong with the place that something was written to, and what to do; empty for any other failure."""
    place = getattr(fault, "filename", None)
    if is_disk_full(fault):
        return f"{place or 'the disk'}: no space left; free some and run the same command to go on"
    if place and is_denied(fault):
        words = str(getattr(fault, "strerror", "")).lower()
        return f"{place}: {words}; give this user access to it, or name another place"
    if place and isinstance(fault, NotADirectoryError | IsADirectoryError | FileExistsError):
        return f"{place}: {str(fault.strerror).lower()}; name another place, or move away what is there"
    return ""
