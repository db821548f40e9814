"""own_rewards.py - rewards of the user's own, file.py:function behind --rewards. The file is run: it is code.

    def polite(prompt, response): …             # one text -> a number, larger is better
    def polite(prompts, responses): …           # many texts -> as many numbers: where a model wants batches

The names of the parameters tell which it is. Of a prompt that is turns it gets the last user's text.
"""
import importlib.util
import inspect
import math
import sys
from pathlib import Path

import torch

from data.chat import question
from runs.files import UserError, bar


def is_own(name):
    """Whether a name of --rewards is file.py:function."""
    return name.rpartition(":")[0].endswith(".py")


def own_reward(name):
    """file.py:function -> a function (prompts, responses), R each -> (R, 1) float64. Raises UserError where there is no
    such function; and what it returns does, where an answer is no number."""
    file, _, called = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"--rewards {name}: {file} does not exist")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))               # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--rewards {name}: the file fails: {_told(error)}") from None
    finally:
        sys.path.pop(0)
    function = getattr(module, called, None)
    takes = list(inspect.signature(function).parameters) if callable(function) else []
    if takes not in (["prompt", "response"], ["prompts", "responses"]):
        raise UserError(f"--rewards {name}: {file} must define {called}(prompt, response), or {called}(prompts, "
                        f"responses) for lists")

    def answers(prompts, responses):
        if not responses:
            return []
        if takes == ["prompt", "response"]:
            pairs = bar(zip(prompts, responses, strict=True), called, len(responses))
            return [_asked(name, function, x, y, y) for x, y in pairs]
        values = _asked(name, function, prompts, responses, responses[0])
        if not hasattr(values, "__len__") or len(values) != len(responses):
            got = len(values) if hasattr(values, "__len__") else type(values).__name__
            raise UserError(f"--rewards {name}: {got} for {len(responses)} responses, of which the first is "
                            f"{_short(responses[0])}")
        return values

    def rewards(prompts, responses):
        values = answers([question(x) for x in prompts], list(responses))
        return torch.tensor([[_number(name, value, y)] for value, y in zip(values, responses)],
                            dtype=torch.float64).reshape(-1, 1)
    return rewards


def _asked(name, function, prompt, response, text):
    try:
        return function(prompt, response)
    except Exception as error:
        raise UserError(f"--rewards {name}: it fails at the response {_short(text)}: {_told(error)}") from None


def _number(name, value, text):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--rewards {name}: {value!r} for the response {_short(text)}; a reward is a finite number")
    return number


def _short(text):
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _told(error):
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
