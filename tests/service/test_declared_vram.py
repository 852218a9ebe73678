"""Declared VRAM: MiB in a field of GB, and more than the named cards have."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from broker.errors import InvalidRequest
from broker.runners.declared_vram import check, sold_gb
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import code_of, open_fleet

MakeSettings = Callable[..., Settings]


def declared(vram_gb: int, *cards: str | dict[str, Any]) -> dict[str, Any]:
    """Return capabilities with these cards."""
    gpus = [{"name": card} if isinstance(card, str) else card for card in cards]
    return {"vram_gb": vram_gb, "quantizations": ["fp16"], **({"gpus": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("name", "gb"),
    [
        ("NVIDIA GeForce RTX 4090", 24),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16),
        ("NVIDIA RTX 6000 Ada Generation", 48),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96),
        ("NVIDIA H100 80GB HBM3", 96),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA GH200 480GB", 144),
        ("NVIDIA L40S", 48),
        ("NVIDIA L4", 24),
        ("AMD Radeon RX 7900 XTX", 24),
        ("Apple M3 Max", None),
        ("AMD Radeon 8060S", None),
        ("Tesla T400", None),
    ],
)
def test_names_as_drivers_print_them(name: str, gb: int | None) -> None:
    assert sold_gb(name) == gb


@pytest.mark.parametrize(
    "capabilities",
    [
        declared(24, "NVIDIA GeForce RTX 4090"),
        declared(48, "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        declared(48, {"name": "NVIDIA GeForce RTX 4090", "vram_gb": 48}),
        declared(20, {"name": "NVIDIA GeForce RTX 4090", "vram_gb": 20}),
        declared(128, "NVIDIA GeForce RTX 4090", "a card of tomorrow"),
        declared(2304),
    ],
)
def test_what_a_machine_can_have_is_taken(capabilities: dict[str, Any]) -> None:
    check(capabilities, "")


@pytest.mark.parametrize(
    ("capabilities", "pointer", "fix"),
    [
        (declared(24576), "/capabilities/vram_gb", "Then send 24,"),
        (
            declared(24, {"name": "x", "vram_gb": 24564}),
            "/capabilities/gpus/0/vram_gb",
            "Then send 24,",
        ),
        (declared(32, "NVIDIA GeForce RTX 4090"), "/capabilities/vram_gb", "send 24 at most"),
        (
            declared(96, {"name": "NVIDIA GeForce RTX 4090", "vram_gb": 96}),
            "/capabilities/vram_gb",
            "send 48 at most",
        ),
    ],
)
def test_what_it_cannot_have_is_refused_with_the_fix(
    capabilities: dict[str, Any], pointer: str, fix: str
) -> None:
    with pytest.raises(InvalidRequest, match=fix) as refused:
        check(capabilities, "")
    assert [each.pointer for each in refused.value.violations] == [pointer]


@pytest.mark.gen_test
async def test_mib_are_asked_back_at_a_claim_and_at_a_registration(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        refused = await runner.claim(capabilities=declared(24576))
        assert code_of(refused) == (422, "invalid_request")
        assert refused.json()["errors"][0]["pointer"] == "/capabilities/vram_gb"
        other = replace(await fleet.admit("runner-b"), capabilities=declared(24576))
        refused = await other.register()
        assert code_of(refused) == (422, "invalid_request")
        place = refused.json()["errors"][0]["pointer"]
        assert place == "/registration/capabilities/vram_gb"
