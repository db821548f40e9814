"""test_text_rewards.py - text rewards by hand, and the hacks that they must not pay for."""
import pytest
import torch

from data.files import Message
from data.text_rewards import TEXT_REWARDS, collapsed, text_rewards, words
from runs.files import UserError


def reward(name, response, prompt=""):
    return TEXT_REWARDS[name](prompt, response)


def test_words():
    assert words("Don’t stop, Tim! It's 3 o'clock_now -- 'yes'.") == ["don't", "stop", "tim", "it's", "o'clock", "now",
                                                                       "yes"]
    assert words("") == words(' "?! 12 ') == []


# ---- the lexicon ----

def test_the_lexicon_counts_different_words():
    name, one, two = "happy", "Tom was happy.", "Tom smiled a lot."
    assert reward(name, "") == reward(name, "Tom had a red car.") == 0
    assert reward(name, one) == reward(name, one.upper()) == reward(name, one.replace(".", "!")) == 1     # case, marks
    assert reward(name, f"{one} {two}") == 2
    assert reward(name, " ".join([one] * 9)) == 1                        # wrong: a count of all occurrences gives 9
    assert reward(name, two, prompt=one) == 1                            # the prompt's own words are not the policy's


def test_forms_of_a_word_count_once():
    assert reward("happy", "He will smile now. She smiled at him. They were smiling.") == 1
    assert reward("happy", "She began to laugh. She laughed and laughed.") == 1
    assert reward("happy", "He will smile now. She laughed at him. They were glad.") == 3


def test_the_lexicon_matches_whole_words():
    # wrong: a search for substrings finds happy, joy, fun, love
    assert reward("happy", "They lived happily ever after. A funny killjoy function.") == 0
    assert reward("happy", "Two lovers put a glove on.") == 0
    assert reward("happy", "Tom felt happy-looking, or happy, or \"happy\"") == 1


def test_a_list_of_words_is_one_sentence():
    assert reward("happy", "Happy, glad, joy, smile, laugh, fun, proud, hug") == 1        # wrong: 6 without the rule
    assert reward("happy", "Happy. Glad! Joy. Fun. Proud.") == 0         # wrong: sentences of a single word
    assert reward("happy", "Tom was happy. He was happy and glad.") == 2                  # the first that is new
    six = "I was happy. I was glad. I was proud. I had fun. I did laugh. I did smile."
    assert reward("happy", six) == 6 == reward("happy", six + " It was wonderful.")       # at most 6


# ---- length, concise ----

def test_length_by_hand():
    assert reward("length", "") == 0 and reward("length", "One, two!") == 0.2 and reward("length", "a b c d") == 0.4
    assert reward("length", "the cat sat. " * 20) == 0.5                 # 2 + 3 different phrases; wrong: 6 (60 words)
    assert reward("length", "a " * 90) == 0.3
    many = " ".join(chr(97 + i) + chr(97 + j) for i in range(10) for j in range(10))
    assert reward("length", many) == 6 and reward("length", many[:59 * 3]) == 5.9         # capped at 60 words
    assert reward("length", "......!!!???" * 20) == 0                    # wrong: characters or tokens count


@pytest.mark.parametrize("n, value", [(0, 4), (25, 4), (50, 4), (51, 5 - 51 / 50), (75, 3.5), (100, 3)])
def test_concise_by_hand(n, value):
    assert reward("concise", "word " * n) == pytest.approx(value)        # continuous at 50; wrong: no + 1


# ---- dialogue, narrative ----

STORY = 'Tom saw a big dog. "Hello, big dog!" he said to it. The dog said, "Hello." Tom ran to his red house!'


def test_dialogue_and_narrative_by_hand():
    assert reward("dialogue", STORY) == 0.3                              # hello big dog; a single word is no speech
    # "Tom saw a big dog." 5, " he said to it." 4, " Tom ran to his red house!" 6; "The dog said," does not end
    assert reward("narrative", STORY) == 1.5
    assert reward("dialogue", "") == reward("narrative", "") == 0
    curly = STORY.replace('"Hello, big', "“Hello, big").replace('dog!"', "dog!”")
    for name in ("dialogue", "narrative"):
        assert reward(name, curly) == reward(name, STORY)
        assert reward(name, STORY + " " + STORY) == reward(name, STORY)  # wrong: repetition doubles it


def test_a_quotation_that_the_prompt_opened():
    prompt, response = 'Mom said, "I see', 'a very big dog." Tom did not look up at all.'
    assert reward("dialogue", response, prompt) == 0.4 and reward("narrative", response, prompt) == 0.7
    # wrong: the response alone, where speech and telling change places
    assert reward("dialogue", response) == 0.7 and reward("narrative", response) == 0.4
    assert reward("dialogue", response, 'Mom said, "Oh!" and "I see') == 0.4
    assert reward("dialogue", response, prompt + '" and ran to') == 0.7


def test_dialogue_is_not_paid_for_marks_or_monologues():
    assert reward("dialogue", '"' * 50) == reward("dialogue", '"a" ' * 50) == 0
    assert reward("dialogue", '"' + "blah and so on " * 20) == 1.2       # to the end, never closed: 12 words
    assert reward("dialogue", '"No, Tom!" ' * 20) == 0.2                 # an echo
    speeches = " ".join(f'"{a} sees ten blue birds and nine red frogs in their lake"' for a in ("Tom", "Mia", "Ann"))
    assert reward("dialogue", speeches) == pytest.approx(3.6)
    assert reward("dialogue", speeches + ' "' + "and he is glad too " * 2 + '"') == 4     # at most 4
    assert reward("narrative", speeches) == 0


def test_narrative_is_not_paid_for_fragments_or_endless_sentences():
    assert reward("narrative", "Dog ran. Cat sat! Tom sat down. " * 9) == 0               # 3 words are no full sentence
    assert reward("narrative", "a dog and " * 30) == 0                   # never ends
    assert reward("narrative", "a dog and " * 30 + ".") == 1.2
    different = [f"{who} had a ball and a car and a red hat there." for who in ("An", "Bo", "Cy", "Di", "Ed", "Flo")]
    assert reward("narrative", " ".join(different)) == 6                 # at most 6


# ---- all of them ----

def test_text_rewards_is_one_column_a_name():
    prompts, responses = ["", 'Mom said, "I see'], [STORY, "a dog. I am glad."]
    table = text_rewards(["dialogue", "happy", "narrative"], prompts, responses)
    assert table.dtype == torch.float64 and table.shape == (2, 3)
    assert torch.allclose(table, torch.tensor([[0.3, 0, 1.5], [0.5, 1, 0]], dtype=torch.float64))
    # of turns the last user's words count; wrong: a speech that an earlier turn has left open
    turns = (Message("user", 'He said "I'), Message("assistant", 'see" a'), Message("user", 'Mom said, "I see'))
    assert torch.equal(text_rewards(["dialogue", "happy", "narrative"], ["", turns], responses), table)
    assert text_rewards(["happy", "length"], [], []).shape == (0, 2)
    with pytest.raises(ValueError):
        text_rewards(["happy"], prompts, responses[:1])
    with pytest.raises(UserError, match="unknown reward 'happyness'.*length concise happy dialogue narrative"):
        text_rewards(["happy", "happyness"], prompts, responses)


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_rewards_are_pure_and_take_any_text(name):
    for text in ("", " ", '"', "\n\n", "ärger “ʼ’ 你好。", "\ud83d", STORY):
        value = reward(name, text, text)
        assert type(value) is float and value == reward(name, text, text) and 0 <= value <= 6


def test_collapsed_by_hand():
    assert collapsed([1, 2, 3, 4]) and not collapsed([1, 2, 3, 4, 5]) and collapsed([])
    assert collapsed([7] * 13) and not collapsed([7] * 6) and collapsed([7] * 7)         # 1/10, 1/3 and 1/4; wrong: 1/6
    assert collapsed("once upon a time".split() * 5) and not collapsed("once upon a time".split() * 4)   # 4/17, 4/13
