"""Statistics of the training rows in a Kafka topic, as the reference that live traffic is compared with.

`python -m drift` runs the service, `python -m drift.simulate` makes training rows and traffic to try it with.
"""
