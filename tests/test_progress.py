"""Laws of progress: it fits a terminal, gives it back, and is plain lines in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from appliance.progress import Pace, say_duration

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


def test_what_came_before_the_first_unit_is_no_measure_of_speed() -> None:
    """No estimate before there is a rate; then only the time between units counts, from a resumed one too."""
    pace = Pace()
    assert pace.estimate(41, total=101, now=300.0) is None
    assert pace.estimate(41, total=101, now=301.0) is None
    assert pace.estimate(51, total=101, now=320.0) == 100.0
    assert pace.estimate(101, total=101, now=420.0) == 0.0


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (3723, "1:02:03")])
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    """Minutes and seconds; hours when there are any."""
    assert say_duration(seconds) == text


TRAINING = (
    "import time\n"
    "from appliance.training.view import TrainingView\n"
    "event = {'max_steps': 3, 'epoch': 1.0, 'loss': 2.0, 'grad_norm': 1.0, 'learning_rate': 1e-4,\n"
    "         'tokens_per_second': 9.0, 'memory_bytes': 1 << 30}\n"
    "with TrainingView() as view:\n"
    "    for step in range(1, 4): view.show({**event, 'step': step}); time.sleep(0.3)\n"
    "    raise RuntimeError('stopped')\n"
)


def test_the_training_view_gives_the_terminal_back_too() -> None:
    """Within 80 columns, the cursor visible again after an exception."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    done = subprocess.Popen([sys.executable, "-c", TRAINING], stderr=child, env=env)
    os.close(child)
    said = read_all(parent)
    assert done.wait(timeout=60) == 1
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l") >= 0
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said))
    assert any("3/3 steps" in f for f in frames)
    assert max(map(len, (f for f in frames if "steps" in f))) <= 80


def test_a_log_of_training_gets_the_first_and_the_last_state() -> None:
    """One line at once, one at the end, no control characters."""
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if "steps" in line]
    assert [line.split(" steps")[0] for line in lines] == ["  train 1/3", "  train 3/3"]
    assert "left" not in lines[0]
    assert "\x1b" not in done.stderr


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
