"""The OpenAPI document holds what the service does, and the page that shows it needs nothing from elsewhere."""

import http.client
import json
import re
import tempfile
import time
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
from model_server.config import Config
from model_server.core import Models
from model_server.protocols import docs, jobs, kserve, named, oip, openapi, torchserve
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
PROTOCOLS = (named, oip, torchserve, kserve, jobs)
# In the document, but not of a protocol.
OF_CONTROL = {("GET", "/health"), ("GET", "/metrics")}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name:
        found = free_port()
        settings = {"MODEL_PORT": found, "MODEL_WORKERS": 1, "MODEL_JOBS_DIR": name}
        with running(Path(name), write_family(Path(name) / "family"), **settings) as started:
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
def family(tmp_path_factory) -> Models:
    """What the service serves, without the code."""
    bundle = bundles.read(write_family(tmp_path_factory.mktemp("family") / "family"))
    # The protocols ask whether the code makes its own answers, as that of these two does.
    own = SimpleNamespace(postprocess=None)
    return Models(
        [
            SimpleNamespace(
                name=one.name, version=one.version, module=own if one.name in ("parity", "signs") else None, bundle=one
            )
            for one in bundle.models
        ]
    )


@pytest.fixture(scope="module")
def of_jobs(family) -> dict:
    return openapi.document(family, jobs.operations(family))


@pytest.fixture(scope="module")
def document(port) -> dict:
    status, headers, body = get(port, "/openapi.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return json.loads(body)


def test_the_document_is_valid(document, of_jobs):
    for one in (document, of_jobs):
        assert not list(jsonschema_rs.Draft4Validator(OPENAPI_30).iter_errors(one))
        assert one["servers"] == [{"url": "."}]
        identifiers = [operation["operationId"] for item in one["paths"].values() for operation in item.values()]
        assert len(set(identifiers)) == len(identifiers)


def test_no_two_operations_have_one_name(family):
    one, other = (
        SimpleNamespace(name=name, version=model.version, module=model.module, bundle=model.bundle)
        for name, model in zip(("x", "x_ready"), family.all, strict=False)
    )
    made = openapi.document(Models([one, other]), oip.operations(Models([one, other])))
    identifiers = [operation["operationId"] for item in made["paths"].values() for operation in item.values()]
    assert len(set(identifiers)) == len(identifiers) > 4


def test_examples_are_what_the_models_do(document, of_jobs):
    for item in (*document["paths"].values(), *of_jobs["paths"].values()):
        for operation in item.values():
            for content in (operation.get("requestBody", {}), operation["responses"].get("200", {})):
                for media in content.get("content", {}).values():
                    if "example" in media:
                        jsonschema_rs.validate(media["schema"], media["example"])
    predict = document["paths"]["/predict"]["post"]
    assert predict["requestBody"]["content"]["application/json"]["example"] == {"data": [0.2, 0.6]}
    assert {"200", "400", "404", "413", "503", "504"} <= predict["responses"].keys()
    assert "Retry-After" in predict["responses"]["503"]["headers"]


def test_every_route_is_in_the_document_and_nothing_else(tmp_path):
    model = SimpleNamespace(name="simplemodel", version="1.0.0", module=None, bundle=bundles.read(SHIPPED / "1.0.0"))
    models = Models([model])
    app = protocols.openapi.flask.Flask("test", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    rules = [(route.method, route.rule) for route in protocols.prediction_routes(models)]
    for method, rule in rules:
        app.add_url_rule(rule, f"{method} {rule}", lambda **_: "", methods=[method])
    for blueprint in protocols.blueprints(models, SimpleNamespace(), lambda: True, True):
        app.register_blueprint(blueprint)
    config = Config.from_environment({"MODEL_JOBS_DIR": str(tmp_path)})
    app.register_blueprint(jobs.create_blueprint(models, config, metrics=None, log=None))
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


@pytest.mark.parametrize("has_jobs", [True, False])
def test_the_document_has_jobs_where_they_are_enabled(family, has_jobs):
    app = openapi.flask.Flask("test", static_folder=None)
    for blueprint in protocols.blueprints(family, SimpleNamespace(), lambda: True, has_jobs):
        app.register_blueprint(blueprint)
    found = json.loads(app.test_client().get("/openapi.json").data)["paths"]
    assert {"/v1/jobs", "/v1/jobs/{job_id}/result", "/v1/model/roots/jobs"} <= found.keys() or not has_jobs
    assert has_jobs == any("/jobs" in path for path in found)


def operations(document: dict):
    return [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]


def exercise(port: int, operation, mode: GenerationMode, wanted: list) -> None:
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case):
        response = case.call_and_validate(base_url=f"http://127.0.0.1:{port}", checks=wanted)
        # A request that is allowed to wait for a few nanoseconds does come too late.
        assert response.status_code < 500 or response.status_code == 504

    run()


def test_answers_are_as_the_document_says(port, document, of_jobs):
    for operation in (*operations(document), *operations(of_jobs)):
        exercise(port, operation, GenerationMode.POSITIVE, CHECKS)


def test_jobs_go_through_their_states_as_the_document_says(port, of_jobs):
    found = {(one.method.upper(), one.path): one for one in operations(of_jobs)}

    def ask(method: str, path: str, **parts) -> tuple[int, dict]:
        case = found[method, path].Case(**parts)
        answer = case.call_and_validate(base_url=f"http://127.0.0.1:{port}", checks=CHECKS)
        return answer.status_code, answer.json()

    body = {"body": {"data": [0.2, 0.6]}, "media_type": "application/json"}
    key = {"headers": {"Idempotency-Key": "a name"}}
    job = "/v1/jobs/{job_id}"
    status, submitted = ask("POST", "/v1/jobs", **body, **key)
    assert (status, ask("POST", "/v1/jobs", **body, **key)[0]) == (202, 200)
    of_it = {"path_parameters": {"job_id": submitted["id"]}}
    deadline = time.monotonic() + SECONDS
    while ask("GET", job, **of_it)[1]["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ask("GET", f"{job}/result", **of_it) == (200, {"output": pytest.approx(0.6318, abs=1e-3)})
    assert ask("POST", f"{job}/cancel", **of_it)[0] == ask("POST", f"{job}/retry", **of_it)[0] == 409
    assert ask("GET", "/v1/jobs", query={"status": "completed"})[1]["jobs"]


def test_what_the_document_forbids_is_refused(port, document, of_jobs):
    for operation in (*operations(document), *operations(of_jobs)):
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
