"""Entry point of the console script: handles Ctrl-C, closed pipes and full disks."""

import io
import os
import sys
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Stdout(io.TextIOWrapper):
    """Stdout, whose failures are told apart from those of the command.

    What a terminal or a locale cannot show is written as an escape, and ends nothing. Raises
    OutputFailed; a reader that left is a BrokenPipeError.
    """

    def write(self, text: str, /) -> int:
        """Write, or keep for the next flush."""
        try:
            return super().write(text)
        except OSError as error:
            _refuse(error)

    def flush(self) -> None:
        """Write what is kept."""
        try:
            super().flush()
        except OSError as error:
            _refuse(error)


class Closed(io.TextIOBase):
    """In place of a stdout that was closed before we began. Raises OutputFailed."""

    def write(self, text: str, /) -> int:
        """Take nothing."""
        _refuse(OSError(0, "it is closed"))


def main() -> int:
    """Run the command line; an interruption or a reader that left ends it without a traceback."""
    from client.output import OutputFailed, print_failure

    _take_stdout()
    try:
        from cli.main import main as run

        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `... | head` has seen enough.
        code = 0
    except OutputFailed as failure:
        print_failure(failure)
        code = failure.code
    else:
        return code
    _give_up_stdout()
    return code


def _take_stdout() -> None:
    if sys.stdout is None:
        sys.stdout = Closed()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        old = sys.stdout
        sys.stdout = Stdout(
            old.detach(),
            encoding=old.encoding,
            errors="backslashreplace",
            line_buffering=old.line_buffering,
        )


def _give_up_stdout() -> None:
    """Let Python's last flush of stdout, at its exit, go into nothing."""
    if not isinstance(sys.stdout, Closed):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: OSError) -> NoReturn:
    from client.output import OutputFailed

    if isinstance(error, BrokenPipeError):
        raise error
    raise OutputFailed(error.strerror or type(error).__name__) from None


if __name__ == "__main__":
    sys.exit(main())
