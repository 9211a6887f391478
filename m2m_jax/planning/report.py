"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses

from m2m_jax.planning.compile import Plan, Work
from m2m_jax.planning.memory import gib
from m2m_jax.training.workload import Workload


def as_dict(plan: Plan, topology: str, workload: Workload, overrides: list[str]) -> dict:
    """Return all numbers of a plan: of one device and one step, where nothing else is said."""
    values = dataclasses.asdict(plan) | {"fits": plan.fits}
    values["memory"] |= {"gradients_and_activations": plan.memory.rest, "needed": plan.memory.needed}
    if plan.work:
        values["work"]["times"] |= {
            "step_seconds": plan.work.times.step_seconds,
            "limiter": plan.work.times.limiter,
        }
    return {
        "topology": topology,
        "slices": plan.mesh["slice"],
        "devices": plan.devices,
        "per_set": dataclasses.asdict(workload),
        "overrides": overrides,
        **values,
    }


def as_text(plan: Plan, topology: str, workload: Workload, overrides: list[str]) -> str:
    """Return a plan to be read."""
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    slices = f" x {plan.mesh['slice']} slices" if plan.mesh["slice"] > 1 else ""
    how = "by formula" if plan.compile_seconds is None else f"compiled in {plan.compile_seconds:.0f} s"
    lines = [
        f"{topology}{slices}: {plan.devices} devices, mesh {axes}; "
        f"{plan.batch_size} sets a step, {plan.sets_per_device} a device; {how}"
    ]
    if overrides:
        lines.append(f"  found: {' '.join(overrides)}")
    lines += [f"  note: {note}" for note in plan.notes]

    m = plan.memory
    lines.append("memory of a device")
    rows = [
        ("parameters", m.parameters),
        ("optimizer", m.optimizer),
        ("EMA", m.ema),
        ("frozen models", m.frozen),
        ("batch", m.batch),
        ("gradients, activations", m.rest),
    ]
    lines += [f"  {name:<24} {gib(size):>12}" for name, size in rows]
    lines.append(f"  {'needed':<24} {gib(m.needed):>12} of {gib(m.limit)}: {'fits' if plan.fits else 'DOES NOT FIT'}")
    if not plan.fits:
        lines.append(f"too large by {gib(m.needed - m.limit)}; what would help:")
        lines += [f"  {line}" for line in plan.advice]
    if plan.work:
        lines += _work_lines(plan, plan.work, workload)
    return "\n".join(lines)


def _work_lines(plan: Plan, work: Work, workload: Workload) -> list[str]:
    times = work.times
    model = workload.model_flops * plan.batch_size / plan.devices
    lines = [
        "work of a device in a step",
        f"  FLOPs                    {work.flops / 1e12:9.2f} T executed, {model / 1e12:.2f} T of the model itself",
        f"  HBM                      {work.hbm_bytes / 1e9:9.1f} GB read and written",
    ]
    lines += [
        f"  {c.kind:<24} {c.ici_bytes / 1e9:9.3f} GB over ICI, {c.dcn_bytes / 1e9:.3f} GB over DCN: "
        f"{c.count} x between {c.group_size} devices"
        for c in work.collectives
    ]
    kernels = f"{work.kernels} calls of kernels" if work.kernels else "no kernels, plain XLA,"
    if workload.attention.allowed and plan.compile_seconds is not None:
        ratio = workload.attention.executed / workload.attention.allowed
        how = f"by {workload.backend}: {kernels} in the program"
        lines.append(f"  Image-Set Attention      {ratio:.3f} times the allowed products, {how}")
    if work.launches:
        counts = ", ".join(f"{count} {kind}" for kind, count in work.launches.items())
        lines.append(f"  kernels in the program   {counts}")
    dcn = "unknown" if times.dcn is None else f"{times.dcn:.4f}"
    lines += [
        "roofline",
        f"  seconds                  compute {times.compute:.4f}, HBM {times.hbm:.4f}, ICI {times.ici:.4f}, DCN {dcn}",
        f"  a step                   {times.step_seconds:.4f} s at least, by {times.limiter}",
        f"  images                   {work.images_per_second:.1f} a second at most",
        f"  MFU                      {100 * work.mfu:.1f} % at most",
    ]
    return lines
