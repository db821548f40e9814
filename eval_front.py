"""eval_front.py - what a trained run achieves over the whole simplex of preferences, beside what is possible.

    python eval_front.py out/a                   # writes front.json and front.png into the run directory
    python eval_front.py out/a out/b out/c       # the same for each, and one table and picture of all (out/compare)
    python eval_front.py out/a --evolution       # the front at every snapshot of the training (Fig. 4)

N: preferences   m: dimensions   lams: (N, m)   xi: (N, m) the point reached at each preference, larger is better
J_i = −L_DPO,i; on the embedded world an exact expectation over all pairs of responses and their labels, normalised so
that the exact front's best value of a dimension (ideal) is 1 and its worst (nadir) is 0. The hypervolume's reference
point is −0.1 there in every dimension. On preference files xi is the implicit-reward accuracy, with reference point 0.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aggregate import simplex_lattice
from common import UserError, flag, pick_device, read_json, run_main, write_json
from data import optimum, toy
from data.preferences import read_preferences
from data.tokenizers import load_tokenizer, tokenize
from data.trees import batch_logprobs, pack
from model import Transformer
from objectives import dpo_on_pairs
from plots import draw_evolution, draw_fronts
from svd_lora import adapters_off, fingerprint, load_adapter, merged_state_dict, read_adapter_header, set_preference

REFERENCE = -0.1            # of the hypervolume, in normalised J


# ---------------------------------------------------------------------------------------------------------------------
# 1. Metrics of a set of points, larger is better. Pure functions of (N, m) arrays.

def nondominated(points):
    """Which points no other dominates (at least as good everywhere and better somewhere). (N, m) -> (N,) bool.

    Equal points do not dominate each other: duplicates of a non-dominated point are all kept.
    """
    P = np.asarray(points, dtype=float)
    keep = np.ones(len(P), dtype=bool)
    for i, p in enumerate(P):
        keep[i] = not ((P >= p).all(1) & (P > p).any(1)).any()
    return keep


def hypervolume(points, reference):
    """The volume that is dominated by `points` and dominates `reference`: HV = measure of ∪_i [reference, ξ^i].

    points (N, m), reference (m,); exact, for any m. Points not better than the reference everywhere add nothing.
    """
    P, z = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    P = P[(P > z).all(1)] - z
    return float(_volume(P[nondominated(P)])) if len(P) else 0.0


def _volume(P):
    """Hypervolume over the origin of non-dominated points, slicing off one dimension at a time (m ≤ 2: of any points).

    In ascending order of the last coordinate, what point p adds to the points after it is a slab of height p_m: its
    box in the other m − 1 dimensions, less the part of that box which the later points cover (all of them are taller).
    """
    if P.shape[1] == 1:
        return P.max()
    if P.shape[1] == 2:                                                               # a staircase
        P = P[np.lexsort((-P[:, 1], -P[:, 0]))]
        top = np.maximum.accumulate(P[:, 1])
        return (P[:, 0] * np.diff(top, prepend=0.0)).sum()
    P, total = P[np.argsort(P[:, -1], kind="stable")], 0.0
    for i, p in enumerate(P):
        covered = np.minimum(P[i + 1:, :-1], p[:-1])
        if len(p) > 3:                                                                # the staircase needs no filter
            covered = covered[nondominated(covered)]
        total += p[-1] * (p[:-1].prod() - (_volume(covered) if len(covered) else 0.0))
    return total


def inner_product(lams, points):
    """IP = (1/N) Σ_i ⟨λ^i, ξ^i⟩: whether the points follow the preferences."""
    return float((np.asarray(lams) * np.asarray(points)).sum(1).mean())


def sparsity(points):
    """1/(m(N−1)) Σ_j Σ_i (gap between neighbours on objective j)²; smaller is denser.

    For m = 2 and non-dominated points this is 1/(m(N−1)) Σ_i ‖ξ^i − ξ^{i+1}‖²; the form by objectives carries over to
    m > 2, where points have no one order. Dominated points are not removed here. 0 for a single point.
    """
    P = np.sort(np.asarray(points, dtype=float), axis=0)
    return float((np.diff(P, axis=0) ** 2).sum() / (P.shape[1] * (len(P) - 1))) if len(P) > 1 else 0.0


def spacing(points, p=2):
    """sqrt( (1/N) Σ_i (d_i − d̄)² ), d_i the distance to the nearest other point (p-norm); 0 when evenly spread."""
    P = np.asarray(points, dtype=float)
    if len(P) < 2:
        return 0.0
    distance = np.linalg.norm(P[:, None] - P[None], ord=p, axis=-1) + np.diag(np.full(len(P), np.inf))
    return float(distance.min(1).std())


def spearman(x, y):
    """Rank correlation; ties share their mean rank. 0 where one of the two is constant."""
    rank = lambda v: np.array([(v < a).sum() + ((v == a).sum() - 1) / 2 for a in v])
    a, b = rank(np.asarray(x)), rank(np.asarray(y))
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# 2. Log-probs of responses under a model.

def world_batches(prompts, tokenizer, device, responses=32, rows=40):
    """All responses to `prompts`, packed for world_logprobs: `responses` neighbours a tree, `rows` trees a batch."""
    cut = [toy.as_row(x, texts[i:i + responses]) for x in prompts for texts in [toy.responses(x)]
           for i in range(0, len(texts), responses)]
    trees = tokenize(cut, tokenizer, max_length=10_000)[0]
    return [pack(trees[i:i + rows]).to(device) for i in range(0, len(trees), rows)]


@torch.no_grad()
def world_logprobs(model, batches):
    """log π(y|x) of every prompt's every response: (prompts, S) float64."""
    return torch.cat([batch_logprobs(model, batch) for batch in batches]).double().cpu().view(-1, toy.N_RESPONSES)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The policies of a run.

def policies(run, config, model, lams, adapters=None):
    """Yields (λ, model ready to be used at that λ) for each preference, with `model` changed in place.

    Panacea sets λ in its one adapter. Rewarded soups average the merged weights of m models, W0 + Σ λ_i ΔW_i. A
    discrete policy solution has one adapter for each of its own preferences, and `lams` is ignored.
    """
    method, dims = config["flags"]["method"], config["dims"]
    if method == "panacea":
        load_adapter(model, adapters or run / "adapter.safetensors", dims)
        for lam in lams:
            set_preference(model, lam)
            yield lam, model
    elif method == "rs":
        ends = []
        for dim in dims:
            load_adapter(model, run / f"adapter-{dim}.safetensors", dims)
            ends.append(merged_state_dict(model))
        soup = Transformer(model.config).to(model.embed.weight)
        for lam in lams:
            soup.load_state_dict({key: sum(w * end[key] for w, end in zip(lam.tolist(), ends)) for key in ends[0]})
            yield lam, soup
    else:
        for file in sorted(run.glob("adapter-*.safetensors")):
            header = load_adapter(model, file, dims)
            yield torch.tensor(header["lam"]), model


# ---------------------------------------------------------------------------------------------------------------------
# 4. What a policy achieves.

class World:
    """The embedded world's evaluation prompts with all their responses, ready to measure policies exactly."""

    def __init__(self, dims, tokenizer, device, split="eval"):
        prompts = toy.prompts(split)
        self.batches = world_batches(prompts, tokenizer, device)
        self.scores = torch.stack([toy.scores(x, toy.responses(x)) for x in prompts])                 # (prompts, S, 10)
        self.columns = [toy.DIMS.index(dim) for dim in dims]
        problem_scores, _, self.problem = optimum.problems(prompts, dims)
        self.label_probs = optimum.label_probs(problem_scores)                                         # (Q, m, S, S)

    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        with adapters_off(model):
            self.ref = world_logprobs(model, self.batches)

    def measure(self, model, beta):
        """J (m,), mean scores (m,), KL(π ‖ π_ref) in nats, and the mass on texts that are not the world's.

        Scores and KL are of the policies renormalised to the world's responses.
        """
        logps = world_logprobs(model, self.batches)                                                    # (prompts, S)
        h, J = beta * (logps - self.ref), 0.0
        for q in self.problem.unique():                                               # few: equal prompts share
            here = self.problem == q
            J = J - optimum.dpo_losses(h[here][:, None], self.label_probs[q][None]).sum((0, 1)) / len(h)
        inside, ref = logps.log_softmax(-1), self.ref.log_softmax(-1)
        return {"J": J.tolist(), "scores": self.mean_scores(logps).tolist(),
                "kl": (inside.exp() * (inside - ref)).sum(1).mean().item(),
                "outside_mass": (1 - logps.exp().sum(1)).mean().item()}

    def mean_scores(self, logps):
        """E r_i over the world's responses, renormalised to them. logps: (…, prompts, S) -> (…, m)"""
        return torch.einsum("...xs,xsi->...i", logps.softmax(-1), self.scores[..., self.columns]) / len(self.scores)


class PreferenceFiles:
    """Held-out preference rows: implicit-reward accuracy and −L_DPO of every dimension."""

    def __init__(self, config, model, tokenizer, device):
        flags = config["flags"]
        rows, *_ = read_preferences(flags["eval_data"], dims=config["dims"], seed=flags["seed"])
        rows, cut = tokenize(rows, tokenizer, min(flags["max_length"], model.config.context_length))
        print("evaluation: {prompts} rows, {prompts_cut} prompts and {responses_cut} of {responses} responses cut"
              .format(**cut))
        B = flags["batch_size"]
        self.batches = [pack(rows[i:i + B]).to(device) for i in range(0, len(rows), B)]

    @torch.no_grad()
    def reference(self, model):
        """Measures the base model once; what measure() needs of it."""
        with adapters_off(model):
            self.ref = [batch_logprobs(model, batch) for batch in self.batches]

    @torch.no_grad()
    def measure(self, model, beta):
        """J = −L_DPO (m,) and scores: the implicit-reward accuracy (m,) on the rows that have the label."""
        loss = correct = count = 0.0
        for batch, ref in zip(self.batches, self.ref):
            l, c, known = dpo_on_pairs(batch_logprobs(model, batch), ref, batch.pairs, batch.better, beta)
            loss, correct, count = loss + (l * known).sum(0), correct + (c * known).sum(0), count + known.sum(0)
        self.labels = count.int().tolist()
        return {"J": (-loss / count).tolist(), "scores": (correct / count).tolist(), "kl": None, "outside_mass": None}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The exact front of the embedded world, and the scale that it sets.

def exact_front(dims, aggregate, ideal=None, split="eval"):
    """The best that any policy can do on `split`, for this objective and aggregation, on a fine grid of preferences.

    Returns dict: lams (N, m), J (N, m), ideal (m,), nadir (m,) (the best and worst J_i on the front of linear
    scalarisation), points (N, m) and hypervolume: normalised J and its volume, residual: the largest gradient entry
    (ls) or duality gap (tche) that is left, checked to be 0 but for rounding; and h: a tensor (N, prompts, S), the
    optimal policies as β log π/π_ref.
    """
    m = len(dims)
    lams = simplex_lattice(m, {2: 100, 3: 40}.get(m, parts_for(m) * 2))
    scores, w, problem = optimum.problems(toy.prompts(split), dims)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                              # small matrices: a second thread costs more than it gives
    J, h, residual = optimum.ls_front(lams, scores, w)
    best, worst = J.amax(0), J.amin(0)
    if aggregate == "tche":
        J, h, residual = optimum.tche_front(lams, scores, w, ideal)
    torch.set_num_threads(threads)
    assert residual < 1e-8, f"the exact front is not exact: residual {residual}"
    front = {"lams": lams.tolist(), "J": J.tolist(), "ideal": best.tolist(), "nadir": worst.tolist(),
             "residual": residual}
    points = normalise(front["J"], front)
    return front | {"points": points.tolist(), "hypervolume": hypervolume(points, [REFERENCE] * m), "h": h[:, problem]}


def normalise(J, exact):
    """J (…, m) on the scale of the exact front: 1 is its best value of a dimension, 0 its worst."""
    ideal, nadir = np.array(exact["ideal"]), np.array(exact["nadir"])
    return (np.array(J, dtype=float) - nadir) / (ideal - nadir)


def parts_for(m):
    """Into how many parts an evaluation cuts the simplex: 11 preferences for m = 2, 66 for m = 3, then 21 to 55."""
    return {1: 1, 2: 10, 3: 10, 4: 4, 5: 3}.get(m, 2)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Evaluating runs.

def evaluate(run, device, parts=None, adapters=None, exact=None):
    """Measures one run at every preference of the lattice. Returns what front.json holds.

    adapters: a snapshot instead of the run's final adapter (Panacea). exact: the exact front, if it is known already.
    """
    config = read_json(run / "config.json")
    flags, dims = config["flags"], config["dims"]
    m = len(dims)
    model = Transformer.from_pretrained(config["base"], device=device)
    if fingerprint(model) != config["fingerprint"]:
        raise UserError(f"{config['base']} is not the base model that {run} was trained on")
    tokenizer = load_tokenizer(config["tokenizer"])
    toy_world = flags["data"] is None
    data = World(dims, tokenizer, device) if toy_world else PreferenceFiles(config, model, tokenizer, device)
    data.reference(model)
    base = data.measure(model, flags["beta"])                                         # no adapter yet: π = π_ref
    lams, results = [], []
    grid = simplex_lattice(m, parts or parts_for(m)).float()
    for lam, policy in tqdm(policies(run, config, model, grid, adapters), desc="front", disable=None):
        lams.append([round(x, 6) for x in lam.tolist()])
        results.append(data.measure(policy, flags["beta"]))
    J, scores, kl, outside = ([r[key] for r in results] for key in ("J", "scores", "kl", "outside_mass"))
    if toy_world:
        exact = exact or exact_front(dims, flags["aggregate"], flags["ideal"])
        exact_scores = data.mean_scores(data.ref + exact["h"] / flags["beta"])       # π* ∝ π_ref exp(h/β)
        points, reference = normalise(J, exact), [REFERENCE] * m
        base["points"] = normalise(base["J"], exact).tolist()
    else:
        points, reference = np.array(scores), [0.0] * m
        base["points"] = None                                 # a policy equal to its reference orders no pair
    labels = None if toy_world else data.labels
    front = points[nondominated(points)]
    result = {"run": str(run), "dims": dims, "lams": lams, "J": J, "scores": scores, "points": points.tolist(),
              "points_are": "normalised J" if toy_world else "implicit-reward accuracy",
              "hypervolume": hypervolume(points, reference), "hypervolume_share": None,
              "inner_product": inner_product(lams, points), "sparsity": sparsity(front), "spacing": spacing(front),
              "reference_point": reference, "nondominated": int(nondominated(points).sum()),
              "kl": kl, "outside_mass": outside,
              "spearman": [spearman([lam[i] for lam in lams], points[:, i]) for i in range(m)],
              "base": base, "exact": None, "eval_labels": labels, "models": config["models"],
              **{k: flags[k] for k in ("method", "aggregate", "beta", "steps", "seed")}}
    if toy_world:
        # what the optimum itself would score with these few points, from the lattice's nearest preferences
        nearest = [int(np.abs(np.array(exact["lams"]) - lam).sum(1).argmin()) for lam in lams]
        same = hypervolume(np.array(exact["points"])[nearest], reference) / exact["hypervolume"]
        result |= {"hypervolume_share": result["hypervolume"] / exact["hypervolume"],
                   "exact": exact | {"scores": exact_scores.tolist(), "share_at_these_lams": same}}
    return result


def stored(result):
    """The result as JSON holds it: without the optimal policies themselves."""
    exact = result["exact"] and {key: value for key, value in result["exact"].items() if key != "h"}
    return result | {"exact": exact}


def table(results):
    """One line a run; the metrics are those of section 1, on result["points"]."""
    head = (f"{'run':46} {'HV share':>8} {'HV':>7} {'IP':>7} {'sparsity':>8} {'spacing':>7} {'Spearman':>8} "
            f"{'outside':>7} {'models':>6} {'steps':>6} {'train s':>7}")
    lines = [head, "-" * len(head)]
    for r in results:
        share = f"{r['hypervolume_share']:8.4f}" if r["hypervolume_share"] is not None else f"{'-':>8}"
        outside = f"{max(r['outside_mass']):7.3f}" if r["outside_mass"][0] is not None else f"{'-':>7}"
        lines.append(f"{Path(r['run']).name:46} {share} {r['hypervolume']:7.4f} {r['inner_product']:7.4f} "
                     f"{r['sparsity']:8.4f} {r['spacing']:7.4f} {min(r['spearman']):8.3f} {outside} "
                     f"{r['models']:6d} {r['steps']:6d} "
                     f"{read_json(Path(r['run']) / 'timing.json')['train_seconds']:7.0f}")
    return "\n".join(lines)


def front_table(r):
    """One line a preference: λ, J, and the mean scores (world) or accuracies ± standard error (preference files)."""
    what = "score" if r["exact"] else "acc"
    head = " ".join([f"{'λ_' + d[:8]:>10}" for d in r["dims"]] + [f"{'J_' + d[:8]:>10}" for d in r["dims"]]
                    + [f"{what + '_' + d[:8]:>14}" for d in r["dims"]] + ["     KL outside"])
    lines = [head, "-" * len(head)]
    for lam, J, s, kl, o in zip(r["lams"], r["J"], r["scores"], r["kl"], r["outside_mass"]):
        error = ([""] * len(s) if r["exact"] else
                 [f" ± {(x * (1 - x) / n) ** 0.5:.3f}" for x, n in zip(s, r["eval_labels"])])
        lines.append(" ".join([f"{x:10.2f}" for x in lam] + [f"{x:10.4f}" for x in J]
                              + [f"{f'{x:.3f}{e}':>14}" for x, e in zip(s, error)]
                              + [f"{x:7.3f}" if x is not None else "      -" for x in (kl, o)]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Flags:
    """The script's flags, with defaults and --help texts."""

    runs: list[str] = flag([], "run directories", positional=True)
    parts: int | None = flag(None, "cut the simplex into so many parts (default 10 for m = 2 and 3)")
    out: str = flag("out/compare", "where the comparison of several runs is written")
    evolution: bool = flag(False, "evaluate every snapshot of the (one) run instead")
    device: str = flag("auto", "cpu, cuda, or auto")


def main(flags):
    """Evaluates the runs, prints the tables, writes the JSON files and pictures. Returns the results."""
    device, _ = pick_device(flags.device)
    runs = [Path(run) for run in flags.runs]
    if flags.evolution and len(runs) > 1:
        raise UserError("--evolution takes one run")
    if flags.parts is not None and flags.parts < 1:
        raise UserError(f"--parts {flags.parts}: must be at least 1")
    if flags.evolution:
        return evolution(runs[0], device, flags.parts)
    results, fronts = [], {}
    for run in runs:
        config = read_json(run / "config.json")
        if not (run / "timing.json").exists():
            raise UserError(f"{run}: the training has not ended; run its command again to resume it")
        key = (*config["dims"], config["flags"]["aggregate"], str(config["flags"]["ideal"]))
        r = evaluate(run, device, flags.parts, exact=fronts.get(key))
        fronts[key] = r["exact"]
        if results and (r["points_are"], r["beta"]) != (results[0]["points_are"], results[0]["beta"]):
            raise UserError(f"{run} and {runs[0]} were measured on other data or with another beta: not comparable")
        if results and r["dims"] != results[0]["dims"]:
            raise UserError(f"{run} has the dimensions {' '.join(r['dims'])}, {runs[0]} has "
                            f"{' '.join(results[0]['dims'])}: their fronts lie in different spaces")
        write_json(run / "front.json", stored(r))
        draw_fronts([r], run / "front.png")
        results.append(r)
    if len(results) == 1:
        print(front_table(results[0]))
    print(table(results))
    if results[0]["exact"]:
        print(f"HV share: of the exact front's hypervolume {results[0]['exact']['hypervolume']:.4f} on "
              f"{len(results[0]['exact']['lams'])} preferences; the exact front itself, at these "
              f"{len(results[0]['lams'])}: {results[0]['exact']['share_at_these_lams']:.4f}")
    if len(results) > 1:
        write_json(Path(flags.out) / "front.json", [stored(r) for r in results])
        draw_fronts(results, Path(flags.out) / "front.png")
    print(f"reference point {results[0]['reference_point']} in {results[0]['points_are']}; pictures: "
          + ", ".join(str(run / "front.png") for run in (runs if len(runs) == 1 else [Path(flags.out)])))
    return results


def evolution(run, device, parts):
    """Evaluates every snapshot of one Panacea run: evolution.json and evolution.png in its directory."""
    config = read_json(run / "config.json")
    if config["flags"]["method"] != "panacea" or not (run / "timing.json").exists():
        raise UserError(f"{run}: --evolution takes a finished run of method panacea")
    files = sorted((run / "snapshots").glob("adapter-*.safetensors"))
    steps = [read_adapter_header(f)["step"] for f in files] + [config["flags"]["steps"]]
    results, exact = [], None
    for step, file in zip(steps, files + [run / "adapter.safetensors"]):
        results.append(evaluate(run, device, parts, file, exact))
        exact = results[-1]["exact"]
        print(f"step {step:06d} | hypervolume {results[-1]['hypervolume']:.4f} | "
              f"share {results[-1]['hypervolume_share']}")
    write_json(run / "evolution.json", {"steps": steps, "fronts": [stored(r) for r in results]})
    draw_evolution(steps, results, run / "evolution.png")
    return results


if __name__ == "__main__":
    run_main(main, Flags, __doc__)
