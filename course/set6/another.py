"""another.py - set 6 solved once more from its handout alone: a trie of dicts, einsum, sorting in Python."""
import torch


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, block):
        top = hidden.new_full((len(hidden),), -torch.inf)
        total, own = torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, len(weight), block):
            logits = torch.einsum("nd,vd->nv", hidden, weight[start:start + block])
            new = torch.maximum(top, logits.max(1).values)
            total = total * (top - new).exp() + (logits - new[:, None]).exp().sum(1)
            top = new
            inside = ((target >= start) & (target < start + block)).nonzero()[:, 0]
            own[inside] = logits[inside, target[inside] - start]
        log_Z = top + total.log()
        ctx.save_for_backward(hidden, weight, target, log_Z)
        ctx.block = block
        return own - log_Z

    @staticmethod
    def backward(ctx, g):
        hidden, weight, target, log_Z = ctx.saved_tensors
        to_hidden, to_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(weight), ctx.block):
            part = weight[start:start + ctx.block]
            p = (hidden @ part.T).sub_(log_Z[:, None]).exp_()
            words = torch.arange(start, start + len(part))
            back = (target[:, None] == words).to(p).sub_(p).mul_(g[:, None])          # (N, block)
            to_hidden += back @ part
            to_weight[start:start + ctx.block] = back.T @ hidden
        return to_hidden, to_weight, None, None


def linear_logprob(hidden, weight, target, block):
    return LinearLogprob.apply(hidden, weight, target, block)


def pack_tree(prompt, responses):
    tokens, parents, children, paths = [], [], {}, []                 # children: {(parent, token): node}
    for response in responses:
        node, path = -1, []
        for token in prompt + response:
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = children[node, token]
            path.append(node)
        paths.append(path[len(prompt):])
    return torch.tensor(tokens), torch.tensor(parents), paths


def tree_attention(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask.sum(1) - 1, mask


def tree_logprobs(hidden, weight, tokens, parents, paths):
    nodes = torch.tensor(sorted({node for path in paths for node in path}))
    each = hidden.new_zeros(len(tokens)).index_put(
        (nodes,), linear_logprob(hidden[parents[nodes]], weight, tokens[nodes], 1000))
    return torch.stack([each[path].sum() for path in paths])


class SVDLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, U, V, d, gain):
        ctx.save_for_backward(x, weight, U, V, d)
        ctx.gain = gain
        y = x @ weight.T + gain * torch.einsum("bti,ir,br,or->bto", x, V, d, U)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, G):
        x, weight, U, V, d = ctx.saved_tensors
        left, right = G @ U, x @ V                                    # (B, T, r) each
        return (G @ weight + ctx.gain * torch.einsum("btr,br,ir->bti", left, d, V), None, None,
                ctx.gain * torch.einsum("bto,btr,br->or", G, right, d),
                ctx.gain * torch.einsum("bti,btr,br->ir", x, left, d),
                ctx.gain * torch.einsum("btr,btr->br", left, right), None)


def svd_lora_by_hand(x, weight, bias, U, V, d, gain):
    return SVDLoRA.apply(x, weight, bias, U, V, d, gain)


def direction_distance(unit, lam):
    v, off = lam - 1, unit - 1
    t = torch.einsum("nm,m->n", off, v).div(v.square().sum()).clamp(min=0)
    return (off - torch.outer(t, v)).square().sum(1).sqrt()


def select_pareto(scores, lams, k, at_least):
    low, high = scores.min(0).values, scores.max(0).values
    unit, left, pool = (scores - low) / (high - low), set(range(len(scores))), []
    better = ((scores[:, None] >= scores[None]).all(2) & (scores[:, None] > scores[None]).any(2)).tolist()
    while len(pool) < max(k, at_least) and left:
        layer = [i for i in left if not any(better[j][i] for j in left)]
        pool, left = pool + layer, left - set(layer)
    return torch.tensor([sorted(pool, key=lambda i: (round(d[i], 9), i))[:k]
                         for d in (direction_distance(unit, lam.to(unit)).tolist() for lam in lams)])


def representatives(lams):
    m, chosen = lams.shape[1], []
    for end in [*torch.eye(m, dtype=lams.dtype), torch.full((m,), 1 / m, dtype=lams.dtype)]:
        nearest = int((lams - end).square().sum(1).argmin())
        chosen += [nearest] * (nearest not in chosen)
    return chosen


def select_answers(answers, ended, scores, lams, k, at_least):
    seen, pool = set(), []
    for i, (prompt, response) in enumerate(answers):
        if ended[i] and response.strip() and (prompt, response) not in seen:
            seen.add((prompt, response))
            pool.append(i)
    pool = torch.tensor(pool)
    return pool[select_pareto(scores[pool], lams, max(1, k // 2), at_least)]
