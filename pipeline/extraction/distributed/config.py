"""The options of an extraction on a cluster. Imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from train.option import SettingError, option


@dataclass(frozen=True)
class RayOptions:
    """The options of `cap extract-features --ray`. None: chosen by what the cluster has."""

    ray: str | None = option(
        None,
        "Spread the work over a cluster of Ray: HOST:PORT, or auto, which is the cluster of this "
        "machine, or else one that is started on it.",
    )
    ray_workers: int | None = option(
        None,
        "With --ray: how many workers.  [default: one per GPU; on CPUs as many as fit]",
        min=1,
    )
    ray_gpus: float | None = option(
        None,
        "With --ray: GPUs of each worker, also a part of one.  [default: 1 where there are any]",
        min=0,
    )
    ray_cores: float | None = option(
        None,
        "With --ray: CPUs of each worker, also a part of one.  [default: what is beside a GPU, or "
        "up to 8]",
        min=0.01,
    )
    ray_shards: int | None = option(
        None,
        "With --ray: how many shards.  [default: some minutes of work each]",
        min=1,
        max=999_999,
    )
    ray_wait: float | None = option(
        None,
        "With --ray: seconds until the job gives up if no worker can start.  [default: 60]",
        min=1,
    )
    catalogue: bool = option(
        False, "With --ray: keep the shards, and make --out a catalogue of them."
    )
    cost_per_hour: float | None = option(
        None, "With --ray: what a worker costs per hour; progress then shows the cost.", min=0
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            given = getattr(self, each.name)
            if self.ray is None and given not in (None, False):
                raise SettingError(f"--{each.name.replace('_', '-')} needs --ray")
