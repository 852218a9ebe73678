"""What the console script calls: it holds Ctrl-C and closed pipes from the first import on."""

import os
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> int:
    """Run the command line; an interruption or a reader that left ends it without a traceback."""
    try:
        from cli.main import main as run

        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `... | head` has seen enough. Python flushes stdout once more at exit, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
