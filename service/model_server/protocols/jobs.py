"""Jobs over HTTP: ``POST /v1/jobs`` and what is under ``/v1/jobs/``."""

import sqlite3
from typing import Any

import flask

from model_server import payload
from model_server.config import Config
from model_server.core import Models, Refusal, plain_body
from model_server.jobs.queue import Queue
from model_server.jobs.store import NOBODY, STATUSES, Job, Store
from model_server.logs import Log, rfc3339
from model_server.metrics import Metrics
from model_server.model import Model
from model_server.protocols.operations import (
    Operation,
    example_of,
    json_content,
    one_or_list,
    record,
    row_schema,
    value_schema,
)
from model_server.web import error_response, json_response

_LONGEST_KEY = 255
_USUAL_LIST, _LONGEST_LIST = 100, 1000


def create_blueprint(models: Models, config: Config, metrics: Metrics, log: Log) -> flask.Blueprint:
    """The routes of jobs; each answers 404 where jobs are not enabled."""
    routes = flask.Blueprint("jobs", __name__)

    @routes.errorhandler(payload.BadRequest)
    def bad_request(error: payload.BadRequest) -> flask.Response:
        return error_response(str(error), 400)

    @routes.errorhandler(sqlite3.Error)
    def unavailable(error: sqlite3.Error) -> flask.Response:
        log.error("jobs_failed", "the file of the jobs can't be used", error, request_id=flask.g.get("request_id"))
        response = error_response("jobs are not available at the moment; try again", 503)
        response.headers["Retry-After"] = "10"
        return response

    if config.jobs is None:
        _add_refusals(routes)
    else:
        _add_routes(routes, models, config, metrics, log)
    return routes


def _add_refusals(routes: flask.Blueprint) -> None:
    def refuse(**_: str) -> flask.Response:
        raise Refusal(404, "jobs are not enabled")

    for rule in ("/v1/jobs", "/v1/jobs/<path:rest>", "/v1/model/<name>/jobs"):
        routes.add_url_rule(rule, "refuse", refuse, methods=["GET", "POST"])


def _add_routes(routes: flask.Blueprint, models: Models, config: Config, metrics: Metrics, log: Log) -> None:
    store = Store(config.jobs)
    queue = Queue(config.jobs, config.colour)

    def document(job: Job) -> dict[str, Any]:
        unfinished = job.status in ("pending", "in_progress") and job.colour != NOBODY
        position, seconds = store.place(job) if unfinished else (None, None)
        return {
            **_document(job),
            "expires": _time(store.expires(job)),
            "position": position if job.status == "pending" else None,
            "estimated_seconds": None if seconds is None else round(seconds, 3),
        }

    def enqueue(job: Job) -> None:
        try:
            queue.put(job.id)
        except sqlite3.Error as error:
            # It's in the table, where the consumer finds it.
            log.warning("job_not_enqueued", f"job {job.id} waits for the consumer to find it: {error}", job=job.id)

    def submit(model: Model) -> flask.Response:
        request = flask.request
        encoding = request.headers.get("Content-Encoding")
        body = plain_body(request.get_data(cache=False), encoding, config.max_body_bytes)
        payload.parse(body, model.bundle.input, model.bundle.max_rows)
        job, is_new = store.submit(model.name, model.version, config.colour, body, _key())
        if is_new:
            enqueue(job)
            log.info(
                "job_submitted",
                f"job {job.id} submitted",
                job=job.id,
                job_model=job.model,
                request_id=flask.g.request_id,
                bytes=len(body),
            )
        response = json_response(document(job), 202 if is_new else 200)
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return response

    @routes.post("/v1/jobs")
    def submit_to_default() -> flask.Response:
        return submit(models.default)

    @routes.post("/v1/model/<name>/jobs")
    def submit_to_model(name: str) -> flask.Response:
        return submit(models.find(name))

    @routes.get("/v1/jobs")
    def list_jobs() -> flask.Response:
        query = flask.request.args
        status, limit = query.get("status"), _limit(query.get("limit"))
        if status is not None and status not in STATUSES:
            raise Refusal(400, f"status must be one of {', '.join(STATUSES)}")
        jobs = store.list(status, limit + 1, query.get("after"))
        found = {"jobs": [_document(job) for job in jobs[:limit]], "next": None}
        if len(jobs) > limit:
            found["next"] = jobs[limit - 1].id
        return json_response(found)

    @routes.get("/v1/jobs/<job_id>")
    def get_job(job_id: str) -> flask.Response:
        return json_response(document(store.find(job_id)))

    @routes.get("/v1/jobs/<job_id>/result")
    def get_result(job_id: str) -> flask.Response:
        job = store.find(job_id)
        if store.is_expired(job):
            raise Refusal(410, "the job has expired; submit it again")
        if job.status == "failed":
            raise Refusal(409, f"the job failed: {job.error}")
        result = store.result(job_id) if job.status == "completed" else None
        if result is None:
            raise Refusal(409, f"the job is {job.status}; it has no result")
        return flask.Response(result, content_type="application/json")

    @routes.post("/v1/jobs/<job_id>/cancel")
    def cancel(job_id: str) -> flask.Response:
        job = store.cancel(job_id)
        metrics.jobs_finished.labels("canceled").inc()
        log.info("job_finished", f"job {job_id} canceled", job=job_id, job_model=job.model, status="canceled")
        return json_response(document(job))

    @routes.post("/v1/jobs/<job_id>/retry")
    def retry(job_id: str) -> flask.Response:
        models.find(store.find(job_id).model)
        job = store.retry(job_id, config.colour)
        enqueue(job)
        return json_response(document(job), 202)


def _document(job: Job) -> dict[str, Any]:
    ran = job.ran_colour is not None
    return {
        "id": job.id,
        "status": job.status,
        "model": job.model,
        "version": job.version,
        "submitted": _time(job.submitted),
        "started": _time(job.started),
        "finished": _time(job.finished),
        "attempts": job.attempts,
        "ran_by": {"colour": job.ran_colour, "version": job.ran_version} if ran else None,
        "error": job.error,
    }


def _key() -> str | None:
    key = flask.request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isascii() and key.isprintable()):
        raise Refusal(400, f"the Idempotency-Key must have 1 to {_LONGEST_KEY} printable ASCII characters")
    return key


def _limit(text: str | None) -> int:
    if text is None:
        return _USUAL_LIST
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= _LONGEST_LIST):
        raise Refusal(400, f"limit must be a whole number from 1 to {_LONGEST_LIST}")
    return int(text)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else rfc3339(seconds)


_TAG = "Jobs"
_TEXT = {"type": "string"}
_MAYBE_TEXT = {"type": "string", "nullable": True}
_ANSWER = record(
    id=_TEXT,
    status={"type": "string", "enum": list(STATUSES)},
    model=_TEXT,
    version=_TEXT,
    submitted=_TEXT,
    started=_MAYBE_TEXT,
    finished=_MAYBE_TEXT,
    attempts={"type": "integer"},
    ran_by={**record(colour=_TEXT, version=_TEXT), "nullable": True},
    error=_MAYBE_TEXT,
)
_JOB = json_content(
    {
        "allOf": [
            _ANSWER,
            record(
                expires=_MAYBE_TEXT,
                position={"type": "integer", "nullable": True},
                estimated_seconds={"type": "number", "nullable": True},
            ),
        ]
    }
)
_ID = {"name": "job_id", "in": "path", "required": True, "schema": {**_TEXT, "pattern": "^[0-9a-f]{32}$"}}


def operations(models: Models) -> list[Operation]:
    """Of these routes, where jobs are enabled."""
    listed = json_content(record(jobs={"type": "array", "items": _ANSWER}, next=_MAYBE_TEXT))
    results = [record(output=one_or_list(value_schema(model), model)) for model in models.all]
    of_job = {"refusals": (404, 503), "parameters": [_ID]}
    of_change = {"refusals": (404, 409, 503), "parameters": [_ID]}
    of_end = {"refusals": (404, 409, 410, 503), "parameters": [_ID]}
    limit = {"type": "integer", "minimum": 1, "maximum": _LONGEST_LIST, "default": _USUAL_LIST}
    filters = [
        {"name": "status", "in": "query", "schema": {"type": "string", "enum": list(STATUSES)}},
        {"name": "limit", "in": "query", "schema": limit},
        {"name": "after", "in": "query", "schema": _ID["schema"], "description": "The `next` of the page before."},
    ]
    path = "/v1/jobs/{job_id}"
    return [
        _submission("/v1/jobs", models.default),
        *(_submission(f"/v1/model/{model.name}/jobs", model) for model in models.all),
        Operation(
            "GET", "/v1/jobs", _TAG, "The jobs, the newest first", listed, refusals=(400, 404, 503), parameters=filters
        ),
        Operation("GET", path, _TAG, "How far a job is", _JOB, **of_job),
        Operation("GET", f"{path}/result", _TAG, "What a job has come to", json_content({"anyOf": results}), **of_end),
        Operation("POST", f"{path}/cancel", _TAG, "End a job that isn't finished", _JOB, **of_change),
        Operation("POST", f"{path}/retry", _TAG, "Run a failed or canceled job again", _JOB, statuses=(202,), **of_end),
    ]


def _submission(path: str, model: Model) -> Operation:
    body = json_content(record(data=one_or_list(row_schema(model), model)), {"data": example_of(model)[0]})
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "The same request with the same key is the same job, and answered with 200.",
        "schema": {"type": "string", "minLength": 1, "maxLength": _LONGEST_KEY, "pattern": "^[ -~]+$"},
    }
    return Operation(
        "POST",
        path,
        _TAG,
        f"Have {model.name} predict later",
        _JOB,
        body,
        predicts=True,
        statuses=(200, 202),
        refusals=(400, 413, 415, 422, 503, 507),
        parameters=[key],
    )
