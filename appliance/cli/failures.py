"""Errors to messages and exit codes: one line for what a user can mend, a traceback only for a bug."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

import click

from appliance.child import list_stop_signals
from appliance.cli.lines import wrap
from appliance.command import leave_closed_terminal
from appliance.digest import write_atomic
from appliance.errors import ApplianceError, InterruptedRunError, describe_place

_BUG, _USAGE, _INTERRUPTED = 70, 2, 33


def run_guarded(group: click.Group, argv: Sequence[str] | None) -> int:
    """Run `group`; return 0 or the exit code of what went wrong, after saying it."""
    _forget_failure()
    _keep_printing()
    for number in list_stop_signals():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _stop)
    try:
        _refuse_bytes(sys.argv[1:] if argv is None else argv)
        result = group.main(args=argv, prog_name="appliance", standalone_mode=False, color=_choose_color())
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as fault:
        fault.show()
        _write_failure(fault.format_message(), _USAGE)
        return _USAGE
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped; what was finished is kept: run the same command to go on", _INTERRUPTED)
    except (ApplianceError, InterruptedRunError) as fault:
        return _fail(str(fault), fault.exit_code)
    except Exception as fault:  # noqa: BLE001 - the last line of defence: a bug is told as one
        words = describe_place(fault)
        return _fail(words, 1) if words else _report_bug()
    return result if isinstance(result, int) else 0


def _stop(number: int, _frame: FrameType | None) -> None:
    leave_closed_terminal()
    name = signal.Signals(number).name
    raise InterruptedRunError(f"stopped by {name}; what was finished is kept: run the same command to go on")


def _keep_printing() -> None:
    """What the output's encoding lacks is escaped, as Python does on standard error: no row or answer ends a verb."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """An argument that is no text can be in no prompt, no history and no record of a run."""
    for text in arguments:
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            message = (
                f"argument {text!r}: expected text, found bytes that are no {sys.getfilesystemencoding()}; correct it"
            )
            raise click.UsageError(message) from fault


def _choose_color() -> Literal[False] | None:
    """Never where NO_COLOR (https://no-color.org) is set and not empty, else by the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def _fail(message: str, code: int) -> int:
    is_colored = sys.stderr.isatty() and _choose_color() is None
    lead = "\x1b[31merror:\x1b[0m " if is_colored else "error: "
    sys.stderr.write(f"{lead}{wrap(f'error: {message}', indent=2, stream=sys.stderr).removeprefix('error: ')}\n")
    _write_failure(message, code)
    return code


def _report_bug() -> int:
    trace = traceback.format_exc()
    say_bug(trace)
    _write_failure(trace, _BUG)
    return _BUG


def say_bug(trace: str) -> None:
    """A traceback and what to do with it, to standard error."""
    sys.stderr.write(f"{trace}\nThis is a bug in the appliance. Please report it with the lines above.\n")


def _find_record() -> Path | None:
    """`failure.json` for machines, which a failed command leaves in a container (`APPLIANCE_OUT` is set)."""
    out = os.environ.get("APPLIANCE_OUT")
    return Path(out) / "failure.json" if out and Path(out).is_dir() else None


def _forget_failure() -> None:
    """What an earlier command left would be read as the failure of this one."""
    if (record := _find_record()) and record.exists():
        try:
            record.unlink()
        except OSError as fault:
            sys.stderr.write(f"{record}: of an earlier command, not removed ({fault})\n")


def _write_failure(message: str, code: int) -> None:
    if record := _find_record():
        try:
            write_atomic(record, json.dumps({"message": message, "exit_code": code}).encode())
        except OSError as fault:
            sys.stderr.write(f"{record}: not written ({fault})\n")
