"""All benchmarks, one after the other, each in a process of its own; then the table.

A full run writes bench/results/latest.json; `--quick` shows that each works and keeps nothing.

    make bench
    make bench-quick
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time

from bench import report

MODULES = {
    "B1": "claims", "B2": "heartbeats", "B3": "peers", "B4": "depth", "B5": "wakeup",
    "B6": "parked", "B7": "expiry", "B8": "submits", "B9": "balanced",
    "B12": "floods",
}  # fmt: skip


def main() -> int:
    """Run them. Returns 1 when one did not work, whatever the figures are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="tiny: shows that each works")
    quick = parser.parse_args().quick
    failed = []
    for name, module in MODULES.items():
        if importlib.util.find_spec(f"bench.{module}") is None:
            print(f"{name}: bench/{module}.py is not there", flush=True)
            continue
        began = time.monotonic()
        argv = [sys.executable, "-m", f"bench.{module}", *(["--quick"] if quick else [])]
        code = subprocess.run(argv, check=False).returncode
        if code not in (0, report.NOT_HERE):
            failed.append(name)
        done = "not measured" if code == report.NOT_HERE else f"{time.monotonic() - began:.0f} s"
        print(f"{name}: {done}", flush=True)
    if not quick:
        found = json.loads(report.LATEST.read_text())
        report.print_table({name: found[name] for name in MODULES if name in found})
    if failed:
        print(f"did not work: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
