"""The fleet from above, page by page."""

import base64
from collections.abc import Callable
from typing import Any

import pytest

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of, open_fleet

MakeSettings = Callable[..., Settings]
# Names that differ in what a collation makes little of, not in their order.
NAMES = ("b", "A.1", "a-1", "a_1", "B", "a1", "Z9", "z-9", "10", "9")


async def walk(fleet: Fleet, path: str) -> list[list[dict[str, Any]]]:
    """Follow the Link headers from `path`; return the runners of each page."""
    found = []
    while path:
        answer = await fleet.admin("GET", path)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["runners"])
        assert len(found) < 20, "a page leads back to itself"
        link = answer.links.get("next", {}).get("url", "")
        cursor = answer.json()["next_cursor"]
        assert (cursor is None) == (link == "")
        path = link.removeprefix("/api/admin")
    return found


@pytest.mark.gen_test
async def test_pages_are_in_one_order_lose_none_and_show_none_twice(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        assert await walk(fleet, "/runners") == [[]]
        signed_on = [await fleet.sign_on(name) for name in NAMES]
        await fleet.admit("c")  # on the allowlist, but never registered
        await fleet.pool.execute(
            "INSERT INTO runners (runner_id, public_key) SELECT unnest($1::text []), ''",
            ["0", "a-0", "a-2", "m", "zz"],  # bakeoff's own
        )
        run_id = await fleet.enqueue()
        await signed_on[4].take()
        await fleet.revoke(signed_on[7])

        [whole] = await walk(fleet, "/runners?limit=1000")
        assert sorted(runner["runner_id"] for runner in whole) == sorted(NAMES)
        by_name = {runner["runner_id"]: runner for runner in whole}
        assert by_name["B"]["current_runs"] == [run_id]
        assert [name for name in by_name if by_name[name]["state"] == "revoked"] == ["z-9"]
        for limit, sizes in ((3, [3, 3, 3, 1]), (5, [5, 5]), (10, [10]), (1, [1] * 10)):
            pages = await walk(fleet, f"/runners?limit={limit}")
            assert [len(page) for page in pages] == sizes
            assert [runner["runner_id"] for page in pages for runner in page] == list(by_name)


@pytest.mark.gen_test
async def test_a_page_has_100_runners_unless_the_query_says_otherwise(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.pool.execute(
            "INSERT INTO runners (runner_id, public_key, capabilities, key_fingerprint,"
            " last_heartbeat, status) SELECT 'runner-b' || n, public_key, capabilities,"
            " key_fingerprint, last_heartbeat, status"
            " FROM runners, generate_series(1, 120) AS n WHERE runner_id = $1",
            runner.runner_id,
        )
        assert [len(page) for page in await walk(fleet, "/runners")] == [100, 21]


@pytest.mark.gen_test
async def test_a_query_that_makes_no_sense_is_422(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    texts = ("a\0b", "a" * 129, "-a", "a b", "a\n", "é", "1:00000000-0000-4000-8000-000000000000")
    names = [base64.urlsafe_b64encode(text.encode()).decode() for text in texts]
    bad = (
        "limit=-1", "limit=0", "limit=1001", "limit=ten", "limit=", "limit=%EF%BC%91",
        "limit=1&limit=2", "limit=99999999999999999999", "cursor=x", "cursor=%C3%A9",
        "cursor=_w==", "cursor=" + "A" * 5000, *(f"cursor={name}" for name in names),
        "state=idle", "offset=1",
    )  # fmt: skip
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.sign_on()
        for query in bad:
            answer = await fleet.admin("GET", f"/runners?{query}")
            assert code_of(answer) == (422, "invalid_request"), query
        pointed = await fleet.admin("GET", "/runners?limit=1001")
        assert pointed.json()["errors"][0]["pointer"] == "/limit"
        pointed = await fleet.admin("GET", f"/runners?cursor={names[0]}")
        assert pointed.json()["errors"][0]["pointer"] == "/cursor"
