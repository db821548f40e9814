"""test_tokenizers.py - token ids against known ones, no special token from text, and the rules for over-long rows."""
import base64
import json

import pytest
import tiktoken

from data.files import Row
from data.tokenizers import Tokenizer, TokenRow, load_tokenizer, tokenize
from runs.files import UserError

UNICODE = "\n\nHuman: naïve żółć, 日本語 🙂\t 12345  don't!\r\n"
SPELLED = "a <|endoftext|> b </s> c <s> d <unk>"  # special tokens' names, as plain text


def token_row(prompt, responses):
    """A TokenRow with the one pair and label that every row here has."""
    return TokenRow(prompt, responses, [(0, 1)], [[0]])


def ranks_file(path, *merged):
    """A ranks file of the 256 bytes (rank = byte) and then the `merged` tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [token.encode() for token in merged]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def letters(bos_id=None, prefix_space=False):
    """A toy tokenizer whose ids are the character codes: EOS 0, BOS (if asked for) 1."""
    return Tokenizer("letters", lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)),
                     vocab_size=128, eos_id=0, bos_id=bos_id, prefix_space=prefix_space)


def ids(text, *more):
    return [ord(c) for c in text] + list(more)


def row(prompt, *responses):
    return Row(prompt, list(responses), [(0, 1)], [[0]])


# ---- loading ----

def test_ranks_file(tmp_path):
    tokenizer = load_tokenizer(str(ranks_file(tmp_path / "tiny.tiktoken", "he", "hel", " h")))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (260, 259, None)
    assert tokenizer.encode("hello he") == [257, 108, 111, 32, 256]  # "he" is merged before " h": the lower rank first
    assert tokenizer.decode([258, 108, 111, 32, 256]) == " hlo he"
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE


def test_ranks_file_made_anew_is_read_anew(tmp_path):
    path = ranks_file(tmp_path / "tiny.tiktoken", "he")
    assert load_tokenizer(path).vocab_size == 258
    ranks_file(path, "he", "hel")
    assert load_tokenizer(path).vocab_size == 259


@pytest.mark.parametrize("content, says", [
    ("not a ranks file\n", "not a tiktoken ranks file"),
    ("aGU= x\n", "not a tiktoken ranks file"),
    ("aGU= 0\n", "all 256 single bytes"),
])
def test_bad_ranks_file(tmp_path, content, says):
    path = tmp_path / "bad.tiktoken"
    path.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_gap_in_the_ranks(tmp_path):
    path = ranks_file(tmp_path / "gap.tiktoken")
    path.write_text(path.read_text() + "aGU= 300\n")
    with pytest.raises(UserError, match="the ranks must be 0, 1, 2"):
        load_tokenizer(path)


@pytest.mark.parametrize("where", ["no_such", "no_such.tiktoken", "no/such/dir"])
def test_nothing_there(tmp_path, where):
    with pytest.raises(UserError, match=where):
        load_tokenizer(str(tmp_path / where))


def test_gpt2_without_network(monkeypatch):
    def offline(name):
        raise ConnectionError("Max retries\nexceeded")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r'"gpt2".*could not be downloaded.*gpt2\.tiktoken.*tokenizer\.json.*"toy"'):
        load_tokenizer("gpt2")


def test_gpt2_ranks(shared):
    tokenizer = load_tokenizer(shared("tokenizers", "gpt2", "gpt2.tiktoken"))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (50257, 50256, None)
    assert tokenizer.encode("Hello world") == [15496, 995]  # known ids of GPT-2
    assert tokenizer.encode("   I don't") == [220, 220, 314, 836, 470]  # the pattern splits spaces and 't
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE
    assert not tokenizer.prefix_space
    assert tokenizer.eos_id not in tokenizer.encode(SPELLED) and tokenizer.decode(tokenizer.encode(SPELLED)) == SPELLED


def test_toy():
    tokenizer = load_tokenizer("toy")
    assert tokenizer.name == "toy" and tokenizer.vocab_size == tokenizer.eos_id + 1 > 257 and tokenizer.bos_id is None
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE
    assert tokenizer.eos_id not in tokenizer.encode(SPELLED)
    assert max(tokenizer.encode(UNICODE + SPELLED)) < tokenizer.eos_id


def test_stories260k(shared):
    tokenizer = load_tokenizer(shared("stories260K"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    assert tokenizer.prefix_space
    text = "Once upon a time, there was a little girl named Lily. 日本\n🙂"
    assert tokenizer.encode(text)[:5] == [403, 407, 261, 378, 432]  # Once upon a time, (no BOS in front)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("\ud83d") == tokenizer.encode("\ufffd")  # half an emoji does not stop a run


@pytest.mark.parametrize("where", [("stories260K",), ("tokenizers", "llama2")])
def test_no_special_token_from_text(shared, where):
    tokenizer = load_tokenizer(shared(*where))
    for text in (SPELLED, "</s>", "a</s>", "<s><s>", "<unk>"):
        assert not {0, 1, 2} & set(tokenizer.encode(text)), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_special_token_from_text_tiktoken(tmp_path):
    tokenizer = load_tokenizer(ranks_file(tmp_path / "tiny.tiktoken", "<|"))
    assert tokenizer.eos_id not in tokenizer.encode(SPELLED)
    assert tokenizer.decode(tokenizer.encode(SPELLED)) == SPELLED


def test_llama2_prompt_and_response_are_one_text(shared):
    """SentencePiece adds a space before the response; the space that the response begins with is no second one."""
    tokenizer = load_tokenizer(shared("tokenizers", "llama2"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    (tokens,), _ = tokenize([row("\n\nHuman: hi\n\nAssistant:", " Hello there")], tokenizer, 100)
    one_text = tokenizer.encode("\n\nHuman: hi\n\nAssistant: Hello there")
    assert tokens.prompt + tokens.responses[0] == [1] + one_text + [2]


def small_hf(path, tokens=("<s>", "</s>", "<|im_end|>", "a", "▁"), **files):
    """A Hugging Face directory with a word-level tokenizer, and the JSON files beside it."""
    specials = [dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                for i, token in enumerate(tokens) if token.startswith("<")]
    model = dict(type="WordLevel", vocab={token: i for i, token in enumerate(tokens)}, unk_token="a")
    truncation = dict(direction="Right", max_length=1, strategy="LongestFirst", stride=0)
    (path / "tokenizer.json").write_text(json.dumps(dict(
        version="1.0", truncation=truncation, padding=None,
        added_tokens=specials, normalizer=None, pre_tokenizer=dict(type="WhitespaceSplit"), post_processor=None,
        decoder=None, model=model)))
    for name, settings in files.items():
        (path / f"{name}.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("files, bos, eos", [
    ({}, 0, 1),  # the usual spellings
    (dict(tokenizer_config=dict(bos_token="<s>", eos_token=dict(content="<|im_end|>"))), 0, 2),
    (dict(config=dict(bos_token_id=0, eos_token_id=[2, 1])), 0, 2),  # a list: the first
    (dict(tokenizer_config=dict(eos_token="</s>"), config=dict(bos_token_id=0, eos_token_id=2)), 0, 1),
    (dict(tokenizer_config=dict(bos_token=None, eos_token="</s>"), config=dict(bos_token_id=0)), None, 1),  # Qwen2
    (dict(tokenizer_config=dict(bos_token="<s>", add_bos_token=False, eos_token="</s>")), None, 1),
    (dict(tokenizer_config=dict(bos_token="</s>", eos_token="</s>")), None, 1),  # GPT-2: one token for both
])
def test_bos_and_eos_of_a_huggingface_directory(tmp_path, files, bos, eos):
    tokenizer = load_tokenizer(small_hf(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    assert tokenizer.encode("a a a") == [3, 3, 3]  # the saved truncation to one token is off


def test_bad_huggingface_directory(tmp_path):
    with pytest.raises(UserError, match="no EOS token found; name eos_token"):
        load_tokenizer(small_hf(tmp_path, tokens=("a", "b")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file, settings, says", [
    ("tokenizer_config.json", dict(eos_token=3), 'eos_token must be a text, or {"content": text}, not 3'),
    ("tokenizer_config.json", dict(bos_token={"text": "<s>"}), "bos_token must be a text"),
    ("special_tokens_map.json", dict(eos_token="\ud800"), "eos_token must be a text"),
    ("generation_config.json", dict(eos_token_id=[1, "2"]), "eos_token_id must be the number of a token"),
    ("generation_config.json", dict(eos_token_id=-1), "eos_token_id must be the number of a token, not -1"),
    ("config.json", dict(eos_token_id=999), "eos_token_id is 999, and tokenizer.json has no such token"),
    ("config.json", [1, 2], "holds no JSON object")])
def test_settings_of_another_kind(tmp_path, file, settings, says):
    """Wrong: a traceback of the first function that takes them."""
    (small_hf(tmp_path, tokens=("a", "b", "</s>" if file != "config.json" else "c")) / file).write_text(
        json.dumps(settings))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert f"{file}: {says}" in str(error.value) or f"{file} {says}" in str(error.value)


# ---- tokenize ----

def test_nothing_cut():
    rows = [row("ask", "yes", "no"), row("", "x", "")]
    tokens, counts = tokenize(rows, letters(), max_length=7)
    assert tokens == [token_row(ids("ask"), [ids("yes", 0), ids("no", 0)]),
                      token_row([0], [ids("x", 0), [0]])]  # no BOS: the empty prompt is one EOS
    assert counts == dict(prompts=2, responses=4, prompts_cut=0, responses_cut=0)
    tokens, _ = tokenize(rows, letters(bos_id=1), max_length=8)
    assert [t.prompt for t in tokens] == [[1] + ids("ask"), [1]]


def test_prompt_is_cut_from_the_left_beside_the_longest_response():
    (tokens,), counts = tokenize([row("abcdef", "uvw", "u")], letters(), max_length=8)
    assert tokens == token_row(ids("cdef"), [ids("uvw", 0), ids("u", 0)])  # 8 - 4 tokens left for the prompt
    assert counts == dict(prompts=1, responses=2, prompts_cut=1, responses_cut=0)
    (tokens,), _ = tokenize([row("abcdef", "uvw", "u")], letters(bos_id=1), max_length=8)
    assert tokens.prompt == [1] + ids("def")


def test_response_is_cut_from_the_right_and_gets_no_eos():
    (tokens,), counts = tokenize([row("ab", "tuvwxyz", "u")], letters(), max_length=8)
    assert tokens == token_row(ids("ab"), [ids("tuvwxy"), ids("u", 0)])  # what the prompt leaves: 6 of 8
    assert counts == dict(prompts=1, responses=2, prompts_cut=0, responses_cut=1)
    (tokens,), _ = tokenize([row("ab", "tuvwxy")], letters(), max_length=8)
    assert tokens.responses == [ids("tuvwxy")]  # only EOS had no room


def test_both_cut():
    (tokens,), counts = tokenize([row("abcdefgh", "stuvwxyz", "stu")], letters(bos_id=1), max_length=9)
    assert tokens == token_row([1] + ids("efgh"), [ids("stuv"), ids("stu", 0)])  # 9 // 2 = 4 for the response
    assert counts == dict(prompts=1, responses=2, prompts_cut=1, responses_cut=1)


def test_max_prompt():
    (tokens,), counts = tokenize([row("abcdef", "uvwxyz")], letters(bos_id=1), max_length=9, max_prompt=3)
    assert tokens == token_row([1] + ids("ef"), [ids("uvwxyz")])  # 9 - 3 = 6, one too few for EOS
    assert counts == dict(prompts=1, responses=1, prompts_cut=1, responses_cut=1)
    (tokens,), _ = tokenize([row("abcdef", "u")], letters(bos_id=1), max_length=9, max_prompt=1)
    assert tokens.prompt == [1]


@pytest.mark.parametrize("bos_id", [None, 1])
def test_never_longer_than_max_length(bos_id):
    for max_length in range(2, 12):
        for p in range(0, 12):
            for r in range(0, 12):
                (tokens,), _ = tokenize([row("p" * p, "r" * r, "r")], letters(bos_id), max_length)
                assert tokens.prompt and all(tokens.responses)
                assert len(tokens.prompt) + max(map(len, tokens.responses)) <= max_length
                assert bos_id is None or tokens.prompt[0] == bos_id
                assert all(0 not in response[:-1] for response in tokens.responses)


def test_prefix_space():
    (tokens,), _ = tokenize([row(" ask", " yes", "no")], letters(prefix_space=True), max_length=20)
    assert tokens == token_row(ids(" ask"), [ids("yes", 0), ids("no", 0)])  # the response's first space only


def test_eos_inside_a_text_is_refused():
    with pytest.raises(UserError, match="token 0 ends a response, and this text has it inside"):
        tokenize([row("ask", "y\0s")], letters(), max_length=20)
