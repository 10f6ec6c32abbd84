from __future__ import annotations

import hmac
from typing import Any

import pytest

from helpers.asgi import ask, echo
from ziggurat.runtime.server.middleware import auth
from ziggurat.runtime.server.middleware.auth import AuthMiddleware

KEYS = ("first-key", "second-key", "schlüssel")


def answer(*headers: tuple[str, str], path: str = "/v1/models", keys: tuple[str, ...] = KEYS) -> Any:
    return ask(AuthMiddleware(echo, keys), path=path, headers=headers)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_every_key_lets_in(scheme: str, key: str) -> None:
    assert answer(("Authorization", f"{scheme} {key}")).status == 200


def test_keys_are_utf8() -> None:
    sent = "schlüssel".encode().decode("latin-1")  # what the bytes of a header are to ASGI
    assert answer(("Authorization", f"Bearer {sent}")).status == 200


def test_without_keys_nothing_is_asked() -> None:
    assert answer(keys=()).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("Authorization", ""),),
        (("Authorization", "Bearer"),),
        (("Authorization", "Bearer "),),
        (("Authorization", "Basic Zmlyc3Qta2V5Og=="),),
        (("Authorization", "first-key"),),
        (("Authorization", "Bearer first-key"), ("Authorization", "Bearer first-key")),
    ],
)
def test_requests_without_a_key_are_challenged(headers: tuple[tuple[str, str], ...]) -> None:
    got = answer(*headers)
    assert (got.status, got.headers["www-authenticate"]) == (401, "Bearer")
    assert got.error["type"] == "authentication_error" and got.error["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["first-ke", "first-key2", "FIRST-KEY", "x", "\xff\xfe", "first-key second-key"])
def test_wrong_keys_are_refused_and_not_told(key: str) -> None:
    got = answer(("Authorization", f"Bearer {key}"))
    assert got.status == 401
    assert got.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert key not in got.error["message"] and "first-key" not in got.error["message"]


def test_health_is_public_and_nothing_like_it() -> None:
    assert answer(path="/health").status == 200
    assert answer(path="/health/").status == 401
    assert answer(path="/v1/../health").status == 401


def test_all_keys_are_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        sizes.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    class Spy:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth, "hmac", Spy)
    assert answer(("Authorization", "Bearer first-key")).status == 200
    assert answer(("Authorization", "Bearer x")).status == 401
    assert sizes == [(32, 32)] * 6
