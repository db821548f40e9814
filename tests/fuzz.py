"""fuzz.py - bad input, by the thousand: whatever a user's files hold, the answer is one clear line.

    python tests/fuzz.py --minutes 10                   # all targets in turn, from a seed that it prints
    python tests/fuzz.py --target models --seed 1234    # that one case again, with its traceback

A *case* is a target and a seed. Valid files are copied, one of them is changed at random, and what reads such files
reads them, in this process: either it works, or it raises UserError (generate() also FloatingPointError) with one line,
in SECONDS and within MEMORY, and leaves nothing behind. Everything else is a *finding*, and is printed. Every
EVERY-th refused case also goes through the command line: exit status 2, one line on stderr, nothing left behind.
The cases run in a process of their own, which is ended and begun anew when one hangs.
"""
import argparse
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
from safetensors.torch import load, save
from small import SHAPES, adapted

import chat
import eval_front
import export
import train_base
import train_dpo
import train_hqd
import train_ppo
import train_reward
import train_sft
from data import check
from data.files import Message, Row
from data.offline import read_offline
from data.preferences import read_preferences
from data.prompts import read_demonstrations, read_prompts
from data.tokenizers import load_tokenizer, tokenize
from model import Config, Transformer, generate
from runs.directory import load_state, read_state_header, save_state, truncate_log
from runs.files import UserError
from runs.flags import cli, preferences_of
from svd_lora import load_adapter, save_adapter, set_preference, svd_lora_layers

try:
    import resource
except ImportError:         # Windows: no limit of memory there
    resource = None

SECONDS = 5                 # of this process's and its children's time; on the clock a busy machine gives it PATIENCE
PATIENCE = 120
MEMORY = 2 ** 30            # bytes that a case may take
LONGEST = 1100              # characters of a message
EVERY = 500
SCRIPTS = (train_base, train_dpo, train_hqd, train_ppo, train_reward, train_sft, eval_front, export,
           chat, check)

# ---------------------------------------------------------------------------------------------------------------------
# Valid files.

ASK, SAY = {"role": "user", "content": "How do I paint a door?"}, {"role": "assistant", "content": "Sand it first."}
NO, GPT = SAY | {"content": "No."}, {"from": "gpt", "value": "No."}
HH = "\n\nHuman: How do I paint a door?\n\nAssistant:"
RATED = [{"response": text, "annotations": {"kind": {"Rating": n}}} for text, n in (("Yes.", "5"), ("No.", "1"))]
SMALL = ("--device cpu --init base --data rows.jsonl --eval_data rows.jsonl --steps 1 --batch_size 2 --lams_per_step 1 "
         "--lora_dim 2 --max_length 24")                     # a training of a second, in the folder `runs`
RECORDS = [                 # one of every layout of data/layouts.py
    dict(prompt="Hi", response_0="Yes.", response_1="No.", better=dict(helpful=0, harmless=1)),
    dict(prompt="Hi", response_0="Yes.", response_1="No.", higher=dict(helpfulness=0), concise_response_id=1),
    dict(prompt="Hi", response_0="Yes.", response_1="No.", better_response_id=0, safer_response_id=1),
    dict(prompt="Hi", response="Yes.", helpfulness=4, correctness=2, coherence=4, complexity=1, verbosity=2),
    dict(prompt="Hi", response_1="Yes.", response_2="No.", preference_strength=-2),
    dict(context=[ASK], response1="Yes.", response2="No.", overall_preference=1),
    dict(instruction="Hi", completions=RATED), dict(history="Hi", human_ref_A="Yes.", human_ref_B="No.", labels=1),
    dict(conversation_a=[ASK, SAY], conversation_b=[ASK, NO], winner="model_b"),
    dict(input=dict(messages=[ASK]), preferred_output=[SAY], non_preferred_output=[NO]),
    dict(system="Be kind.", conversations=[{"from": "human", "value": "Hi"}], chosen=GPT, rejected=GPT),
    dict(instruction="Write", input="it.", history=[["Hi", "Yes?"]], chosen="Yes.", rejected="No."),
    dict(prompt=[ASK], chosen=[SAY], rejected=[NO]), dict(messages=[ASK], chosen="Yes.", rejected="No."),
    dict(chosen=HH + " Yes.", rejected=HH + " No."), dict(messages=[ASK, SAY]), dict(conversations=[ASK, SAY]),
    dict(instruction="Hi", output="Yes."), dict(prompt="Hi", completion="Yes."), dict(prompt=[ASK], response="Yes.")]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def small_model(family, seed=0):
    config = Config(61, 32, n_layer=2, n_head=4, d_model=32, eos_id=1, **SHAPES[family])
    return Transformer(config).init_weights(torch.Generator().manual_seed(seed))


def make_valid(folder):
    """Writes the valid files: a folder for each target that has some."""
    for i, record in enumerate(RECORDS):
        rows = [record | {key: value + " " * n for key, value in record.items() if key == "prompt" and value == "Hi"}
                for n in range(24)]                          # more than 20: one broken row alone does not stop a file
        for name, data in ((f"{i}.jsonl", lines(rows).encode()), (f"{i}.json", json.dumps(rows).encode()),
                           (f"{i}.jsonl.gz", gzip.compress(lines(rows).encode(), mtime=0))):
            write(folder / "rows" / name, data)
    story = " ".join(f"Word{n}" for n in range(30)) + "\n"
    write(folder / "rows" / "stories.txt", (story * 3).encode())
    for family in SHAPES:
        small_model(family).save_pretrained(folder / "models" / family, None if family == "gpt2" else 20_000)

    tokenizer_directory(folder / "tokenizers")
    for kind in ("jinja", "json"):                           # a template in a file of its own, or among the settings
        shutil.copytree(folder / "tokenizers", folder / "templates" / kind)
    write(folder / "templates" / "jinja" / "chat_template.jinja", TEMPLATE.encode())
    settings = json.loads((folder / "tokenizers" / "tokenizer_config.json").read_text())
    write(folder / "templates" / "json" / "tokenizer_config.json", json.dumps(
        settings | {"chat_template": [{"name": "default", "template": TEMPLATE}]}).encode())
    shutil.copy(ROOT / "data" / "toy.tiktoken", folder / "tokenizers" / "toy.tiktoken")

    model = adapted(small_model("llama"))
    save_adapter(model, folder / "adapters" / "adapter.safetensors", ["helpful", "harmless"], method="panacea",
                 lam=None, beta=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sum(p.sum() for _, p in trained).backward()
    optimizer.step()
    save_state(folder / "states" / "state.safetensors", trained, optimizer, step=3, member=0)
    write(folder / "states" / "metrics.jsonl", lines({"step": n, "member": 0, "loss": 0.5} for n in range(5)).encode())

    # a run on files: its base has the tokenizer's vocabulary
    run = folder / "runs"
    shutil.copytree(folder / "tokenizers", run / "base", ignore=shutil.ignore_patterns("*.tiktoken"))
    size = load_tokenizer(str(run / "base")).vocab_size
    Transformer(replace(small_model("llama").config, vocab_size=size)).init_weights(
        torch.Generator().manual_seed(0)).save_pretrained(run / "base")
    write(run / "rows.jsonl", lines(RECORDS[0] | {"prompt": f"Question {n}?"} for n in range(24)).encode())
    with chdir(run):
        train_dpo.main(cli(train_dpo.Flags, "", f"{SMALL} --out run".split()))


def tokenizer_directory(folder):
    """A small tokenizer of the `tokenizers` package with its files, as a model's directory has them."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    model.train_from_iterator([lines(RECORDS)], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    for name, value in {
            "tokenizer.json": json.loads(model.to_str()),
            "tokenizer_config.json": dict(bos_token="<s>", eos_token={"content": "<|im_end|>"}, add_bos_token=True),
            "special_tokens_map.json": dict(bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>"),
            "generation_config.json": dict(eos_token_id=[3, 1]),
            "config.json": dict(model_type="llama", bos_token_id=0, eos_token_id=[3, 1])}.items():
        write(folder / name, json.dumps(value).encode())


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Changes. All take a random.Random first.

DEEP, LONG = "\ue000deep\ue000", "\ue000long\ue000"          # stand for what is too large to be changed further
ODD = [None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e308, 2 ** 31, 2 ** 63, 2 ** 64, -2 ** 63, 10 ** 30, 10 ** 400,
       float("nan"), float("inf"), -float("inf"), "", " ", "\n", "\x00", "\ud800", "\udc00x", "é\u2028", "1", "NaN",
       "../../x", "{{ 1 / 0 }}", [], {}, [[]], [None], {"": None}, {"content": 3}, ["a", "b"], [0] * 100, DEEP, LONG]


def odd(rng, value):
    """Something else in the place of a JSON value."""
    near = [[value], {"x": value}, str(value)]
    if isinstance(value, (int, float)) and value == value and abs(value) < 1e9:
        near += [value + 1, value - 1, -value, value * 2, value * 1000, float(value), value == 0]
    return rng.choice(near if rng.random() < 0.3 else ODD)


def changed(rng, value):
    """A JSON value with one change somewhere in it."""
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:        # JSON in a text
        try:
            return as_json(rng, changed(rng, json.loads(value)))
        except ValueError:
            pass
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return odd(rng, value)
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    at, other = rng.randrange(len(pairs)), rng.randrange(len(pairs))
    (key, inner), kind = pairs[at], rng.randrange(10)
    if kind == 0:
        del pairs[at]
    elif kind == 1:
        pairs[at] = (odd(rng, key) if rng.random() < 0.5 else pairs[other][0], inner)
    elif kind == 2:
        pairs[at] = (key, pairs[other][1])
    elif kind == 3:
        pairs.insert(at, (odd(rng, key), inner))
    else:
        pairs[at] = (key, changed(rng, inner))
    return {str(k): v for k, v in pairs} if isinstance(value, dict) else [v for _, v in pairs]


def as_json(rng, value):
    """The text of a JSON value, with what stands for large things written out."""
    text, n = json.dumps(value, ensure_ascii=rng.random() < 0.8), rng.choice((50, 2000, 100_000))
    return text.replace(json.dumps(DEEP), "[" * n + "]" * n).replace(f'"{DEEP}"', "[" * n + "]" * n).replace(
        json.dumps(LONG)[1:-1], "x" * n).replace(LONG, "x" * n)


def changed_json(rng, data):
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = changed(rng, value)
    return as_json(rng, value).encode(errors="surrogatepass")


def changed_rows(rng, data):
    """One row in another way, or all in the same."""
    rows, seed = data.splitlines(), rng.random()
    for i in range(len(rows)) if rng.random() < 0.7 else [rng.randrange(len(rows))]:
        rows[i] = changed_json(random.Random(seed), rows[i])
    return b"\n".join(rows)


def changed_bytes(rng, data):
    """Any file, cut, with bytes of others, or twice."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    part = rng.choice((b"", b"\x00", b"\xff", b"\n", b"[", b"{", b'"', b"\\ud800", b"\xef\xbb\xbf", b"A" * 1000,
                       rng.randbytes(8), data[a:b]))
    return rng.choice((data[:a], data[a:], data[:a] + data[b:], data[:a] + part + data[a:], data[:b] + data[a:],
                       data[:a] + part + data[a + 1:], part, b"", data + part,
                       data.decode(errors="replace").encode("utf-16")))


def changed_tensors(rng, data):
    """A safetensors file: a sound one with other tensors or metadata, or one whose header does not fit."""
    n = struct.unpack("<Q", data[:8])[0]
    header, body, length = json.loads(data[8:8 + n]), data[8 + n:], None
    metadata, tensors = header.get("__metadata__", {}), load(data)
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensor, entry, kind = tensors[name], header[name], rng.randrange(12)
    if kind < 3 and metadata:
        key = rng.choice(list(metadata))
        text = str(changed(rng, metadata[key])).encode(errors="replace").decode()
        return save(tensors, metadata | {key if rng.random() < 0.9 else "x": text})
    if kind < 7:
        wrong = [tensor.to(dtype) for dtype in (torch.float64, torch.float16, torch.int32, torch.bool)]
        wrong += [tensor * x for x in (math.nan, math.inf, 1e38)] + [tensor[None], tensor.flatten(), torch.zeros(())]
        if tensor.ndim:
            wrong += [tensor[:0], tensor[:1], tensor.flip(0), tensor.movedim(0, -1)]
        key = rng.choice((name, name, name, other, name + "x", "", "blocks.9.attn.q.weight", "\n\x00é"))
        added = {key: rng.choice(wrong).contiguous()} if rng.random() < 0.8 else {}
        return save({each: x for each, x in tensors.items() if each != name} | added, metadata)
    if kind == 7:
        length = rng.choice((0, 1, n - 1, n + 1, len(data), 10 ** 8, 2 ** 40, 2 ** 63, 2 ** 64 - 1))
    elif kind == 8:
        entry["dtype"] = rng.choice(("F64", "I32", "U32", "U16", "BOOL", "F8_E4M3", "C64", "F4", "?"))
    elif kind == 9:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 10:
        body = body[:rng.randrange(len(body))] if rng.random() < 0.5 else body + bytes(rng.randrange(1, 9))
    else:
        header = changed(rng, header)
    text = as_json(rng, header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + body


PIECES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10 ** 9 }}", "{% if %}",
    "{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}", "{{ 2 ** (2 ** 40) }}", "{{ '%999999999d' % 1 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ range(10 ** 7) | list | length }}", "{{ a.b.c }}", "{{",
    "{{ raise_exception('\n\nno\n') }}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ none.x }}", "{{ tools[0] }}",
    "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ messages.append(1) }}", "{{ strftime_now(0) }}",
    "{{ messages | tojson }}", "{{ eos_token }}", "<|im_end|>", "\ufdd07\ufdd1", "\x00", "{{ ('a' * 50000) | tojson }}",
    "{% break %}", "{% generation %}x{% endgeneration %}", "{{ namespace(x=1).x }}", "{% set messages = [] %}"]


def changed_template(rng, data):
    text = data.decode()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice([i for i, c in enumerate(text) if c in "{<\n"] + [len(text)])
        text = text[:at] + rng.choice(PIECES) + text[at if rng.random() < 0.8 else at + 5:]
    return text.encode(errors="surrogatepass")


def changed_file(rng, name, data):
    """The content of a file of this name, changed."""
    if name.endswith(".gz") and rng.random() < 0.7:
        return gzip.compress(changed_file(rng, name.removesuffix(".gz"), gzip.decompress(data)), mtime=0)
    by_suffix = {".jsonl": changed_rows, ".json": changed_json, ".safetensors": changed_tensors,
                 ".jinja": changed_template}
    return by_suffix.get(Path(name).suffix if rng.random() < 0.8 else "", changed_bytes)(rng, data)


# ---------------------------------------------------------------------------------------------------------------------
# Targets: what reads a file. The rest of the folder that it lies in is as it should be.

PROMPTS = [Row("How do I paint a door?", ["Sand it."]), Row((Message(**ASK),), ["Sand it.", "No.</s>"]),
           Row((Message(**ASK), Message(**SAY), Message("user", "<|im_end|> \ud800 {{ x }}")), [" Yes."])]


def rows(rng, file):
    names = rng.choice((None, None, None, ["prompt=prompt", "helpful=better"], ["response_0=chosen", "x=labels"]))
    kind, data = rng.randrange(5), str(file)
    if kind == 0:
        read = read_preferences(data, fields=names)[0]
    elif kind == 1:
        read = read_prompts(data, 3, names)[0]
    elif kind == 2:
        read = read_demonstrations([data], names)[0]
    elif kind == 3:
        read = read_offline(data, 3, names)[0]
    else:
        check.main(check.Flags([data], fields=names, json=rng.random() < 0.5))
    if kind < 4:
        tokenize(read, load_tokenizer("toy"), 64)


def models(rng, file):
    quantize = rng.choice(("none", "none", "int8", "nf4"))
    model = Transformer.from_pretrained(file.parent, rng.choice((torch.float32, torch.bfloat16)), "cpu", quantize)
    new = min(3, model.config.context_length - 1)
    generate(model, [[1], [2, 3][:model.config.context_length - new]], new, generator=torch.Generator().manual_seed(0))


def tokenizers(rng, file):
    where = str(file if file.suffix == ".tiktoken" else file.parent)
    tokenizer = load_tokenizer(where, system=rng.choice((None, None, "Be kind.")))
    for row in tokenize(PROMPTS, tokenizer, 30)[0]:
        tokenizer.decode(row.prompt + row.responses[0])


def adapters(rng, file):
    model = small_model(*rng.choice([("llama",)] * 8 + [("llama", 1), ("gpt2",), ("qwen3",)]))
    if rng.random() < 0.2:
        adapted(model, k=rng.choice((4, 3)), m=rng.choice((2, 3)))
    dims = rng.choice((None, None, None, ["helpful", "harmless"], ["harmless", "helpful"], ["helpful"]))
    header = load_adapter(model, file, dims)
    set_preference(model, torch.tensor([0.25, 0.75]))
    generate(model, [[1, 2, 3]], 2, generator=torch.Generator().manual_seed(0))
    assert header["dims"] == (dims or header["dims"])


def states(rng, file):
    if file.suffix == ".jsonl":
        return truncate_log(file, lambda record: (record["member"], record["step"]) <= (0, 3))
    header = read_state_header(file)
    model = adapted(small_model("llama"))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in trained])
    load_state(file, trained, optimizer)
    sum(p.sum() for _, p in trained).backward()
    optimizer.step()
    assert header["member"] + header["step"] >= 0


def runs(rng, file):
    if rng.random() < 0.7:
        eval_front.main(eval_front.Flags(["run"], parts=1, device="cpu"))
    else:
        eval_front.show(Path("run"), train_dpo.Flags())


def preferences(rng, file):
    model = adapted(small_model("llama"), m=rng.choice((1, 2, 3)))
    m = next(iter(svd_lora_layers(model).values())).m
    off = rng.choice((0, 1e-6, 1e-3, -1e-4))
    words = rng.choices((0.0, 1.0, 0.5, 1 / 3, -0.1, 2.0, math.nan, math.inf, 1e308, 1e-320, "a=0.5", "b=0.5", "=1",
                         "λ", "a=", "1_0", "0x1", "٣", ""), k=rng.randrange(7))
    words = rng.choice((words, [1 / m + off] * m))
    lams = preferences_of(words, ["a", "b", "c"][:m])
    for lam in lams:
        set_preference(model, lam)


def arguments(rng, cls, without=()):
    """Some flags of a script with odd values."""
    argv = []
    for f in rng.choices([f for f in fields(cls) if f.name not in without], k=rng.randrange(1, 4)):
        values = [str(rng.choice(ODD)).replace("\0", "")[:500] for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        argv += [*([] if f.metadata["positional"] else ["--" + f.name]), *values]
    return [x.encode(errors="replace").decode() for x in argv]


def flags(rng, file):
    script = rng.choice(SCRIPTS)
    cli(script.Flags, "", arguments(rng, script.Flags))


def trainings(rng, file):
    argv = arguments(rng, train_dpo.Flags, ("out", "steps", "epochs"))         # those may ask for a long training
    train_dpo.main(cli(train_dpo.Flags, "", [*SMALL.split(), "--no-eval", "--out", "out", *argv]))


CHECK, TRAIN = "-m data.check ROWS --init {folder}", (
    "train_dpo.py --init {folder} --tokenizer toy --data ROWS --eval_data ROWS --steps 1 --batch_size 2 --no-eval "
    "--device cpu --out out")
# {target: (what reads, the folder of valid files, those that are changed, share of the cases, the command line)}
TARGETS = {"rows": (rows, "rows", "*", 8, "-m data.check {file}"),
           "models": (models, "models", "*/*", 4, TRAIN), "configs": (models, "models", "*/config.json", 2, TRAIN),
           "tokenizers": (tokenizers, "tokenizers", "*", 4, CHECK),
           "templates": (tokenizers, "templates", "*/*t*_[ct]*", 0.3, CHECK),
           "adapters": (adapters, "adapters", "*", 5, None), "states": (states, "states", "*", 3, None),
           "runs": (runs, "runs", "run/*", 0.3, "eval_front.py run --parts 1 --device cpu"),
           "trainings": (trainings, "runs", None, 0.5, None), "preferences": (preferences, None, None, 2, None),
           "flags": (flags, None, None, 2, None)}


# ---------------------------------------------------------------------------------------------------------------------
# A case, and what comes of it.

def listing(folder):
    return sorted((str(f.relative_to(folder)), f.stat().st_size) for f in folder.rglob("*") if f.is_file())


def outcome(read, rng, file, folder):
    """What comes of read(rng, file) in this folder: "works", "refused" or the kind of a finding, and the message. (A
    training that diverges leaves its run.)"""
    before, said, place = listing(folder), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            read(rng, file)
        return "works", ""
    except (UserError, FloatingPointError, SystemExit) as e:
        message = f"error: {e}" if not isinstance(e, SystemExit) else said.getvalue().strip()
        if isinstance(e, SystemExit) and e.code != 2:
            return ("works", "") if e.code == 0 else (f"exit status {e.code}", message)
        if not message.isprintable() or len(message) > LONGEST:
            return "more than a line", message[:2 * LONGEST]
        left = [name for name, _ in set(listing(folder)) ^ set(before) if read is not trainings or ".tmp" in name]
        return ("leaves something behind", f"{message}: {left}") if left else ("refused", message)
    except Exception as e:
        own = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(str(ROOT))][-1]
        return f"{type(e).__name__} in {Path(own.filename).name}: {own.name}", traceback.format_exc()
    finally:
        os.chdir(place)


def case(target, seed, valid, folder):
    """Makes `folder` with the files of a case, and reads them. Returns the changed file, and what outcome returns."""
    rng, (read, source, pattern, *_), file = random.Random(f"{target} {seed}"), TARGETS[target], folder
    shutil.copytree(valid / source, folder) if source else folder.mkdir()
    if pattern:
        file = rng.choice(sorted(f for f in folder.glob(pattern) if f.is_file()))
        file.write_bytes(changed_file(rng, file.name, file.read_bytes()))
    return file, *outcome(read, rng, file, folder)


def by_command(target, file, valid, folder):
    """The same files by the command line, which may find them good. Returns a finding, or None."""
    argv, before = TARGETS[target][4], listing(folder)
    argv = argv.format(file=file, folder=file.parent).replace("ROWS", str(valid / "runs" / "rows.jsonl")).split()
    argv = [str(ROOT / word) if word.endswith(".py") else word for word in argv]
    try:
        done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    if done.returncode != 2 or done.stderr.count("\n") != 1 or not done.stderr.startswith("error: "):
        return f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return None if listing(folder) == before else "leaves something behind"


def work(pipe, valid):
    """The process of the cases: (target, seed, folder) -> (file, kind, message, seconds of this process)."""
    if resource and Path("/proc/self/statm").exists():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    while True:
        target, seed, folder = pipe.recv()
        before = sum(os.times()[:4])
        pipe.send((*case(target, seed, valid, folder), sum(os.times()[:4]) - before))


def fuzz(minutes, seed, targets, valid):
    """Runs cases for so long. Returns {kind of finding: [(target, seed, message), …]}, and what came of how many."""
    context, order, end = multiprocessing.get_context("spawn"), random.Random(seed), time.monotonic() + 60 * minutes
    findings, counts, process, refused = {}, Counter(), None, 0
    while time.monotonic() < end:
        target = order.choices(targets, [TARGETS[name][3] for name in targets])[0]
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, valid), daemon=True)
            process.start()
            theirs.close()
        folder = valid.parent / f"case-{target}-{seed}"
        file, kind, message, seconds = folder, "hangs", "", 0
        try:
            pipe.send((target, seed, folder))
            if pipe.poll(PATIENCE):
                file, kind, message, seconds = pipe.recv()
        except (EOFError, OSError):
            kind = "dies"
        if kind in ("hangs", "dies"):
            process.kill()
            process = None
        if seconds > SECONDS:
            kind, message = f"takes more than {SECONDS} s", f"{seconds:.1f} s; {kind}: {message}"
        if kind == "refused" and TARGETS[target][4]:
            refused += 1
            if refused % EVERY == 0 and (found := by_command(target, file, valid, folder)):
                kind, message = "by the command line", found
        counts[target, kind if kind in ("works", "refused") else "findings"] += 1
        if kind not in ("works", "refused"):
            findings.setdefault(kind, []).append((target, seed, message))
            if len(findings[kind]) <= 2:
                print(f"FINDING {kind}: --target {target} --seed {seed}: {message}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        seed += 1
    if process:
        process.kill()
    return findings, counts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="how long; without it one case, which --target and --seed name")
    parser.add_argument("--seed", type=int, default=None, help="of the first case (default: of the clock)")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    flags = parser.parse_args(argv)
    seed = int(time.time()) * 1000 if flags.seed is None else flags.seed
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder) / "valid"
        with redirect_stdout(io.StringIO()):
            make_valid(valid)
        if not flags.minutes:
            print(*case(flags.target[0], seed, valid, Path(folder) / "case"), sep="\n")
            return
        print(f"seed {seed}", flush=True)
        findings, counts = fuzz(flags.minutes, seed, flags.target, valid)
    for target in flags.target:
        print(f"{target}: " + ", ".join(f"{n} {kind}" for (name, kind), n in sorted(counts.items()) if name == target))
    for kind, found in sorted(findings.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(found):5d}  {kind}  (--target {found[0][0]} --seed {found[0][1]})")
    print(f"{counts.total()} cases, {sum(map(len, findings.values()))} findings of {len(findings)} kinds")
    return len(findings)


if __name__ == "__main__":
    sys.exit(bool(main()))
