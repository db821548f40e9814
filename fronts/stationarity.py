"""stationarity.py - how far an RLHF run's policies are from Pareto-stationary, on the embedded world.

At a Pareto-stationary policy some c on the simplex has Σ c_i ∇J_i = 0 (PAMA, arXiv:2508.07768, Theorem 2).
m: dimensions   J: (m,)   c: (m,)
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
from runs.files import UserError, bar
from svd_lora import merged_state_dict, svd_lora_layers


def min_norm(world, model, beta):
    """min over c in the simplex of ‖Σ c_i ∇J_i‖ for a plain Transformer.

    The gradients are exact, of J on the world's prompts, and with respect to the matrices that adapters adapt (all of
    them inside the blocks): unlike the adapter's own factors, these mean the same before and after training.
    Returns the norm, c (m,) and the norms of the single gradients (m,). The model's requires_grad is changed.
    """
    matrices = [p.requires_grad_(True) for p in model.requires_grad_(False).blocks.parameters() if p.ndim == 2]
    total, start = 0.0, 0
    for batch in bar(world.batches, "gradients"):
        logps = optimum.with_outside(batch_logprobs(model, batch).double().cpu().view(-1, toy.N_RESPONSES))
        here = slice(start, start := start + len(logps))                              # the batch's prompts
        J, _ = optimum.rlhf_objectives(logps, world.ref[here], world.r[here], beta)
        grads = [torch.autograd.grad(value, matrices, retain_graph=True) for value in J * len(logps) / len(world.r)]
        total = total + torch.stack([torch.cat([g.flatten() for g in each]).double() for each in grads])
    gram = total @ total.T                                                            # (m, m)
    c = min_norm_weights(gram)
    return (c @ gram @ c).clamp(min=0).sqrt().item(), c.tolist(), gram.diagonal().sqrt().tolist()


def stationarity(run, device):
    """min_norm of the base ("before") and of every model of a run at its own λ ("after"): what stationarity.json holds.

    Raises UserError for a run that is not RLHF on the embedded world.
    """
    config = run_config(run)
    model, beta = base_of(config, device), config["objective"]["beta"]
    worlds, _ = measured_on(config, model, load_tokenizer(config["tokenizer"]), device)
    if not worlds or not OBJECTIVES[config["objective"]["name"]].speaks:
        raise UserError(f"{run}: --stationarity takes runs of train_ppo.py on the embedded world's own dimensions")
    plain = Transformer(model.config).to(model.embed.weight.device)                   # fp32: no update is rounded away

    def at(lam, policy):
        adapted = svd_lora_layers(policy)                                             # the base is not
        plain.load_state_dict(merged_state_dict(policy, lam, torch.float32) if adapted else dense_state_dict(policy))
        return min_norm(worlds[0], plain, beta)

    lams = simplex_lattice(len(config["dims"]), 2).float()
    return {"before": [at(None, model)], "after": [at(*each) for each in policies(run, config, model, lams)]}
