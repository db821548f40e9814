"""train_reward.py - reward models, one scalar per preference dimension (Panacea, arXiv:2402.02030v1, Sec. 3.1).

    python train_reward.py --pref_dim 2                      # the embedded world
    python train_reward.py --pref_dim 2 --reward_scale 1 5   # the paper's factor 5 on the harmless reward
    python train_reward.py --dims harmless --init <Hugging Face directory> --data a.jsonl b.jsonl --eval_data c.jsonl
    torchrun --nproc_per_node 8 train_reward.py …            # on several GPUs; --parallel fsdp: a sharded base
    python train_ppo.py --rewards out/reward-helpful-harmless       # uses it (data/rewards.py: load_reward_model)

B: data rows per step   R: responses in them   P: compared pairs   m: dimensions   raw: (R, m), head outputs
All dimensions share one frozen base and one adapter and differ in their heads: one forward pass gives all m rewards.
# not in paper: it has one 7B model per dimension. One run per dimension with --dims gives each an adapter of its own,
for as many forward passes more; docs/results.md compares the two.
The loss is −log σ(r_i(x, y_w) − r_i(x, y_l)), the mean over all labels of the data, whatever their dimension. A row's
responses are packed as a token tree (data/trees.py), so each is computed once, and all of their pairs are used.
Only differences of raw rewards mean anything. What is used is reward_scale_i · (raw_i − mean_i) / std_i, with mean and
standard deviation over responses that the frozen base gives to training prompts, stored in reward.json.
"""
import runs.waiting  # noqa: F401  # isort: skip
from dataclasses import dataclass, replace
from functools import partial

import torch
from safetensors.torch import save_file

from data import toy
from data.base import find_base, load_base, usual_rate
from data.batches import pad_to
from data.chat import announce
from data.files import Row, as_json, plain_name
from data.rewards import raw_rewards
from data.sources import check_preferences, preference_rows, room_for_prompts
from data.tokenizers import as_begun, spoken, tokenize
from data.trees import pack_ends, row_lengths
from fronts.tables import shown, table
from objectives import bradley_terry_loss
from ops.heads import RewardModel
from runs.directory import TRAINED, close_run, end_training, open_run, run_directory
from runs.files import UserError, bar, read_json, write_json, write_jsonl, write_whole
from runs.flags import AdapterFlags, BaseFlags, ProcessFlags, RunFlags, flag, run_main
from runs.loop import Run, adamw
from runs.processes import (
    all_sum,
    check_shares,
    generate_all,
    in_shares,
    init_distributed,
    pick_device,
    shard,
    share,
    sum_of_all,
)
from runs.randomness import epoch_batch, generator_for
from runs.speed import matmul_ceiling
from svd_lora import adapters_off, inject_svd_lora, save_adapter

EVAL_ROWS = 160             # embedded world: held-out data rows
N_REFERENCE = 256           # responses of the frozen base that set mean and standard deviation of the rewards


@dataclass
class Flags(RunFlags, BaseFlags, AdapterFlags, ProcessFlags):
    """The script's flags, with defaults and --help texts; more in runs/flags.py."""

    pref_dim: int = flag(2, "m: the number of preference dimensions, the first m of the data's; 1 is allowed")
    dims: list[str] | None = flag(None, "these dimensions instead, in this order")
    reward_scale: list[float] | None = flag(
        None, "factors on the normalised rewards, one per dimension (default 1 each; the paper has 5 on harmless)",
        "positive")
    data: list[str] | None = flag(None, "preference files of any layout of data/README.md, dimension=file where one "
                                        "has a single label without a name (default: the embedded world)")
    eval_data: list[str] | None = flag(None, "the same for the held-out accuracy (required with --data)")
    rows: int = flag(1920, "embedded world: data rows, each a prompt with some responses, all compared", 1)
    responses: int = flag(12, "embedded world: responses in a row", 2)
    epochs: float = flag(1.0, "passes over --data, where --steps is not given", "positive")
    steps: int | None = flag(None, "optimizer steps (embedded world: 200)", 1)
    lora_dim: int = flag(8, "k, the rank of the adapter", 1)
    max_new_tokens: int = flag(64, "tokens of a reference response; one that is cut has no EOS", 1)


def train(model, rows, dims, flags, out, resume, device):
    """Bradley-Terry likelihood. model: a RewardModel, trained in place   rows: TokenRows"""
    optimizer = adamw(model.backbone, flags, head=model.head)
    run = Run(model, optimizer, out, "reward", flags, flags.steps, dims, resume=resume)
    lengths = None if flags.data is None else row_lengths(rows)       # files: batches of rows of about one length
    labels = sum((torch.tensor(row.better) >= 0).sum().item() for row in rows) / len(rows) * flags.batch_size

    for step in run.steps():
        # 1. a batch of rows, of which each process takes its share
        chosen = epoch_batch(len(rows), flags.batch_size, flags.seed, step, lengths)[share()].tolist()
        batch, last = (x.to(device) for x in pack_ends([rows[j] for j in chosen], pad_to(device)))

        # 2. rewards of all responses, all dimensions
        raw = model(batch.tokens, last, batch.positions, batch.mask)                  # (R, m)

        # 3. loss: the mean over all labels, whatever their dimension. Divided by how many a batch has on average: by
        #    its own number, labels would weigh the more, the fewer are beside them
        losses, correct, known = compare(raw, batch.pairs, batch.better)              # (P, m) each
        loss = sum_of_all((losses * known).sum() / labels)

        # 4. backward, clip, step
        run.update(loss)
        run.log(batch.size[0], 0, ("losses", "accuracy"), labels=all_sum(known.sum(0)).long().tolist(),
                means={"losses": (losses, known), "accuracy": (correct, known)})


def compare(raw, pairs, better):
    """Bradley-Terry on compared responses, every dimension with its own rewards and labels.

    raw (R, m); pairs (P, 2), indices into the R; better (P, m), 0 where the first of a pair is better, 1 the second, -1
    no label. Returns loss, correct (1.0 where the better response has the higher reward; a tie is wrong) and known (0
    where there is no label: there the other two mean nothing), each (P, m).
    """
    first, second = raw.index_select(0, pairs[:, 0]), raw.index_select(0, pairs[:, 1])
    chosen, rejected = torch.where(better == 1, second, first), torch.where(better == 1, first, second)
    return bradley_terry_loss(chosen, rejected), (chosen > rejected).float(), (better >= 0).float()


def main(flags):
    """Trains one reward model, measures it, fixes its normalisation, writes the run directory. Returns its path."""
    device, dtype = pick_device(flags.device, flags.precision, flags.plain)
    rank, processes, device = init_distributed(device)
    given, on_world = replace(flags), flags.data is None
    check_preferences(flags)
    check_shares(flags, flags.batch_size, f"--batch_size {flags.batch_size}", processes)
    matmul_ceiling(device, dtype)                                      # now, while nothing else runs
    base, tokenizer_name = find_base(flags.init, flags.size, flags.tokenizer, device)
    rows, held_out, dims = preference_rows(flags, EVAL_ROWS if flags.eval else 0)
    m = len(dims)
    flags.reward_scale = flags.reward_scale or [1.0] * m
    if len(flags.reward_scale) != m:
        raise UserError(f"--reward_scale has {len(flags.reward_scale)} factors; the dimensions are {' '.join(dims)}")
    # a base to be sharded is read into main memory: it may be too large for one GPU
    backbone, tokenizer = load_base(base, tokenizer_name, torch.device("cpu") if flags.parallel == "fsdp" else device,
                                    dtype, flags)
    flags.lr = flags.lr or usual_rate(on_world, backbone.config)
    flags.steps = flags.steps or (200 if on_world else max(1, round(flags.epochs * len(rows) / flags.batch_size)))
    max_length = room_for_prompts(flags, backbone.config)
    files = [plain_name(f) for f in flags.data or []]
    out = run_directory(["reward", *files], {"data", "eval_data", "fields"}, given, flags, dims)
    tokenizer = as_begun(tokenizer, out, flags.overwrite)
    announce(tokenizer.template, [row.prompt for row in rows])
    token_rows, cut = tokenize(rows, tokenizer, max_length)
    print("data: {prompts} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut".format(**cut))

    resume = open_run("train_reward.py", out, flags, dims, backbone, base, tokenizer, done="reward.json",
                      max_length=max_length, cut=cut)
    if resume == TRAINED:
        if rank == 0:
            print(report_table(read_json(out / "reward.json")))
            close_run(out)
        return out
    inject_svd_lora(backbone, flags.lora_dim, 0, flags.lora_scaling, generator=generator_for(flags.seed, "adapter"))
    if flags.parallel == "fsdp":
        shard(backbone, device)
    model = RewardModel(backbone, m)
    train(model, token_rows, dims, flags, out, resume, device)
    save_adapter(backbone, out / "adapter.safetensors", dims)
    write_whole(out / "heads.safetensors", lambda f: save_file({"head.weight": model.head.weight.detach().cpu()}, f))

    report = {"dims": list(dims), "reward_scale": flags.reward_scale}
    if flags.eval:
        report |= held_out_accuracy(model, held_out, dims, tokenizer, max_length, flags.batch_size, on_world)
    # mean and standard deviation on reference responses, by the same route that rewards take ever after: from texts
    samples = reference_samples(backbone, rows, tokenizer, max_length, flags)
    write_jsonl(out / "reference.jsonl", [s | {"prompt": as_json(s["prompt"])} for s in samples])
    raw = in_shares(partial(raw_rewards, model, tokenizer, max_length),
                    [[s[key] for s in samples] for key in samples[0]], device)
    if not (raw.std(0, correction=0) > 1e-6).all():
        raise UserError("a dimension's reward is the same on all reference responses: nothing was learned; "
                        "raise --steps or --lr")
    report |= {"mean": raw.mean(0).tolist(), "std": raw.std(0, correction=0).tolist(),
               "reference_finished": sum(s["finished"] for s in samples) / len(samples)}
    print(report_table(report))
    if rank > 0:
        return out
    end_training(out, f"{flags.steps} steps", device, dtype, processes)
    write_json(out / "reward.json", report)                            # a directory that has it is a finished run
    close_run(out)
    return out


def report_table(report):
    """What reward.json holds, a line per dimension."""
    heads = {"mean": "mean", "std": "std", "labels": "eval_labels", "held-out accuracy": "accuracy", "±": "accuracy_se",
             "the longer one": "longer_accuracy", "expected": "expected_accuracy", "best possible": "bayes_accuracy",
             "ratio": "bayes_ratio"}
    return table({"on reference responses": report["dims"]} | {
        head: shown(report[key], ".4g") for head, key in heads.items() if key in report})


# ---------------------------------------------------------------------------------------------------------------------
# Held-out accuracy, and the responses that rewards are normalised on.

@torch.no_grad()
def held_out_accuracy(model, rows, dims, tokenizer, max_length, batch_size, on_world):
    """{"accuracy": share of the labels that the rewards agree with, "accuracy_se", "eval_labels",
    "longer_accuracy": that of a rule that takes the response with more tokens}, a list of m each.

    accuracy_se is sqrt(p(1 − p)/n), as if labels were independent. On the embedded world, where the probabilities
    behind the labels are known, also "expected_accuracy", the first without the noise of the labels drawn;
    "bayes_accuracy", that of the true scores, which none can beat; "bayes_ratio", the one over the other.
    """
    token_rows, device, sums = tokenize(rows, tokenizer, max_length)[0], model.head.weight.device, {}
    for i in bar(range(0, len(rows), batch_size), "held-out pairs"):   # every process measures all: it is soon done
        some = token_rows[i:i + batch_size]
        batch, last = pack_ends(some)
        raw = model(batch.tokens.to(device), last.to(device), batch.positions.to(device), batch.mask.to(device)).cpu()
        tokens = torch.tensor([[float(len(y))] for row in some for y in row.responses])               # (R, 1)
        (_, correct, known), (_, longer, _) = (compare(x, batch.pairs, batch.better) for x in (raw, tokens))
        terms = {"labels": known.double(), "correct": correct.double() * known, "longer": longer.double() * known}
        if on_world:
            r = torch.cat([toy.scores(row.prompt.removesuffix("\n"), row.responses, dims)
                           for row in rows[i:i + batch_size]])                        # (R, m)
            first, second = batch.pairs.T
            p = torch.sigmoid(r[first] - r[second])                                   # (P, m): the first is better
            terms |= {"expected": torch.where(raw[first] > raw[second], p, 1 - p), "best": torch.maximum(p, 1 - p)}
        sums = {key: sums.get(key, 0) + term.sum(0) for key, term in terms.items()}                   # (m,) each
    labels, p = sums["labels"], sums["correct"] / sums["labels"]
    report = {"accuracy": p.tolist(), "accuracy_se": (p * (1 - p) / labels).sqrt().tolist(),
              "eval_labels": labels.long().tolist(), "longer_accuracy": (sums["longer"] / labels).tolist()}
    if on_world:
        report |= {"expected_accuracy": (sums["expected"] / labels).tolist(),
                   "bayes_accuracy": (sums["best"] / labels).tolist(),
                   "bayes_ratio": (sums["expected"] / sums["best"]).tolist()}
    return report


@torch.no_grad()
def reference_samples(backbone, rows, tokenizer, max_length, flags):
    """N_REFERENCE responses of the frozen base (temperature 1) to the training prompts, in a random order and again
    from the first where there are fewer. Returns a list of {"prompt", "response", "finished": it ended in EOS}."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    order = torch.randperm(len(prompts), generator=generator_for(flags.seed, "reference")).tolist()
    prompts = [prompts[order[i % len(order)]] for i in range(N_REFERENCE)]
    ids = tokenize([Row(prompt, [], [], []) for prompt in prompts], tokenizer, max_length,
                   max_prompt=max_length - flags.max_new_tokens)[0]
    out = []
    with adapters_off(backbone):
        for i in bar(range(0, len(prompts), 64), "reference responses"):
            out += generate_all(backbone, [row.prompt for row in ids[i:i + 64]], flags.max_new_tokens,
                                tokenizer.ends, generator_for(flags.seed, "reference samples", i),
                                tokenizer.vocab_size)
    return [{"prompt": x, "response": y, "finished": end} for x, y, end in zip(prompts, *spoken(out, tokenizer))]


if __name__ == "__main__":
    run_main(main, Flags, __doc__, several=True)
