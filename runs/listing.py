"""listing.py - the runs under a folder: what each is, how far it got, and what came out of it."""
import time
from pathlib import Path

from runs.directory import read_state_header
from runs.files import read_json

# the keys of a record
RECORD = ("run", "script", "method", "dims", "steps", "step", "finished", "measure", "result", "written")


def runs_under(folder):
    """A dict of RECORD for every run directory in a folder or below, the last written first. step: where a training
    that has not ended would go on; measure, result: None without an evaluation; written: seconds since 1970."""
    records = []
    for file in Path(folder).rglob("config.json"):
        config, run = read_json(file), file.parent
        if "script" not in config:                                     # a model's
            continue
        finished = (run / ("reward.json" if config["script"] == "train_reward.py" else "timing.json")).exists()
        steps, kept = config["flags"]["steps"], read_state_header(run / "state.safetensors")
        values = (str(run), config["script"], config.get("method"), config["dims"], steps,
                  steps if finished else kept["step"] if kept else 0, finished, *outcome(run),
                  max(int(f.stat().st_mtime) for f in run.iterdir()))
        records.append(dict(zip(RECORD, values)))
    return sorted(records, key=lambda record: (-record["written"], record["run"]))


def outcome(run):
    """(what was measured, its number): the regret; where there is none the mean of λ·points over all preferences; of a
    reward model the mean accuracy. (None, None) where nothing was."""
    if (run / "front.json").exists():
        r = read_json(run / "front.json")
        return ("regret", r["regret"]) if r["regret"] is not None else (f"λ · {r['points_are']}", r["inner_product"])
    accuracy = read_json(run / "reward.json").get("accuracy") if (run / "reward.json").exists() else None
    return ("held-out accuracy", sum(accuracy) / len(accuracy)) if accuracy else (None, None)


def age(written):
    """How long ago, in the largest unit of which it is two."""
    minutes = max(0, time.time() - written) / 60
    return next(f"{minutes / size:.0f} {unit}" for size, unit in ((1440, "d"), (60, "h"), (1, "min"))
                if minutes >= 2 * size or size == 1)
