"""Entry point of `python -m dlfer`."""

from dlfer.cli import main

if __name__ == "__main__":
    main()
