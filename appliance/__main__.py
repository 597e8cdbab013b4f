"""Where `appliance` and `python -m appliance` begin."""

import signal
import sys


def main() -> int:
    """Run the command and return its exit code.

    While its modules are loaded nothing has begun: a Ctrl-C then ends the process as it ends any
    program, and not with Python's traceback. `run_guarded` takes it over.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from appliance.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
