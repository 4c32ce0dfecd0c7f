"""What the log is told of a model that failed on a request."""

from model_server.errors import ModelFailed
from model_server.logs import Log
from model_server.payload import UnusableOutput


def log_failure(log: Log, error: Exception, **fields: object) -> None:
    """Log that a prediction failed, whatever the model's code raised."""
    cause = error.__cause__ if isinstance(error, ModelFailed) else None
    if cause is None and isinstance(error, ModelFailed | UnusableOutput):
        # In the service's own words, which quote nothing.
        log.error("prediction_failed", str(error), **fields)
    else:
        log.failure("prediction_failed", "the model failed", cause or error, **fields)
