"""The edge: what nginx answered, as its access logs tell, and how busy it is."""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ONE,
    GOOD_IS_ZERO,
    Dashboard,
    Query,
    Row,
    Variable,
    heatmap,
    stat,
    timeseries,
)
from roles.grafana.dashboards.promql import percentiles, quantile, rate, share

ALL = 'environment=~"$environment"'
PRODUCTION = 'environment="production"'
# As the objectives have it: a client that asks for /health tells nothing of predictions.
PREDICTIONS = f'{PRODUCTION}, method=~"POST|PUT"'

DASHBOARD = Dashboard(
    uid="appliance-edge",
    title="Edge",
    description="What clients get from nginx, as its access logs tell: the end that users see.",
    variables=[Variable("environment", "Environment", "edge_requests_total")],
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "Probes",
                    "Whether what the appliance asks itself for, through the edge, is answered well: a prediction, for "
                    "one.",
                    "bool_yes_no",
                    Query("min by (probe) (probe_success)", "{{probe}}"),
                    steps=GOOD_IS_ONE,
                ),
                stat(
                    "Requests",
                    "Production's requests per second.",
                    "reqps",
                    Query(rate("edge_requests_total", PRODUCTION), "requests"),
                ),
                stat(
                    "Errors",
                    "Share of production's predictions (POST and PUT) that were answered with a 5xx status. No value "
                    "without them.",
                    "percentunit",
                    Query(share("edge_requests_total", PREDICTIONS, 'code=~"5.."'), "5xx"),
                    steps=[(None, "green"), (0.001, "orange"), (0.01, "red")],
                ),
                stat(
                    "Slowest 5 %",
                    "95 of 100 of production's predictions (POST and PUT) take no longer than this, from the first "
                    "byte to the last.",
                    "s",
                    Query(quantile(0.95, "edge_request_duration_seconds", PRODUCTION), "p95"),
                    steps=[(None, "green"), (0.25, "orange"), (0.5, "red")],
                ),
                stat(
                    "Log lines not understood",
                    "Lines of the access logs within the last hour that don't look as they should: requests that no "
                    "number here counts.",
                    "short",
                    Query("increase(edge_log_lines_unparsed_total[1h])", "lines"),
                    steps=GOOD_IS_ZERO,
                    decimals=0,
                ),
                stat(
                    "Certificate ends",
                    "When the first of the watched certificates (probes_certificates) expires. No value without any.",
                    "dateTimeFromNow",
                    Query("min(probe_ssl_earliest_cert_expiry) * 1000", "expires"),
                ),
            ],
        ),
        Row(
            "Requests",
            [
                timeseries(
                    "Requests by environment",
                    "Requests per second: production, the door to the idle colour (test), and the appliance's own "
                    "(probe).",
                    "reqps",
                    Query(rate("edge_requests_total", ALL, "environment"), "{{environment}}"),
                ),
                timeseries(
                    "Requests by status",
                    "Requests per second by HTTP status. 499 is a client that went away.",
                    "reqps",
                    Query(rate("edge_requests_total", ALL, "code"), "{{code}}"),
                ),
                timeseries(
                    "Requests by colour",
                    "Which colour answered, or should have. None: no colour was asked, as in maintenance.",
                    "reqps",
                    Query(rate("edge_requests_total", ALL, "colour"), "{{colour}}"),
                ),
                timeseries(
                    "Failures of the edge",
                    "Requests per second that ended with a status of nginx's own: the client went away (499), no "
                    "worker could be reached (502), none was free (503), or none answered in time (504).",
                    "reqps",
                    Query(rate("edge_requests_total", f'{ALL}, code=~"499|502|503|504"', "code"), "{{code}}"),
                    width=12,
                ),
                timeseries(
                    "Refused",
                    "Requests per second that were refused as too many (429), too large (413) or wrong (other 4xx).",
                    "reqps",
                    Query(rate("edge_requests_total", f'{ALL}, code=~"4..", code!="499"', "code"), "{{code}}"),
                    width=12,
                ),
            ],
        ),
        Row(
            "Duration",
            [
                timeseries(
                    "Duration of a request",
                    "From the first byte of a request to the last of its answer, with the client's network. POST and "
                    "PUT only, like all that follow here.",
                    "s",
                    *percentiles("edge_request_duration_seconds", ALL),
                ),
                timeseries(
                    "Edge and worker",
                    "The 95th percentile as the client sees it, and of the part that a worker took. What lies between "
                    "is the network and the edge.",
                    "s",
                    Query(quantile(0.95, "edge_request_duration_seconds", ALL), "request"),
                    Query(quantile(0.95, "edge_upstream_duration_seconds", ALL), "worker"),
                ),
                heatmap(
                    "Distribution of the durations",
                    "How many requests per second, by POST and PUT, took how long.",
                    "s",
                    Query(rate("edge_request_duration_seconds_bucket", ALL, "le")),
                ),
            ],
        ),
        Row(
            "nginx",
            [
                timeseries(
                    "Connections",
                    "Open connections by what they do: waiting ones are kept alive and cost little.",
                    "short",
                    Query("nginx_connections_reading", "reading"),
                    Query("nginx_connections_writing", "writing"),
                    Query("nginx_connections_waiting", "waiting"),
                    stacked=True,
                ),
                timeseries(
                    "New connections",
                    "Connections per second that nginx accepted, and those that it had to close at once because it had "
                    "no more room.",
                    "cps",
                    Query("rate(nginx_connections_accepted[$__rate_interval])", "accepted"),
                    Query(
                        "rate(nginx_connections_accepted[$__rate_interval])"
                        " - rate(nginx_connections_handled[$__rate_interval])",
                        "dropped",
                    ),
                ),
                timeseries(
                    "Edge and service side by side",
                    "POST and PUT requests per second by the logs of nginx and by the model service. Where the edge "
                    "has more, answers or lines of the log are lost. The service has more while requests are copied to "
                    "both colours.",
                    "reqps",
                    Query(rate("edge_requests_total", 'method=~"POST|PUT", colour!="none"'), "edge"),
                    Query(rate("http_requests_total", 'job="model", method=~"POST|PUT"'), "service"),
                ),
            ],
        ),
        Row(
            "Probes of the appliance itself",
            [
                timeseries(
                    "Duration of the probes",
                    "What the appliance's own requests through the edge take.",
                    "s",
                    Query("max by (probe) (probe_duration_seconds)", "{{probe}}"),
                    width=12,
                ),
                timeseries(
                    "Where the probes' time goes",
                    "Phases of each probe's request.",
                    "s",
                    Query("max by (probe, phase) (probe_http_duration_seconds)", "{{probe}} {{phase}}"),
                    width=12,
                ),
            ],
        ),
    ],
)
