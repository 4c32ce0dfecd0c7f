"""``GET /docs``: a page to read the OpenAPI document and to try requests from, with nothing from elsewhere."""

import html
from pathlib import Path

import flask
import swagger_ui_bundle

from model_server.core import Models

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
# Without a validator, which would be someone else's service.
_SCRIPT = b"""SwaggerUIBundle({
  url: new URL("openapi.json", window.location.href).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
});
"""
_TYPES = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "favicon-32x32.png": "image/png",
    "start.js": "text/javascript; charset=utf-8",
}
# The page needs its own files, small pictures inside its style sheet, and this service.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def blueprint(models: Models) -> flask.Blueprint:
    """The page and its files. All addresses in it are relative, so that it also works under a prefix."""
    views = flask.Blueprint("docs", __name__)
    page = _PAGE.format(title=html.escape(f"{models.default.name} {models.default.version}")).encode()

    @views.get("/docs")
    def show() -> flask.Response:
        return _response(page, "text/html; charset=utf-8", "no-cache")

    @views.get("/docs/<file>")
    def asset(file: str) -> flask.Response:
        if file not in _TYPES:
            flask.abort(404)
        content = _SCRIPT if file == "start.js" else Path(swagger_ui_bundle.swagger_ui_path / file).read_bytes()
        return _response(content, _TYPES[file], "public, max-age=3600")

    return views


def _response(content: bytes, content_type: str, cache: str) -> flask.Response:
    return flask.Response(content, headers={"Content-Type": content_type, "Cache-Control": cache, **_HEADERS})
