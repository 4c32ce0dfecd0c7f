"""Model serving: rate, errors, duration and saturation of the model service."""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ZERO,
    Column,
    Dashboard,
    Query,
    Row,
    Variable,
    heatmap,
    stat,
    table,
    timeseries,
)
from roles.grafana.dashboards.promql import PREDICTIONS, mean, percentiles, quantile, rate, share

COLOUR = 'job="model", colour=~"$colour"'
MODEL = f'{COLOUR}, model=~"$model"'
# What rules record has no job.
CHOSEN = 'colour=~"$colour", model=~"$model"'
PREDICT = f"{COLOUR}, {PREDICTIONS}"


DASHBOARD = Dashboard(
    uid="appliance-serving",
    title="Model serving",
    description="What the model service does with its requests: rate, errors, duration, and what it has left.",
    variables=[
        Variable("model", "Model", "model_info"),
        Variable("colour", "Colour", "model_info"),
    ],
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "Workers missing",
                    "Worker processes that should take requests and don't. More than 0 while a colour starts or "
                    "drains.",
                    "short",
                    Query(
                        f'sum by (colour) (model_workers{{{COLOUR}, state="wanted"}})'
                        f' - sum by (colour) (model_workers{{{COLOUR}, state="ready"}})',
                        "{{colour}}",
                    ),
                    steps=GOOD_IS_ZERO,
                ),
                stat(
                    "Requests",
                    "Predictions asked for per second, whatever the outcome.",
                    "reqps",
                    Query(rate("http_requests_total", PREDICT, "colour"), "{{colour}}"),
                ),
                stat(
                    "Errors",
                    "Share of the predictions asked for that were answered with a 5xx status. No value without "
                    "requests.",
                    "percentunit",
                    Query(share("http_requests_total", PREDICT, 'code=~"5.."', "colour"), "{{colour}}"),
                    steps=[(None, "green"), (0.001, "orange"), (0.01, "red")],
                ),
                stat(
                    "Slowest 5 %",
                    "95 of 100 requests take no longer than this, from the whole request to the whole answer.",
                    "s",
                    Query(quantile(0.95, "model_request_duration_seconds", MODEL, "colour"), "{{colour}}"),
                    steps=[(None, "green"), (0.25, "orange"), (0.5, "red")],
                ),
                stat(
                    "Queue used",
                    "The longest queue's share of its limit, over all workers. At 100 % requests are refused with 503.",
                    "percentunit",
                    Query(f"max by (colour) (model:queue_used:ratio{{{CHOSEN}}})", "{{colour}}"),
                    steps=[(None, "green"), (0.5, "orange"), (0.8, "red")],
                ),
                stat(
                    "Workers replaced",
                    "Workers that died or hung within the last hour, and were replaced.",
                    "short",
                    Query(f"sum by (colour) (increase(model_worker_restarts_total{{{COLOUR}}}[1h]))", "{{colour}}"),
                    steps=GOOD_IS_ZERO,
                    decimals=0,
                ),
            ],
        ),
        Row(
            "Requests",
            [
                timeseries(
                    "Requests by status",
                    "Answers to requests for predictions per second, by HTTP status. 4xx is the client's fault, 5xx is "
                    "ours.",
                    "reqps",
                    Query(rate("http_requests_total", PREDICT, "colour, code"), "{{colour}} {{code}}"),
                ),
                timeseries(
                    "Refused requests",
                    "Requests that got no prediction, by reason: the body or the model's name was wrong, the queue was "
                    "full, the client's deadline had passed, or the client had gone.",
                    "reqps",
                    Query(rate("model_rejected_total", MODEL, "colour, reason"), "{{colour}} {{reason}}"),
                ),
                timeseries(
                    "Rows",
                    "Rows predicted per second: a request may hold many. By outcome.",
                    "rowsps",
                    Query(rate("predictions_total", MODEL, "colour, status"), "{{colour}} {{status}}"),
                ),
            ],
        ),
        Row(
            "Duration",
            [
                timeseries(
                    "Duration of a request",
                    "From the whole request to the whole answer, without the edge and the network.",
                    "s",
                    *percentiles("model_request_duration_seconds", MODEL, "colour"),
                ),
                timeseries(
                    "Time in the model",
                    "What the model takes for a batch.",
                    "s",
                    *percentiles("prediction_duration_seconds", MODEL, "colour"),
                ),
                timeseries(
                    "Waiting for the model",
                    "What a request waits until the model takes it. This grows first when there is too much to do.",
                    "s",
                    *percentiles("model_queue_wait_seconds", MODEL, "colour"),
                ),
                heatmap(
                    "Distribution of the durations",
                    "How many requests per second took how long, over both colours where both are chosen. Two bands "
                    "are two kinds of requests, or two colours that differ.",
                    "s",
                    Query(rate("model_request_duration_seconds_bucket", MODEL, "le")),
                    width=12,
                ),
                timeseries(
                    "Where the time goes",
                    "Mean parts of a request: waiting, in the model, and all the rest (parsing, encoding).",
                    "s",
                    Query(mean("model_queue_wait_seconds", MODEL, "colour"), "{{colour}} waiting"),
                    Query(mean("prediction_duration_seconds", MODEL, "colour"), "{{colour}} model"),
                    Query(mean("model_handler_duration_seconds", MODEL, "colour"), "{{colour}} rest"),
                    width=12,
                ),
            ],
        ),
        Row(
            "Saturation",
            [
                timeseries(
                    "In progress and waiting",
                    "Predictions that were asked for and not yet answered, and those of them that wait for the model.",
                    "short",
                    Query(f"sum by (colour) (model_requests_in_progress{{{MODEL}}})", "{{colour}} in progress"),
                    Query(f"sum by (colour) (model_queue_depth{{{MODEL}}})", "{{colour}} waiting"),
                ),
                timeseries(
                    "Rows in a batch",
                    "How many rows the model gets at once: waiting requests are put together.",
                    "short",
                    Query(quantile(0.5, "model_batch_rows", MODEL, "colour"), "{{colour}} p50"),
                    Query(quantile(0.95, "model_batch_rows", MODEL, "colour"), "{{colour}} p95"),
                ),
                timeseries(
                    "Workers",
                    "Worker processes that take requests.",
                    "short",
                    Query(f'sum by (colour) (model_workers{{{COLOUR}, state="ready"}})', "{{colour}} ready"),
                    Query(f'sum by (colour) (model_workers{{{COLOUR}, state="wanted"}})', "{{colour}} wanted"),
                ),
            ],
        ),
        Row(
            "What is predicted",
            [
                timeseries(
                    "Classes",
                    "Share of each class among the rows predicted. Classifiers only.",
                    "percentunit",
                    Query(
                        f"{rate('model_predicted_class_total', MODEL, 'model, class')} / on (model) group_left()"
                        f" ({rate('model_predicted_class_total', MODEL, 'model')} > 0)",
                        "{{model}} {{class}}",
                    ),
                    stacked=True,
                    maximum=1,
                ),
                timeseries(
                    "Confidence",
                    "Probability of the class that was predicted. A model that has become unsure sees something new.",
                    "percentunit",
                    Query(quantile(0.1, "model_prediction_confidence", MODEL, "model"), "{{model}} p10"),
                    Query(quantile(0.5, "model_prediction_confidence", MODEL, "model"), "{{model}} p50"),
                    maximum=1,
                ),
                table(
                    "Models",
                    "When each colour loaded each of its models, and the accuracy that the training script measured, "
                    "by the bundle's manifest; nobody measures it in production.",
                    ["colour", "model"],
                    Column(
                        Query(f"1000 * max by (colour, model) (model_loaded_timestamp_seconds{{{MODEL}}})"),
                        "loaded",
                        "dateTimeFromNow",
                    ),
                    Column(
                        Query(f"max by (colour, model) (model_accuracy_ratio{{{MODEL}}})"), "accuracy", "percentunit"
                    ),
                    width=8,
                ),
            ],
        ),
        Row(
            "Jobs",
            [
                timeseries(
                    "Jobs by state",
                    "Asynchronous jobs of each colour. A queue that only grows has nobody who works on it.",
                    "short",
                    Query(
                        'sum by (colour, status) (model_jobs{job="model", colour=~"$colour"})', "{{colour}} {{status}}"
                    ),
                    width=12,
                ),
                timeseries(
                    "Duration of a job",
                    "How long a job took once it was its turn.",
                    "s",
                    Query(quantile(0.5, "model_job_duration_seconds", COLOUR, "colour"), "{{colour}} p50"),
                    Query(quantile(0.95, "model_job_duration_seconds", COLOUR, "colour"), "{{colour}} p95"),
                    width=12,
                ),
            ],
        ),
    ],
)
