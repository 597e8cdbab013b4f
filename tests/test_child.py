"""Laws of a child's start."""

from __future__ import annotations

import json
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
