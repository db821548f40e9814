"""tokenizers.py - text to token ids and back, and rows of text to rows of tokens that fit the context.

Three sources, one small wrapper: ranks files in tiktoken's format (`toy.tiktoken` of the embedded world, or the user's
own), GPT-2 through tiktoken, and `tokenizer.json` of a Hugging Face directory.
ids: token ids   BOS, EOS: the special tokens that begin a text and end a response (EOS always exists, BOS need not)
row: one prompt, its responses and their labels (data.files.Row); a prompt of turns is written by a template (data.chat)
"""
import base64
import json
import os
import re
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Callable

import tiktoken

from data.chat import Template, find_template, shown, spelled, tried, write
from runs.files import UserError, bar, read_json

# GPT-2's split into words, numbers, punctuation and spaces, before the byte pairs are merged. The toy BPE uses it too.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
EOS = "<|endoftext|>"  # of the tiktoken files
# BOS and EOS of a Hugging Face directory that does not name them: the first of these that its vocabulary has.
USUAL = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>")}


@dataclass(frozen=True)
class Tokenizer:
    """encode(text) -> ids: never BOS, EOS or another special token, even where the text spells one. decode(ids) ->
    text: special ids are spelled out. encode_marked: encode for what a template wrote, whose special tokens are ids.
    `prefix_space`: encode puts one more space in front (as SentencePiece)."""
    name: str  # what load_tokenizer was given
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int  # all ids are smaller
    eos_id: int  # what training appends to a response
    bos_id: int | None = None
    prefix_space: bool = False
    more_ends: tuple[int, ...] = ()  # other tokens that end a response when the model says them
    template: Template = Template()
    encode_marked: Callable[[str], list[int]] | None = None

    @property
    def ends(self):
        """All tokens that end a response, EOS first."""
        return (self.eos_id, *self.more_ends)


@dataclass(frozen=True)
class TokenRow:
    """prompt: ids, at least one. responses: ids, each ends in EOS unless it was cut. pairs, better: as in the Row. Its
    lists never change: data.trees.tree_of remembers, by the row's identity, what it made of them."""
    __hash__ = object.__hash__
    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    better: list[list[int]] = field(default_factory=list)


def load_tokenizer(where, template=None, system=None, eos_id=None, day=None):
    """-> Tokenizer. `where`: "toy", "gpt2", a `*.tiktoken` ranks file (text is split by PATTERN), or a Hugging Face
    directory. template, system, eos_id: the flags of these names; with eos_id no other token ends a response. day: what
    chat templates read, None: today. Raises UserError where it is none of these, or cannot be read."""
    choice, end = (template or "auto", system), {} if eos_id is None else {"eos_id": eos_id, "more_ends": ()}
    if encoding := encoding_of(where):
        tokenizer = _from_tiktoken(str(where), encoding, choice)
    elif os.path.isfile(Path(where) / "tokenizer.json"):  # pathlib's raises where a name is too long
        tokenizer = _from_huggingface(str(where), Path(where), choice)
    else:
        raise UserError(f'tokenizer "{where}": no such tokenizer; give "toy", "gpt2", a *.tiktoken ranks file, or a '
                        f'directory that holds tokenizer.json')
    return on_day(replace(tokenizer, **end), day or str(date.today()))


def on_day(tokenizer, day):
    """The tokenizer with a chat template that reads this day, like "2024-07-26"."""
    return replace(tokenizer, template=replace(tokenizer.template, day=day, known={}))


def encoding_of(where):
    """tiktoken's Encoding for "toy", "gpt2" or a `*.tiktoken` ranks file, None for anything else. Raises UserError
    where it cannot be read."""
    if where == "toy":
        return _from_ranks("toy", Path(__file__).with_name("toy.tiktoken"))
    if where == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # offline and not cached: several packages' errors, no common base
            raise UserError(f'tokenizer "gpt2": its ranks are not in tiktoken\'s cache and could not be downloaded '
                            f'({type(error).__name__}); go online once, or give a gpt2.tiktoken file, a Hugging Face '
                            f'directory with tokenizer.json, or "toy"') from None
    return _from_ranks(str(where), Path(where)) if Path(where).suffix == ".tiktoken" else None


def tokenizer_of(config):
    """The Tokenizer that a run was trained with. config: config.json of its directory."""
    flags = (config["flags"].get(key) for key in ("template", "system", "eos_id"))
    return load_tokenizer(config["tokenizer"], *flags, config.get("day"))


def as_begun(tokenizer, out, overwrite):
    """A training's tokenizer, on the day that the run in its directory `out` began where that goes on."""
    there = not overwrite and os.path.isfile(out / "config.json")
    return on_day(tokenizer, there and read_json(out / "config.json").get("day") or tokenizer.template.day)


def tokenize(rows, tokenizer, max_length, max_prompt=None):
    """rows: list[Row] (data.files) -> (list[TokenRow], counts), in order.

    prompt   = BOS (where there is one) + encoded prompt; of turns what a chat template writes, with its own special
               tokens alone. An empty one is one EOS, so that the first response token has something to condition on.
    response = encoded response + one EOS; no EOS can come from text. To turns it begins with the white space that the
               template has in front of an answer, and no other.
    Prompt and response together take at most `max_length` tokens:
      1. the prompt is cut to its last `max_prompt` tokens, if that is given (BOS is kept);
      2. each response is cut to the first tokens that the prompt leaves room for, at least half of `max_length`. A cut
         response gets no EOS: it did not end there, and EOS would teach the model to stop in mid-sentence;
      3. the prompt is cut to the last tokens that the longest response of its row leaves room for (BOS is kept).
    counts: dict of prompts, responses (how many there are), prompts_cut, responses_cut.
    """
    assert max_length >= 2 and (max_prompt is None or max_prompt >= 1), (max_length, max_prompt)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    token_rows, prompts_cut, responses_cut = [], 0, 0
    written = zip(rows, write(tokenizer.template, [row.prompt for row in rows]))
    for row, (text, marked, before) in bar(written, "tokens", len(rows)):
        prompt = (tokenizer.encode_marked(text) if marked else bos + _encode(tokenizer, text)) or [tokenizer.eos_id]
        full_prompt = len(prompt)
        prompt = _cut_left(prompt, max_prompt or full_prompt, bos)
        room = max(max_length // 2, max_length - len(prompt))
        texts = row.responses if before is None else [before + text.lstrip(before) for text in row.responses]
        full = [_encode(tokenizer, text, True, marked) + [tokenizer.eos_id] for text in texts]
        responses = [ids[:room] for ids in full]  # EOS is the last id, so a cut loses it
        prompt = _cut_left(prompt, max_length - max(map(len, responses), default=0), bos)
        prompts_cut += len(prompt) < full_prompt
        responses_cut += sum(len(ids) > room for ids in full)
        token_rows.append(TokenRow(prompt, responses, row.pairs, row.better))
    return token_rows, dict(prompts=len(rows), responses=sum(len(row.responses) for row in rows),
                            prompts_cut=prompts_cut, responses_cut=responses_cut)


def spoken(responses, tokenizer):
    """Sampled token lists -> (their texts without EOS, list[bool]: whether each ended in EOS or another end)."""
    finished = [y[-1] in tokenizer.ends for y in responses]
    return [tokenizer.decode(y[:-1] if end else y) for y, end in zip(responses, finished)], finished


def _encode(tokenizer, text, continues=False, marked=False):
    """ids of text. continues: it follows a prompt, so the space that SentencePiece adds replaces its first one. marked:
    a template wrote that prompt, so there is no space where the text begins with none. Raises UserError for EOS."""
    if continues and tokenizer.prefix_space and text.startswith(" "):
        text = text[1:]
    elif marked and tokenizer.prefix_space:
        return _encode(tokenizer, "\n" + text)[len(tokenizer.encode("\n")):]
    ids = tokenizer.encode(text)
    if tokenizer.eos_id in ids:
        raise UserError(f"token {tokenizer.eos_id} ends a response, and this text has it inside: {text[:80]!r}; give "
                        f"another --eos_id")
    return ids


def _cut_left(prompt, length, bos):
    """The last `length` ids of the prompt, the first of them replaced by BOS where it begins with that."""
    if len(prompt) <= length:
        return prompt
    begin = prompt[:1] if prompt[:1] == bos else []
    return begin + prompt[len(prompt) - length + len(begin):]


def _from_ranks(name, path):
    """A file of lines "base64(token bytes) rank", ranks 0, 1, 2, … and every single byte among the tokens."""
    try:  # read here, not by tiktoken's loader: that caches by path, and would not see that a file has changed
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise UserError(f"tokenizer {path}: not a tiktoken ranks file; each line must be: base64-token rank") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"tokenizer {path}: the ranks must be 0, 1, 2, …, each once, and all 256 single bytes among "
                        f"the tokens; train or copy the file anew")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOS: len(ranks)})


def _from_tiktoken(name, encoding, choice):
    tokenizer = Tokenizer(name, encode=encoding.encode_ordinary, decode=encoding.decode,  # ordinary: no special tokens
                          vocab_size=encoding.n_vocab, eos_id=encoding.eot_token)
    control = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    template = find_template(choice[0], None, choice[1])
    template.tokens["eos_token"] = encoding.decode([encoding.eot_token])
    return _templated(tokenizer, template, tried(template), control, partial(encoding.encode, allowed_special="all"))


def _from_huggingface(name, path, choice):
    """tokenizer.json through the `tokenizers` package; BOS and EOS from the JSON files beside it, or the usual ones."""
    import tokenizers  # only here: the embedded world does without
    try:
        model = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the package raises bare Exceptions
        raise UserError(f"tokenizer {path / 'tokenizer.json'}: cannot be read ({error})") from None
    model.no_truncation()  # a saved setting would cut silently; tokenize() cuts and counts
    model.no_padding()
    bos, eos = (_special_id(model, path, kind) for kind in ("bos", "eos"))
    if eos is None:
        raise UserError(f"tokenizer {path}: no EOS token found; name eos_token in its tokenizer_config.json")
    if bos == eos:  # GPT-2's one special token: it ends texts, so it must not begin prompts
        bos = None
    named = {token: model.id_to_token(number) for token, number in (("bos_token", bos), ("eos_token", eos))
             if number is not None}
    template, ends = find_template(choice[0], path, choice[1]), [eos, *_stops(path)]
    template.tokens.update(named | template.tokens)
    trial = tried(template)
    # special tokens: those that say so, what ends a response, and what the template writes around a question
    control = {token.content: number for number, token in model.get_added_tokens_decoder().items()
               if token.special or number in ends or token.content.strip() and token.content in trial[0]}
    control |= {token: model.token_to_id(token) for token in named.values()}
    model.add_special_tokens(list(control))

    def encode(text, special=False):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half an emoji: U+FFFD, as tiktoken
        model.encode_special_tokens = not special  # True: "</s>" in a text is four characters, not the end
        ids = model.encode(text, add_special_tokens=False).ids  # no BOS from the post-processor
        return ids if special else [number for number in ids if number not in (bos, eos)]  # as words of a vocabulary

    first = model.encode("a", add_special_tokens=False).tokens[:1]
    tokenizer = Tokenizer(name, encode, decode=lambda ids: model.decode(ids, skip_special_tokens=False),
                          vocab_size=max(model.get_vocab().values()) + 1, eos_id=eos, bos_id=bos,
                          prefix_space=bool(first) and first[0][0] in "▁Ġ", more_ends=tuple(ends[1:]))
    return _templated(tokenizer, template, trial, control, partial(encode, special=True))


def _templated(tokenizer, template, trial, control, marked):
    """The tokenizer with a template. trial: what data.chat.tried says of it   control: {special token: id}
    marked: encode, but special tokens are ids."""
    prompt, before, asks, after = trial
    found = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    spelled, bos = tuple(control), template.tokens.get("bos_token", "")

    def encode_marked(text):
        if shown(text, spelled) == text:
            return marked(text)
        parts = filter(None, re.split(f"({found})", text))  # what is hidden in a part is a text
        return [number for part in parts
                for number in ([control[part]] if part in control else tokenizer.encode(shown(part, spelled)))]

    end = re.search(found, after)  # what the template writes behind an answer
    eos, *more = dict.fromkeys([control[end[0]] if end else tokenizer.eos_id, *tokenizer.ends])
    template = replace(template, before=before, asks=asks, control=spelled, opens=bos if prompt.startswith(bos) else "")
    return replace(tokenizer, eos_id=eos, more_ends=tuple(more), template=template, encode_marked=encode_marked)


def _ids(settings, key, path):
    """The token ids that a file has under this key, one or a list: a list, empty where it has none."""
    given = settings.get(key)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int and 0 <= number < 2 ** 31 for number in ids):
        raise UserError(f"{path}: {key} must be the number of a token, not {json.dumps(given)[:60]}")
    return ids


def _stops(path):
    """The ids of all tokens at which generation stops, as generation_config.json or else config.json says."""
    for file in ("generation_config.json", "config.json"):
        if (path / file).is_file() and (ids := _ids(read_json(path / file), "eos_token_id", path / file)):
            return ids
    return []


def _special_id(model, path, kind):
    """The id of BOS or EOS (`kind` "bos" or "eos"), or None. The first file that names it decides. A file that says
    that there is no BOS decides too: Qwen2's tokenizer_config.json does, though its config.json has a number."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if not (path / file).is_file():
            continue
        settings = read_json(path / file)
        ids = _ids(settings, f"{kind}_token_id", path / file)  # chat models number several ends: take the first
        number = ids[0] if ids else None
        if settings.get(f"{kind}_token"):
            number = model.token_to_id(spelled(settings, f"{kind}_token", path / file))
        if kind == "bos" and settings.get("add_bos_token") is False:
            return None
        if number is not None:
            if model.id_to_token(number) is None:
                raise UserError(f"{path / file}: {kind}_token_id is {number}, and tokenizer.json has no such token")
            return number
        if kind == "bos" and "bos_token" in settings:  # null
            return None
    found = (model.token_to_id(token) for token in USUAL[kind])
    return next((number for number in found if number is not None), None)
