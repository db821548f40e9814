"""bench_gguf.py - an exported model in llama.cpp: converted by its converter, loaded by its library, beside our own.

    python export.py out/a --pref 0.3 0.7 --dtype fp32 --out DIR
    python bench/bench_gguf.py DIR --converter llama.cpp/convert_hf_to_gguf.py

DIR is what export.py wrote as a whole model, of a family and a tokenizer that llama.cpp knows. Four questions go
through DIR's own chat template, if it has one. Printed: whether llama.cpp makes the same tokens of these texts; the
largest difference of a logit, divided by the largest logit; at how many places the likeliest token is the same.
llama.cpp computes in fp32 here; as it is used by default, its keys and values have 16 bits.
The peers: pip install cyllama gguf transformers sentencepiece; the converter comes with llama.cpp's source.
"""
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.files import Message, Row
from data.tokenizers import load_tokenizer, tokenize
from model import Transformer
from runs.files import UserError
from runs.flags import flag, run_main

QUESTIONS = ("What is the capital of France?", "How do I paint a front door?", "Tell me about 3 birds; be brief!",
             "Schreib bitte einen Satz über den Mond. 🌙")


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    model: str = flag(None, "a whole model in fp32 that export.py wrote", positional=True)
    converter: str = flag("llama.cpp/convert_hf_to_gguf.py", "llama.cpp's program of this name")


@torch.no_grad()
def main(flags):
    """Converts, computes, prints."""
    from cyllama.llama.llama_cpp import (
        LlamaBatch,
        LlamaContext,
        LlamaContextParams,
        LlamaModel,
        LlamaModelParams,
        disable_logging,
    )
    disable_logging()

    class Model(LlamaModel):
        """With what LlamaContext asks for and cyllama 0.2.18 does not have."""
        n_vocab = property(lambda self: self.get_vocab().n_vocab)

    if not Path(flags.converter).exists():
        raise UserError(f"--converter {flags.converter} is not there: it comes with llama.cpp")
    ours, tokenizer = Transformer.from_pretrained(flags.model, torch.float32), load_tokenizer(flags.model)
    prompts = [row.prompt for row in tokenize([Row((Message("user", text),)) for text in QUESTIONS], tokenizer, 512)[0]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        subprocess.run([sys.executable, flags.converter, flags.model, "--outtype", "f32", "--outfile", file],
                       check=True, stdout=subprocess.DEVNULL)
        theirs = Model(str(file), LlamaModelParams(), verbose=False)
        params = LlamaContextParams()
        params.type_k = params.type_v = params.flash_attn_type = 0     # keys and values in fp32, plain attention
        same, off, largest, agree, places = 0, 0.0, 0.0, 0, 0
        for ids in prompts:
            text = tokenizer.decode(ids)
            same += theirs.get_vocab().tokenize(text, False, True) == ids
            batch, context = LlamaBatch(n_tokens=512, embd=0, n_seq_max=1), LlamaContext(theirs, params)
            batch.set_batch(ids, 0, True)                              # from position 0, logits of every token
            context.decode(batch)
            b = np.array([context.get_logits_ith(i) for i in range(len(ids))])
            a = ours(torch.tensor([ids]))[0].numpy()                                  # (tokens, vocabulary)
            off, largest = max(off, np.abs(a - b).max()), max(largest, np.abs(a).max())
            agree, places = agree + (a.argmax(1) == b.argmax(1)).sum(), places + len(ids)
    print(f"the same tokens: {same} of {len(prompts)} texts\nlargest difference of a logit: {off / largest:.1e} of the "
          f"largest, {largest:.1f}\nthe same likeliest token: at {agree} of {places} places")


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
