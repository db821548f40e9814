"""handout.py - writes a student's repository: handouts, stubs, graders, data and base model, and no solution.

    python course/handout.py --out DIR              # all sets
    python course/handout.py --out DIR --sets 2     # this set alone; the reference fills in what earlier sets build

What solves a set that is handed out, or a later one, is in none of its files. (Later ones, because a student keeps what
an earlier handout brought.)
"""
import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from course.grade import SETS  # noqa: E402
from course.page import page  # noqa: E402

SHARED = """course/__init__.py course/adapters.py course/conftest.py course/earlier.py course/gpt.py course/grade.py
course/grading.py course/pytest.ini course/world.py data/__init__.py data/base/config.json data/base/model.safetensors
data/chat.py data/files.py data/render.py data/tokenizers.py data/toy.py data/toy.tiktoken
runs/__init__.py runs/files.py requirements.txt LICENSE""".split()
OF_SET = ("__init__.py", "grade.py", "experiment.py", "handout.md")
REFERENCE = {   # set: the files that its solution needs to run, where a later set is handed out without it
    1: ("svd_lora.py model.py families.py ops/__init__.py ops/attention.py ops/fused.py ops/check.py "
        "ops/generation.py ops/quantize.py ops/threads.py").split(),
    2: ["objectives.py", "aggregate.py"],
    3: [],                                                            # no later set needs a front
    4: ["objectives.py", "aggregate.py"],
    5: ["objectives.py", "aggregate.py"]}
LOGPROBS = ("linear_logprob_plain _LinearLogprob _logprob_rows_fp32 _logprob_rows_bf16 logprob_rows_plain "
            "_logprob_rows_cuda linear_logprob")
SOLVES = {      # set: {a file of REFERENCE or SHARED: the names in it that solve the set; None: the whole file}
    1: {"svd_lora.py": None, "ops/generation.py": None, "ops/check.py": None,
        "ops/fused.py": "svd_lora_linear_plain _SVDLoRALinear _down _up_ svd_lora_linear"},
    2: {"objectives.py": "response_logprobs dpo_loss ipo_loss implicit_accuracy losses_on_pairs bradley_terry_loss",
        "aggregate.py": "sample_preference linear_scalarization tchebycheff denominators scalar_reward",
        "ops/fused.py": LOGPROBS},
    3: dict.fromkeys(["fronts/dominance.py", "fronts/metrics.py", "fronts/optimum.py", "fronts/evaluation.py"]),
    4: {"objectives.py": "masked_mean kl_penalized_rewards gae group_advantages ppo_policy_loss ppo_value_loss",
        "aggregate.py": "linear_scalarization scalar_reward pama_advantages", "ops/heads.py": "Critic",
        "ops/fused.py": LOGPROBS},
    5: {"objectives.py": "noon", "aggregate.py": "min_norm_weights pama_weights pama_advantages"},
    6: {"ops/fused.py": LOGPROBS + " _SVDLoRALinear _down _up_ svd_lora_linear",
        "data/trees.py": None, "fronts/selection.py": None, "fronts/dominance.py": None, "train_hqd.py": None}}
INSTEAD = {     # what stands in a file for something that a set solves and an earlier set's solution calls
    6: {"ops/fused.py": """

def svd_lora_linear(*arguments):
    \"\"\"The definition: the fused one with its own backward is a problem of set 6.\"\"\"
    return svd_lora_linear_plain(*arguments)
"""}}
README = """# Problem sets: aligning one language model with many preferences

    pip install -r requirements.txt
    python course/grade.py              # at first every test fails with NotImplementedError

Read `course/set*/handout.md` (or `handout.html`, the same as one page). Write your code in `solution.py`, or in
files of your own, connect it in `course/adapters.py`, and grade it as often as you like: `python course/grade.py NAME`
for one problem (without `--sets`), `--sets N` for one set. `pytest course/setN/grade.py -k NAME` does the same with
pytest's own report.

A set can be started before the earlier ones are solved. Sets: {sets}.
"""
START = '''"""solution.py - your code. course/adapters.py connects it to the grader."""
import torch
'''


def cut(text, names):
    """A module's text without these top-level functions and classes."""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        if getattr(node, "name", None) in names:
            del lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1:node.end_lineno]
    return "".join(lines)


def files(sets):
    """{path: text, or None to copy it} of a student's repository for these sets."""
    hidden = {n: SOLVES[n] for n in SOLVES if n in sets or n > max(sets)}
    earlier = [n for n in SETS if n < max(sets) and n not in sets]
    wanted = [*SHARED, *(f"course/set{n}/{name}" for n in sets for name in OF_SET),
              *(f for n in earlier for f in REFERENCE[n])]
    out = {"README.md": README.format(sets=" ".join(map(str, sets))), "solution.py": START}
    for path in wanted:
        names = [solves[path] for solves in hidden.values() if path in solves]
        if None not in names:
            out[path] = cut((ROOT / path).read_text(encoding="utf-8"), " ".join(names).split()) if names else None
            out[path] = (out[path] or "") + "".join(INSTEAD.get(n, {}).get(path, "") for n in hidden) or None
    return out | {f"course/set{n}/handout.html": page((ROOT / f"course/set{n}/handout.md").read_text(encoding="utf-8"))
                  for n in sets}


def write(out, sets):
    """Writes a student's repository for these sets into the folder `out`."""
    for path, text in files(sets).items():
        target = Path(out) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            shutil.copyfile(ROOT / path, target)
        else:
            target.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--sets", type=int, nargs="+", default=SETS, choices=SETS, help="problem sets (default: all)")
    args = parser.parse_args()
    if Path(args.out).exists():
        print(f"{args.out} exists already: give --out a new folder", file=sys.stderr)
        return 2
    write(args.out, sorted(set(args.sets)))
    print(f"{args.out}: sets {' '.join(map(str, sorted(set(args.sets))))}; first  python course/grade.py  there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
