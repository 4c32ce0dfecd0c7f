"""The host: utilisation, saturation and errors of each resource, and the units."""

from roles.grafana.dashboards.builder import (
    GOOD_IS_ZERO,
    Column,
    Dashboard,
    Query,
    Row,
    stat,
    table,
    timeseries,
)

REAL = 'fstype!~"tmpfs|ramfs|squashfs"'
FULL = f"1 - node_filesystem_avail_bytes{{{REAL}}} / node_filesystem_size_bytes{{{REAL}}}"
CPU = '1 - avg(rate(node_cpu_seconds_total{mode="idle"}[$__rate_interval]))'
MEMORY = "1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes"
# Interfaces of containers and the loopback say nothing about the host's own network.
NETWORK = 'device!~"lo|veth.*|docker.*|br-.*"'
DISKS = 'device!~"loop.*|ram.*|sr.*"'
FULLNESS = [(None, "green"), (0.8, "orange"), (0.9, "red")]


def waiting(resource: str) -> str:
    return f"rate(node_pressure_{resource}_waiting_seconds_total[$__rate_interval])"


DASHBOARD = Dashboard(
    uid="appliance-host",
    title="Host",
    description="The machine below it all: how busy each resource is, what has to wait for it, and what goes wrong.",
    rows=[
        Row(
            "Is it OK?",
            [
                stat(
                    "CPU",
                    "Share of all cores that is busy. Close to 100 %, requests wait for a core.",
                    "percentunit",
                    Query(CPU, "busy"),
                    steps=[(None, "green"), (0.85, "orange"), (0.95, "red")],
                    width=3,
                ),
                stat(
                    "Memory",
                    "Share of the memory that is in use and can't be reclaimed. Both colours hold a model.",
                    "percentunit",
                    Query(MEMORY, "in use"),
                    steps=FULLNESS,
                    width=3,
                ),
                stat(
                    "Fullest disk",
                    "Used share of the file system that has the least space left.",
                    "percentunit",
                    Query(f"max({FULL})", "used"),
                    steps=FULLNESS,
                    width=3,
                ),
                stat(
                    "Killed for memory",
                    "Processes that the kernel killed within the last day because memory had run out.",
                    "short",
                    Query("increase(node_vmstat_oom_kill[1d])", "killed"),
                    steps=GOOD_IS_ZERO,
                    width=3,
                    decimals=0,
                ),
                stat(
                    "Units failed",
                    "Units of the appliance that systemd has given up on.",
                    "short",
                    Query('sum(node_systemd_unit_state{state="failed"})', "failed"),
                    steps=GOOD_IS_ZERO,
                    width=3,
                ),
                stat(
                    "Clock synchronised",
                    "Whether the kernel's clock follows a time source. Certificates and logs need the right time. "
                    "Where the host is a container, its machine keeps the time.",
                    "bool_yes_no",
                    Query("node_timex_sync_status", "synchronised"),
                    steps=[(None, "orange"), (1, "green")],
                    width=3,
                ),
                stat(
                    "Up since",
                    "When the host started.",
                    "dateTimeFromNow",
                    Query("node_boot_time_seconds * 1000", "start"),
                    width=3,
                ),
                stat(
                    "Cores",
                    "Processor cores that the host has; each colour runs one worker for each of them.",
                    "short",
                    Query('count(node_cpu_seconds_total{mode="idle"})', "cores"),
                    width=3,
                ),
            ],
        ),
        Row(
            "Processor",
            [
                timeseries(
                    "What the cores do",
                    "Share of all cores by what they do. User is the models' work; steal is time that another machine "
                    "on the same hardware took.",
                    "percentunit",
                    Query(
                        'sum by (mode) (rate(node_cpu_seconds_total{mode!="idle"}[$__rate_interval]))'
                        ' / on () group_left() count(node_cpu_seconds_total{mode="idle"})',
                        "{{mode}}",
                    ),
                    stacked=True,
                    maximum=1,
                ),
                timeseries(
                    "Load for each core",
                    "Processes that run or want to, divided by the cores. Above 1 some of them wait.",
                    "short",
                    Query(
                        'node_load1 / on (instance) count by (instance) (node_cpu_seconds_total{mode="idle"})', "1 min"
                    ),
                    Query(
                        'node_load5 / on (instance) count by (instance) (node_cpu_seconds_total{mode="idle"})', "5 min"
                    ),
                    Query(
                        'node_load15 / on (instance) count by (instance) (node_cpu_seconds_total{mode="idle"})',
                        "15 min",
                    ),
                    limit=2,
                ),
                timeseries(
                    "Waiting for a resource",
                    "Share of time in which some process had to wait (pressure stall information). It shows saturation "
                    "before utilisation does.",
                    "percentunit",
                    Query(waiting("cpu"), "cpu"),
                    Query(waiting("memory"), "memory"),
                    Query(waiting("io"), "disk"),
                ),
            ],
        ),
        Row(
            "Memory",
            [
                timeseries(
                    "What holds the memory",
                    "In use by processes, or by the kernel as a cache that it can give up.",
                    "bytes",
                    Query("node_memory_MemTotal_bytes - node_memory_MemAvailable_bytes", "in use"),
                    Query("node_memory_MemAvailable_bytes - node_memory_MemFree_bytes", "reclaimable"),
                    Query("node_memory_MemFree_bytes", "free"),
                    stacked=True,
                ),
                timeseries(
                    "Pages read back from disk",
                    "Major page faults per second: programs that wait for memory that was pushed out.",
                    "short",
                    Query("rate(node_vmstat_pgmajfault[$__rate_interval])", "major faults"),
                ),
                timeseries(
                    "Open files",
                    "File handles in use on the whole machine. A number that only grows is a leak.",
                    "short",
                    Query("node_filefd_allocated", "file handles"),
                ),
            ],
        ),
        Row(
            "Disk",
            [
                timeseries(
                    "Space used",
                    "Used share of each file system. Bundles, images and Prometheus's samples grow here.",
                    "percentunit",
                    Query(f"max by (mountpoint) ({FULL})", "{{mountpoint}}"),
                    maximum=1,
                ),
                timeseries(
                    "Files used",
                    "Used share of each file system's inodes. Many small files can fill a disk that has space left.",
                    "percentunit",
                    Query(
                        f"max by (mountpoint) (1 - node_filesystem_files_free{{{REAL}}}"
                        f" / (node_filesystem_files{{{REAL}}} > 0))",
                        "{{mountpoint}}",
                    ),
                    maximum=1,
                ),
                timeseries(
                    "Disk busy",
                    "Share of time in which a disk had something to do.",
                    "percentunit",
                    Query(f"rate(node_disk_io_time_seconds_total{{{DISKS}}}[$__rate_interval])", "{{device}}"),
                    maximum=1,
                ),
                timeseries(
                    "Read and written",
                    "Bytes per second; written below zero.",
                    "Bps",
                    Query(f"rate(node_disk_read_bytes_total{{{DISKS}}}[$__rate_interval])", "{{device}} read"),
                    Query(f"-rate(node_disk_written_bytes_total{{{DISKS}}}[$__rate_interval])", "{{device}} written"),
                    minimum=None,
                    width=12,
                ),
                timeseries(
                    "Waiting for the disk",
                    "Operations that wait for each disk, on average.",
                    "short",
                    Query(f"rate(node_disk_io_time_weighted_seconds_total{{{DISKS}}}[$__rate_interval])", "{{device}}"),
                    width=12,
                ),
            ],
        ),
        Row(
            "Network",
            [
                timeseries(
                    "Received and sent",
                    "Bytes per second of each interface; sent below zero.",
                    "Bps",
                    Query(
                        f"rate(node_network_receive_bytes_total{{{NETWORK}}}[$__rate_interval])", "{{device}} received"
                    ),
                    Query(
                        f"-rate(node_network_transmit_bytes_total{{{NETWORK}}}[$__rate_interval])", "{{device}} sent"
                    ),
                    minimum=None,
                ),
                timeseries(
                    "Lost packets",
                    "Packets per second that were dropped or damaged, of each interface.",
                    "pps",
                    Query(
                        f"rate(node_network_receive_errs_total{{{NETWORK}}}[$__rate_interval])"
                        f" + rate(node_network_receive_drop_total{{{NETWORK}}}[$__rate_interval])",
                        "{{device}} received",
                    ),
                    Query(
                        f"rate(node_network_transmit_errs_total{{{NETWORK}}}[$__rate_interval])"
                        f" + rate(node_network_transmit_drop_total{{{NETWORK}}}[$__rate_interval])",
                        "{{device}} sent",
                    ),
                ),
                timeseries(
                    "TCP",
                    "Connections that are open, and segments per second that had to be sent again.",
                    "short",
                    Query("node_netstat_Tcp_CurrEstab", "connections"),
                    Query("rate(node_netstat_Tcp_RetransSegs[$__rate_interval])", "sent again per second"),
                ),
            ],
        ),
        Row(
            "Units, tasks and clock",
            [
                table(
                    "Units that aren't active",
                    "Units of the appliance that don't run. Empty is good; the idle colour may be stopped on purpose, "
                    "and a unit that does one thing ends with it.",
                    ["name"],
                    Column(
                        Query('max by (name) (node_systemd_unit_state{state=~"inactive|failed|activating"} == 1)'),
                        "not active",
                        "bool_yes_no",
                    ),
                    width=6,
                ),
                timeseries(
                    "Units by state",
                    "How many units of the appliance are in which state.",
                    "short",
                    Query("sum by (state) (node_systemd_unit_state)", "{{state}}"),
                    width=6,
                ),
                table(
                    "Regular tasks",
                    "How long ago each of them last worked, and how often it should. One that hasn't for more than "
                    "twice its interval and five minutes is an alert.",
                    ["task"],
                    Column(
                        Query("max by (task) (time() - appliance_task_last_success_timestamp_seconds)"), "last", "s"
                    ),
                    Column(Query("max by (task) (appliance_task_interval_seconds)"), "every", "s"),
                    width=6,
                ),
                timeseries(
                    "Clock off by",
                    "How far the clock is from its time source, as far as the kernel knows.",
                    "s",
                    Query("node_timex_offset_seconds", "offset"),
                    minimum=None,
                    width=6,
                ),
            ],
        ),
    ],
)
