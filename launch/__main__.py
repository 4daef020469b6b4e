"""``python -m launch`` is ``atoll``, also where no script of that name is installed."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
