"""Drift and training data: does the model see what it was trained with?"""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ONE,
    GOOD_IS_ZERO,
    Column,
    Dashboard,
    Query,
    Row,
    Variable,
    bars,
    stat,
    table,
    timeline,
    timeseries,
)

CHOSEN = 'model=~"$model", feature=~"$feature"'
MODEL = 'model=~"$model"'
STATES = {0: ("as in training", "green"), 1: ("differs a little", "orange"), 2: ("drifted", "red")}
DISTANCE = [(None, "green"), (0.1, "orange"), (0.2, "red")]
EFFECT = [(None, "red"), (-0.25, "orange"), (-0.1, "green"), (0.1, "orange"), (0.25, "red")]


DASHBOARD = Dashboard(
    uid="appliance-drift",
    title="Drift and training data",
    description="Whether the live values of each feature are those that the model was trained with, and whether new "
    "training data still comes.",
    variables=[
        Variable("model", "Model", "model_feature_rows_total"),
        Variable("feature", "Feature", "model_feature_rows_total"),
    ],
    refresh="30s",
    period="6h",
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "Features drifted",
                    "Features whose values differ from training's, in size and beyond chance, in the last hour and the "
                    "last six. No value until there are enough rows to tell.",
                    "short",
                    Query(
                        f"count by (model) (feature:drift_state{{{MODEL}}} == 2)"
                        f" or 0 * count by (model) (feature:drift_state{{{MODEL}}})",
                        "{{model}}",
                    ),
                    steps=GOOD_IS_ZERO,
                ),
                stat(
                    "Rows, 6 hours",
                    "Rows that all this goes by: below 3000 (prometheus_thresholds.drift_rows_long_count) it says "
                    "nothing.",
                    "short",
                    Query(f"max by (model) (feature:rows:increase6h{{{MODEL}}})", "{{model}}"),
                    steps=[(None, "orange"), (3000, "green")],
                    decimals=0,
                ),
                stat(
                    "Values missing or wrong",
                    "The largest share, over all features, of the requests within the last hour that were refused "
                    "because a value was missing or of another type.",
                    "percentunit",
                    Query(
                        f"max by (model) (feature:missing_ratio:1h{{{MODEL}}} + feature:invalid_ratio:1h{{{MODEL}}})",
                        "{{model}}",
                    ),
                    steps=[(None, "green"), (0.01, "orange"), (0.1, "red")],
                ),
                stat(
                    "Training data connected",
                    "Whether the service that reads the training data has a connection to its broker.",
                    "bool_yes_no",
                    Query("training_connected", "connected"),
                    steps=GOOD_IS_ONE,
                ),
                stat(
                    "Last training row",
                    "When the last row of training data came.",
                    "dateTimeFromNow",
                    Query(f"max by (model) (training_last_message_timestamp_seconds{{{MODEL}}}) * 1000", "{{model}}"),
                ),
                stat(
                    "Training rows not read yet",
                    "Rows that lie in the topic and that the service hasn't read.",
                    "short",
                    Query(f"sum by (model) (training_consumer_lag{{{MODEL}}})", "{{model}}"),
                    steps=[(None, "green"), (1000, "orange"), (10000, "red")],
                ),
            ],
        ),
        Row(
            "Features",
            [
                table(
                    "Every feature, 6 hours",
                    "Effect: live mean minus training's, in training's standard deviations. z: the same in standard "
                    "errors, so how sure it is. PSI and KS: how far apart the distributions are.",
                    ["model", "feature"],
                    Column(
                        Query(f"max by (model, feature) (feature:drift_state{{{CHOSEN}}})"),
                        "state",
                        steps=[(None, "green"), (1, "orange"), (2, "red")],
                    ),
                    Column(
                        Query(f"max by (model, feature) (feature:smd:6h{{{CHOSEN}}})"),
                        "effect",
                        steps=EFFECT,
                        decimals=2,
                    ),
                    Column(Query(f"max by (model, feature) (feature:zscore:6h{{{CHOSEN}}})"), "z", decimals=1),
                    Column(
                        Query(f"max by (model, feature) (feature:psi:6h{{{CHOSEN}}})"),
                        "PSI",
                        steps=DISTANCE,
                        decimals=3,
                    ),
                    Column(
                        Query(f"max by (model, feature) (feature:ks:6h{{{CHOSEN}}})"), "KS", steps=DISTANCE, decimals=3
                    ),
                    Column(Query(f"max by (model, feature) (feature:rows:increase6h{{{CHOSEN}}})"), "rows", decimals=0),
                    width=14,
                ),
                timeline(
                    "State of each feature",
                    "Whether a feature's values were as in training, over time.",
                    Query(f"max by (model, feature) (feature:drift_state{{{CHOSEN}}})", "{{model}} {{feature}}"),
                    words=STATES,
                    width=10,
                ),
                timeseries(
                    "Effect",
                    "Live mean minus training's, in training's standard deviations, over an hour. Beyond 0.25 it "
                    "matters.",
                    "short",
                    Query(f"feature:smd:1h{{{CHOSEN}}}", "{{model}} {{feature}}"),
                    minimum=None,
                ),
                timeseries(
                    "Distance of the distributions",
                    "Population stability index over an hour. Above 0.2 the values are distributed otherwise; few rows "
                    "raise it by themselves.",
                    "short",
                    Query(f"feature:psi:1h{{{CHOSEN}}}", "{{model}} {{feature}}"),
                    limit=0.2,
                ),
                timeseries(
                    "z",
                    "The effect in standard errors, over an hour: how sure it is that there is any. Many rows make a "
                    "harmless difference sure.",
                    "short",
                    Query(f"feature:zscore:1h{{{CHOSEN}}}", "{{model}} {{feature}}"),
                    minimum=None,
                ),
            ],
        ),
        Row(
            "Live against training",
            [
                timeseries(
                    "Mean, and where training's values lie",
                    "The live mean over an hour, training's mean, and one standard deviation to either side of it. "
                    "Choose one feature above.",
                    "short",
                    Query(f"feature:mean:1h{{{CHOSEN}}}", "{{feature}} live"),
                    Query(f"feature:reference_mean{{{CHOSEN}}}", "{{feature}} training"),
                    Query(
                        f"feature:reference_mean{{{CHOSEN}}} + feature:reference_std{{{CHOSEN}}}", "{{feature}} +1 sd"
                    ),
                    Query(
                        f"feature:reference_mean{{{CHOSEN}}} - feature:reference_std{{{CHOSEN}}}", "{{feature}} -1 sd"
                    ),
                    minimum=None,
                    width=12,
                ),
                bars(
                    "Share of each tenth, live",
                    "Live rows of the last six hours in each of ten ranges; in training each held about a tenth.",
                    "percentunit",
                    Query(f"feature:bin_ratio:6h{{{CHOSEN}}}", "{{feature}} {{bin}}"),
                    width=6,
                ),
                bars(
                    "Share of each tenth, training",
                    "Training rows in the same ranges.",
                    "percentunit",
                    Query(f"feature:reference_bin_ratio{{{CHOSEN}}}", "{{feature}} {{bin}}"),
                    width=6,
                ),
                timeseries(
                    "Refused for a feature",
                    "Share of the requests of an hour that were refused because this feature's value was missing or of "
                    "another type.",
                    "percentunit",
                    Query(f"feature:missing_ratio:1h{{{CHOSEN}}}", "{{feature}} missing"),
                    Query(f"feature:invalid_ratio:1h{{{CHOSEN}}}", "{{feature}} wrong"),
                ),
                timeseries(
                    "Values never seen in training",
                    "Share of the rows of an hour in which a feature was below training's smallest value or above its "
                    "largest.",
                    "percentunit",
                    Query(f"feature:out_of_range_ratio:1h{{{CHOSEN}}}", "{{model}} {{feature}}"),
                ),
                timeseries(
                    "Live rows",
                    "Rows per second that are counted here; the appliance's own probes aren't.",
                    "rowsps",
                    Query(
                        f"max by (model) (sum by (model, feature) (rate(model_feature_rows_total{{{CHOSEN}}}"
                        "[$__rate_interval])))",
                        "{{model}}",
                    ),
                ),
            ],
        ),
        Row(
            "Training data",
            [
                timeseries(
                    "Rows read",
                    "Rows of training data per second: good ones, and those that were malformed, didn't fit the "
                    "model's features, or lacked values.",
                    "rowsps",
                    Query(
                        f"sum by (model, status) (rate(training_rows_total{{{MODEL}}}[$__rate_interval]))",
                        "{{model}} {{status}}",
                    ),
                    width=6,
                ),
                timeseries(
                    "Rows lost",
                    "Rows that Kafka removed before they were read, all so far of the live version. A step is a loss, "
                    "also over a gap in which the service was down.",
                    "short",
                    Query(f"sum by (model) (training_rows_expired_total{{{MODEL}}})", "{{model}}"),
                    width=6,
                ),
                timeseries(
                    "Rows not read yet",
                    "Rows that lie in the topic. Growing without end, the service is too slow or stands still.",
                    "short",
                    Query(f"sum by (model) (training_consumer_lag{{{MODEL}}})", "{{model}}"),
                    width=6,
                ),
                timeseries(
                    "Age of the last row",
                    "How long ago the last row of training data came.",
                    "s",
                    Query(f"time() - max by (model) (training_last_message_timestamp_seconds{{{MODEL}}})", "{{model}}"),
                    width=6,
                ),
                table(
                    "Training's statistics",
                    "What the live values are compared with: from the training data's topic, or else from the bundle.",
                    ["model", "feature"],
                    Column(Query(f"max by (model, feature) (feature:reference_mean{{{CHOSEN}}})"), "mean", decimals=3),
                    Column(Query(f"max by (model, feature) (feature:reference_std{{{CHOSEN}}})"), "sd", decimals=3),
                    Column(Query(f"max by (model, feature) (feature:reference_count{{{CHOSEN}}})"), "rows", decimals=0),
                ),
                timeseries(
                    "Accuracy in training",
                    "What the live model's training script measured. A step is a switch to another release. Labels of "
                    "live rows aren't known to the appliance.",
                    "percentunit",
                    Query(
                        f"max by (model) (model_accuracy_ratio{{{MODEL}}}"
                        ' and on (colour) appliance_release_info{role="live"})',
                        "{{model}}",
                    ),
                    width=12,
                    minimum=None,
                    maximum=1,
                ),
            ],
        ),
    ],
)
