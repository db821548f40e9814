"""rewards.py - rewards of short stories that need no model: functions (prompt, response) -> float, larger is better.

For PPO without a reward model: anyone can check them by eye, and conflicts can be chosen (happy against sad, dialogue
against narrative, length against concise). Under a KL penalty the best policy is π ∝ π_ref · exp(r/β): as β falls it
goes to the likeliest texts among those of the largest r, and every function says what these are. What keeps them
stories: repetition is not paid (words, speeches and sentences count once), every reward is bounded above, and nothing
is divided by the response's own length, where a single good word would win.
"""
import re
from functools import partial

import torch

from runs.files import UserError

# Lexicons: forms of one word stand together. They are listed, not found by their beginning: "saddle" is not "sad".
# Adverbs are left out: "happily ever after" is how stories end, whatever they tell. A negation is not seen.
HAPPY = ("happy happier happiest happiness | glad | joy joyful joyous | smile smiles smiled smiling | "
         "laugh laughs laughed laughing laughter | giggle giggles giggled giggling | fun | "
         "cheer cheers cheered cheering cheerful | love loves loved loving | proud | "
         "excited excitement exciting | delighted delight | hug hugs hugged hugging | "
         "enjoy enjoys enjoyed enjoying | celebrate celebrates celebrated celebrating celebration | wonderful")
SAD = ("sad sadder saddest sadness | cry cries cried crying | tear tears | weep weeps wept weeping | "
         "sob sobs sobbed sobbing | unhappy | lonely alone | upset | sorry | miss misses missed missing | "
         "lost lose loses losing | hurt hurts hurting | scared scary | afraid | "
         "worry worries worried worrying | broken broke break breaks breaking | gloomy miserable")
NATURE = ("tree trees | flower flowers | grass | forest forests woods | river rivers stream | lake lakes pond | "
         "sea seas ocean | mountain mountains hill hills | sky skies | sun sunny sunshine | moon | "
         "star stars | cloud clouds cloudy | rain rains rained raining rainy | "
         "snow snows snowed snowing snowy | wind windy | bird birds | leaf leaves | garden gardens | "
         "beach beaches")
MOST_WORDS = 6              # of a lexicon that a response is paid for
MOST_LENGTH = 60            # words that `length` pays for
MOST_IN_PART = 12           # words that one speech or one sentence is paid for


def words(text):
    """The text's words in order, lower case: "Don’t stop, Tim!" -> ["don't", "stop", "tim"]."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("’", "'"))


def _lexicon(groups):
    """The reward of one lexicon: how many different words of it the response has, one a sentence of 3 words or more
    (the first that is new), at most MOST_WORDS.

    The best: six sentences that name six feelings ("Tom was glad. His mom smiled."). A list of the words is one
    sentence, so it pays as little as one word; the same sentence again pays nothing.
    """
    word_of = {form: group.split()[0] for group in groups.split("|") for form in group.split()}

    def reward(prompt, response):
        counted = set()
        for sentence in map(words, re.split(r"[.!?\n]+", response)):
            new = [word_of[w] for w in sentence if w in word_of and word_of[w] not in counted]
            counted.update(new[:1] if len(sentence) >= 3 else [])
        return float(min(len(counted), MOST_WORDS))
    return reward


def length(prompt, response):
    """Tens of words, at most 6; a word that ends a three-word phrase which stood before adds nothing.

    Capped, because otherwise never ending is always better, which the cut at a maximal number of tokens decides. The
    best: any text of 60 words without a loop; the likeliest such ones are the base model's own, just unended.
    """
    w = words(response)
    return min(len(w[:2]) + len(set(zip(w, w[1:], w[2:]))), MOST_LENGTH) / 10


def concise(prompt, response, r_max=4.0, c=50):
    """r_max up to c words, then r_max + 1 − words / c (the form of Panacea's helpful-harmless-concise problem).

    # not in paper: r_max and c are those of a re-implementation, whose unit is tokens. "concise:12" has c = 12. The
    best: anything of up to c words, so base texts that end soon; an empty one is as good, and is held off by KL and by
    the other rewards alone.
    """
    n = len(words(response))
    return r_max if n <= c else r_max + 1 - n / c


def _speech(prompt, response):
    """Splits the response at its quotation marks -> (speeches, what stands outside). A mark that the prompt left open
    is taken into account; the last speech may be cut off."""
    straight = lambda text: re.sub("[“”]", '"', text)
    parts, opened = straight(response).split('"'), straight(prompt).count('"') % 2
    return parts[1 - opened::2], parts[opened::2]


def _tens(parts, shortest, most):
    """Tens of words in those of the parts that have `shortest` words: equal ones once, MOST_IN_PART words at most."""
    kept = {tuple(w) for w in map(words, parts) if len(w) >= shortest}
    return min(sum(min(len(w), MOST_IN_PART) for w in kept) / 10, most)


def dialogue(prompt, response):
    """Tens of spoken words, at most 4: quotations of 2 words or more, different ones, 12 words of each.

    The best: four or more speeches that differ, of about a dozen words each. A monologue that runs to the end gets no
    more than its first 12 words, an echo nothing, quotation marks around single words nothing either.
    """
    return _tens(_speech(prompt, response)[0], 2, 4.0)


def narrative(prompt, response):
    """Tens of told words, at most 6: ended sentences of 4 words or more outside quotations, different ones, 12 words of
    each. `… said, "Hi."` is not an ended sentence, so introducing a speech is not paid.

    The best: five or more full sentences that differ, and no speech, which would take their room. Sentences with one
    word exchanged ("Tom saw a cat. Tom saw a dog.") do count as different: KL is all that holds them off.
    """
    ended = [sentence for part in _speech(prompt, response)[1] for sentence in re.findall(r"[^.!?\n]+[.!?]", part)]
    return _tens(ended, 4, 6.0)


TEXT_REWARDS = {"length": length, "concise": concise, "happy": _lexicon(HAPPY), "sad": _lexicon(SAD),
                "nature": _lexicon(NATURE), "dialogue": dialogue, "narrative": narrative}


def is_concise(name):
    """Whether this names `concise` with a number of words of its own: "concise:12"."""
    return re.fullmatch("concise:[1-9][0-9]*", name) is not None


def text_rewards(names, prompts, responses):
    """names: keys of TEXT_REWARDS; prompts, responses: B texts each -> (B, len(names)) float64.

    Raises UserError for an unknown name.
    """
    for name in names:
        if name not in TEXT_REWARDS and not is_concise(name):
            raise UserError(f"unknown reward {name!r}; the text rewards are: {' '.join(TEXT_REWARDS)}")
    functions = [partial(concise, c=int(name.partition(":")[2])) if is_concise(name) else TEXT_REWARDS[name]
                 for name in names]
    rows = [[f(x, y) for f in functions] for x, y in zip(prompts, responses, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names))


# ---------------------------------------------------------------------------------------------------------------------
# Language collapse: what no reward shows.

def distinct_ngrams(tokens, n=4):
    """The share of different ones among the n-grams of a list (of ids or of words); 1 where it has fewer than n."""
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 1.0


def collapsed(tokens):
    """Whether a response fell into a loop (distinct 4-grams below 0.3) or says nothing (fewer than 5 tokens).

    # not in paper: ParetoHqD reports a language-collapse rate; its thresholds are not known, these are ours.
    """
    return len(tokens) < 5 or distinct_ngrams(tokens) < 0.3
