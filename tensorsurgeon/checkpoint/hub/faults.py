"""What goes wrong between here and the Hub: one message each, and tried again where that helps."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from tensorsurgeon.errors import SurgeonError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before each new try: a Hub that restarts, or a connection that comes back, needs less than these together.
_WAITS: Final = (1.0, 3.0, 10.0, 30.0)
FIRST_WAITS: Final = (1.0, 3.0)
"""The same where nothing has been fetched yet and nobody answers: whoever has no network, or meant a folder, is told soon."""
# Whoever asks for more patience than this is told to a person, who may come back later.
_MOST_PATIENCE: Final = 300.0
# As httpx and requests call them.
_NO_CONNECTION: Final = frozenset({"ConnectError", "ConnectTimeout", "ConnectionError"})
_LOG_IN: Final = "log in with `hf auth login`, or give a token as HF_TOKEN"


class Fault(NamedTuple):
    """What happened, in words; whether it may pass, how many seconds the Hub asked to wait, whether nobody answered at all."""

    message: str
    may_pass: bool
    wait: float = 0.0
    is_unreached: bool = False


def persistently(
    work: Callable[[], T], where: str, error: Callable[..., SurgeonError], *, unreached_waits: Sequence[float] | None = None
) -> T:
    """The result of ``work``, tried again while what stops it may pass; raises ``error`` with one message.

    Deliberate errors go through as they are. ``unreached_waits`` are the seconds before each new try where no connection comes
    about, if they are others.
    """
    for number, patience in enumerate((*_WAITS, None)):
        try:
            return work()
        except SurgeonError:
            raise
        except Exception as cause:
            fault = fault_of(cause)
            if fault is None:
                raise
            wait = patience
            if fault.is_unreached and unreached_waits is not None:
                wait = unreached_waits[number] if number < len(unreached_waits) else None
            if wait is None or not fault.may_pass or fault.wait > _MOST_PATIENCE:
                raise error(fault.message, where=where) from cause
            pause = max(wait, fault.wait)
            logger.warning("%s: %s; trying again in %.0f s", where, fault.message, pause)
            time.sleep(pause)
    raise AssertionError  # the last wait is None


def fault_of(error: BaseException) -> Fault | None:
    """What an error of the library means to a person; None for what is none of the Hub's or the disk's."""
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled():
            return Fault("is not complete in the cache, and the Hub may not be asked (HF_HUB_OFFLINE is set)", False)
        case errors.GatedRepoError():
            return Fault(f"is gated: ask for access on its page at the Hub, then {_LOG_IN}", False)
        case errors.RepositoryNotFoundError():
            return Fault(f"the Hub knows no such model, or it is private: check the name, or {_LOG_IN}", False)
        case errors.RevisionNotFoundError():
            return Fault("the model is on the Hub, but has no such branch, tag or commit; check what follows @", False)
        case errors.DisabledRepoError():
            return Fault("the Hub has disabled access to this model", False)
        case errors.EntryNotFoundError() if isinstance(error, errors.HfHubHTTPError):
            return Fault("is gone from the repository since its files were listed; make the plan again", False)
        case errors.HfHubHTTPError():
            return _of_status(error)
        case errors.HTTPError():  # type: ignore[attr-defined]  # of whichever HTTP library it uses
            unreached = type(error).__name__ in _NO_CONNECTION
            message = f"the Hub cannot be reached ({_first_line(error)}); check the connection, or HF_ENDPOINT"
            return Fault(message, True, is_unreached=unreached)
        case errors.HFValidationError():
            return Fault(_first_line(error), False)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return Fault("the disk is full; free some space and go on", False)
    if error.__cause__ is not None and (inner := fault_of(error.__cause__)) is not None:
        return inner
    if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError) or "Consistency check failed" in str(error):
        return Fault(_first_line(error), True)
    if isinstance(error, ConnectionError | TimeoutError) or "xet" in type(error).__name__.lower():
        return Fault(f"the transfer broke off ({_first_line(error)})", True)
    return None


def _of_status(error: Any) -> Fault:
    status = error.response.status_code
    match status:
        case 401:
            return Fault(f"the Hub does not take the token (401); {_LOG_IN} that is valid", False)
        case 403:
            return Fault("the token has no right to this (403); ask for access, or give another token as HF_TOKEN", False)
        case 408 | 429:
            said = str(error.response.headers.get("Retry-After") or "")
            wait = float(said) if said.isdigit() else 0.0
            asked = f", it asks to wait {wait:.0f} s" if wait else ""
            return Fault(f"the Hub answers that there were too many requests ({status}){asked}; try again later", True, wait)
    if status >= 500:
        return Fault(f"the Hub is in trouble ({status}); try again later", True)
    # What the Hub itself says, where it says something: the library's first line is of its own words.
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return Fault(f"the Hub refuses: {said or _first_line(error)}", False)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
