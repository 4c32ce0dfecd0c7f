"""The protocols spoken with a running service, the Open Inference Protocol by Triton's own client."""

import http.client
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import flask
import numpy
import pytest
from bundle_making import ROOT
from model_server.core import Models
from model_server.protocols import kserve, named, oip, torchserve
from protocol_models import MODELS, free_port, in_base64, picture, write_family
from service_process import SECONDS, Service, running
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

ROW = [0.2, 0.6]
PROBABILITY = 0.631793737411499
NAMES = ["simplemodel", *MODELS]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name:
        port = free_port()
        bundle = write_family(Path(name) / "family")
        with running(Path(name), bundle, MODEL_PORT=port, MODEL_WORKERS=1) as started:
            started.port = port
            started.wait_ready()
            yield started


@pytest.fixture
def triton(service) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        yield client


def tensor(array: numpy.ndarray, datatype: str, **options: bool) -> InferInput:
    found = InferInput("input", list(array.shape), datatype)
    found.set_data_from_numpy(array, **options)
    return found


def strings(*values: bytes) -> numpy.ndarray:
    return numpy.array(values, dtype=numpy.object_)


def floats(*rows: list) -> numpy.ndarray:
    return numpy.array(rows, dtype=numpy.float32)


def ask(service: Service, method: str, path: str, body: bytes | None = None, **headers: str):
    """The status and the JSON document of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=SECONDS)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_triton_learns_about_the_server_and_its_models(triton):
    assert triton.is_server_live() and triton.is_server_ready()
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    assert [model["name"] for model in triton.get_model_repository_index()] == NAMES
    for name in NAMES:
        assert triton.is_model_ready(name) and triton.is_model_ready(name, "1.0.0")
        assert triton.get_model_metadata(name, "1.0.0")["versions"] == ["1.0.0"]
    assert not triton.is_model_ready("simplemodel", "2") and not triton.is_model_ready("other")
    with pytest.raises(InferenceServerException, match="no model of that name"):
        triton.get_model_metadata("other")
    with pytest.raises(InferenceServerException, match="not found"):
        triton.get_inference_statistics("simplemodel")


@pytest.mark.parametrize(
    ("name", "taken", "made"),
    [
        ("simplemodel", ("FP32", [-1, 2]), ("FP32", [-1, 1])),
        ("shades", ("BYTES", [-1]), ("FP32", [-1, 2])),
        ("roots", ("FP64", [-1, 2, 2]), ("FP64", [-1, 2, 2])),
        ("parity", ("INT64", [-1]), ("BYTES", [-1])),
        ("inverse", ("BOOL", [-1, 2]), ("BOOL", [-1, 2])),
        ("lengths", ("BYTES", [-1]), ("INT64", [-1])),
    ],
)
def test_metadata_name_the_tensors(triton, name, taken, made):
    metadata = triton.get_model_metadata(name)
    assert metadata["inputs"] == [{"name": "input", "datatype": taken[0], "shape": taken[1]}]
    assert metadata["outputs"] == [{"name": "output", "datatype": made[0], "shape": made[1]}]


def test_triton_predicts_by_default(triton):
    result = triton.infer("simplemodel", [tensor(floats(ROW, [0, 0]), "FP32")])
    assert result.get_output("output")["parameters"] == {"binary_data_size": 8}
    assert result.as_numpy("output").dtype == numpy.float32
    assert result.as_numpy("output").tolist() == [[pytest.approx(PROBABILITY)], [pytest.approx(0.1148, abs=1e-4)]]


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize(
    ("name", "rows", "datatype", "expected"),
    [
        ("simplemodel", floats(ROW), "FP32", [[PROBABILITY]]),
        ("roots", numpy.array([[[1, 4], [9, 16]], [[0, 1e-300], [4e300, 0.25]]]), "FP64", None),
        ("parity", numpy.array([3, 2**63 - 1, -2]), "INT64", [b'{"odd":true}', b'{"odd":true}', b'{"odd":false}']),
        ("inverse", numpy.array([[True, True], [False, True]]), "BOOL", [[False, False], [True, False]]),
    ],
)
def test_tensors_travel_as_json_and_as_bytes(triton, name, rows, datatype, expected, binary_in, binary_out):
    outputs = [InferRequestedOutput("output", binary_data=binary_out)]
    result = triton.infer(name, [tensor(rows, datatype, binary_data=binary_in)], "1.0.0", outputs, request_id="7")
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == (name, "1.0.0", "7")
    assert ("data" in result.get_output("output")) is not binary_out
    found = result.as_numpy("output").tolist()
    # Strings are bytes where they travelled as bytes.
    found = [value.encode() if isinstance(value, str) else value for value in found]
    if expected is None:
        assert found == numpy.sqrt(rows).tolist()
    else:
        assert found == [pytest.approx(value) for value in expected]


def test_json_data_may_be_nested_or_flat(service):
    for data in ([[0.2, 0.6], [0, 0]], [0.2, 0.6, 0, 0]):
        request = {"inputs": [{"name": "input", "shape": [2, 2], "datatype": "FP32", "data": data}]}
        status, answer = ask(service, "POST", "/v2/models/simplemodel/infer", json.dumps(request).encode())
        assert status == 200 and answer["outputs"][0]["shape"] == [2, 1]
        assert answer["outputs"][0]["data"][0] == pytest.approx(PROBABILITY)


def test_images_are_bytes_or_pixels(triton):
    by_file = triton.infer("shades", [tensor(strings(picture(0), picture(255)), "BYTES")])
    assert by_file.as_numpy("output").tolist() == [[1, -1], [-1, 1]]
    encoded = strings(in_base64(picture(0)).encode(), in_base64(picture(255)).encode())
    in_json = triton.infer("shades", [tensor(encoded, "BYTES", binary_data=False)])
    assert in_json.as_numpy("output").tolist() == [[1, -1], [-1, 1]]
    pixels = numpy.full((2, 1, 4, 4), 0.25, dtype=numpy.float32)
    for binary in (True, False):
        by_pixel = triton.infer("shades", [tensor(pixels, "FP32", binary_data=binary)])
        assert by_pixel.as_numpy("output").tolist() == [[-0.25, 0.25]] * 2
    with pytest.raises(InferenceServerException, match="isn't an image"):
        triton.infer("shades", [tensor(strings(b"not one"), "BYTES")])


def test_classes_are_counted_whatever_the_protocol(service, triton):
    def counted() -> list[float]:
        found = service.metrics()
        classes = [found[f'model_predicted_class_total{{class="{name}",model="shades"}}'] for name in ("dark", "light")]
        return [*classes, found['model_prediction_confidence_count{model="shades"}']]

    before = counted()
    triton.infer("shades", [tensor(strings(picture(0), picture(255), picture(255)), "BYTES")])
    ask(service, "POST", "/predictions/shades", picture(0))
    service.wait_for(lambda: [new - old for new, old in zip(counted(), before, strict=True)] == [2, 2, 4], "counted")


@pytest.mark.parametrize(
    ("path", "body", "name", "reason"),
    [
        ("/predict", b"{", "simplemodel", "invalid"),
        ("/predictions/roots", b"[1]", "roots", "invalid"),
        ("/v2/models/parity/infer", b"{}", "parity", "invalid"),
        ("/v1/models/inverse:predict", b'{"instances": [3]}', "inverse", "invalid"),
        ("/v1/model/shades/predict", b"no image", "shades", "invalid"),
        ("/predictions/roots/2", b"[1]", "roots", "unknown_model"),
        ("/predictions/other", b"[1]", "simplemodel", "unknown_model"),
    ],
)
def test_what_is_refused_is_counted(service, path, body, name, reason):
    def rejected() -> dict[str, float]:
        return {key: value for key, value in service.metrics().items() if key.startswith("model_rejected_total")}

    before = rejected()
    request_id = f"refused-{name}-{len(before)}-{path.count('/')}-{len(body)}"
    assert ask(service, "POST", path, body, X_Request_ID=request_id)[0] in (400, 404)
    # The answer comes a little earlier.
    service.wait_for(lambda: rejected() != before, "counted")
    changed = {key: value - before[key] for key, value in rejected().items() if value != before[key]}
    assert changed == {f'model_rejected_total{{model="{name}",reason="{reason}"}}': 1}
    wanted = {"event": "request", "request_id": request_id, "model": name}.items()
    service.wait_for(lambda: any(wanted <= line.items() for line in service.logs()), "logged with its model")


def test_bytes_travel_as_they_are(triton):
    rows = strings(b"\x00\xff" * 500, b"", b"x")
    assert triton.infer("lengths", [tensor(rows, "BYTES")]).as_numpy("output").tolist() == [1000, 0, 1]


def test_classes_by_name(triton):
    images = tensor(strings(picture(0), picture(255)), "BYTES")
    for wanted, found in ((1, 1), (2, 2), (9, 2)):
        for binary in (True, False):
            outputs = [InferRequestedOutput("output", binary_data=binary, class_count=wanted)]
            result = triton.infer("shades", [images], outputs=outputs).as_numpy("output")
            assert result.shape == (2, found)
            best = [value if isinstance(value, str) else value.decode() for value in result[:, 0]]
            assert best == ["0.880797:0:dark", "0.880797:1:light"]
    with pytest.raises(InferenceServerException, match="classification"):
        outputs = [InferRequestedOutput("output", class_count=1)]
        triton.infer("simplemodel", [tensor(floats(ROW), "FP32")], outputs=outputs)


def test_what_is_not_finite(triton):
    negative = numpy.array([[[-1, 4], [9, 16]]], dtype=numpy.float64)
    assert numpy.isnan(triton.infer("roots", [tensor(negative, "FP64")]).as_numpy("output")[0, 0, 0])
    with pytest.raises(InferenceServerException, match="no finite answer"):
        outputs = [InferRequestedOutput("output", binary_data=False)]
        triton.infer("roots", [tensor(negative, "FP64")], outputs=outputs)
    with pytest.raises(InferenceServerException, match="no finite answer") as caught:
        pixels = numpy.full((1, 1, 4, 4), 3e38, dtype=numpy.float32)
        triton.infer("shades", [tensor(pixels, "FP32")], outputs=[InferRequestedOutput("output", class_count=1)])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="isn't finite"):
        triton.infer("simplemodel", [tensor(floats([numpy.nan, 1]), "FP32")])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_may_be_compressed(triton, algorithm):
    result = triton.infer("simplemodel", [tensor(floats(ROW), "FP32")], request_compression_algorithm=algorithm)
    assert result.as_numpy("output").tolist() == [[pytest.approx(PROBABILITY)]]


def test_several_at_a_time(service):
    rows = [floats([x / 20, 0.5]) for x in range(20)]
    with InferenceServerClient(f"127.0.0.1:{service.port}", concurrency=8) as client:
        alone = [client.infer("simplemodel", [tensor(row, "FP32")]).as_numpy("output").item() for row in rows]
        running = [client.async_infer("simplemodel", [tensor(row, "FP32")]) for row in rows]
        assert [one.get_result().as_numpy("output").item() for one in running] == pytest.approx(alone)


@pytest.mark.parametrize(
    ("rows", "datatype", "name", "message"),
    [
        (floats([1, 2, 3]), "FP32", "input", r"shape \[rows, 2\]"),
        (floats(*ROW), "FP32", "input", r"shape \[rows, 2\]"),
        (floats(ROW).astype(numpy.float64), "FP64", "input", "datatype FP32"),
        (floats(ROW).astype(numpy.float16), "FP16", "input", "datatype FP32"),
        (floats(ROW), "FP32", "INPUT0", 'name "input"'),
        (numpy.zeros((65, 2), dtype=numpy.float32), "FP32", "input", "at most 64"),
        (numpy.zeros((0, 2), dtype=numpy.float32), "FP32", "input", "no rows"),
    ],
)
def test_refusals_reach_the_client(triton, rows, datatype, name, message):
    for binary in (True, False):
        given = InferInput(name, list(rows.shape), datatype)
        given.set_data_from_numpy(rows, binary_data=binary)
        with pytest.raises(InferenceServerException, match=message) as caught:
            triton.infer("simplemodel", [given])
        assert caught.value.status() == "400"


def test_unknown_outputs_versions_and_shared_memory_are_refused(triton):
    row = tensor(floats(ROW), "FP32")
    with pytest.raises(InferenceServerException, match='name "output"'):
        triton.infer("simplemodel", [row], outputs=[InferRequestedOutput("OUTPUT0")])
    with pytest.raises(InferenceServerException, match="version"):
        triton.infer("simplemodel", [row], model_version="2")
    row.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="shared memory"):
        triton.infer("simplemodel", [row])


def test_a_client_that_waits_too_shortly_is_told(triton):
    row = tensor(floats(ROW), "FP32")
    assert triton.infer("simplemodel", [row], timeout=10_000_000, priority=1)
    with pytest.raises(InferenceServerException, match="waited") as caught:
        triton.infer("simplemodel", [row], timeout=1)
    assert caught.value.status() == "504"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("simplemodel", [0.2, 0.6], [pytest.approx(PROBABILITY)]),
        ("simplemodel/1.0.0", [0.2, 0.6], [pytest.approx(PROBABILITY)]),
        ("simplemodel", [[0.2, 0.6]], [[pytest.approx(PROBABILITY)]]),
        ("simplemodel", {"instances": [[0.2, 0.6]]}, [[pytest.approx(PROBABILITY)]]),
        ("simplemodel", {"data": [0.2, 0.6]}, [pytest.approx(PROBABILITY)]),
        ("roots", [[1, 4], [9, 16]], [[1, 2], [3, 4]]),
        ("parity", 3, {"odd": True}),
        ("signs", [-1, 2], ["minus", "plus"]),
        ("shades", [in_base64(picture(0))], [{"dark": pytest.approx(0.880797)}]),
        ("shades", picture(255), {"light": pytest.approx(0.880797)}),
        ("lengths", b"[1, 2]", 6),
    ],
)
def test_torchserve_answers_with_the_value_itself_as_its_own_handlers_do(service, path, body, expected):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    for content_type in ("application/json", "application/x-www-form-urlencoded"):
        status, answer = ask(service, "POST", f"/predictions/{path}", data, Content_Type=content_type)
        assert (status, answer) == (200, expected)


def form(name: str, data: bytes, options: str = "") -> dict:
    body = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n--x--\r\n'
    return {
        "body": body % (name.encode(), options.encode(), data),
        "Content_Type": "multipart/form-data; boundary=x",
    }


def test_torchserve_takes_an_upload_by_put(service):
    # What `curl -T FILE` sends.
    for path in ("shades", "shades/1.0.0"):
        status, answer = ask(service, "PUT", f"/predictions/{path}", picture(255))
        assert (status, list(answer)) == (200, ["light"])


def test_torchserve_predicts_on_each_file_of_a_form(service):
    part = b'--x\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\n%s\r\n'
    content_type = "multipart/form-data; boundary=x"
    body = part % picture(0) + part % picture(255) + b"--x--\r\n"
    status, answer = ask(service, "POST", "/predictions/shades", body, Content_Type=content_type)
    assert (status, [list(one) for one in answer]) == (200, [["dark"], ["light"]])
    status, answer = ask(service, "POST", "/predictions/lengths", body, Content_Type=content_type)
    assert (status, answer) == (200, [len(picture(0)), len(picture(255))])
    body = part % b"[0.2, 0.6]" * 2 + b"--x--\r\n"
    status, answer = ask(service, "POST", "/predictions/simplemodel", body, Content_Type=content_type)
    assert status == 400 and "several times" in answer["message"]


def test_torchserve_takes_forms(service):
    for name in ("data", "body"):
        for options in ("", '; filename="row.json"'):
            status, answer = ask(service, "POST", "/predictions/simplemodel", **form(name, b"[0.2, 0.6]", options))
            assert (status, answer) == (200, [pytest.approx(PROBABILITY)])
    status, answer = ask(service, "POST", "/predictions/shades", **form("data", picture(0), '; filename="a.png"'))
    assert (status, list(answer)) == (200, ["dark"])
    status, answer = ask(service, "POST", "/predictions/simplemodel", **form("other", b"[0.2, 0.6]"))
    assert status == 400 and "field" in answer["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("POST", "/predictions/other", b"[1, 2]", 404, "ModelNotFoundException"),
        ("POST", "/predictions/simplemodel/2", b"[1, 2]", 404, "ModelNotFoundException"),
        ("POST", "/predictions/simplemodel", b"[1, 2", 400, "BadRequestException"),
        ("POST", "/predictions/simplemodel", b"", 400, "BadRequestException"),
        ("POST", "/predictions/simplemodel", b"[1, 2, 3]", 400, "BadRequestException"),
        ("POST", "/predictions/simplemodel", b'{"rows": [1, 2]}', 400, "BadRequestException"),
        ("GET", "/models/other", None, 404, "ModelNotFoundException"),
    ],
)
def test_torchserve_errors(service, method, path, body, status, kind):
    found, answer = ask(service, method, path, body)
    assert (found, answer["code"], answer["type"]) == (status, status, kind)
    assert answer["message"] and str(ROOT) not in answer["message"]


def test_torchserve_health_and_models(service):
    assert ask(service, "GET", "/ping") == (200, {"status": "Healthy"})
    assert [one["modelName"] for one in ask(service, "GET", "/models")[1]["models"]] == NAMES
    [description] = ask(service, "GET", "/models/shades")[1]
    assert (description["modelVersion"], description["batchSize"]) == ("1.0.0", 8)
    assert [worker["status"] for worker in description["workers"]] == ["READY"]
    status, document = ask(service, "OPTIONS", "/")
    assert status == 200 and "/predictions/shades" in document["paths"]


def test_kserve(service):
    body = json.dumps({"instances": [[0.2, 0.6], [0, 0]]}).encode()
    status, answer = ask(service, "POST", "/v1/models/simplemodel:predict", body)
    assert status == 200 and answer["predictions"][0] == pytest.approx(PROBABILITY)
    assert ask(service, "GET", "/v1/models/roots") == (200, {"name": "roots", "ready": True})
    for wrong in (b'{"instances": [0.2, 0.6]}', b'{"data": [[0.2, 0.6]]}', b"[]"):
        assert ask(service, "POST", "/v1/models/simplemodel:predict", wrong)[0] == 400


def test_named_routes_answer_like_predict(service):
    body = json.dumps({"data": ROW}).encode()
    for path in ("/predict", "/v1/predict", "/v1beta1/predict", "/", "/v1/model/simplemodel/predict"):
        assert ask(service, "POST", path, body) == (200, {"output": pytest.approx(PROBABILITY)})
    assert ask(service, "POST", "/v1/model/parity/predict", b'{"data": [2, 3]}')[1]["output"][1] == {"odd": True}
    assert ask(service, "POST", "/v1/model/other/predict", body)[0] == 404
    status, answer = ask(service, "POST", "/v1/model/shades/predict", picture(255), Content_Type="image/png")
    assert (status, answer["output"]["class"]) == (200, "light")


def test_what_is_served(service):
    assert ask(service, "GET", "/ok") == (200, {"status": "ok"})
    assert ask(service, "GET", "/v1/live") == (200, {"live": True})
    assert ask(service, "GET", "/v1/ready") == (200, {"ready": True})
    assert [model["name"] for model in ask(service, "GET", "/")[1]["models"]] == NAMES
    bio = ask(service, "GET", "/v1/model/simplemodel/bio")[1]
    assert (bio["name"], bio["version"], bio["metrics"]) == ("simplemodel", "1.0.0", {"accuracy": 0.8692})
    assert bio["bundle_digest"].startswith("sha256:") and bio["description"]
    assert bio["input"]["schema"]["maxItems"] == 2 and bio["output"]["schema"]["type"] == "number"
    assert ask(service, "GET", "/v1/model/other/bio") == (404, {"error": "there is no model of that name"})


def test_a_service_that_is_not_ready_says_so_and_lives():
    models = Models([SimpleNamespace(name="m", version="1")])
    app = flask.Flask("test")
    for protocol in (named, oip, kserve):
        app.register_blueprint(protocol.blueprint(models, lambda: False))
    app.register_blueprint(torchserve.blueprint(models, lambda: False, SimpleNamespace()))
    client = app.test_client()
    for path in ("/v1/ready", "/v2/health/ready", "/v2/models/m/ready", "/ping", "/v1/models/m"):
        assert client.get(path).status_code == 503, path
    for path in ("/v1/live", "/v2/health/live", "/ok"):
        assert client.get(path).status_code == 200, path
