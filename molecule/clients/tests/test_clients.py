"""Real clients of every protocol through nginx, on the live colour and on the idle one under /test."""

import json
import urllib.request

import numpy
import pytest
from tritonclient import http as triton

ROWS = [[0.2, 0.6], [0.9, 0.1]]
BOTH = pytest.mark.parametrize("prefix", ["", "/test"])


@pytest.fixture
def answers(edge):
    """What `POST /predict` answers to ROWS; other protocols must agree."""

    def ask(prefix):
        answer = edge.predict(f"{prefix}/predict", {"data": ROWS})
        assert answer.status == 200, answer.text
        return answer.json["output"]

    return ask


@pytest.fixture
def client(edge):
    clients = []

    def connect(prefix):
        clients.append(triton.InferenceServerClient(f"127.0.0.1:{edge.port}{prefix}"))
        return clients[-1]

    yield connect
    for each in clients:
        each.close()


@BOTH
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_client_predicts(client, answers, prefix, binary, compression):
    tensor = triton.InferInput("input", [2, 2], "FP32")
    tensor.set_data_from_numpy(numpy.array(ROWS, dtype=numpy.float32), binary_data=binary)
    result = client(prefix).infer(
        "simplemodel",
        [tensor],
        outputs=None if binary else [triton.InferRequestedOutput("output", binary_data=False)],
        request_id="mine-1",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert result.get_response()["id"] == "mine-1"
    numpy.testing.assert_allclose(result.as_numpy("output").reshape(-1), answers(prefix), atol=1e-6)


@BOTH
def test_triton_client_sees_server_and_model(client, prefix):
    found = client(prefix)
    assert found.is_server_live() and found.is_server_ready() and found.is_model_ready("simplemodel")
    assert "binary_tensor_data" in found.get_server_metadata()["extensions"]
    assert [tensor["datatype"] for tensor in found.get_model_metadata("simplemodel")["inputs"]] == ["FP32"]
    with pytest.raises(triton.InferenceServerException, match="404|no model"):
        found.get_model_metadata("another")


@BOTH
@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream", None])
def test_torchserve_clients_keep_their_routes(edge, answers, prefix, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    version = edge.request("GET", f"{prefix}/health").json["version"]
    for path in ("/predictions/simplemodel", f"/predictions/simplemodel/{version}"):
        answer = edge.request("POST", f"{prefix}{path}", json.dumps(ROWS).encode(), headers)
        assert (answer.status, answer.json) == (200, [[number] for number in answers(prefix)])
    assert edge.request("GET", f"{prefix}/ping").json == {"status": "Healthy"}
    assert edge.request("GET", f"{prefix}/models").json["models"][0]["modelName"] == "simplemodel"
    assert edge.request("GET", f"{prefix}/models/simplemodel").json[0]["modelVersion"] == version
    missing = edge.request("POST", f"{prefix}/predictions/another", b"[0.2, 0.6]")
    assert (missing.status, missing.json["type"]) == (404, "ModelNotFoundException")


@BOTH
@pytest.mark.parametrize("path", ["/", "/predict", "/v1beta1/predict", "/v1/predict", "/v1/model/simplemodel/predict"])
def test_plain_clients(edge, answers, prefix, path):
    # urllib sends a form's content type by itself, as curl -d does.
    request = urllib.request.Request(f"{edge.url}{prefix}{path}", json.dumps({"data": ROWS}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["output"] == answers(prefix)


@BOTH
def test_kserve_clients(edge, answers, prefix):
    answer = edge.predict(f"{prefix}/v1/models/simplemodel:predict", {"instances": ROWS})
    assert answer.json == {"predictions": answers(prefix)}


@BOTH
def test_probes(edge, prefix):
    for path in ("/health", "/ok", "/v1/live", "/v1/ready", "/v1/model/simplemodel/bio", "/v2/health/ready"):
        assert edge.request("GET", f"{prefix}{path}").status == 200, path


@BOTH
def test_documents(edge, prefix):
    described = edge.request("GET", f"{prefix}/openapi.json").json
    assert "/predict" in described["paths"] and described["openapi"].startswith("3.")
    page = edge.request("GET", f"{prefix}/docs")
    assert page.headers["content-type"].startswith("text/html")
    # Relative, so that they are found under the prefix too.
    assert 'src="docs/swagger-ui-bundle.js"' in page.text
    assert edge.request("GET", f"{prefix}/docs/swagger-ui-bundle.js").status == 200


@pytest.fixture
def held(host, live):
    """The live colour's process for jobs, stopped, so that what is submitted stays pending until it may go on."""
    parent = host.check_output(f"docker inspect --format '{{{{.State.Pid}}}}' model-{live}").strip()
    # It alone gives way to the others, whatever niceness the container engine itself has.
    processes = [line.split() for line in host.check_output(f"ps -o pid=,ni= --ppid {parent}").splitlines()]
    niceness = [int(own) for _, own in processes]
    assert niceness.count(max(niceness)) == 1 and max(niceness) > min(niceness), processes
    process = processes[niceness.index(max(niceness))][0]
    host.check_output(f"kill -STOP {process}")
    yield process
    host.run(f"kill -CONT {process}")


def test_a_job_outlives_a_swap(host, edge, engine, held, eventually):
    before = engine("status")
    submitted = edge.predict("/v1/jobs", {"data": ROWS})
    assert submitted.status == 202, submitted.text
    job = submitted.headers["location"]
    assert engine("swap")["live"] == before["idle"]
    try:
        for prefix in ("", "/test"):
            assert edge.request("GET", f"{prefix}{job}").json["status"] == "pending"
        host.check_output(f"kill -CONT {held}")
        eventually(lambda: edge.request("GET", job).json["status"] == "completed", what="the job's completion")
        assert edge.request("GET", job).json["ran_by"]["colour"] == before["live"]
        result = edge.request("GET", f"{job}/result")
        assert len(result.json["output"]) == len(ROWS)
        assert result.headers["x-model-colour"] == before["idle"]
    finally:
        assert engine("swap")["live"] == before["live"]


def test_jobs_outlive_a_killed_container(host, edge, live, engine, held, eventually):
    jobs = [edge.predict("/v1/jobs", {"data": ROWS}).headers["location"] for _ in range(10)]
    assert {edge.request("GET", job).json["status"] for job in jobs} == {"pending"}
    host.check_output(f"docker kill model-{live}")

    def done():
        # Until the colour is back, errors come instead.
        return all(edge.request("GET", job).json.get("status") == "completed" for job in jobs)

    eventually(done, seconds=120, what="the completion of every job")
    eventually(lambda: engine("status")["colours"][live]["status"] == "ready", what="the colour's return")
