"""appendix_a.py - why one scalar label is not enough (Panacea, arXiv:2402.02030v1, Appendix A), on the embedded world.

    python appendix_a.py --panacea out/dpo-panacea-ls-helpful-harmless-seed0       # a finished run of train_dpo.py

Labelers agree on every dimension, r_1 … r_m, and weigh the dimensions differently: labeler i judges by Σ_j λ^i_j r_j
(Assumption A.3, Eq. (10)). Asked for one label a pair, "which is better?", they contradict each other, and a model that
is trained on the pooled labels serves none of them: RLHF gets the λ^opt = Σ p^i λ^i that nobody has (Theorem A.4, Eq.
(11)); DPO fits the pooled probabilities of the labels, which contradictions pull to ½. Asked for one label a dimension
they agree, and one Panacea model serves each of them at his own λ.

Served: U_i(π) = E Σ_j λ^i_j r_j − KL(π‖π_ref), 0 for the base model and 1 for what labeler i would get from a model of
his own, the best of all policies, π_ref exp(Σ_j λ^i_j r_j). Exact expectations on unseen prompts.
n: labelers   m: dimensions   X: prompts   S: responses
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import train_dpo
from aggregate import linear_scalarization
from runs.device import pick_device
from runs.files import UserError, read_json, write_json
from runs.flags import flag, run_main
from runs.randomness import generator_for
from data import toy
from fronts import optimum
from data.tokenizers import load_tokenizer, tokenize
from eval_front import base_of
from fronts.measure import World, world_logprobs
from fronts.pictures import draw_labelers
from svd_lora import load_adapter, set_preference, shared_base


@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    panacea: str = flag("out/dpo-panacea-ls-helpful-harmless-seed0", "a finished run of train_dpo.py, m = 2")
    labelers: list[float] = flag([1.0, 0.8, 0.2, 0.0], "each labeler's weight of the first dimension")
    steps: int | None = flag(None, "steps of the model on pooled labels (default: the Panacea run's)")
    out: str = flag("out/appendix-a", "where table and picture go")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Trains DPO on pooled scalar labels, compares; writes labelers.json and labelers.png. Returns what it wrote."""
    device, _ = pick_device(flags.device)
    run = Path(flags.panacea)
    config = read_json(run / "config.json")
    if config["script"] != "train_dpo.py" or config["flags"]["data"] or len(config["dims"]) != 2 or not (
            run / "adapter.safetensors").exists():
        raise UserError(f"{run} is no finished Panacea run on two of the embedded world's dimensions: "
                        f"run  python train_dpo.py --pref_dim 2  first")
    if not flags.labelers or not all(0 <= x <= 1 for x in flags.labelers):
        raise UserError("--labelers takes weights between 0 and 1")
    dims, first = config["dims"], torch.tensor(flags.labelers, dtype=torch.float64)
    labelers = torch.stack([first, 1 - first], dim=1)                                 # (n, m)
    model, tokenizer = base_of(config, device), load_tokenizer(config["tokenizer"])
    world = World(dims, tokenizer, device)
    world.reference(model)
    ref = world.ref.log_softmax(-1)                                                   # (X, S)

    # 1. one model on the labels of all, pooled: one scalar label a pair
    pooled = train_pooled(model, config, labelers, flags, tokenizer, device)
    spoken = {"pooled DPO, trained": world_logprobs(pooled, world.batches).expand(len(labelers), -1, -1)}
    # 2. one Panacea model on labels a dimension, at each labeler's λ
    panacea, at = shared_base(model), []
    load_adapter(panacea, run / "adapter.safetensors", dims)
    for lam in labelers.float():
        set_preference(panacea, lam)
        at.append(world_logprobs(panacea, world.batches))
    spoken["Panacea (DPO), trained"] = torch.stack(at)                                # (n, X, S)
    # 3. the same by the best of all policies
    spoken |= optimal(world, ref, labelers, dims)

    utility = lambda logps: linear_scalarization(torch.stack([world.mean_scores(x) for x in logps]), labelers) - (
        logps.softmax(-1) * (logps.log_softmax(-1) - ref)).sum(-1).mean(-1)           # (n, X, S) -> (n,)
    low, high = utility(ref.expand(len(labelers), -1, -1)), utility(spoken["a model of his own"])
    served = {name: ((utility(logps) - low) / (high - low)).tolist() for name, logps in spoken.items()}
    print(f"{'labeler: λ =':34}" + "".join(f"{f'({a:.2g}, {b:.2g})':>13}" for a, b in labelers.tolist()))
    for name, row in served.items():
        print(f"{name:34}" + "".join(f"{x:13.3f}" for x in row))
    print("how well each labeler is served: 0 as by the base model, 1 as by the best policy for him alone")
    result = {"dims": dims, "labelers": labelers.tolist(), "served": served,
              "scores": {name: torch.stack([world.mean_scores(x) for x in logps]).tolist()
                         for name, logps in spoken.items()}, "base": world.mean_scores(world.ref).tolist()}
    write_json(Path(flags.out) / "labelers.json", result)
    draw_labelers(result, Path(flags.out) / "labelers.png")
    return result


def train_pooled(base, config, labelers, flags, tokenizer, device):
    """DPO with the Panacea run's own settings, but for the labels: one a pair, by one of the labelers. -> the model"""
    settings = train_dpo.Flags(**config["flags"])
    settings.lams_per_step, settings.aggregate, settings.snapshots = 1, "ls", 0
    settings.steps = flags.steps or settings.steps
    rows = toy.sample_pairs("train", config["dims"], settings.rows, settings.responses,
                            generator_for(settings.seed, "pairs"), labelers)
    rows = tokenize(rows, tokenizer, settings.max_length)[0]
    model = shared_base(base)
    reference = train_dpo.reference_logprobs(model, rows, settings.batch_size, 1, device)
    with tempfile.TemporaryDirectory() as scratch:            # one dimension, "which is better", and so λ = (1,)
        train_dpo.train(model, Path(scratch) / "adapter", torch.ones(1), rows, reference, ["better"], settings,
                        settings.steps, 0, None, 1, device)
    return model


def optimal(world, ref, labelers, dims):
    """{name: log-probs (n, X, S)} of the optimal policies: pooled labels by RLHF and by DPO, Panacea, one each."""
    n, own = len(labelers), torch.einsum("xsm,nm->nxs", world.scores, labelers)       # labeler i's scalar reward
    scores, w, problem = optimum.problems(toy.prompts("eval"), dims)                  # (Q, S, m)
    # DPO on pooled labels: P(a better than b) = Σ p^i σ(λ^i · (r(a) − r(b))), one dimension for the solver
    P = torch.stack([optimum.label_probs((scores @ lam)[..., None]) for lam in labelers]).mean(0)    # (Q, 1, S, S)
    h = optimum.minimise(torch.ones(1, dtype=torch.float64), P, (scores @ labelers.mean(0)))         # (Q, S)
    return {"pooled RLHF, exact: λ^opt": (ref + own.mean(0)).expand(n, -1, -1),       # Eq. (11) with p^i = 1/n
            "pooled DPO, exact": (ref + h[problem]).expand(n, -1, -1),
            "Panacea (DPO), exact": ref + optimum.ls_front(labelers, scores, w)[1][:, problem],
            "a model of his own": ref + own}


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
