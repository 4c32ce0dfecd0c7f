"""The OpenAPI document holds what the service does, and the page that shows it needs nothing from elsewhere."""

import http.client
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jsonschema_rs
import pytest
import schemathesis
import swagger_ui_bundle
from bundle_making import SHIPPED
from hypothesis import HealthCheck, given, settings
from model_server import bundle as bundles
from model_server import protocols
from model_server.core import Models
from model_server.protocols import docs, kserve, named, oip, torchserve
from protocol_models import free_port, write_family
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi.definitions import OPENAPI_30
from test_service import SECONDS, running
from werkzeug.exceptions import HTTPException

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
PROTOCOLS = (named, oip, torchserve, kserve)
# In the document, but not of a protocol.
OF_CONTROL = {("GET", "/health"), ("GET", "/metrics")}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name:
        found = free_port()
        with running(Path(name), write_family(Path(name) / "family"), MODEL_PORT=found, MODEL_WORKERS=1) as started:
            started.wait_ready()
            yield found
            assert not [line for line in started.logs() if line["level"] == "error"]


def get(port: int, path: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def document(port) -> dict:
    status, headers, body = get(port, "/openapi.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return json.loads(body)


def test_the_document_is_valid(document):
    assert not list(jsonschema_rs.Draft4Validator(OPENAPI_30).iter_errors(document))
    assert document["servers"] == [{"url": "."}]
    identifiers = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(identifiers)) == len(identifiers)


def test_examples_are_what_the_models_do(document):
    for item in document["paths"].values():
        for operation in item.values():
            for content in (operation.get("requestBody", {}), operation["responses"]["200"]):
                for media in content.get("content", {}).values():
                    if "example" in media:
                        jsonschema_rs.validate(media["schema"], media["example"])
    predict = document["paths"]["/predict"]["post"]
    assert predict["requestBody"]["content"]["application/json"]["example"] == {"data": [0.2, 0.6]}
    assert {"200", "400", "404", "413", "503", "504"} <= predict["responses"].keys()
    assert "Retry-After" in predict["responses"]["503"]["headers"]


def test_every_route_is_in_the_document_and_nothing_else():
    model = SimpleNamespace(name="simplemodel", version="1.0.0", module=None, bundle=bundles.read(SHIPPED / "1.0.0"))
    models = Models([model])
    app = protocols.openapi.flask.Flask("test", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    rules = [(route.method, route.rule) for route in protocols.prediction_routes(models)]
    for method, rule in rules:
        app.add_url_rule(rule, f"{method} {rule}", lambda **_: "", methods=[method])
    for blueprint in protocols.blueprints(models, SimpleNamespace(), lambda: True):
        app.register_blueprint(blueprint)
        if blueprint.name in ("docs", "openapi"):
            continue
    served = {
        (method, rule.rule)
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD"}
        if rule.endpoint.partition(".")[0] not in ("docs", "openapi")
    }
    adapter, matched = app.url_map.bind("localhost"), set(OF_CONTROL)
    for protocol in PROTOCOLS:
        for operation in protocol.operations(models):
            if (operation.method, operation.path) in OF_CONTROL:
                continue
            try:
                rule, _ = adapter.match(operation.path, operation.method, return_rule=True)
            except HTTPException:
                raise AssertionError(f"{operation.method} {operation.path} isn't served") from None
            matched.add((operation.method, rule.rule))
    assert matched == served | OF_CONTROL


def operations(port: int):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def exercise(port: int, operation, mode: GenerationMode, wanted: list) -> None:
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        response = case.call_and_validate(base_url=f"http://127.0.0.1:{port}", checks=wanted)
        # A request that is allowed to wait for a few nanoseconds does come too late.
        assert response.status_code < 500 or response.status_code == 504

    run()


def test_answers_are_as_the_document_says(port):
    for operation in operations(port):
        exercise(port, operation, GenerationMode.POSITIVE, CHECKS)


def test_what_the_document_forbids_is_refused(port):
    for operation in operations(port):
        if operation.path != "/v2/repository/index" and operation.body:
            exercise(port, operation, GenerationMode.NEGATIVE, [*CHECKS, checks.negative_data_rejection])


def test_the_page_needs_nothing_from_elsewhere(port):
    status, headers, body = get(port, "/docs")
    page = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "//" not in policy
    # All addresses are relative, also to a prefix, and no script or style stands in the page itself.
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(addresses) == 4 and all(address.startswith("docs/") for address in addresses)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page) == ["", ""] and "<style" not in page
    for address in addresses:
        status, headers, content = get(port, f"/{address}")
        assert status == 200 and content and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"].startswith("public, max-age=")
        kind = {"css": "text/css", "js": "text/javascript", "png": "image/png"}[address.rpartition(".")[2]]
        assert headers["Content-Type"].startswith(kind)
    assert b"validatorUrl: null" in get(port, "/docs/start.js")[2]


@pytest.mark.parametrize("file", ["index.html", "../docs", "..%2f__init__.py", "swagger-ui.css/", "nothing"])
def test_the_page_has_no_other_files(port, file):
    assert get(port, f"/docs/{file}")[0] == 404


def test_the_title_is_escaped():
    models = SimpleNamespace(default=SimpleNamespace(name="<b>", version='"1"'))
    app = docs.flask.Flask("test")
    app.register_blueprint(docs.blueprint(models))
    assert "<title>&lt;b&gt; &quot;1&quot;</title>" in app.test_client().get("/docs").text


def test_the_page_can_show_the_documents_version(document):
    # This release of Swagger UI says of other versions that it can't show them.
    script = Path(swagger_ui_bundle.swagger_ui_path / "swagger-ui-bundle.js").read_text()
    assert '"3.0."' in script and document["openapi"].startswith("3.0.")
