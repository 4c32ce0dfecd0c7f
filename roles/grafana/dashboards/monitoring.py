"""The monitoring itself: would it notice?"""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ONE,
    GOOD_IS_ZERO,
    Column,
    Dashboard,
    Query,
    Row,
    stat,
    table,
    timeline,
    timeseries,
)

UP_OR_DOWN = {0: ("down", "red"), 1: ("up", "green")}

DASHBOARD = Dashboard(
    uid="appliance-monitoring",
    title="Monitoring itself",
    description="Prometheus, its exporters and Alertmanager: whether what the other dashboards show can be believed.",
    refresh="30s",
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "Targets down",
                    "Targets that don't answer their scrapes. A colour without a release has nothing to answer with: "
                    "it isn't counted.",
                    "short",
                    Query(
                        'count(up{job!="model"} == 0 or up{job="model"} == 0 and on (colour) appliance_release_info)'
                        " or vector(0)",
                        "down",
                    ),
                    steps=GOOD_IS_ZERO,
                ),
                stat(
                    "Configuration accepted",
                    "Whether Prometheus runs with the configuration that is on disk.",
                    "bool_yes_no",
                    Query("prometheus_config_last_reload_successful", "Prometheus"),
                    Query("alertmanager_config_last_reload_successful", "Alertmanager"),
                    steps=GOOD_IS_ONE,
                    width=5,
                ),
                stat(
                    "Rules failed",
                    "Evaluations of rules within the last hour that failed or came too late.",
                    "short",
                    Query("sum(increase(prometheus_rule_evaluation_failures_total[1h]))", "failed"),
                    Query("sum(increase(prometheus_rule_group_iterations_missed_total[1h]))", "missed"),
                    steps=GOOD_IS_ZERO,
                    width=5,
                    decimals=0,
                ),
                stat(
                    "Alertmanagers",
                    "Alertmanagers that Prometheus tells its alerts to. Without one nobody is woken.",
                    "short",
                    Query("prometheus_notifications_alertmanagers_discovered", "known"),
                    steps=GOOD_IS_ONE,
                    width=3,
                ),
                stat(
                    "Notifications failed",
                    "Messages within the last hour that Alertmanager couldn't deliver.",
                    "short",
                    Query("sum(increase(alertmanager_notifications_failed_total[1h]))", "failed"),
                    steps=GOOD_IS_ZERO,
                    width=3,
                    decimals=0,
                ),
                stat(
                    "Watchdog",
                    "Whether the alert fires that always has to: the outside world notices when it stops.",
                    "bool_yes_no",
                    Query('count(ALERTS{alertname="Watchdog", alertstate="firing"}) or vector(0)', "fires"),
                    steps=GOOD_IS_ONE,
                ),
            ],
        ),
        Row(
            "Scrapes",
            [
                timeline(
                    "Targets",
                    "Whether each target answered. A gap is a time in which Prometheus itself didn't run.",
                    Query("up", "{{job}} {{colour}} {{probe}}"),
                    words=UP_OR_DOWN,
                    width=12,
                ),
                table(
                    "Targets now",
                    "Each target with its last scrape: how long it took, and what it brought.",
                    ["job", "colour", "probe", "instance"],
                    Column(Query("max by (job, colour, probe, instance) (up)"), "up", "bool_yes_no", GOOD_IS_ONE),
                    Column(Query("max by (job, colour, probe, instance) (scrape_duration_seconds)"), "duration", "s"),
                    Column(Query("max by (job, colour, probe, instance) (scrape_samples_scraped)"), "samples"),
                ),
                timeseries(
                    "Duration of a scrape",
                    "How long a target takes to tell its metrics. A scrape that takes longer than its timeout is lost.",
                    "s",
                    Query("max by (job, colour) (scrape_duration_seconds)", "{{job}} {{colour}}"),
                ),
                timeseries(
                    "Samples of a scrape",
                    "How many series a target has. A colour's are limited to 10,000.",
                    "short",
                    Query("max by (job, colour) (scrape_samples_post_metric_relabeling)", "{{job}} {{colour}}"),
                ),
                timeseries(
                    "Scrapes with faults",
                    "Per second: samples that came twice or too late, scrapes that exceeded a limit.",
                    "short",
                    Query(
                        "rate(prometheus_target_scrapes_sample_duplicate_timestamp_total[$__rate_interval])", "twice"
                    ),
                    Query(
                        "rate(prometheus_target_scrapes_sample_out_of_order_total[$__rate_interval])", "out of order"
                    ),
                    Query(
                        "rate(prometheus_target_scrapes_exceeded_sample_limit_total[$__rate_interval])",
                        "over the limit",
                    ),
                ),
            ],
        ),
        Row(
            "Rules and alerts",
            [
                timeseries(
                    "Time for the rules",
                    "How long the last evaluation of each group took. It has to stay far below the group's interval.",
                    "s",
                    Query(
                        "label_replace(prometheus_rule_group_last_duration_seconds,"
                        ' "group", "$1", "rule_group", ".*;(.*)")',
                        "{{group}}",
                    ),
                ),
                timeseries(
                    "Alerts",
                    "Alerts that fire or are about to, by severity. The severity none is the watchdog.",
                    "short",
                    Query('count by (severity) (ALERTS{alertstate="firing"})', "{{severity}} firing"),
                    Query('count by (severity) (ALERTS{alertstate="pending"})', "{{severity}} pending"),
                ),
                timeseries(
                    "Messages",
                    "Messages per second that Alertmanager sent, and those that failed, by the way they go.",
                    "short",
                    Query(
                        "sum by (integration) (rate(alertmanager_notifications_total[$__rate_interval]))",
                        "{{integration}} sent",
                    ),
                    Query(
                        "sum by (integration) (rate(alertmanager_notifications_failed_total[$__rate_interval]))",
                        "{{integration}} failed",
                    ),
                ),
                table(
                    "Alerts that fire",
                    "Everything that fires now, with its severity.",
                    ["alertname", "severity"],
                    Column(Query('count by (alertname, severity) (ALERTS{alertstate="firing"})'), "how many"),
                ),
                timeseries(
                    "From Prometheus to Alertmanager",
                    "Alerts per second that Prometheus told, and those that it couldn't.",
                    "short",
                    Query("rate(prometheus_notifications_sent_total[$__rate_interval])", "told"),
                    Query("rate(prometheus_notifications_errors_total[$__rate_interval])", "failed"),
                    Query("rate(prometheus_notifications_dropped_total[$__rate_interval])", "dropped"),
                    width=12,
                ),
            ],
        ),
        Row(
            "Prometheus",
            [
                timeseries(
                    "Series",
                    "Series that Prometheus holds in memory.",
                    "short",
                    Query("prometheus_tsdb_head_series", "series"),
                ),
                timeseries(
                    "Samples on disk",
                    "What the samples take, and the most that they may; the oldest go first.",
                    "bytes",
                    Query("prometheus_tsdb_storage_blocks_bytes", "blocks"),
                    Query("prometheus_tsdb_retention_limit_bytes", "limit"),
                ),
                timeseries(
                    "Memory",
                    "Memory of Prometheus, its exporters and Alertmanager.",
                    "bytes",
                    Query('process_resident_memory_bytes{job!="model"}', "{{job}}"),
                ),
                table(
                    "Metrics with the most series",
                    "The ten metrics that cost the most.",
                    ["__name__"],
                    Column(Query('topk(10, count by (__name__) ({__name__!=""}))'), "series"),
                ),
                timeseries(
                    "Faults of the storage",
                    "Compactions that failed, and corrupted parts of the log, since Prometheus started.",
                    "short",
                    Query("prometheus_tsdb_compactions_failed_total", "compactions"),
                    Query("prometheus_tsdb_wal_corruptions_total", "log"),
                    Query("prometheus_tsdb_wal_writes_failed_total", "writes"),
                    width=12,
                ),
            ],
        ),
    ],
)
