"""The plans of docs/plans: the full-size models on every topology, each compiled by `m2m_jax.plan`, and their table.

    python -m benchmarks.plans                         all that are not there yet: 17 to 45 minutes of a core each
    python -m benchmarks.plans --only=v5p_self5        one of them
    python -m benchmarks.plans --table                 only the table, in docs/planning.md

`make plan` runs the first in an environment of its own. A plan is a file NAME.json as `m2m_jax.plan --json` prints it,
with its command; remove it to make it again.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.program import run_program
from m2m_jax.planning.memory import gib

ONLY = flags.DEFINE_list("only", None, "Names of plans; all if not given.")
TABLE = flags.DEFINE_bool("table", False, "Make no plan, only the table of those that are there.")

HLO = flags.DEFINE_string("hlo", None, "Folder for the compiled programs, NAME.hlo; none are kept if not given.")

FOLDER = Path("docs/plans")
DOCUMENT = Path("docs/planning.md")
BEGIN, END = "<!-- by python -m benchmarks.plans -->\n", "<!-- to here -->\n"
MODELS = {"self": "configs/mis_sd21_self.py", "dino": "configs/mis_sd21_dino.py"}
IMAGES = (5, 10, 25)
FSDP, REMAT = "--config.mesh.fsdp=16", "--config.model.remat=blocks"
# Name -> topology, slices, devices of all, overrides by the number of images a set: one set a device, whatever it takes
# for that to fit.
TOPOLOGIES = {
    "v5p": ("v5p:4x4x4", 1, 64, {5: (), 10: (), 25: ()}),
    "v6e": ("v6e:16x16", 1, 256, {5: (), 10: (REMAT,), 25: (REMAT,)}),
    "v5e": ("v5e:16x16", 1, 256, {5: (FSDP, REMAT), 10: (FSDP, REMAT), 25: (FSDP, REMAT)}),
    "v5e_2_slices": ("v5e:16x16", 2, 512, {5: (FSDP, REMAT), 10: (FSDP, REMAT), 25: (FSDP, REMAT)}),
}
# One that does not fit, and says what would help.
TOO_LARGE = ("v5e_self5_too_large", "v5e:16x16", 1, 256, "self", 5, ())


def commands() -> dict[str, list[str]]:
    """{name of a plan: the arguments of m2m_jax.plan}, those with fewest images first."""
    rows = [
        (f"{name}_{model}{images}", topology, slices, devices, model, images, overrides[images])
        for images in IMAGES
        for name, (topology, slices, devices, overrides) in TOPOLOGIES.items()
        for model in MODELS
    ]
    found = {}
    for name, topology, slices, devices, model, images, overrides in [*rows, TOO_LARGE]:
        found[name] = [f"--config={MODELS[model]}", f"--topology={topology}"]
        found[name] += [f"--slices={slices}"] * (slices > 1)
        found[name] += [f"--config.data.images_per_set={images}"] * (images != IMAGES[0])
        found[name] += [f"--config.{part}.batch_size={devices}" for part in ("data", "eval") if devices != 64]
        found[name] += overrides
    return found


def make(name: str, arguments: list[str]) -> None:
    """Writes a plan, whole or not at all. Raises UserError where the program failed."""
    shown = shlex.join(["python", "-m", "m2m_jax.plan", *arguments])
    print(f"{name}: {shown}", flush=True)
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "m2m_jax.plan", *arguments, "--json"]
        + [f"--hlo={HLO.value}/{name}.hlo"] * bool(HLO.value),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode not in (0, 1):
        raise UserError(f"{name} ended with exit code {result.returncode}; what it printed stands above")
    plan = {"command": shown, **json.loads(result.stdout)}
    disk.write(FOLDER / f"{name}.json", f"{json.dumps(plan, indent=1)}\n".encode())
    print(f"{name}: {'fits' if plan['fits'] else 'does not fit'}; {time.monotonic() - started:.0f} s", flush=True)


def table() -> str:
    """Markdown: a line for each plan that is there, and the commands in that order."""
    head = (
        *("plan", "images a set", "needed, of what there is", "state", "FLOPs: executed, model", "set attention"),
        *("kernels", "HBM", "collectives", "a step at least", "images/s at most", "MFU at most"),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    shown = []
    for name in commands():
        path = FOLDER / f"{name}.json"
        if path.is_file():
            plan = json.loads(path.read_text())
            lines.append("| " + " | ".join(_cells(name, plan)) + " |")
            shown.append(plan["command"] + "".join(f"\n    # does not fit: {line}" for line in plan["advice"]))
    listed = "".join(f"    {command}\n" for command in shown)
    return "\n".join(lines) + "\n\n" + listed


def _cells(name: str, plan: dict) -> list[str]:
    memory, work, per_set = plan["memory"], plan["work"], plan["per_set"]
    state = memory["parameters"] + memory["optimizer"] + memory["ema"]
    images = re.search(r"images_per_set=(\d+)", plan["command"])
    fits = "fits" if plan["fits"] else "**does not fit**"
    cells = [
        name,
        images[1] if images else str(IMAGES[0]),
        f"{gib(memory['needed'])} of {gib(memory['limit'])}: {fits}",
        gib(state),
    ]
    if not work:
        return cells + [""] * 8
    model = per_set["model_flops"] * plan["batch_size"] / plan["devices"]
    attention, times = per_set["attention"], work["times"]
    sent = {}
    for one in work["collectives"]:
        sent.setdefault(one["kind"], [0.0, 0.0])
        sent[one["kind"]][0] += one["ici_bytes"]
        sent[one["kind"]][1] += one["dcn_bytes"]
    return [
        *cells,
        f"{work['flops'] / 1e12:.1f} T, {model / 1e12:.1f} T",
        f"{attention['executed'] / attention['allowed']:.3f}",
        str(work["kernels"]),
        f"{work['hbm_bytes'] / 1e9:.0f} GB",
        "; ".join(
            f"{kind} {ici / 1e9:.2f} GB" + (f" + {dcn / 1e9:.2f} GB between slices" if dcn else "")
            for kind, (ici, dcn) in sent.items()
        ),
        f"{times['step_seconds']:.3f} s, by {times['limiter']}",
        f"{work['images_per_second']:.0f}",
        f"{100 * work['mfu']:.1f} %",
    ]


def main(argv):
    del argv
    plans = commands()
    unknown = sorted(set(ONLY.value or ()) - plans.keys())
    if unknown:
        raise UserError(f"--only={','.join(unknown)}: plans are {', '.join(plans)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in () if TABLE.value else ONLY.value or plans:
        if not (FOLDER / f"{name}.json").is_file():
            make(name, plans[name])
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{DOCUMENT} has no place for the table: put {BEGIN.strip()} and {END.strip()} where it goes")
    disk.write(DOCUMENT, (before + begin + table() + end + after).encode())
    print(DOCUMENT)


if __name__ == "__main__":
    run_program(main)
