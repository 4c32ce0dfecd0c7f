"""Jobs over HTTP: ``POST /v1/jobs`` and what is under ``/v1/jobs/``."""

import sqlite3
from datetime import UTC, datetime
from typing import Any

import flask

from model_server import payload
from model_server.config import Config
from model_server.core import Models, Refusal, decompressed, too_large
from model_server.jobs.queue import Queue
from model_server.jobs.store import STATUSES, Job, Store
from model_server.logs import Log
from model_server.metrics import Metrics
from model_server.model import Model
from model_server.web import error_response, json_response

_LONGEST_KEY = 255
_USUAL_LIST, _LONGEST_LIST = 100, 1000


def create_blueprint(models: Models, config: Config, metrics: Metrics, log: Log) -> flask.Blueprint:
    """The routes of jobs; each answers 404 where jobs are not enabled."""
    routes = flask.Blueprint("jobs", __name__)

    @routes.errorhandler(Refusal)
    def refused(error: Refusal) -> flask.Response:
        response = error_response(error.message, error.status)
        response.headers.extend(error.headers)
        return response

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
        position, seconds = store.place(job) if job.status == "pending" else (None, None)
        return {
            **_document(job),
            "expires": _time(store.expires(job)),
            "position": position,
            "estimated_seconds": None if seconds is None else round(seconds, 3),
        }

    def enqueue(job: Job) -> None:
        try:
            queue.put(job.id)
        except sqlite3.Error as error:
            # It's in the table, where the consumer finds it.
            log.warning("job_not_enqueued", f"job {job.id} waits for the consumer to find it: {error}", job=job.id)

    def submit(model: Model) -> flask.Response:
        body = _body(config.max_body_bytes)
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


def _body(limit: int) -> bytes:
    request = flask.request
    size = request.content_length or 0
    if size > limit:
        raise too_large(size, limit)
    encoding = request.headers.get("Content-Encoding")
    return decompressed(request.get_data(cache=False), encoding and encoding.strip().lower(), limit)


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
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
