"""schemathesis over /openapi.yaml: no answer 5xx, and each one as it is described.

    make fuzz-openapi EXAMPLES=60

Against a real server process on private servers, once with an admin's token and once with a
runner's. It must not sign the runner off, or all that came after would be 401.
"""

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path

from bench.support import seeding
from bench.support.env import BenchEnv, open_env
from db.pool import open_pool
from sandbox.services.admin_token import new_token

RUNS = 2000
# Left out: what a request with the token of another kind is answered (a 401 each, which the table
# of test_authorization.py holds), and good data that the queue's state refuses.
LEFT_OUT = "ignored_auth,positive_data_acceptance"


def main() -> int:
    """Run both; 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.openapi", description=__doc__)
    parser.add_argument("--examples", type=int, default=60, help="of each operation")
    parser.add_argument("--seed", type=int, help="of an earlier run, which prints it")
    given = parser.parse_args()
    with open_env() as stage:
        server = stage.serve(verify_max=8)
        tokens = asyncio.run(_tokens(stage))
        codes = []
        for whose, (token, paths) in tokens.items():
            sys.stdout.write(f"with {whose} token\n")
            sys.stdout.flush()
            codes.append(_run(f"http://127.0.0.1:{server.port}", token, paths, given))
    return max(codes)


async def _tokens(stage: BenchEnv) -> dict[str, tuple[str, list[str]]]:
    """Seed runs; return the tokens and, for each, the options that choose its operations."""
    async with seeding.open_connection(stage.dsn) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, 3)
        await seeding.add_runs(connection, models, RUNS)
        (runner,) = await seeding.sign_on(connection, 1, max_leases=8)
    async with open_pool(stage.dsn, 2) as pool:
        admin = await new_token(pool, "schemathesis")
    return {
        "a runner's": (runner.token, ["--exclude-path", "/api/runners/me"]),
        "an admin's": (admin, []),
    }


def _run(url: str, token: str, paths: list[str], given: argparse.Namespace) -> int:
    argv = [
        str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.yaml", "--url", url,
        "--header", f"Authorization: Bearer {token}", *paths,
        "--phases", "examples,coverage,fuzzing", "--max-examples", str(given.examples),
        "--exclude-checks", LEFT_OUT, "--continue-on-failure", "--request-timeout", "40",
    ]  # fmt: skip
    if given.seed is not None:
        argv += ["--seed", str(given.seed)]
    return subprocess.run(argv, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
