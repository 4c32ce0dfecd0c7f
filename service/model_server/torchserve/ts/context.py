"""What handlers are told about the model and the requests, for those that name its type."""

from model_server.handlers import Context

__all__ = ["Context"]
