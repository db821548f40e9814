"""tokenizers.py - text to token ids and back, and rows of text to rows of tokens that fit the context.

Three sources, one small wrapper: ranks files in tiktoken's format (`toy.tiktoken` of the embedded world, or the user's
own), GPT-2 through tiktoken, and `tokenizer.json` of a Hugging Face directory.
ids: token ids   BOS, EOS: the special tokens that begin and end a text (EOS always exists, BOS need not)
row: one prompt, its responses and their labels (data.files.Row)
"""
import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import tiktoken

from runs.files import UserError, read_json

# GPT-2's split into words, numbers, punctuation and spaces, before the byte pairs are merged. The toy BPE uses it too.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
EOS = "<|endoftext|>"  # of the tiktoken files
# BOS and EOS of a Hugging Face directory that does not name them: the first of these that its vocabulary has.
USUAL = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>")}


@dataclass(frozen=True)
class Tokenizer:
    """encode(text) -> ids: never BOS, EOS or another special token, even where the text spells one. decode(ids) ->
    text: special ids are spelled out. `prefix_space`: encode puts one more space in front (as SentencePiece)."""
    name: str  # what load_tokenizer was given
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    vocab_size: int
    eos_id: int
    bos_id: int | None = None
    prefix_space: bool = False


@dataclass
class TokenRow:
    """prompt: ids, at least one. responses: ids, each ends in EOS unless it was cut. pairs, better: as in the Row."""
    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    better: list[list[int]] = field(default_factory=list)


def load_tokenizer(where):
    """-> Tokenizer. `where`: "toy", "gpt2", a `*.tiktoken` ranks file (text is split by PATTERN), or a Hugging Face
    directory. Raises UserError where it is none of these, or cannot be read."""
    path = Path(where)
    if where == "toy":
        return _from_ranks("toy", Path(__file__).with_name("toy.tiktoken"))
    if where == "gpt2":
        try:
            return _from_tiktoken("gpt2", tiktoken.get_encoding("gpt2"))
        except Exception as error:  # offline and not cached: several packages' errors, no common base
            raise UserError(f'tokenizer "gpt2": its ranks are not in tiktoken\'s cache and could not be downloaded '
                            f'({type(error).__name__}); go online once, or give a gpt2.tiktoken file, a Hugging Face '
                            f'directory with tokenizer.json, or "toy"') from None
    if path.suffix == ".tiktoken":
        return _from_ranks(str(where), path)
    if (path / "tokenizer.json").is_file():
        return _from_huggingface(str(where), path)
    raise UserError(f'tokenizer "{where}": no such tokenizer; give "toy", "gpt2", a *.tiktoken ranks file, or a '
                    f'directory that holds tokenizer.json')


def tokenize(rows, tokenizer, max_length, max_prompt=None):
    """rows: list[Row] (data.files) -> (list[TokenRow], counts), in order.

    prompt   = BOS (where there is one) + encoded prompt. Without BOS an empty prompt is one EOS, so that the first
               response token has something to condition on.
    response = encoded response + one EOS; no EOS can come from text.
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
    for row in rows:
        prompt = (bos + _encode(tokenizer, row.prompt)) or [tokenizer.eos_id]
        full_prompt = len(prompt)
        prompt = _cut_left(prompt, max_prompt or full_prompt, bos)
        room = max(max_length // 2, max_length - len(prompt))
        full = [_encode(tokenizer, text, continues=True) + [tokenizer.eos_id] for text in row.responses]
        responses = [ids[:room] for ids in full]  # EOS is the last id, so a cut loses it
        prompt = _cut_left(prompt, max_length - max(map(len, responses), default=0), bos)
        prompts_cut += len(prompt) < full_prompt
        responses_cut += sum(len(ids) > room for ids in full)
        token_rows.append(TokenRow(prompt, responses, row.pairs, row.better))
    return token_rows, dict(prompts=len(rows), responses=sum(len(row.responses) for row in rows),
                            prompts_cut=prompts_cut, responses_cut=responses_cut)


def spoken(responses, tokenizer):
    """Sampled token lists -> (their texts without EOS, list[bool]: whether each ended in EOS)."""
    finished = [y[-1] == tokenizer.eos_id for y in responses]
    return [tokenizer.decode(y[:-1] if end else y) for y, end in zip(responses, finished)], finished


def _encode(tokenizer, text, continues=False):
    """ids of text. `continues`: it follows a prompt, so the space that SentencePiece adds replaces its first one."""
    if continues and tokenizer.prefix_space:
        text = text.removeprefix(" ")
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids, f"EOS inside a text: {text[:80]!r}"
    return ids


def _cut_left(prompt, length, bos):
    """The last `length` ids of the prompt, the first of them replaced by BOS where there is one."""
    if len(prompt) <= length:
        return prompt
    return bos + prompt[len(prompt) - length + len(bos):]


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
    return _from_tiktoken(name, tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                                  special_tokens={EOS: len(ranks)}))


def _from_tiktoken(name, encoding):
    return Tokenizer(name, encode=encoding.encode_ordinary, decode=encoding.decode,  # ordinary: no special tokens
                     vocab_size=encoding.n_vocab, eos_id=encoding.eot_token)


def _from_huggingface(name, path):
    """tokenizer.json through the `tokenizers` package; BOS and EOS from the JSON files beside it, or the usual ones."""
    import tokenizers  # only here: the embedded world does without
    try:
        model = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the package raises bare Exceptions
        raise UserError(f"tokenizer {path / 'tokenizer.json'}: cannot be read ({error})") from None
    model.encode_special_tokens = True  # "</s>" in a text is four characters, not the end
    model.no_truncation()  # a saved setting would cut silently; tokenize() cuts and counts
    model.no_padding()

    def encode(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half an emoji: U+FFFD, as tiktoken
        return model.encode(text, add_special_tokens=False).ids  # no BOS from the post-processor

    bos, eos = (_special_id(model, path, kind) for kind in ("bos", "eos"))
    if eos is None:
        raise UserError(f"tokenizer {path}: no EOS token found; name eos_token in its tokenizer_config.json")
    if bos == eos:  # GPT-2's one special token: it ends texts, so it must not begin prompts
        bos = None
    return Tokenizer(name, encode, decode=lambda ids: model.decode(ids, skip_special_tokens=False),
                     vocab_size=model.get_vocab_size(), eos_id=eos, bos_id=bos,
                     prefix_space=model.encode("a", add_special_tokens=False).tokens[0][0] in "▁Ġ")


def _special_id(model, path, kind):
    """The id of BOS or EOS (`kind` "bos" or "eos"), or None. The first file that names it decides. A file that says
    that there is no BOS decides too: Qwen2's tokenizer_config.json does, though its config.json has a number."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        if not (path / file).is_file():
            continue
        settings = read_json(path / file)
        token, number = settings.get(f"{kind}_token"), settings.get(f"{kind}_token_id")
        if token:  # spelled, as a string or as {"content": …}
            number = model.token_to_id(token["content"] if isinstance(token, dict) else token)
        if kind == "bos" and settings.get("add_bos_token") is False:
            return None
        if number is not None:  # chat models number several ends in a list: take the first
            return number[0] if isinstance(number, list) else number
        if kind == "bos" and "bos_token" in settings:  # null
            return None
    found = (model.token_to_id(token) for token in USUAL[kind])
    return next((number for number in found if number is not None), None)
