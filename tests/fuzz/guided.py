"""One parser under atheris: `python -m tests.fuzz.guided PARSER SECONDS`; libFuzzer ends it.

The parsers are imported here, and only theirs are made to tell which of their branches were taken:
to instrument everything that they use takes minutes.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[
        "auth",
        "broker",
        "handlers",
        "python_multipart",
        "sigstore",
        "sigstore_models",
        "json",
    ]
):
    from tests.fuzz import parsers


def main(name: str, seconds: str) -> None:
    """Search for so long; what is found, and the corpus as it grows, go to build/fuzz."""
    grown = parsers.KEEP / f"corpus-{name}"
    grown.mkdir(parents=True, exist_ok=True)
    flags = [f"-max_total_time={seconds}", f"-max_len={parsers.MOST}", "-print_final_stats=1"]
    folders = [str(grown), str(parsers.ASSETS / name)]
    target = parsers.TARGETS[name]

    def one(data: bytes) -> None:
        target(data)

    found = f"-artifact_prefix={Path(parsers.KEEP)}/find-{name}-"
    atheris.Setup([sys.argv[0], *flags, found, *folders], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
