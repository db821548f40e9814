"""log.py - metrics.jsonl, one JSON object a step; a progress bar; and one line a step that grep can read."""
import json
import time
from pathlib import Path

from tqdm import tqdm

from runs.files import write_whole
from runs.processes import ranks


class Log:
    """Appends one JSON object a step to metrics.jsonl and prints it as a line every `every` steps, above the bar."""

    def __init__(self, path, steps, first_step=0, every=1, desc=""):
        self.path, self.every, self.started, self.steps = Path(path), every, time.time(), steps
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.silent = ranks()[0] > 0
        self.bar = tqdm(total=steps, initial=first_step, desc=desc, disable=self.silent or None, dynamic_ncols=True)

    def step(self, record, line):
        """record: {"step": …, …} for the file; line: the same for people."""
        if self.silent:
            return
        with self.path.open("a") as f:
            f.write(json.dumps(record) + "\n")
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            self.bar.write(line)
        self.bar.update()

    def close(self):
        """Ends the bar; returns the seconds since the log was opened."""
        self.bar.close()
        return time.time() - self.started


def truncate_log(path, keep):
    """Drops the records of metrics.jsonl for which keep(record) is false, and a last line that was cut short."""
    lines = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            if keep(json.loads(line)):
                lines.append(line)
        except json.JSONDecodeError:
            break                                           # the line that was being written when the run was killed
    write_whole(path, lambda f: Path(f).write_text("".join(line + "\n" for line in lines)))
