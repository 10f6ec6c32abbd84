from __future__ import annotations

import pytest

from helpers.api import Api
from helpers.fake_engine import FakeEngine
from ziggurat.runtime.server.schemas.models import ModelList, ModelObject


def test_the_model_is_listed_by_its_files_name() -> None:
    api = Api(FakeEngine())
    listed = api.http.get("/v1/models").json()
    ModelList.model_validate(listed)
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "ziggurat")
    assert model["meta"]["n_ctx"] == 4096
    shown = api.http.get("/v1/models/fake").json()
    ModelObject.model_validate(shown)
    assert shown == model


def test_aliases_take_its_place() -> None:
    api = Api(FakeEngine(), alias=["org/name", "other"])
    assert [model["id"] for model in api.http.get("/v1/models").json()["data"]] == ["org/name", "other"]
    assert api.http.get("/v1/models/org/name").json()["id"] == "org/name"
    assert api.chat(model="other")["model"] == "other"
    assert api.chat()["model"] == "org/name"
    assert api.chat(model="fake.gguf")["model"] == "org/name"  # the file's name is known as well


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_other_models_do_not_exist(path: str) -> None:
    api = Api(FakeEngine())
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "a"}], "prompt": "a"}
    error = api.refused(path, body, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-4'" in error["message"] and "fake" in error["message"]
    assert api.http.get("/v1/models/gpt-4").status_code == 404


def test_the_fingerprint_is_stable() -> None:
    first, second = Api(FakeEngine()), Api(FakeEngine())
    fingerprints = {api.chat()["system_fingerprint"] for api in (first, first, second)}
    assert len(fingerprints) == 1 and fingerprints.pop().startswith("fp_")
