"""tokenizer_json.py - a tiktoken Encoding as Hugging Face's tokenizer.json, with the same ids for every text.

Both merge bytes by rank. tiktoken tells ranks alone; tokenizer.json also wants the two tokens that each one is made of,
and every byte as a letter (GPT-2's table).
"""
from data.tokenizers import EOS


def tokenizer_json(encoding):
    """tiktoken.Encoding that splits by data.tokenizers.PATTERN -> tokenizers.Tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]                     # bytes that are their own letters
    letter = {byte: chr(byte) for byte in plain}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letter)}
    spell = lambda token: "".join(letter[byte] for byte in token)
    merges = [tuple(map(spell, halves(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    model = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)            # its split is PATTERN's
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([EOS])                                                   # the next id, as in the encoding
    return model


def halves(token, ranks):
    """The two tokens that the last merge makes a token of: the pair of the lowest rank is merged until two are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
