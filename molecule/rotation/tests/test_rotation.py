"""Rotation under load: what was answered is what is logged, line for line."""

import threading

import pytest

LOG = "/var/log/nginx/prod_access.log"
ROTATE = "logrotate --force /etc/logrotate.d/appliance"


def logged(host, marker):
    """Lines with this marker in the log and everything that was rotated out of it."""
    return int(host.check_output(f"zgrep -h -c {marker} {LOG}* | awk '{{n += $1}} END {{print n}}'"))


def load(edge, marker):
    """Send requests from several clients; return the event that stops them, the threads, and their counts."""
    stop = threading.Event()
    counts = [0, 0, 0, 0]

    def client(index):
        while not stop.is_set():
            answer = edge.predict("/predict", **{"X-Request-ID": f"{marker}-{index}-{counts[index]}"})
            assert answer.status == 200
            counts[index] += 1

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    return stop, threads, counts


# A loss that comes only now and then is a loss: no second try.
@pytest.mark.flaky(reruns=0)
def test_no_line_is_lost_while_logs_rotate(host, edge):
    marker = "rotating"
    stop, threads, counts = load(edge, marker)
    try:
        for _ in range(5):
            host.check_output(ROTATE)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert sum(counts) > 100
    assert logged(host, marker) == sum(counts)


def test_rotated_files_are_as_promised(host, edge):
    for number in range(10):
        edge.predict("/predict", **{"X-Request-ID": f"fill-{number}"})
        host.check_output(ROTATE)
    names = host.check_output(f"ls {LOG}.*").split()
    assert len(names) == 7
    # The youngest stays as it is until nobody can still write to it.
    assert f"{LOG}.1" in names
    assert all(name.endswith(".gz") for name in names if name != f"{LOG}.1")
    for name in [LOG, *names]:
        assert host.file(name).mode == 0o640


def test_a_log_is_rotated_by_size_only_when_it_is_large(host, edge):
    edge.predict("/predict")
    inode = host.check_output(f"stat -c %i {LOG}")
    host.check_output("logrotate /etc/logrotate.d/appliance")
    assert host.check_output(f"stat -c %i {LOG}") == inode
    host.check_output(f"head -c 1100000 /dev/zero | tr '\\0' '\\n' >> {LOG}")
    host.check_output("logrotate /etc/logrotate.d/appliance")
    assert host.check_output(f"stat -c %i {LOG}") != inode


def test_missing_and_empty_logs_are_tolerated(host):
    host.check_output("rm -f /var/log/nginx/test_access.log && nginx -s reopen && : > /var/log/nginx/error.log")
    host.check_output("rm -f /var/log/nginx/test_access.log")
    assert host.run(ROTATE).rc == 0
    host.check_output("install -o www-data -g adm -m 0640 /dev/null /var/log/nginx/test_access.log && nginx -s reopen")


def test_cron_runs_it(host, eventually):
    """A job of the same shape, due each minute, shows that cron reads our file's directory and runs as told."""
    schedule = host.file("/etc/cron.d/appliance").content_string.replace("*/5 *", "* *", 1)
    host.check_output(f"cat > /etc/cron.d/appliance-test <<'END'\n{schedule}END")
    try:
        host.check_output(f"head -c 1100000 /dev/zero | tr '\\0' '\\n' >> {LOG}")
        inode = host.check_output(f"stat -c %i {LOG}")
        eventually(lambda: host.check_output(f"stat -c %i {LOG}") != inode, seconds=130, what="rotation by cron")
    finally:
        host.check_output("rm /etc/cron.d/appliance-test")
