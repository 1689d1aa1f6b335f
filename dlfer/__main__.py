"""Entry point of the `dlfer` command and of `python -m dlfer`."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C during its imports ends the process at once, without a traceback, with exit code 130.

    The handler does not raise, because some code, such as `__set_name__`, turns a KeyboardInterrupt into another error.
    """
    is_heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as under nohup
    if is_heeded:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    from dlfer.cli import main as run

    if is_heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
