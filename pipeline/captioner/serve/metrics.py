"""Counters of the server in the text form that Prometheus reads.

The form is short enough to write by hand: lines of `name{label="value"} number`, below a line with
the metric's type. See https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PARTS = ("upload", "decode", "wait", "encode", "search")
_BOUNDS_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # of the histogram's buckets


class Metrics:
    """What has happened since the server started. Threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.photos = 0  # captioned
        self.batches = 0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._refused: Counter[str] = Counter()
        self._buckets = [0] * len(_BOUNDS_S)
        self._total_s = 0.0

    def batch_done(self) -> None:
        with self._lock:
            self.batches += 1

    def photo_done(self, seconds: Mapping[str, float]) -> None:
        """seconds: of each of the `PARTS` of one photo."""
        total_s = sum(seconds.values())
        with self._lock:
            self.photos += 1
            for part in PARTS:
                self._seconds[part] += seconds[part]
            self._total_s += total_s
            for place, bound in enumerate(_BOUNDS_S):
                self._buckets[place] += total_s <= bound

    def refused(self, reason: str) -> None:
        """A photo got no caption. reason: one word for it."""
        with self._lock:
            self._refused[reason] += 1

    def text(self, now: Mapping[str, tuple[str, int]]) -> str:
        """All metrics. now: what is measured at this moment, by name: (its help, its value)."""
        with self._lock:
            lines = [
                *_metric("cap_photos_total", "counter", "Photos captioned.", {"": self.photos}),
                *_metric("cap_batches_total", "counter", "Batches computed.", {"": self.batches}),
                *_metric(
                    "cap_seconds_total",
                    "counter",
                    "Seconds that the captioned photos spent in each part.",
                    {f'{{part="{part}"}}': self._seconds[part] for part in PARTS},
                ),
                *_metric(
                    "cap_refused_total",
                    "counter",
                    "Requests for a caption that got none, by reason.",
                    {f'{{reason="{r}"}}': count for r, count in sorted(self._refused.items())},
                ),
                *_metric(
                    "cap_request_seconds",
                    "histogram",
                    "Seconds from the start of a request to its caption.",
                    {
                        **{
                            f'_bucket{{le="{bound}"}}': count
                            for bound, count in zip(_BOUNDS_S, self._buckets, strict=True)
                        },
                        '_bucket{le="+Inf"}': self.photos,
                        "_sum": self._total_s,
                        "_count": self.photos,
                    },
                ),
            ]
        for name, (help, value) in now.items():
            lines += _metric(f"cap_{name}", "gauge", help, {"": value})
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, help: str, values: Mapping[str, float]) -> list[str]:
    return [
        f"# HELP {name} {help}",
        f"# TYPE {name} {kind}",
        *(f"{name}{label} {value:.10g}" for label, value in values.items()),
    ]
