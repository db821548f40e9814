"""text_rewards.py - rewards of short stories without a model: functions (prompt, response) -> float, larger is better.

For PPO without a reward model: anyone can check them by eye, and conflicts can be chosen (dialogue against narrative,
length against concise). Under a KL penalty the best policy is π ∝ π_ref · exp(r/β): as β falls it prefers the likeliest
texts among those of the largest r, and every docstring says which texts these are. Three rules
keep them stories: repetition is not paid (words, speeches and sentences count once), every reward is bounded above, and
nothing is divided by the response's own length, where a single good word would win.
"""
import re
from functools import partial

import torch

from data.chat import question
from runs.files import UserError

# A lexicon: the forms of one word stand between bars. Each form is listed, because a search by beginnings would take
# "lovers" for "love". Adverbs are left out: many stories end in "happily ever after". Negations are not recognised.
HAPPY = ("happy happier happiest happiness | glad | joy joyful joyous | smile smiles smiled smiling | "
         "laugh laughs laughed laughing laughter | giggle giggles giggled giggling | fun | "
         "cheer cheers cheered cheering cheerful | love loves loved loving | proud | "
         "excited excitement exciting | delighted delight | hug hugs hugged hugging | "
         "enjoy enjoys enjoyed enjoying | celebrate celebrates celebrated celebrating celebration | wonderful")
MOST_WORDS = 6              # of a lexicon that a response is paid for
MOST_LENGTH = 60            # words that `length` pays for
MOST_IN_PART = 12           # words that one speech or one sentence is paid for
MOST_CONCISE = 4.0          # the value of `concise` for a short text


def words(text):
    """The text's words in order, lower case: "Don’t stop, Tim!" -> ["don't", "stop", "tim"]."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("’", "'"))


WORD_OF = {form: group.split()[0] for group in HAPPY.split("|") for form in group.split()}


def happy(prompt, response):
    """How many different words of HAPPY the response has, at most MOST_WORDS. Each sentence of 3 words or more adds at
    most one, the first that is new; shorter sentences add nothing.

    The best: six sentences that name six feelings ("Tom was glad. His mom smiled."). A list of the words is one
    sentence, so it pays as little as one word; the same sentence again pays nothing.
    """
    counted = set()
    for sentence in map(words, re.split(r"[.!?\n]+", response)):
        new = [WORD_OF[w] for w in sentence if w in WORD_OF and WORD_OF[w] not in counted]
        counted.update(new[:1] if len(sentence) >= 3 else [])
    return float(min(len(counted), MOST_WORDS))


def length(prompt, response):
    """Tens of words, at most 6; a word that ends a three-word phrase which occurred before adds nothing.

    Capped, because otherwise a longer text would always be better, up to the maximal number of tokens. The best: any
    text of 60 words without a loop; the likeliest such texts are the base model's own that have not ended yet.
    """
    w = words(response)
    return min(len(w[:2]) + len(set(zip(w, w[1:], w[2:]))), MOST_LENGTH) / 10


def concise(prompt, response, c=50):
    """MOST_CONCISE up to c words, then MOST_CONCISE + 1 − words / c (the form of Panacea's helpful-harmless-concise
    problem).

    # not in paper: both constants are those of a re-implementation, whose unit is tokens. "concise:12" has c = 12. The
    best: anything of up to c words, so base texts that end soon. An empty text is as good; only KL and the other
    rewards keep the policy from it.
    """
    n = len(words(response))
    return MOST_CONCISE if n <= c else MOST_CONCISE + 1 - n / c


def _speech(prompt, response):
    """Splits the response at its quotation marks -> (speeches, what stands outside them). It begins inside a speech if
    the prompt has left one open; the last speech may have no closing mark."""
    straight = lambda text: re.sub("[“”]", '"', text)
    parts, opened = straight(response).split('"'), straight(prompt).count('"') % 2
    return parts[1 - opened::2], parts[opened::2]


def _tens(parts, shortest, most):
    """Tens of words, at most `most`, in the parts of at least `shortest` words. Equal parts count once, and of each
    part at most MOST_IN_PART words."""
    kept = {tuple(w) for w in map(words, parts) if len(w) >= shortest}
    return min(sum(min(len(w), MOST_IN_PART) for w in kept) / 10, most)


def dialogue(prompt, response):
    """Tens of spoken words, at most 4: different quotations of 2 words or more, at most 12 words of each.

    The best: four or more different speeches of about a dozen words each. A monologue is paid for its first 12 words
    alone; a repeated speech and quotation marks around single words are not paid.
    """
    return _tens(_speech(prompt, response)[0], 2, 4.0)


def narrative(prompt, response):
    """Tens of words outside quotations, at most 6: different finished sentences of 4 words or more, at most 12 words of
    each. `… said, "Hi."` is no finished sentence, so introducing a speech is not paid.

    The best: five or more different full sentences, and no speech, which would take their room. Sentences with one word
    exchanged ("Tom saw a cat. Tom saw a dog.") do count as different; only KL keeps the policy from them.
    """
    ended = [sentence for part in _speech(prompt, response)[1]
             for sentence in re.findall(r"(?<![^.!?\n])[^.!?\n]++[.!?]", part)]         # linear time
    return _tens(ended, 4, 6.0)


TEXT_REWARDS = {f.__name__: f for f in (length, concise, happy, dialogue, narrative)}


def is_concise(name):
    """Whether the name is `concise` with its own number of words c, as "concise:12"."""
    return re.fullmatch("concise:[1-9][0-9]*", name) is not None


def text_rewards(names, prompts, responses):
    """names: keys of TEXT_REWARDS; prompts, responses: B each -> (B, len(names)) float64. Of a prompt that is
    turns the last user's text counts. Raises UserError for an unknown name.
    """
    for name in names:
        if name not in TEXT_REWARDS and not is_concise(name):
            raise UserError(f"unknown reward {name!r}; the text rewards are: {' '.join(TEXT_REWARDS)}")
    functions = [partial(concise, c=int(name.partition(":")[2])) if is_concise(name) else TEXT_REWARDS[name]
                 for name in names]
    rows = [[f(question(x), y) for f in functions] for x, y in zip(prompts, responses, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names))


# ---------------------------------------------------------------------------------------------------------------------
# Language collapse: what no reward shows.

def collapsed(tokens):
    """Whether a response, a list of ids or of words, is a loop (fewer than 30 % of its 4-grams are
    distinct) or nearly empty (fewer than 5 tokens).

    # not in paper: ParetoHqD reports a language-collapse rate; its thresholds are not known, these are ours.
    """
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))
    return len(tokens) < 5 or len(set(grams)) / len(grams) < 0.3
