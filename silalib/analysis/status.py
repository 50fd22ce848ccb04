"""What `python -m silalib status` prints: the answer, what is done, what failed and why, how long the rest takes."""

import json
from collections import Counter
from contextlib import suppress
from itertools import chain

from .. import __version__, data
from ..errors import UserError
from ..experiments import PROFILES, tiers
from ..files import EVIDENCE, ROOT, results_folder, sha256, to_json, write_atomically
from ..records import damage, failure, find, load, state

LABELS = ("done", "running", "started", "pending", "failed", "damaged")


def recall():
    """{"lines", "markdown", "picture" (SVG)} from results/answer.json while the records are those that it was made of;
    else made anew, and kept there. A results folder without such records has the answer that came with the code."""
    folder = own = results_folder("*").parent
    if not any(path for profile in PROFILES[1:] for path in folder.glob(f"{profile}/runs/*/result.json")):
        folder = EVIDENCE if EVIDENCE.exists() else ROOT / "results"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((folder / "answer.json").read_bytes())
        texts = [*kept["lines"], kept["markdown"], kept["picture"], kept["key"]]
        if all(isinstance(text, str) for text in texts) and (folder != own or kept["key"] == key()):
            return kept
    from . import answer  # which imports what takes a second

    made = keep(answer.answer(answer.collect()))
    with suppress(OSError, UserError):  # a folder that cannot be written
        write_atomically(folder / "answer.json", to_json(made))
    return made


def keep(whole):
    """What results/answer.json holds of an `answer.Answer`."""
    from .answer import in_lines, in_markdown, picture

    return {"key": key(), "lines": in_lines(whole), "markdown": in_markdown(whole), "picture": picture(whole)}


def key():
    """A checksum of the records that the answer is made of, by their seals and the sizes of their files."""
    root = results_folder("*").parent
    names = ("result.sha256", "result.json", "history.csv", "noise.csv", "failed.json")
    found = [path for p in PROFILES[1:] for name in names for path in sorted(root.glob(f"{p}/runs/*/{name}"))]
    told = [f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in found]
    seals = b"".join(path.read_bytes() for path in found if path.suffix == ".sha256")
    return sha256("\n".join([__version__, *told]).encode() + seals)


def summary():
    """The lines for all profiles: the answer, and how many records each has."""
    yield from recall()["lines"]
    also = f", and what came with the package in {EVIDENCE}" if EVIDENCE.exists() else ""
    yield f"Records in {results_folder('*').parent}{also}:"
    for profile in PROFILES:
        runs = tiers(profile)
        yield f"  {profile:6} {sum(find(run) is not None for run in runs)} of {len(runs)} runs"
    yield "python -m silalib status --profile PROFILE tells more"


def lines(profile, seeds, grids):
    """The lines for a profile. seeds: those asked for, or None; grids: exhibit -> its runs."""
    from ..launch.estimate import hours, seconds_left
    from . import claims, tables

    states = {run: state(run, profile) for run in dict.fromkeys(chain(*grids.values()))}
    judged = claims.judge(profile, seeds)
    yield f"profile {profile}; {claims.score(judged)}"
    if profile != "quick":
        yield from (f"  {claim.name}. {claim.claim}: {claim.said}" for claim in judged)
        yield from (f"  {line}" for claim in judged for line in claims.what_decides(claim))
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
    last = max(tier.values())
    for number in sorted(set(tier.values())):
        mine = {run for run in states if tier.get(run, last) == number}  # what no profile plans is last
        needed, lack = sum(seconds.get(run, 0) for run in mine), mine & lacking
        titles = ", ".join(sorted({data.dataset(run.dataset).title for run in lack}))
        text = [f"tier {number}: " * (last > 1) + f"{len(mine.intersection(done))} of {len(mine)} runs done"]
        text += [f"about {hours(needed)} left at this machine's speed"] if needed else []
        text += [f"and {len(lack)} that need your {titles}"] if lack else []
        if mine:
            yield ", ".join(text)
