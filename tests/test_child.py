"""Laws of a child's start, and of its stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

LOOK = """
import gc, importlib.util, json, sys
from appliance.child import import_libraries
with import_libraries(four_bit=sys.argv[1] == "4"):
    import appliance.training.trainer
names = ("trl", "bitsandbytes", "torch._inductor.compile_fx")
loaded = [n for n in names if sys.modules.get(n) is not None]
print(json.dumps([loaded, gc.isenabled(), gc.get_freeze_count() > 100_000]))
"""


@pytest.mark.parametrize(
    ("bits", "loaded"), [("16", ["trl"]), ("4", ["trl", "bitsandbytes", "torch._inductor.compile_fx"])]
)
def test_a_child_loads_no_compiler_for_weights_that_are_not_in_4_bits(bits: str, loaded: list[str]) -> None:
    """PEFT would import bitsandbytes, and that the compiler; garbage is collected again, what was imported is not."""
    done = subprocess.run([sys.executable, "-c", LOOK, bits], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [loaded, True, True]


WORK = """
import signal, sys, time
from appliance.child import run_child
from appliance.errors import InterruptedRunError

def work(stop, emit):
    if sys.argv[1] == "something":
        stop.defer()
    emit(ready=True)
    while not stop.is_set:
        time.sleep(0.01)
    raise InterruptedRunError("with all of it saved")

sys.exit(run_child(work))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("saves", "said"), [("nothing", ""), ("something", "with all of it saved")])
def test_a_stop_waits_for_work_that_has_something_to_save_alone(number: signal.Signals, saves: str, said: str) -> None:
    """Whoever only loads a model ends in the middle of it; both say by the same code that the work goes on later."""
    argv = [sys.executable, "-c", WORK, saves]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline()) == {"ready": True}
        child.send_signal(number)
        rest = child.stdout.read()
    assert child.returncode == 33
    assert (json.loads(rest)["failure"] if rest else "") == said
