"""What does `python -m fastbn` run? The command line."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
