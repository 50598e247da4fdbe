"""Every Prometheus series of the project, declared once: name, help, labels, buckets.

Names are `isentrope_<service>_<what>_<unit>`; base units; counters end in `_total`. Each process
fills those of its own service; a gauge appears only once it was measured. Label values that an
alert needs to see at zero are initialised here.

    process                      of every service: build, run, calls, certificate; `/metrics` itself
    queues                       the streams and Redis
    rollout, verifier, learner   what each of them does
    quantities                   the learner's gauges: the newest row of metrics.jsonl
    weights                      both sides of a publication
"""

from prometheus_client import disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]
