"""After the rollback: blue is production again."""


def test_blue_is_live(edge, engine):
    status = engine("status")
    assert (status["live"], status["previous"]) == ("blue", "green")
    assert edge.predict("/predict").headers["x-model-colour"] == "blue"


def test_a_job_is_done_before_the_restart(edge, eventually):
    headers = {"Idempotency-Key": "over-the-restart"}
    submitted = edge.predict("/v1/jobs", **headers)
    assert submitted.status in (200, 202), submitted.text
    job = submitted.headers["location"]
    eventually(lambda: edge.request("GET", job).json["status"] == "completed", what="the job's completion")
