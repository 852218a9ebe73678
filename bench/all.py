"""All benchmarks, one after the other, each in a process of its own; then the table.

A full run writes bench/results/latest.json; `--quick` shows that each works and keeps nothing.

    make bench
    make bench ARGS=--quick
"""

import argparse
import json
import subprocess
import sys
import time

from bench.support import report

MODULES = {
    "B1": "claims", "B2": "heartbeats", "B3": "peers", "B4": "depth", "B5": "wakeup",
    "B6": "parked", "B7": "expiry", "B8": "submits", "B9": "balanced",
    "B12": "floods",
}  # fmt: skip


# Named by --only: they measure for hours, draw, or write the page.
OTHERS = ("charts", "page", "finished_runs", "soak", "fleet", "rolling_restart")


def main() -> int:
    """Run all of MODULES, or those named. Returns 1 when one failed, whatever the figures are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help=f"of {', '.join((*MODULES.values(), *OTHERS))}: a,b")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that each works")
    # What one of them takes (--seconds, --runners) goes to it as it is.
    given, passed_on = parser.parse_known_args()
    wanted = given.only.split(",") if given.only else list(MODULES.values())
    if unknown := set(wanted) - {*MODULES.values(), *OTHERS}:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    numbers = {module: number for number, module in MODULES.items()}
    failed = []
    for module in wanted:
        began = time.monotonic()
        arguments = [*(["--quick"] if given.quick else []), *passed_on]
        code = subprocess.run(
            [sys.executable, "-m", f"bench.{module}", *arguments], check=False
        ).returncode
        if code not in (0, report.NOT_HERE):
            failed.append(module)
        done = "not measured" if code == report.NOT_HERE else f"{time.monotonic() - began:.0f} s"
        print(f"{numbers.get(module, '')} {module}: {done}".strip(), flush=True)
    if not given.quick and len(wanted) > 1:
        found = json.loads(report.LATEST.read_text())
        report.print_table({name: found[name] for name in MODULES if name in found})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
