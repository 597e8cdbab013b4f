"""Laws of progress: it fits a terminal, gives it back, and is plain lines in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

WORK = (
    "from appliance.progress import Progress\n"
    "with Progress('train', unit=' steps') as bar:\n"
    "    for step in range(1, 4): bar.advance(step, total=3, note='loss 1.234  ' + 'tokens ' * 30)\n"
    "    raise RuntimeError('stopped')\n"
)


def test_a_terminal_gets_a_bar_of_its_width_and_its_cursor_back() -> None:
    """A long note is cut, never wrapped; an exception leaves no hidden cursor behind."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    done = subprocess.Popen([sys.executable, "-c", WORK], stderr=child, env=env)
    os.close(child)
    said = read_all(parent)
    assert done.wait(timeout=60) == 1
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l") >= 0
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said))
    last = next(f for f in reversed(frames) if "3/3 steps" in f)
    assert last.rstrip().endswith("…")
    assert len(last) <= 80


def read_all(descriptor: int) -> str:
    """What a terminal's other side wrote until it closed."""
    pieces = []
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:  # Linux says EIO at the end
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(descriptor)
    return b"".join(pieces).decode()


def test_a_log_gets_plain_lines() -> None:
    """The first and the last step, no control characters, nothing on standard output."""
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if "steps" in line]
    assert lines[0].startswith("  train 1/3 steps")
    assert lines[-1].startswith("  train 3/3 steps")
    assert len(lines) == 2
    assert "\x1b" not in done.stderr
    assert done.stdout == ""
