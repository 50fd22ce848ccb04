"""What `python -m silalib status` prints: what is done, what failed and why, and about how long the rest takes."""

from collections import Counter
from itertools import chain

from .. import data
from ..experiments import tiers
from ..launch.estimate import seconds_left
from ..launch.progress import duration
from ..records import damage, failure, find, load, state
from ..training.execution import pick_device
from . import claims, tables

LABELS = ("done", "running", "started", "pending", "failed", "damaged")


def lines(profile, seeds, grids):
    """The lines for a profile. seeds: those asked for, or None; grids: exhibit -> its runs."""
    states = {run: state(run, profile) for run in dict.fromkeys(chain(*grids.values()))}
    judged = claims.judge(profile, seeds)
    yield f"profile {profile}; {claims.score(judged)}"
    if profile != "quick":
        yield from (f"  {claim.name}. {claim.claim}: {claim.verdict}" for claim in judged)
    yield f"{'':14}" + "".join(f"{label:>9}" for label in LABELS)
    for name, grid in grids.items():
        counts = Counter(states[run] for run in set(grid))
        yield f"{name:14}" + "".join(f"{counts[label] or '-':>9}" for label in LABELS)
    for run in states:
        if states[run] == "failed" and (found := failure(run, profile)):
            yield f"failed: {found['error']} (--retry trains it again)"
        elif states[run] == "damaged":
            yield f"damaged: {damage(run, profile=profile)}"
    done = [run for run in states if states[run] == "done"]
    records = {run: load(run, profile=profile) for run in done if find(run, profile).parent.parent.name == profile}
    if unlike := tables.mixed(records):
        yield f"not trained alike: {unlike}"
    left = [run for run in states if states[run] in ("running", "started", "pending")]
    lacking = {run for run in left if data.dataset(run.dataset).prepared and not data.is_available(run.dataset)}
    seconds = seconds_left([run for run in left if run not in lacking], records)
    tier = tiers(profile)
    last, unit = max(tier.values()), "GPU" if pick_device("auto").type == "cuda" else "core"
    for number in sorted(set(tier.values())):
        mine = {run for run in states if tier.get(run, last) == number}  # what no profile plans is last
        text = f"tier {number}: " if last > 1 else ""
        text += f"{len(mine.intersection(done))} of {len(mine)} runs done"
        if needed := sum(seconds.get(run, 0) for run in mine):
            hours = f"{needed / 3600:.1f} {unit}-hours" if needed >= 3600 else f"{duration(needed)} of one {unit}"
            text += f", about {hours} left at this machine's speed"
        if wanting := mine & lacking:
            titles = sorted({data.dataset(run.dataset).title for run in wanting})
            text += f", and {len(wanting)} that need your {', '.join(titles)}"
        if mine:
            yield text
