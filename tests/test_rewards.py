"""test_rewards.py - text rewards by hand, the hacks that they must not pay for; prompts cut from stories and split."""
import json
from pathlib import Path

import pytest
import torch

from runs.files import UserError
from data.preferences import Row
from data.prompts import read_prompts, split
from data.text_rewards import TEXT_REWARDS, collapsed, distinct_ngrams, text_rewards, words

STORIES = Path(__file__).parents[2] / "shared" / "material" / "text" / "tinystories_sample.txt"
LEXICONS = pytest.mark.parametrize("name, one, two", [
    ("happy", "Tom was happy.", "Tom smiled a lot."), ("sad", "Tom was sad.", "Then Tom cried."),
    ("nature", "Tom saw trees.", "It was sunny.")])


def reward(name, response, prompt=""):
    return TEXT_REWARDS[name](prompt, response)


def test_words():
    assert words("Don’t stop, Tim! It's 3 o'clock_now -- 'yes'.") == ["don't", "stop", "tim", "it's", "o'clock", "now",
                                                                       "yes"]
    assert words("") == words(' "?! 12 ') == []


# ---- lexicons ----

@LEXICONS
def test_lexicons_count_different_words(name, one, two):
    assert reward(name, "") == reward(name, "Tom had a red car.") == 0
    assert reward(name, one) == reward(name, one.upper()) == reward(name, one.replace(".", "!")) == 1     # case, marks
    assert reward(name, f"{one} {two}") == 2
    assert reward(name, " ".join([one] * 9)) == 1                        # wrong: a count of all occurrences gives 9
    assert reward(name, two, prompt=one) == 1                            # the prompt's own words are not the policy's


def test_forms_of_a_word_count_once():
    assert reward("happy", "He will smile now. She smiled at him. They were smiling.") == 1
    assert reward("sad", "She began to cry. She cried and cried.") == 1
    assert reward("happy", "He will smile now. She laughed at him. They were glad.") == 3


def test_lexicons_match_whole_words():
    # wrong: a search for substrings finds sad, tear, happy, fun, joy, sun, rain, star, sea, tree
    assert reward("sad", "A saddle sadly started tearing. They were close to almost.") == 0
    assert reward("happy", "They lived happily ever after. A funny killjoy function.") == 0
    assert reward("nature", "On Sunday the train started. We searched the treehouse.") == 0
    assert reward("sad", "Tom felt sad-looking, or sad, or \"sad\"") == 1


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
    assert text_rewards(["happy", "sad"], [], []).shape == (0, 2)
    with pytest.raises(ValueError):
        text_rewards(["happy"], prompts, responses[:1])
    with pytest.raises(UserError, match="unknown reward 'happyness'.*length concise happy sad nature dialogue narrat"):
        text_rewards(["happy", "happyness"], prompts, responses)


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_rewards_are_pure_and_take_any_text(name):
    for text in ("", " ", '"', "\n\n", "ärger “ʼ’ 你好。", "\ud83d", STORY):
        value = reward(name, text, text)
        assert type(value) is float and value == reward(name, text, text) and 0 <= value <= 6


def test_distinct_ngrams_and_collapse_by_hand():
    assert distinct_ngrams([1, 2, 3, 4, 5]) == 1 and distinct_ngrams([1, 2, 1, 2, 1, 2]) == pytest.approx(2 / 3)
    assert distinct_ngrams([7] * 13) == 0.1 and distinct_ngrams([7, 7, 7]) == distinct_ngrams([]) == 1
    assert distinct_ngrams(list("abab"), n=2) == pytest.approx(2 / 3)
    assert distinct_ngrams([1, 1, 2, 1, 1, 2], n=1) == pytest.approx(1 / 3)
    assert collapsed([1, 2, 3, 4]) and not collapsed([1, 2, 3, 4, 5]) and collapsed([7] * 13)
    assert not collapsed([7] * 6) and collapsed([7] * 7)                 # 1/3 and 1/4; wrong: single tokens, 1/6
    assert collapsed("once upon a time".split() * 5) and not collapsed("once upon a time".split() * 4)   # 4/17, 4/13


# ---- prompts ----

def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_stories_are_cut_after_their_first_words(tmp_path):
    path = write(tmp_path / "stories.txt", "One  two three four.\n\nFive six.\nThe cat  sat on\n \nthe mat. \n"
                                           "Too short a.\n\tA,\nb c d\n")
    rows, dropped = read_prompts(path, prompt_words=2)
    assert rows == [Row("One  two", [" three four.\n\nFive six."], [], []),
                    Row("The cat", ["  sat on\n \nthe mat."], [], [])]   # a line of one space is a blank line
    assert dropped == {"short": 3, "duplicate": 0}                       # "Too short a.", "A," and "b c d"
    rows, dropped = read_prompts([str(path)], prompt_words=3)            # 6 words each: just enough
    assert [row.prompt for row in rows] == ["One  two three", "The cat  sat"] and dropped["short"] == 3
    write(path, "one two\r\n\r\nthree four\r\nfive six seven\r\n")     # line ends of another system
    assert read_prompts(path, prompt_words=1)[0] == [Row("one", [" two\n\nthree four"], [], []),
                                                     Row("five", [" six seven"], [], [])]


def test_prompts_of_jsonl_take_the_form_of_preference_files(tmp_path):
    lines = [dict(prompt="hi"), dict(prompt="ho", response="A"), dict(prompt="Human: x\n\nAssistant:", response="B")]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(line) + "\n\n" for line in lines))
    rows, dropped = read_prompts(path)
    assert rows == [Row("\n\nHuman: hi\n\nAssistant:", [], [], []),
                    Row("\n\nHuman: ho\n\nAssistant:", [" A"], [], []),
                    Row("Human: x\n\nAssistant:", ["B"], [], [])] and dropped == {"short": 0, "duplicate": 0}


def test_equal_prompts_are_kept_once(tmp_path):
    stories = write(tmp_path / "s.txt", "A cat sat down.\nA cat ran off.\nA dog ran off.\n")
    rows, dropped = read_prompts(stories, prompt_words=2)
    assert [(row.prompt, row.responses) for row in rows] == [("A cat", [" sat down."]), ("A dog", [" ran off."])]
    assert dropped == {"short": 0, "duplicate": 1}
    rows, dropped = read_prompts([stories, stories], prompt_words=2)     # across files too
    assert len(rows) == 2 and dropped == {"short": 0, "duplicate": 4}


@pytest.mark.parametrize("name, text, message", [
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r'p.jsonl, row 2: field "prompt" must be a string, not 3'),
    ("p.jsonl", '{"prompt": "a"}\n\n{"response": "x"}\n', r'p.jsonl, row 3: field "prompt" is missing'),
    ("p.jsonl", '{"prompt": "a", "response": ["b"]}\n', r'p.jsonl, row 1: field "response" must be a string'),
    ("p.jsonl", "[1]\n", r'p.jsonl, row 1: field "prompt" is missing'),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt"', r"p.jsonl, row 2: not JSON"),
    ("p.jsonl", "\n", r"p.jsonl: there is no prompt in it"),
    ("s.txt", "too short\n", r"s.txt: there is no prompt in it"),
    ("s.txt", b"\xff\xfe", r"s.txt: not UTF-8 text"),
    ("s.csv", "a", r"s.csv: give a .txt file of stories or a .jsonl file"),
])
def test_bad_files_name_file_row_and_field(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name, prompt_words=2)


def test_what_else_cannot_be_read(tmp_path):
    path = write(tmp_path / "s.txt", "a b c d\n")
    for arguments, message in [((path,), "give the number of words"), ((path, 0), "give the number of words"),
                               ((tmp_path / "none.txt", 2), "none.txt: cannot be read"), (([], 2), "no prompt file")]:
        with pytest.raises(UserError, match=message):
            read_prompts(*arguments)


def test_split_is_by_the_prompt_alone():
    rows = [Row(f"prompt {i}", [], [], []) for i in range(2000)]
    train, held_out = split(rows)
    assert len(train) + len(held_out) == 2000 and not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert abs(len(held_out) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5      # binomial
    assert [r.prompt for r in held_out[:3]] == ["prompt 14", "prompt 15", "prompt 19"]    # wrong: hash(), shuffles
    assert split(rows[::-1])[1] == held_out[::-1]
    assert split(rows[500:600])[1] == [row for row in held_out if row in rows[500:600]]
    assert {r.prompt for r in held_out} < {r.prompt for r in split(rows, share=0.2)[1]}
    assert split(rows, share=0.0) == (rows, []) and split(rows, share=1.0) == ([], rows)
    one, other = Row("prompt 0", ["a"], [], []), Row("prompt 0", ["b"], [], [])
    assert [] in split([one, other], share=0.5)                          # together, whatever their responses


@pytest.mark.skipif(not STORIES.exists(), reason="shared/material is not beside the repository")
@pytest.mark.parametrize("prompt_words", [4, 12])
def test_real_stories_round_trip(prompt_words):
    text = STORIES.read_text(encoding="utf-8")
    rows, dropped = read_prompts(STORIES, prompt_words)
    assert len({row.prompt for row in rows}) == len(rows) > 300 and dropped["duplicate"] > 0
    for row in rows:
        assert row.prompt + row.responses[0] in text                     # wrong: words joined by single spaces
        assert len(row.prompt.split()) == prompt_words <= len(row.responses[0].split())
        assert row.prompt == row.prompt.strip() and row.responses[0][0].isspace() and row.responses[0][-1:].strip()
