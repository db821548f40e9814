"""stationarity.py - how far an RLHF run's policies are from Pareto-stationary, on the embedded world.

At a Pareto-stationary policy some c on the simplex has Σ c_i ∇J_i = 0 (PAMA, arXiv:2508.07768, Theorem 2).
m: dimensions   J: (m,) with all other texts as one more outcome   c: (m,)
"""
import torch

from aggregate import min_norm_weights, simplex_lattice
from data import toy
from data.tokenizers import load_tokenizer
from data.trees import batch_logprobs
from fronts import optimum
from fronts.measure import base_of, policies, run_config
from fronts.objective import OBJECTIVES, measured_on
from model import Transformer
from ops.quantize import dense_state_dict
from runs.files import UserError
from svd_lora import merged_state_dict


def min_norm(world, model, beta):
    """min over c in the simplex of ‖Σ c_i ∇J_i‖ for a plain Transformer.

    The gradients are exact, of J on the world's prompts, and with respect to the matrices that adapters adapt (all of
    them inside the blocks): unlike the adapter's own factors, these mean the same before and after training.
    Returns the norm, c (m,) and the norms of the single gradients (m,). The model's requires_grad is changed.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    model.requires_grad_(False)
    for p in matrices:
        p.requires_grad_(True)
    total, start = [0.0] * world.r_all.shape[-1], 0
    for batch in world.batches:
        logps = optimum.with_outside(batch_logprobs(model, batch).double().cpu().view(-1, toy.N_RESPONSES))
        here = slice(start, start := start + len(logps))                              # the batch's prompts
        J, _ = optimum.rlhf_objectives(logps, world.ref_all[here], world.r_all[here], beta)
        for j, value in enumerate(J * len(logps) / len(world.r_all)):
            grads = torch.autograd.grad(value, matrices, retain_graph=True)
            total[j] = total[j] + torch.cat([g.flatten() for g in grads]).double()
    gram = torch.stack(total) @ torch.stack(total).T                                  # (m, m)
    c = min_norm_weights(gram)
    return (c @ gram @ c).clamp(min=0).sqrt().item(), c.tolist(), gram.diagonal().sqrt().tolist()


def stationarity(run, device):
    """min_norm of the base ("before") and of every model of a run at its own λ ("after"): what stationarity.json holds.

    Raises UserError for a run that is not RLHF on the embedded world.
    """
    config = run_config(run)
    model, beta = base_of(config, device), config["objective"]["beta"]
    world, _ = measured_on(config, model, load_tokenizer(config["tokenizer"]), device)
    if world is None or OBJECTIVES[config["objective"]["name"]].optimum_all is None:
        raise UserError(f"{run}: --stationarity takes runs of train_ppo.py on the embedded world's own dimensions")
    world.reference(model)
    plain = Transformer(model.config).to(model.embed.weight)
    plain.load_state_dict(dense_state_dict(model))
    before, after = [min_norm(world, plain, beta)], []
    for lam, policy in policies(run, config, model, simplex_lattice(len(config["dims"]), 2).float()):
        if config["method"] != "rs":                                                  # a soup is merged already
            plain.load_state_dict(merged_state_dict(policy, lam if config["method"] == "panacea" else None))
        after.append(min_norm(world, policy if config["method"] == "rs" else plain, beta))
    return {"before": before, "after": after}
