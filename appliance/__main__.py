"""`python -m appliance` is the same command as `appliance`."""

import sys

from appliance.cli import main

if __name__ == "__main__":
    sys.exit(main())
