"""Blue against green: is the idle colour as good as the live one?"""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ONE,
    Column,
    Dashboard,
    Query,
    Row,
    stat,
    table,
    timeline,
    timeseries,
)
from roles.grafana.dashboards.promql import PREDICTIONS, quantile, rate, share

MODEL = 'job="model"'
PREDICT = f"{MODEL}, {PREDICTIONS}"
# Enough for a comparison, and still about now.
WINDOW = "30m"


def of(which: str, expression: str) -> str:
    """The value of the colour that is live, or idle, now; its labels are gone."""
    return f'sum({expression} and on (colour) appliance_release_info{{role="{which}"}})'


REQUESTS = f"sum by (colour) (increase(http_requests_total{{{PREDICT}}}[{WINDOW}]))"
BAD = f'(sum by (colour) (increase(http_requests_total{{{PREDICT}, code=~"5.."}}[{WINDOW}])) or 0 * {REQUESTS})'
POOLED = f"(sum({BAD}) / sum({REQUESTS}))"
P95 = quantile(0.95, "model_request_duration_seconds", MODEL, "colour")
CLASSES = rate("model_predicted_class_total", MODEL, "colour, class")

DASHBOARD = Dashboard(
    uid="appliance-colours",
    title="Blue against green",
    description="The two colours side by side, and what differs: the page to look at during a canary and a bake.",
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "Live",
                    "The colour that answers production, and what it holds.",
                    "none",
                    Query(
                        'appliance_release_info{role="live"}',
                        "{{colour}}: {{model}} {{version}} (release {{release}})",
                    ),
                    width=5,
                    text="name",
                ),
                stat(
                    "Idle",
                    "The other colour, and what it holds.",
                    "none",
                    Query(
                        'appliance_release_info{role="idle"}',
                        "{{colour}}: {{model}} {{version}} (release {{release}})",
                    ),
                    width=5,
                    text="name",
                ),
                stat(
                    "Answers scrapes",
                    "Whether each colour tells its metrics. A colour without a release doesn't.",
                    "bool_yes_no",
                    Query('up{job="model"}', "{{colour}}"),
                    steps=GOOD_IS_ONE,
                ),
                stat(
                    "Users on the idle colour",
                    "Share of users whom a canary sends to the idle colour.",
                    "percent",
                    Query("appliance_split_percent", "split"),
                    width=3,
                ),
                stat(
                    "Errors, z",
                    "How many standard errors the idle colour's share of 5xx is above the live one's, within "
                    f"{WINDOW}. Above 3 it isn't chance. No value until both have answered 30 requests and some of "
                    "them badly.",
                    "short",
                    Query(
                        f"({of('idle', f'{BAD} / ({REQUESTS} > 30)')} - {of('live', f'{BAD} / ({REQUESTS} > 30)')})"
                        f" / (sqrt({POOLED} * (1 - {POOLED}) * sum(1 / ({REQUESTS} > 0))) > 0)",
                        "z",
                    ),
                    steps=[(None, "green"), (2, "orange"), (3, "red")],
                    width=3,
                    decimals=1,
                ),
                stat(
                    "Slowest 5 %, ratio",
                    "The idle colour's 95th percentile of durations, divided by the live one's. No value while either "
                    "has no requests.",
                    "short",
                    Query(f"{of('idle', P95)} / {of('live', P95)}", "idle / live"),
                    steps=[(None, "green"), (1.2, "orange"), (2, "red")],
                    decimals=2,
                ),
            ],
        ),
        Row(
            "Side by side",
            [
                timeseries(
                    "Requests",
                    "Predictions asked for per second. A switch is where the lines cross, a canary where they come "
                    "closer in steps.",
                    "reqps",
                    Query(rate("http_requests_total", PREDICT, "colour"), "{{colour}}"),
                ),
                timeseries(
                    "Errors",
                    "Share of the predictions asked for that were answered with a 5xx status.",
                    "percentunit",
                    Query(share("http_requests_total", PREDICT, 'code=~"5.."', "colour"), "{{colour}}"),
                ),
                timeseries(
                    "Duration",
                    "Percentiles of the time from the whole request to the whole answer.",
                    "s",
                    Query(quantile(0.5, "model_request_duration_seconds", MODEL, "colour"), "{{colour}} p50"),
                    Query(P95, "{{colour}} p95"),
                ),
                timeseries(
                    "Share of the traffic",
                    "Which part of all predictions each colour answers.",
                    "percentunit",
                    Query(
                        f"{rate('http_requests_total', PREDICT, 'colour')} / on () group_left()"
                        f" ({rate('http_requests_total', PREDICT)} > 0)",
                        "{{colour}}",
                    ),
                    stacked=True,
                    maximum=1,
                ),
                timeseries(
                    "Time in the model",
                    "95 of 100 batches take the model no longer than this.",
                    "s",
                    Query(quantile(0.95, "prediction_duration_seconds", MODEL, "colour"), "{{colour}} p95"),
                ),
                timeseries(
                    "Workers ready",
                    "Worker processes that take requests.",
                    "short",
                    Query('sum by (colour) (model_workers{job="model", state="ready"})', "{{colour}}"),
                ),
            ],
        ),
        Row(
            "What differs",
            [
                timeseries(
                    "Idle against live, duration",
                    "The idle colour's percentile divided by the live one's: 1 is no difference.",
                    "short",
                    Query(f"{of('idle', P95)} / {of('live', P95)}", "p95"),
                    Query(
                        "{} / {}".format(
                            *(
                                of(which, quantile(0.5, "model_request_duration_seconds", MODEL, "colour"))
                                for which in ("idle", "live")
                            )
                        ),
                        "p50",
                    ),
                ),
                timeseries(
                    "Classes that one colour predicts more",
                    "Share of a class among the idle colour's rows, minus its share among the live one's. Classifiers "
                    "only. What persists is a difference of the models, or of those who ask.",
                    "percentunit",
                    Query(
                        " - ".join(
                            f"sum by (class) ({CLASSES} / on (colour) group_left()"
                            f" ({rate('model_predicted_class_total', MODEL, 'colour')} > 0)"
                            f' and on (colour) appliance_release_info{{role="{which}"}})'
                            for which in ("idle", "live")
                        ),
                        "{{class}}",
                    ),
                    minimum=None,
                ),
                timeseries(
                    "Copies of live requests",
                    "Live requests that were copied to both colours, per second, by what came of it. Nothing unless "
                    "shadowing is on.",
                    "reqps",
                    Query(rate("appliance_shadow_requests_total", "", "result"), "{{result}}"),
                    stacked=True,
                ),
                timeseries(
                    "Disagreement",
                    "Share of the copies answered by both colours on which they differ.",
                    "percentunit",
                    Query(
                        share("appliance_shadow_requests_total", 'result=~"agree|differ"', 'result="differ"'),
                        "differ",
                    ),
                ),
                timeseries(
                    "Distance between the answers",
                    "How far apart the numbers are that the colours answer the same request with.",
                    "short",
                    Query(quantile(0.5, "appliance_shadow_distance"), "p50"),
                    Query(quantile(0.95, "appliance_shadow_distance"), "p95"),
                ),
                table(
                    "Verdicts of the rollout",
                    "What the engine found at its last look, for the last rollout: appliance history has the values.",
                    ["check", "verdict"],
                    Column(Query("max by (check, verdict) (appliance_verdict)"), "holds", "bool_yes_no"),
                    width=8,
                ),
            ],
        ),
        Row(
            "Rollouts",
            [
                timeline(
                    "Phase",
                    "What the rollout engine was doing: a canary gives the idle colour a rising share, a bake watches "
                    "after the switch.",
                    Query("appliance_rollout_phase", "{{phase}}"),
                    words={0: ("no", "transparent"), 1: ("yes", "blue")},
                    width=12,
                ),
                timeseries(
                    "Switches and returns",
                    "How often the live colour has changed by which command, and how often traffic went back for which "
                    "reason. Counted since the appliance was made.",
                    "short",
                    Query("appliance_switches_total", "{{command}}"),
                    Query("appliance_rollbacks_total", "back: {{reason}}"),
                    width=8,
                ),
                stat(
                    "Last switch took",
                    "From the last change of the live colour to the first answer of the new one.",
                    "s",
                    Query("appliance_last_switch_seconds", "last"),
                    height=8,
                ),
            ],
        ),
    ],
)
