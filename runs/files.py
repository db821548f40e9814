"""files.py - the ground floor: errors that a user reads, and files that are written whole or not at all."""
import json
import os
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """Bad input. Its message is one line: what is wrong, where, and what to do; scripts print it and exit with 2."""


def write_whole(path, write):
    """Calls write(temporary path), then renames it to `path`: a killed run leaves the old file or the new one.
    Of several processes the first one alone writes."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)                          # safetensors writes 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_whole(path, lambda f: Path(f).write_text(text + "\n"))


def write_jsonl(path, records):
    """Writes records as JSONL, one a line, whole or not at all."""
    write_whole(path, lambda f: Path(f).write_text("".join(json.dumps(record) + "\n" for record in records)))


def read_json(path):
    """Reads a JSON file. Raises UserError where there is none or it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
