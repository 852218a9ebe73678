"""The demo runner: `python -m sandbox.runner.main` registers, claims, beats, computes and submits.

It shows how a runner should behave and is no benchmark. One JSON line per event on stdout, none of
which holds a token or a lease_id. The real runner lives in bakeoff's `bench/`.
"""

import argparse
import asyncio
import json
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from sandbox.runner.answers import BuiltInRules, Executor, OpenAIEndpoint
from sandbox.runner.client import RunnerClient
from sandbox.runner.identity import Identity, load_key, public_key_text
from sandbox.runner.life import Runner, RunnerOptions
from sandbox.runner.result_bundle import Hardware, Sign
from sandbox.runner.wire import Problem
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore

LEAVING_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until idle, drained, refused or stopped. Returns 0, or 1 when the server refused."""
    options = parser().parse_args(arguments)
    try:
        key = load_key(options.key)
    except ValueError:
        print(f"{options.key} is no base64 of a 32-byte seed", file=sys.stderr)
        return 2
    print(f"public key: {public_key_text(key)}", file=sys.stderr, flush=True)
    identity = Identity(
        key,
        audience=options.audience or options.server,
        hostname=options.name,
        capabilities={"vram_gb": options.vram_gb, "quantizations": options.quantizations},
    )
    return asyncio.run(serve(options, identity))


async def serve(options: argparse.Namespace, identity: Identity) -> int:
    """Live until done or signalled, then hand back what is held and sign off, promptly."""
    # Proxies of the environment are not meant for a demo on this machine.
    async with httpx.AsyncClient(base_url=options.server, trust_env=False) as http:
        client = RunnerClient(http, identity, say)
        executor = _executor(options, http)
        patience = RunnerOptions(options.once, options.until_idle, options.wait_s, options.idle_s)
        runner = Runner(
            client, executor, _signer(options), Hardware(options.vram_gb), say, patience
        )
        life = asyncio.create_task(runner.live())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, life.cancel)
        return await _outcome(life, runner)


async def _outcome(life: asyncio.Task[None], runner: Runner) -> int:
    try:
        await life
    except asyncio.CancelledError:
        say("stopping")
    except Problem as refusal:
        say("refused", code=refusal.code, detail=refusal.detail)
        return 1
    finally:
        await _leave(runner)
    return 0


async def _leave(runner: Runner) -> None:
    """A server that does not answer must not keep us: the lease lapses by itself."""
    try:
        async with asyncio.timeout(LEAVING_S):
            await runner.leave()
    except (TimeoutError, Problem) as error:
        say("left_without_goodbye", why=str(error) or "no answer in time")


def say(event: str, **facts: object) -> None:
    """Write one event as a JSON line; flushed, because the demo reads along."""
    print(json.dumps({"event": event, **facts}), flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line, with what each option means."""
    line = argparse.ArgumentParser(prog="python -m sandbox.runner.main", description=__doc__)
    line.add_argument("--server", required=True, type=_url, help="the queue's public URL")
    line.add_argument("--audience", help="what to sign as the audience, when not --server")
    line.add_argument(
        "--key", required=True, type=Path, help="32-byte seed, base64; made if absent"
    )
    line.add_argument("--sigstore", required=True, type=Path, help="a throwaway Sigstore's folder")
    line.add_argument("--identity", required=True, help="e-mail address in the certificate")
    line.add_argument("--issuer", required=True, help="OIDC issuer in the certificate")
    line.add_argument("--vram-gb", required=True, type=int, help="whole GB, as the card is sold")
    line.add_argument("--quantizations", required=True, type=_names, help="q4_k_m,q8_0,...")
    line.add_argument("--name", default=socket.gethostname(), help="host name to register")
    line.add_argument("--endpoint", type=_url, help="OpenAI-compatible; else the built-in rules")
    line.add_argument("--seconds-per-cell", type=float, default=0.2, help="pretended computing")
    line.add_argument("--wait-s", type=int, default=20, help="how long a claim waits at the server")
    line.add_argument(
        "--idle-s", type=float, default=5.0, help="longest sleep after an empty claim"
    )
    line.add_argument("--once", action="store_true", help="exit after one run")
    line.add_argument(
        "--until-idle", type=int, metavar="N", help="exit after N empty claims in a row"
    )
    return line


def _executor(options: argparse.Namespace, http: httpx.AsyncClient) -> Executor:
    if options.endpoint:
        return OpenAIEndpoint(http, options.endpoint)
    return BuiltInRules(options.seconds_per_cell)


def _signer(options: argparse.Namespace) -> Sign:
    sigstore = ThrowawaySigstore.load(options.sigstore)
    subject = EmailSubject(options.identity, options.issuer)
    return lambda blob: sigstore.sign(blob, subject)


def _url(text: str) -> str:
    """Without a scheme every request would fail for ever, and look like a network error."""
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError("start it with http:// or https://")
    return text.rstrip("/")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
