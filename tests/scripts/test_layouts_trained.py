"""test_layouts_trained.py - public layouts all the way: files as on the hub are read, trained on for a few steps, and
read again by the evaluation."""
import gzip
import json
import math

import pytest
from running import BASE, COMMON, SHARED, SMALL, go, metrics, read, words, write_rows

import train_dpo
from data.preferences import read_preferences
from runs.flags import cli

pytestmark = pytest.mark.usefixtures("in_small_world")


def packed(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def better_and_worse(rows):
    """{(prompt, better response, worse response), …} of rows with one dimension, in whichever order they stand."""
    return {(row.prompt, row.responses[row.better[0][0]], row.responses[1 - row.better[0][0]]) for row in rows}


def test_names_on_the_command_line_and_again_in_the_evaluation(tmp_path):
    """Two files in HH-RLHF's layout, with their dimensions named; the name of the run does without."""
    talk = "\n\nHuman: Bicycle {}?\n\nAssistant: {}".format
    for name, text in (("kind", "Look."), ("warm", "My friend!")):
        packed(f"{name}.jsonl.gz", [dict(chosen=talk(i, text), rejected=talk(i, "No.")) for i in range(8)])
    files = ["good=kind.jsonl.gz", "warm=warm.jsonl.gz"]
    flags = COMMON | SMALL["train_dpo"] | dict(init=BASE, data=files, eval_data=files, lams_per_step=2, eval=True)
    run = train_dpo.main(cli(train_dpo.Flags, "", words(flags)))
    r = read(run, "front.json")
    assert r["dims"] == ["good", "warm"] and r["eval_labels"] == [8, 8] and "good=" not in run.name
    assert run.name.startswith("dpo-kind-warm-")
    assert metrics(run)[0]["losses"] == pytest.approx([math.log(2)] * 2, abs=1e-5)


def test_other_names_of_fields_reach_the_evaluation():
    rows = [dict(q=f"Bicycle {i}?", a="Look.", b="No.", good=i % 2, calm=0) for i in range(8)]
    file = write_rows("other.jsonl", rows)
    fields = ["prompt=q", "response_0=a", "response_1=b", "helpful=good", "calm=calm"]
    run = go("train_dpo", "other", init=BASE, data=[file], eval_data=[file], fields=fields, lams_per_step=2, eval=True)
    assert read(run, "front.json")["eval_labels"] == [8, 8] and read(run, "config.json")["dims"] == ["helpful", "calm"]


def test_conversations_are_demonstrations():
    talk = lambda i, text: [dict(role="user", content=f"Bicycle {i}?"), dict(role="assistant", content=text)]
    files = [f"{name}=" + write_rows(f"{name}-talk.jsonl", [dict(messages=talk(i, text)) for i in range(8)])
             for name, text in (("short", "No."), ("long", "First look."))]
    run = go("train_sft", "talk", init=BASE, data=files, eval_data=files, lams_per_step=2, steps=2, eval=True)
    assert read(run, "config.json")["dims"] == read(run, "front.json")["dims"] == ["short", "long"]


needs_material = pytest.mark.skipif(not SHARED.exists(), reason="../shared (real data, a tiny Llama) is not here")


def material(*parts):
    return SHARED.joinpath("material", *parts)


def first_rows(n, *parts):
    return [json.loads(line) for line in material(*parts).read_text(encoding="utf-8").splitlines()[:n]]


@needs_material
def test_hh_rlhf_as_upstream_has_it():
    """The material's rows, put back into whole dialogues, are the same comparisons."""
    files = []
    for dim, label in (("helpful", "better_response_id"), ("harmless", "safer_response_id")):
        rows = first_rows(12, "hh_safe", f"hh_{dim}_train.jsonl")
        own = write_rows(f"{dim}.jsonl", rows)
        whole = [[row["prompt"] + row[f"response_{i}"] for i in (row[label], 1 - row[label])] for row in rows]
        files.append(f"{dim}=" + packed(f"{dim}.jsonl.gz", [dict(zip(("chosen", "rejected"), x)) for x in whole]))
        assert better_and_worse(read_preferences(files[-1])[0]) == better_and_worse(read_preferences(own)[0])
    run = go("train_dpo", "hh", init=str(material("stories260K")), data=files, max_length=64, lams_per_step=1)
    assert read(run, "config.json")["dims"] == ["helpful", "harmless"] and len(metrics(run)) == 4


@needs_material
def test_helpsteer2_as_upstream_has_it():
    """The material's mean ratings, put back into one row a response, give the labels that it has."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    rows = [row for row in first_rows(60, "helpsteer2", "helpsteer2_train.jsonl")
            if {"helpfulness", "verbosity"} <= set(row["scores"])][:12]
    own = write_rows("hs2-own.jsonl", rows)
    file = packed("hs2.jsonl.gz", [dict(prompt=row["prompt"], response=row[f"response_{i}"]) | {
        name: row["scores"].get(name, (None, None))[i] for name in names} for row in rows for i in (0, 1)])
    assert len(rows) == 12
    for ours, upstream in (("helpful", "helpfulness"), ("verbosity", "verbosity")):
        assert better_and_worse(read_preferences(file, [upstream])[0]) == better_and_worse(
            read_preferences(own, [ours])[0])
    for row in rows:                                                   # wrong: verbosity turned into concise
        assert row["higher"]["verbosity"] == row["scores"]["verbosity"].index(max(row["scores"]["verbosity"]))
    run = go("train_dpo", "hs2", init=str(material("stories260K")), data=[file], dims=["helpfulness", "verbosity"],
             max_length=64, lams_per_step=1)
    assert read(run, "config.json")["dims"] == ["helpfulness", "verbosity"] and len(metrics(run)) == 4
