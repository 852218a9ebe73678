"""Declared VRAM: checked against the unit and against the cards that a runner names.

Wrong VRAM shows only when a run fails, which costs an attempt. Two frequent mistakes are refused at
once: MiB (what `nvidia-smi` prints) in a field of GB, and more than the named cards have.
"""

import re
from collections.abc import Mapping
from typing import Any

from broker.errors import InvalidRequest, Violation

# No machine has so many GB, and 4000 MiB are too few for a model.
MIB_FROM = 4000

# The largest VRAM in GB that is sold under a name, by the vendors' data sheets. The first that
# fits counts, so longer names stand before those they begin with. Other names are not checked.
SOLD_GB = (
    (r"GB300|B300", 288), (r"GB200|B200", 192), (r"B100", 192), (r"H200", 141), (r"GH200", 144),
    (r"H100", 96), (r"H800", 80), (r"A100", 80), (r"A800", 80), (r"A40", 48), (r"A30", 24),
    (r"A10G?", 24), (r"A16", 64), (r"A2", 16), (r"L40S?", 48), (r"L4", 24), (r"T4", 16),
    (r"V100", 32), (r"P100", 16), (r"P40", 24), (r"MI355X|MI350X", 288), (r"MI325X", 256),
    (r"MI300X", 192), (r"MI250X?", 128), (r"MI210", 64), (r"MI100", 32),
    (r"RTX PRO 6000", 96), (r"RTX 6000 Ada", 48), (r"RTX 5000 Ada", 32), (r"RTX A6000", 48),
    (r"RTX A5000", 24), (r"RTX A4000", 16), (r"RTX 5090 Laptop", 24), (r"RTX 5090", 32),
    (r"RTX 5080", 16), (r"RTX 5070 Ti", 16), (r"RTX 5070", 12), (r"RTX 5060 Ti", 16),
    (r"RTX 5060", 8), (r"RTX 4090 Laptop", 16), (r"RTX 4090", 24), (r"RTX 4080", 16),
    (r"RTX 4070 Ti SUPER", 16), (r"RTX 4070", 12), (r"RTX 4060 Ti", 16), (r"RTX 4060", 8),
    (r"RTX 3090", 24), (r"RTX 3080 Ti Laptop", 16), (r"RTX 3080 Laptop", 16), (r"RTX 3080", 12),
    (r"RTX 3070", 8), (r"RTX 3060", 12), (r"RTX 3050", 8), (r"RTX 2080 Ti", 11),
    (r"RTX 2080", 8), (r"RTX 2070", 8), (r"RTX 2060", 12), (r"GTX 1080 Ti", 11),
    (r"GTX 1080", 8), (r"RX 9070", 16), (r"RX 7900 XTX", 24), (r"RX 7900 XT", 20),
    (r"RX 7900 GRE", 16), (r"RX 7800 XT", 16), (r"RX 6900 XT", 16), (r"RX 6800", 16),
    (r"Arc B580", 12), (r"Arc A770", 16),
)  # fmt: skip
_CARDS = [(re.compile(rf"\b(?:{name})\b", re.IGNORECASE), gb) for name, gb in SOLD_GB]


def check(capabilities: Mapping[str, Any], at: str) -> None:
    """Refuse VRAM that is not in GB, or more than the named cards have together.

    `at` is the JSON pointer of what holds `capabilities`. Raises InvalidRequest with a pointer.
    """
    found = _in_mib(capabilities, at) or _beyond_cards(capabilities, at)
    if found:
        raise InvalidRequest(found[0].detail, found)


def sold_gb(name: str) -> int | None:
    """Return the largest VRAM in GB that a card of this name is sold with; None if unknown."""
    return next((gb for pattern, gb in _CARDS if pattern.search(name)), None)


def _in_mib(capabilities: Mapping[str, Any], at: str) -> tuple[Violation, ...]:
    declared = {"vram_gb": capabilities["vram_gb"]} | {
        f"gpus/{i}/vram_gb": gpu.get("vram_gb", 0)
        for i, gpu in enumerate(capabilities.get("gpus", ()))
    }
    return tuple(
        Violation(
            f"{at}/capabilities/{place}",
            f"{gb} GB of VRAM: is this MiB? Then send {round(gb / 1024)}, the size in GB.",
        )
        for place, gb in declared.items()
        if gb >= MIB_FROM
    )


def _beyond_cards(capabilities: Mapping[str, Any], at: str) -> tuple[Violation, ...]:
    cards = capabilities.get("gpus", ())
    sizes = [_size_gb(card) for card in cards]
    known = [gb for gb in sizes if gb is not None]
    if not cards or len(known) < len(cards) or capabilities["vram_gb"] <= sum(known):
        return ()
    named = ", ".join(f"{card['name']} {gb}" for card, gb in zip(cards, known, strict=True))
    detail = (
        f"{capabilities['vram_gb']} GB is more than the cards have together ({named}): send"
        f" {sum(known)} at most, or a rebuilt card's own size in `gpus`."
    )
    return (Violation(f"{at}/capabilities/vram_gb", detail),)


def _size_gb(card: Mapping[str, Any]) -> int | None:
    """The VRAM of a card: as sold, or up to twice that where it says so (rebuilt cards)."""
    sold = sold_gb(card["name"])
    return sold and min(max(card.get("vram_gb", 0), sold), 2 * sold)
