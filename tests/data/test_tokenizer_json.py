"""test_tokenizer_json.py - a tiktoken vocabulary as tokenizer.json: the same ids for every text."""
import random
from functools import partial

from tokenizers import Tokenizer

from data import toy
from data.tokenizer_json import halves, tokenizer_json
from data.tokenizers import encoding_of

LETTERS = "abc  \n\n\t\r'sS37é日🙂.!\u2028\x85tlvedm"


def test_the_same_ids(tmp_path):
    """Of the world's texts and of random ones, spaces and line breaks above all. Wrong: merges in another order."""
    encoding, draw = encoding_of("toy"), random.Random(0)
    tokenizer_json(encoding).save(str(tmp_path / "tokenizer.json"))
    model = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [text for x in toy.prompts("new_verbs")[::8] for text in (x + "\n", *toy.responses(x))]
    texts += ["".join(draw.choice(LETTERS) for _ in range(draw.randrange(30))) for _ in range(3000)]
    texts += ["".join(chr(draw.randrange(1, 0x3000)) for _ in range(12)) for _ in range(1000)]
    for text in texts:
        ids = model.encode(text, add_special_tokens=False).ids
        assert ids == encoding.encode_ordinary(text) and model.decode(ids) == text
    assert model.get_vocab_size() == encoding.n_vocab and model.token_to_id("<|endoftext|>") == encoding.eot_token


def test_the_last_merge():
    """Of "abcd" the pair of the lowest rank goes first. Wrong: the first two letters and the rest."""
    ranks = {token.encode(): rank for rank, token in enumerate("a b c d bc ab cd abc abcd".split())}
    assert list(map(partial(halves, ranks=ranks), (b"bc", b"abc", b"abcd"))) == [
        [b"b", b"c"], [b"a", b"bc"], [b"abc", b"d"]]
