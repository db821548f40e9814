"""labelers.py - why one scalar label is not enough (Panacea, arXiv:2402.02030v1, Appendix A), on the embedded world.

    python -m experiments.labelers --panacea out/dpo-helpful-harmless       # a run of train_dpo.py

Labelers agree on every dimension, r_1 … r_m, and weigh the dimensions differently: labeler i judges by Σ_j λ^i_j r_j
(Assumption A.3, Eq. (10)). Asked for one label per pair, "which is better?", they contradict each other, and a model
that is trained on the pooled labels serves none of them: RLHF gets the λ^opt = Σ p^i λ^i that nobody has (Theorem A.4,
Eq. (11)); DPO fits the pooled probabilities of the labels, which contradictions pull to ½. Asked for one label per
dimension they agree, and one Panacea model serves each labeler at that labeler's λ.

Served: U_i(π) = E Σ_j λ^i_j r_j − KL(π‖π_ref), scaled to 0 for the base model and 1 for the best of all policies for
labeler i alone, π_ref exp(Σ_j λ^i_j r_j). Exact expectations on unseen prompts.
labelers: (n, m), one λ each   m: dimensions   X: prompts   S: responses   P: pairs   R: responses of a batch
"""
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from aggregate import linear_scalarization
from data import toy
from data.batches import Batches, pad_to
from data.reference import reference_logprobs
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs
from fronts import optimum
from fronts.measure import World, base_of, run_config, world_logprobs
from fronts.objective import listed_only
from fronts.pictures import draw_labelers
from objectives import dpo_loss, losses_on_pairs
from runs.files import UserError, write_json
from runs.flags import flag, run_main
from runs.loop import Run, adamw, add_adapter
from runs.processes import pick_device
from runs.randomness import generator_for
from svd_lora import load_adapter, set_preference, shared_base


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    panacea: str = flag("out/dpo-helpful-harmless", "a finished run of train_dpo.py, m = 2")
    labelers: list[float] = flag([1.0, 0.8, 0.2, 0.0], "each labeler's weight of the first dimension", "share")
    steps: int | None = flag(None, "steps of the model on pooled labels (default: the Panacea run's)", 1)
    out: str = flag("out/appendix-a", "where table and picture go")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Trains DPO on pooled scalar labels, compares; writes labelers.json and labelers.png. Returns what it wrote."""
    device, _ = pick_device(flags.device)
    run = Path(flags.panacea)
    config = run_config(run)
    if config["script"] != "train_dpo.py" or config["flags"]["data"] or len(config["dims"]) != 2 or not (
            run / "adapter.safetensors").exists():
        raise UserError(f"{run} is no finished Panacea run on two of the embedded world's dimensions: "
                        f"run  python train_dpo.py --pref_dim 2  first")
    dims, first = config["dims"], torch.tensor(flags.labelers, dtype=torch.float64)
    labelers = torch.stack([first, 1 - first], dim=1)                                 # (n, m)
    model, tokenizer = base_of(config, device), load_tokenizer(config["tokenizer"])
    world = World(dims, tokenizer, device)
    world.reference(model)

    # 1. one model on the labels of all, pooled: one scalar label per pair
    pooled = train_pooled(model, config, labelers, flags, tokenizer, device)
    measured = lambda policy: optimum.with_outside(world_logprobs(policy, world.batches))                # (X, O)
    said = {"pooled DPO, trained": measured(pooled).expand(len(labelers), -1, -1)}
    # 2. one Panacea model on labels of each dimension, at each labeler's λ
    panacea, at = shared_base(model), []
    load_adapter(panacea, run / "adapter.safetensors", dims)
    for lam in labelers.float():
        set_preference(panacea, lam)
        at.append(measured(panacea))
    said["Panacea (DPO), trained"] = torch.stack(at)                                  # (n, X, O)
    # 3. the same by the best of all policies
    said |= optimal(world, labelers)

    # U_i of policies (n, X, O), one for each labeler -> (n,)
    utility = lambda logps: linear_scalarization(torch.stack([world.mean_scores(x) for x in logps]), labelers) - (
        logps.exp() * (logps - world.ref)).sum(-1).mean(-1)
    low, high = utility(world.ref.expand(len(labelers), -1, -1)), utility(said["for this labeler alone"])
    served = {name: ((utility(logps) - low) / (high - low)).tolist() for name, logps in said.items()}
    print(f"{'labeler: λ =':34}" + "".join(f"{f'({a:.2g}, {b:.2g})':>13}" for a, b in labelers.tolist()))
    for name, row in served.items():
        print(f"{name:34}" + "".join(f"{x:13.3f}" for x in row))
    print("how well each labeler is served: 0 as by the base model, 1 as by the best policy for this labeler alone")
    result = {"dims": dims, "labelers": labelers.tolist(), "served": served,
              "scores": {name: torch.stack([world.mean_scores(x) for x in logps]).tolist()
                         for name, logps in said.items()}, "base": world.mean_scores(world.ref).tolist()}
    write_json(Path(flags.out) / "labelers.json", result)
    draw_labelers(result, Path(flags.out) / "labelers.png")
    return result


def train_pooled(base, config, labelers, flags, tokenizer, device):
    """DPO with the Panacea run's own settings but for the labels: one per pair, by one of the labelers; so no λ."""
    settings = SimpleNamespace(**config["flags"] | {"aggregate": "ls", "snapshots": 0, "save_every": None})
    out, steps = Path(flags.out), flags.steps or settings.steps
    rows = toy.sample_pairs("train", config["dims"], settings.rows, settings.responses,
                            generator_for(settings.seed, "pairs"), labelers)
    rows = tokenize(rows, tokenizer, settings.max_length)[0]
    model = shared_base(base)
    reference, _ = reference_logprobs(model, rows, settings.batch_size, pad_to(device), device)
    add_adapter(model, settings, 0)
    batches = Batches(rows, [torch.ones(len(row.better), 1) for row in rows], settings, 1, device)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    run = Run(model, adamw(model, settings), out, "pooled", settings, steps, ["better"])
    for step in run.steps():
        batch = batches.take(step)
        pi = batch_logprobs(model, batch.tree)                                        # (R,)
        ref = torch.cat([reference[j] for j in batch.rows]).to(device)                # (R,)
        losses, correct, known = losses_on_pairs(dpo_loss, pi, ref, batch.tree.pairs, batch.tree.better, settings.beta)
        run.update(batch.mean(losses).mean())                                         # (P, 1) -> (1, 1) -> ()
        run.log(*batch.tree.size, ("losses",), means={"losses": (losses, known)})
    return model


def optimal(world, labelers):
    """{name: log-probs (n, X, O)} of optimal policies: pooled labels by RLHF and by DPO; Panacea, one per labeler."""
    n, own = len(labelers), torch.einsum("xom,nm->nxo", world.scores, labelers)       # labeler i's scalar reward
    scores, w, problem = world.problems                                               # (Q, S, m)
    # DPO on pooled labels: P(a better than b) = Σ p^i σ(λ^i · (r(a) − r(b))), one dimension for the solver
    win_prob = torch.stack([optimum.win_probs((scores @ lam)[..., None]) for lam in labelers]).mean(0)    # (Q, 1, S, S)
    h = optimum.newton(win_prob.sum(-1)[:, 0], scores @ labelers.mean(0))                                 # (Q, S)
    listed = world.ref[:, :-1]
    return {"pooled RLHF, exact: λ^opt":                                               # Eq. (11) with p^i = 1/n
            (world.ref + own.mean(0)).log_softmax(-1).expand(n, -1, -1),
            "pooled DPO, exact": listed_only(listed + h[problem]).expand(n, -1, -1),
            "Panacea (DPO), exact": listed_only(listed + optimum.dpo_ls(labelers, scores, w)[1][:, problem]),
            "for this labeler alone": (world.ref + own).log_softmax(-1)}


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
