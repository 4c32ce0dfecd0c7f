"""librdkafka's mock cluster: prints its address, and lives until its input ends. A new topic has four partitions."""

import sys

from confluent_kafka import Producer

owner = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1})
brokers = owner.list_topics(timeout=60).brokers.values()
print(*(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
sys.stdin.read()
