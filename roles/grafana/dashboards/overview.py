"""The overview, Grafana's home page: do users get what they were promised, and does anything need a hand?"""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ONE,
    GOOD_IS_ZERO,
    Column,
    Dashboard,
    Query,
    Row,
    stat,
    table,
    timeseries,
)
from roles.grafana.dashboards.promql import PREDICTIONS, percentiles, rate

PRODUCTION = 'environment="production"'
BUDGET = {
    "availability": "(1 - scalar(appliance:objective_availability:ratio))",
    "latency": "(1 - scalar(appliance:objective_latency:ratio))",
}
BURNS = [(None, "green"), (1, "orange"), (14.4, "red")]
WINDOWS = ("5m", "1h", "6h", "3d")


def burn(window: str) -> list[Query]:
    """How many times faster than allowed both budgets are spent."""
    return [
        Query(f"slo:error_ratio:rate{window} / {BUDGET['availability']}", "availability"),
        Query(f"slo:slow_ratio:rate{window} / {BUDGET['latency']}", "latency"),
    ]


DASHBOARD = Dashboard(
    uid="appliance-overview",
    title="Appliance overview",
    description="Is the appliance well? What users get against what they were promised, the models, and the machine.",
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "Live",
                    "The colour that answers production, and the model and version that it holds.",
                    "none",
                    Query(
                        'appliance_release_info{role="live"}',
                        "{{colour}}: {{model}} {{version}}",
                    ),
                    width=5,
                    text="name",
                ),
                stat(
                    "Alerts",
                    "Alerts that fire now: those that page somebody, and those that can wait until morning.",
                    "short",
                    Query('count(ALERTS{alertstate="firing", severity="page"}) or vector(0)', "page"),
                    Query('count(ALERTS{alertstate="firing", severity="ticket"}) or vector(0)', "ticket"),
                    steps=GOOD_IS_ZERO,
                ),
                stat(
                    "Probes",
                    "Whether what the appliance asks itself for, through the edge, is answered well: a prediction, for "
                    "one.",
                    "bool_yes_no",
                    Query("min by (probe) (probe_success)", "{{probe}}"),
                    steps=GOOD_IS_ONE,
                    width=3,
                ),
                stat(
                    "Availability",
                    "Share of production's predictions (POST and PUT) within 30 days that were answered well, which is "
                    "neither 5xx nor 429; planned maintenance doesn't count. No value until the edge's log has told of "
                    "some.",
                    "percentunit",
                    Query("1 - slo:error_ratio:rate30d", "30 days"),
                    width=3,
                    decimals=3,
                ),
                stat(
                    "Budget left",
                    "What is left of the failures, and of the slow answers, that the objectives allow within 30 days. "
                    "Below zero an objective is missed.",
                    "percentunit",
                    Query("slo:budget_remaining:ratio", "{{objective}}"),
                    steps=[(None, "red"), (0, "orange"), (0.25, "green")],
                    width=5,
                    decimals=1,
                ),
                stat(
                    "Burn, 1 hour",
                    "How many times faster than allowed the budget was spent within the last hour: at 1 it lasts 30 "
                    "days, at 14.4 two.",
                    "short",
                    *burn("1h"),
                    steps=BURNS,
                    decimals=1,
                ),
            ],
        ),
        Row(
            "What users get",
            [
                timeseries(
                    "Requests",
                    "Production's requests per second by status, as the edge answered them.",
                    "reqps",
                    Query(rate("edge_requests_total", PRODUCTION, "code"), "{{code}}"),
                ),
                timeseries(
                    "Failed and slow",
                    "Share of production's predictions (POST and PUT) of the last five minutes that failed, and that "
                    "took longer than the objective allows.",
                    "percentunit",
                    Query("slo:error_ratio:rate5m", "failed"),
                    Query("slo:slow_ratio:rate5m", "slow"),
                ),
                timeseries(
                    "Duration",
                    "Percentiles of the time from the first byte of a request to the last of its answer. POST and PUT "
                    "only.",
                    "s",
                    *percentiles("edge_request_duration_seconds", PRODUCTION),
                ),
            ],
        ),
        Row(
            "Objectives",
            [
                timeseries(
                    "Burn of availability",
                    "How many times faster than allowed failures spend the budget. Somebody is paged above 14.4 over "
                    "an hour, and above 6 over six hours.",
                    "short",
                    *(Query(f"slo:error_ratio:rate{window} / {BUDGET['availability']}", window) for window in WINDOWS),
                    limit=14.4,
                ),
                timeseries(
                    "Burn of latency",
                    "How many times faster than allowed slow answers spend the budget.",
                    "short",
                    *(Query(f"slo:slow_ratio:rate{window} / {BUDGET['latency']}", window) for window in WINDOWS),
                    limit=14.4,
                ),
                timeseries(
                    "Budget left over time",
                    "What is left of what the objectives allow within 30 days.",
                    "percentunit",
                    Query("slo:budget_remaining:ratio", "{{objective}}"),
                    minimum=None,
                    maximum=1,
                ),
            ],
        ),
        Row(
            "Alerts and releases",
            [
                table(
                    "Alerts that fire",
                    "What fires now. Empty is good, but for the watchdog, which always fires. The alert's page in "
                    "docs/runbooks says what to do.",
                    ["alertname", "severity"],
                    Column(Query('count by (alertname, severity) (ALERTS{alertstate="firing"})'), "how many"),
                    width=8,
                ),
                table(
                    "Releases",
                    "What each colour holds.",
                    ["colour", "role", "model", "version", "release"],
                    Column(
                        Query("max by (colour, role, model, version, release) (appliance_release_info)"),
                        "placed",
                        "bool_yes_no",
                    ),
                    width=8,
                ),
                timeseries(
                    "Requests by colour",
                    "Predictions asked for per second. The live colour carries the traffic; a switch is where the "
                    "lines cross.",
                    "reqps",
                    Query(
                        rate("http_requests_total", f'job="model", {PREDICTIONS}', "colour"),
                        "{{colour}}",
                    ),
                ),
            ],
        ),
        Row(
            "Machine and data",
            [
                timeseries(
                    "CPU and memory",
                    "Share of all cores that is busy, and of the memory that is in use and can't be reclaimed.",
                    "percentunit",
                    Query('1 - avg(rate(node_cpu_seconds_total{mode="idle"}[$__rate_interval]))', "CPU"),
                    Query("1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes", "memory"),
                    maximum=1,
                ),
                timeseries(
                    "Disk",
                    "Used share of each file system that holds data.",
                    "percentunit",
                    Query(
                        'max by (mountpoint) (1 - node_filesystem_avail_bytes{fstype!~"tmpfs|ramfs|squashfs"}'
                        ' / node_filesystem_size_bytes{fstype!~"tmpfs|ramfs|squashfs"})',
                        "{{mountpoint}}",
                    ),
                    maximum=1,
                ),
                timeseries(
                    "Drifted features",
                    "Features of each model whose live values differ from those that it was trained with.",
                    "short",
                    Query(
                        "count by (model) (feature:drift_state == 2) or 0 * count by (model) (feature:drift_state)",
                        "{{model}}",
                    ),
                ),
            ],
        ),
    ],
)
