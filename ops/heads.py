"""heads.py - scalar heads on a Transformer's hidden states: PPO's critic, and the reward model.

B: sequences   T: tokens   D: d_model   m: dimensions   n: values a state has
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Critic(nn.Module):
    """V_i(s, λ) for n objectives: a two-layer network on the policy's hidden state of s, on the mean of its hidden
    states since the response began, on the least likely token so far, and on λ.

    # differs: the reference implementation's critic is a second language model. Here the states come from the policy's
    own forward pass, detached, so that the value loss never moves the policy; they depend on λ through the SVD-LoRA
    already, and λ is an input besides, since before training the adapter tells nothing of it. The mean is needed: a
    state says how to go on, and forgets what was said before if that does not matter for it, but rewards do not forget.
    The least likely token tells a slip of the tongue at once: without it the blame would be spread over other tokens.
    The last layer starts at 0. With n = m heads, linear scalarisation takes V_λ = Σ λ_i V_i, exact as GAE is linear.
    """

    def __init__(self, d_model, m, n, generator=None):
        super().__init__()
        d_in, width = 2 * d_model + 1 + m, 2 * d_model
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.inner, self.outer = nn.Linear(d_in, width), nn.Linear(width, n)
        nn.init.normal_(self.inner.weight, std=d_in ** -0.5, generator=generator)
        for p in (self.inner.bias, self.outer.weight, self.outer.bias):
            nn.init.zeros_(p)

    def forward(self, states, logps, lam):
        """states (B, L, D): those that predict a response's tokens, in order; logps (B, L): of these tokens when they
        were sampled; lam (B, m), one a response -> values (B, L, n) fp32. No gradient reaches the states."""
        h = states.detach().float()
        mean = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]            # (B, L, D)
        before = F.pad(logps.detach()[:, :-1], (1, 0))              # V_t knows the tokens before t, not y_t itself
        slip = before.cummin(1).values.clamp(min=-10)[..., None] / 2                              # (B, L, 1)
        each = lam[:, None].expand(-1, h.shape[1], -1)                                            # (B, L, m)
        return self.outer(F.gelu(self.inner(torch.cat([self.norm(h), self.norm(mean), slip, each], dim=-1))))


class RewardModel(nn.Module):
    """r_i(x, y) of m dimensions at once: a frozen language model with an SVD-LoRA adapter (m = 0), which all dimensions
    share, and one fp32 Linear without bias: only differences of rewards are trained, so a constant would never move.

    It reads the hidden state of the last token of prompt and response: EOS where the response came to its end. The head
    starts at 0, so the first Bradley-Terry loss is ln 2.
    """

    def __init__(self, backbone, m):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.d_model, m, bias=False, device=backbone.embed.weight.device)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens, last, positions=None, mask=None):
        """tokens (B, T), last (R,): the indices b·T + t of the last tokens -> rewards (R, m) fp32.

        Right-padded sequences need no mask, since nothing looks ahead: last = arange(B)·T + lengths − 1. positions and
        mask are those of Transformer.forward, for token trees (data/trees.py) with several last tokens in a row.
        """
        hidden = self.backbone(tokens, positions, mask, return_hidden=True)                    # (B, T, D)
        # index_select and not [ ]: its backward adds in a fixed order, so that runs repeat bit for bit
        return self.head(hidden.flatten(0, 1).index_select(0, last).float())                   # (R, D) -> (R, m)
