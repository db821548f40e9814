"""heads.py - scalar heads on a Transformer's hidden states: PPO's critic, and the reward model.

B: rows of a batch   T: tokens of a row   R: responses   L: tokens of the longest response   D: d_model   m: dimensions
n: heads of the critic, advantages of a token
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Critic(nn.Module):
    """The critic V_i(s_t, λ), i = 1..n: a two-layer network. Its inputs at token t of a response: the policy's hidden
    state that predicts y_t; the mean of the hidden states since the response began; the log-probability of the least
    likely token among y_1..y_{t−1}; and λ, simply as m further inputs.

    # differs: the reference implementation's critic is a second language model. Here the hidden states come from the
    policy's own forward pass, detached, so the value loss never moves the policy. Through the SVD-LoRA they depend on
    λ, but not yet before training: hence λ as an input. The mean is there because a hidden state may drop what was said
    before where it does not matter for the next token, while the reward still depends on it. The least likely token
    shows a mistake where it happens: without it, the loss of reward would be credited to other tokens.
    The last layer starts at 0. With n = m heads, linear scalarisation takes V_λ = Σ λ_i V_i, exact since GAE is linear.
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
        """states (R, L, D): those that predict a response's tokens, in order; logps (R, L): of these tokens when they
        were sampled; lam (R, m), one per response -> values (R, L, n) fp32. No gradient reaches the states."""
        h = states.detach().float()
        mean = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]            # (R, L, D)
        before = F.pad(logps.detach()[:, :-1], (1, 0))              # the value at t knows y_1..y_{t−1}, not y_t
        least = before.cummin(1).values.clamp(min=-10)[..., None] / 2                              # (R, L, 1)
        each = lam[:, None].expand(-1, h.shape[1], -1)                                            # (R, L, m)
        return self.outer(F.gelu(self.inner(torch.cat([self.norm(h), self.norm(mean), least, each], dim=-1))))


class RewardModel(nn.Module):
    """r_i(x, y) of m dimensions at once: a frozen language model with one SVD-LoRA adapter (injected with m = 0), which
    all dimensions share, and one fp32 Linear without bias: the loss compares rewards, so a bias would get no gradient.

    It reads the hidden state of the last token of prompt and response, EOS where the response is complete. The head
    starts at 0, so the first Bradley-Terry loss is ln 2.
    """

    def __init__(self, backbone, m):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
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
