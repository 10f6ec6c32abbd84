"""What is told while the model loads."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from ziggurat.runtime.server.front import Front
from ziggurat.runtime.server.phase import Phase


def test_how_much_of_the_model_is_loaded_is_told_until_it_is() -> None:
    phase = Phase("loading")
    front = Front(phase)
    client = TestClient(front)
    told = []
    for part in (0.0, 0.25, 1.0):
        phase.load_progress(part)
        answer = client.get("/health")
        told.append((answer.status_code, answer.headers["X-Load-Progress"]))
    assert told == [(503, "0.000"), (503, "0.250"), (503, "1.000")]
    front.open(PlainTextResponse("there"))
    assert client.get("/health").text == "there" and phase.state == "ready"
