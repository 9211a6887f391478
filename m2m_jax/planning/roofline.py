"""The least time that a step can take: of its FLOPs and bytes, and what the chip does of them a second. No JAX."""

from __future__ import annotations

import dataclasses

from m2m_jax.core.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource needs for a step, as if all ran side by side at their peaks; `limiter`: the slowest.

    Not what a step will take: nothing reaches its peak and not everything overlaps. What HBM counts stands in `hbm.py`.
    `dcn` is None where the chip's network is not known.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float | None

    @property
    def limiter(self) -> str:
        return max(self._known, key=lambda resource: self._known[resource])

    @property
    def step_seconds(self) -> float:
        return max(self._known.values())

    @property
    def _known(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def roofline(chip: Chip, flops: float, hbm_bytes: float, ici_bytes: float, dcn_bytes: float) -> Roofline:
    """Return the roofline of what one device does in a step. chip: the device's share of one."""
    dcn = 0.0 if not dcn_bytes else dcn_bytes / chip.dcn_bandwidth if chip.dcn_bandwidth else None
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, ici_bytes / chip.ici_bandwidth, dcn)


def mfu(model_flops: float, seconds: float, devices: int, chip: Chip) -> float:
    """Return the model FLOPs utilisation: the share of the devices' peak that the model's own FLOPs make."""
    return model_flops / (seconds * devices * chip.flops)
