"""``python -m launch`` is ``atoll``, also where no script of that name is installed."""

from launch.cli import main

if __name__ == "__main__":
    main()
