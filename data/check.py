"""check.py - what is understood of preference files, before anything is trained on them.

    python -m data.check train.jsonl --eval_data test.jsonl --init DIR     # lengths in the tokens of DIR
    python -m data.check helpful=helpful.jsonl.gz harmless=harmless.jsonl.gz
    python -m data.check a.parquet --fields prompt=question response_0=a response_1=b helpful=label
    python -m data.check train.jsonl --json                                # every pair as one line of JSON

Without --init lengths are in tokens of the embedded world's small tokenizer, several times as many as a usual one's.
"""
import json
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import combinations

from data.files import Row, as_json
from data.preferences import read_compared
from data.tokenizers import load_tokenizer, tokenize
from runs.files import UserError
from runs.flags import flag, run_main

UNCUT = 10 ** 9
SHOWN = 400             # characters of a text, from its beginning and from its end


@dataclass
class Flags:
    """The command's flags, with defaults and --help texts."""

    files: list[str] = flag([], "preference files, or dimension=file", positional=True)
    eval_data: list[str] | None = flag(None, "those of the evaluation")
    init: str | None = flag(None, "directory of the model's tokenizer")
    template: str | None = flag(None, "as the training scripts' flag")
    system: str | None = flag(None, "as the training scripts' flag")
    fields: list[str] | None = flag(None, "as the training scripts' flag: prompt=question response_0=a …")
    dims: list[str] | None = flag(None, "these dimensions alone")
    max_length: int = flag(512, "tokens of prompt and response together", 2)
    json: bool = flag(False, "one line a pair instead: messages (or prompt, where it is a text), responses, better")


def main(flags):
    """Prints what was understood."""
    parts = {"training": flags.files, "evaluation": flags.eval_data or []}
    with redirect_stdout(sys.stderr if flags.json else sys.stdout):
        files = {part: {path: read_compared(path, flags.fields) for path in paths} for part, paths in parts.items()}
    examples = {part: [x for file in read.values() for x in file.examples] for part, read in files.items()}
    if flags.json:
        for example in examples["training"] + examples["evaluation"]:
            print("\n".join(map(json.dumps, pairs_of(example, flags.dims))))
        return
    tokenizer = load_tokenizer(flags.init or "toy", flags.template, flags.system)
    for part, read in files.items():
        for path, file in read.items():
            layouts = Counter(x.layout for x in file.examples)
            print(f"{path}: {part}, {file.rows} rows, {sum(file.left_out.values())} left out; read as "
                  + ", ".join(f"{layout} ({n})" for layout, n in layouts.items()))
        if examples[part]:
            print("\n".join(about(examples[part], flags.dims)))
            print("\n".join(lengths(examples[part], tokenizer, flags.max_length)))
    seen = {x.prompt for x in examples["training"]}
    if flags.eval_data:
        prompts = dict.fromkeys(x.prompt for x in examples["evaluation"])
        print(f"evaluation: {sum(x in seen for x in prompts)} of its {len(prompts)} prompts are among the training's")
    n = len(examples["training"])
    for i in sorted({0, n // 2, n - 1} if n else ()):
        print("\n".join(as_read(examples["training"][i], tokenizer, flags.max_length)))


def labels_of(examples, dims):
    """The labels {dimension: 0 or 1} of every pair that has one, of these dimensions (None: all). Raises UserError for
    a dimension without labels."""
    pairs = [labels for example in examples for _, labels in example.compared() if labels]
    found = dict.fromkeys(dim for labels in pairs for dim in labels)
    if missing := [dim for dim in dims or () if dim not in found]:
        raise UserError(f"--dims: no labels for {', '.join(missing)}; found are {', '.join(found) or 'none'}")
    return [{dim: label for dim, label in labels.items() if dim in (dims or found)} for labels in pairs]


def about(examples, dims):
    """Lines on labels, conflicts and duplicates."""
    pairs = labels_of(examples, dims)
    found = list(dict.fromkeys(dim for labels in pairs for dim in labels))
    of = {dim: [x[dim] for x in pairs if dim in x] for dim in found}
    for dim, labels in of.items():
        few = 10 * len(labels) < max(map(len, of.values()))
        yield (f"  {dim}: {len(labels)} labels; the second response is better in {sum(labels) / len(labels):.1%}"
               + "; give it a name, as helpful=FILE" * (dim == "*") + "; so few: is the name a slip?" * few)
    for a, b in combinations(found, 2):
        both = [x[a] != x[b] for x in pairs if a in x and b in x]
        if both:
            yield f"  {a} and {b}: {len(both)} pairs have both labels; {sum(both) / len(both):.1%} of them conflict"
    rows, prompts = {(x.prompt, *sorted(x.responses)) for x in examples}, {x.prompt for x in examples}
    yield f"  {len(examples) - len(rows)} rows are there a second time; {len(prompts)} different prompts"


def lengths(examples, tokenizer, max_length):
    """Lines on lengths in tokens, and on what max_length cuts."""
    rows = [Row(x.prompt, x.responses) for x in examples]
    whole, (_, cut) = tokenize(rows, tokenizer, UNCUT)[0], tokenize(rows, tokenizer, max_length)
    tokens = {"prompts": [len(x.prompt) for x in whole], "responses": [len(y) for x in whole for y in x.responses]}
    yield f"  tokens of {tokenizer.name}, template {tokenizer.template.name}: " + "; ".join(
        f"{what} {sorted(n)[len(n) // 2]} in the middle, {sorted(n)[len(n) * 95 // 100]} at 95 %, {max(n)} the longest"
        for what, n in tokens.items())
    yield ("  --max_length {}: {prompts_cut} of {prompts} prompts and {responses_cut} of {responses} responses are cut"
           .format(max_length, **cut))


def as_read(example, tokenizer, max_length):
    """Lines with an example as the model reads it: its tokens, decoded, special ones spelled out."""
    (row,), _ = tokenize([Row(example.prompt, example.responses)], tokenizer, max_length)
    yield f"{example.where}, as the model reads it; the better response is, for " + ", ".join(
        f"{dim}: {pair[label]}" for pair, labels in example.compared() for dim, label in labels.items())
    for name, ids in (("prompt", row.prompt), *enumerate(row.responses)):
        text = tokenizer.decode(ids)
        if len(text) > 2 * SHOWN:
            text = f"{text[:SHOWN]} [… {len(text) - 2 * SHOWN} characters …] {text[-SHOWN:]}"
        yield f"  {name}: {json.dumps(text, ensure_ascii=False)}"


def pairs_of(example, dims):
    """The pairs of an example that have a label, as objects for --json; without any label, its first pair."""
    prompt = {"prompt" if isinstance(example.prompt, str) else "messages": as_json(example.prompt)}
    every = [(pair, {d: x for d, x in labels.items() if not dims or d in dims}) for pair, labels in example.compared()]
    for (a, b), labels in [x for x in every if x[1]] or every[:1]:
        yield prompt | {"responses": [example.responses[a], example.responses[b]], "better": labels}


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
