"""mutants.py - wrong answers to the problems of set 6 that students write. The grader has to see them.

MUTANTS: {problem: {what is wrong: {function of adapters.py: the wrong one}}}; all other functions are the reference's.
ZEROS: {function: one that does nothing, or returns zeros of the right shape}
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import course.reference_adapters as right
from course.set6 import another


def forward(new=torch.maximum, start=-torch.inf, shrink=lambda top, new: (top - new).exp(),
            blocks=lambda V, block: range(0, V, block), own=lambda l, i, inside: l.gather(1, i[:, None])[:, 0],
            log_Z=lambda top, total: top + total.log(), after=lambda own, log_Z: own - log_Z,
            exp=lambda l, new: (l - new[:, None]).exp().sum(1), keep=None):
    """linear_logprob without a backward of its own, with one of its pieces replaced."""
    def wrong(hidden, weight, target, block):
        top, total, mine = (hidden.new_full((len(hidden),), x) for x in (start, 0.0, 0.0))
        kept = []
        for j in blocks(len(weight), block):
            l = hidden @ weight[j:j + block].T
            if keep:
                kept.append(keep(l))
            higher = new(top, l.amax(1))
            total, top = total * shrink(top, higher) + exp(l, higher), higher
            inside = (target >= j) & (target < j + block)
            mine = torch.where(inside, own(l, (target - j).clamp(0, l.shape[1] - 1), inside), mine)
        return after(mine, log_Z(top, total))
    return {"linear_logprob": wrong}


def shifted(by):
    """linear_logprob that reads another target."""
    return {"linear_logprob": lambda hidden, weight, target, block: right.linear_logprob(
        hidden, weight, (target + by) % len(weight), block)}


def logprob(value):
    """linear_logprob from value(hidden, weight, target, block), without blocks."""
    return {"linear_logprob": value}


def two_passes(hidden, weight, target, block):
    top = torch.stack([(hidden @ weight[j:j + block].T).amax(1) for j in range(0, len(weight), block)]).amax(0)
    total = sum((hidden @ weight[j:j + block].T - top[:, None]).exp().sum(1) for j in range(0, len(weight), block))
    return (hidden * weight[target]).sum(1) - top - total.log()


def usual(hidden, weight, target, block=None):
    return -F.cross_entropy(hidden @ weight.T, target, reduction="none")


def checkpointed(hidden, weight, target, block):
    once_more = forward()["linear_logprob"]
    return checkpoint(lambda h, w: once_more(h, w, target, block), hidden, weight, use_reentrant=False)


def backward(slope=lambda p, onehot: onehot - p, g=lambda g: g, to_hidden=lambda s, W: s @ W,
             to_weight=lambda s, h: s.T @ h, out=lambda dh, dW: (dh, dW), log_Z=None, whole=False, blocks=None,
             frozen=True):
    """linear_logprob with a backward by hand, one of whose pieces is replaced. slope: what a logit gets, (N, block)"""
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, target, block):
            with torch.no_grad():
                logp = right.linear_logprob(hidden, weight, target, block)
            ctx.block = len(weight) if whole else block
            own = (hidden * weight[target]).sum(1)
            ctx.save_for_backward(hidden, weight, target, own - logp if log_Z is None else log_Z(hidden, own - logp))
            return logp

        @staticmethod
        def backward(ctx, upstream):
            hidden, weight, target, Z = ctx.saved_tensors
            dh, dW, upstream = torch.zeros_like(hidden), torch.zeros_like(weight), g(upstream)
            for j in (blocks or (lambda V, block: range(0, V, block)))(len(weight), ctx.block):
                W = weight[j:j + ctx.block]
                p = (hidden @ W.T - Z[:, None]).exp()
                onehot = (target[:, None] == torch.arange(j, j + len(W))).to(p)
                s = upstream[:, None] * slope(p, onehot)
                dh += to_hidden(s, W)
                dW[j:j + len(W)] = to_weight(s, hidden)
            return *out(dh, dW), None, None
    return {"linear_logprob": lambda hidden, weight, target, block: Wrong.apply(hidden, weight, target, block)}


def once(p, onehot):
    """A word that is the target of several places gets its 1 for the last of them alone."""
    return onehot * (onehot.flip(0).cumsum(0).flip(0) == 1) - p


def packing(key=lambda parent, token, depth: (parent, token), parent=lambda node, count: node, share=lambda r: True,
            root=-1, path=lambda nodes, n: nodes[n:], drop_last=False):
    """pack_tree as a trie of which one piece is replaced. key: by what a node is found again."""
    def wrong(prompt, responses):
        tokens, parents, found, paths = [], [], {}, []
        for r, response in enumerate(responses):
            node, nodes = root, []
            if not share(r):
                found = {k: v for k, v in found.items() if v < len(prompt)}
            for depth, token in enumerate([*prompt, *response][:-1 if drop_last else None]):
                k = key(node, token, depth)
                if k not in found:
                    found[k] = len(tokens)
                    tokens.append(token)
                    parents.append(parent(node, len(tokens) - 1))
                node = found[k]
                nodes.append(node)
            paths.append(path(nodes, len(prompt)))
        return torch.tensor(tokens), torch.tensor(parents), paths
    return {"pack_tree": wrong}


def repacked(change):
    """pack_tree, changed afterwards. change(tokens, parents, paths, prompt)"""
    return {"pack_tree": lambda prompt, responses: change(*right.pack_tree(prompt, responses), len(prompt))}


def backwards(tokens, parents, paths, n):
    """The same tree, its nodes numbered from the end."""
    last = len(tokens) - 1
    return tokens.flip(0), torch.where(parents < 0, -1, last - parents).flip(0), [
        [last - node for node in path] for path in paths]


def with_neighbour_alone(prompt, responses):
    """Only beginnings of the response just before are found again."""
    tokens, parents, paths, before = list(prompt), list(range(-1, len(prompt) - 1)), [], ([], [])
    for response in responses:
        same, nodes = 0, []
        while same < min(len(response), len(before[0])) and response[same] == before[0][same]:
            same += 1
        nodes = before[1][:same]
        for token in response[same:]:
            parents.append(nodes[-1] if nodes else len(prompt) - 1)
            nodes = [*nodes, len(tokens)]
            tokens.append(token)
        paths.append(nodes)
        before = response, nodes
    return torch.tensor(tokens), torch.tensor(parents), paths


def attention(positions=lambda positions, mask, parents: positions, mask=lambda positions, mask, parents: mask):
    """tree_attention with another result."""
    def wrong(parents):
        a = *right.tree_attention(parents), parents
        return positions(*a), mask(*a)
    return {"tree_attention": wrong}


def generations(n):
    """A node sees itself and its n nearest ancestors."""
    def mask(positions, mask, parents):
        return mask & (positions[:, None] - positions[None] <= n)
    return mask


def along(ask=lambda parents, path: parents[path], of=lambda path: path, score=usual, pool=torch.sum):
    """tree_logprobs, one of whose pieces is replaced. ask: the nodes that predict; of: the nodes whose tokens count"""
    def wrong(hidden, weight, tokens, parents, paths):
        out = []
        for path in map(torch.tensor, paths):
            path = of(path)
            out.append(pool(score(hidden[ask(parents, path)], weight, tokens[path])) if len(path) else hidden.sum() * 0)
        return torch.stack(out)
    return {"tree_logprobs": wrong}


def layer(forward=lambda x, U, V, d, gain: gain * ((x @ V) * d[:, None]) @ U.T, base=lambda y: y, dx=None, dU=None,
          dV=None, dd=None, keep=lambda x, V: (), bias=lambda bias: bias):
    """svd_lora_by_hand, one of whose pieces is replaced. dx, dU, dV, dd: functions of a dict with everything"""
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, b, U, V, d, gain):
            ctx.save_for_backward(x, weight, U, V, d, *keep(x, V))
            ctx.gain = gain
            y = base(F.linear(x, weight, bias(b)))
            return y + forward(x, U, V, d, gain)

        @staticmethod
        def backward(ctx, G):
            x, W, U, V, d, *_ = ctx.saved_tensors
            a = {"x": x, "W": W, "U": U, "V": V, "d": d[:, None], "G": G, "g": ctx.gain, "down": x @ V, "up": G @ U}
            return ((dx or right_x)(a), None, None, (dU or right_U)(a), (dV or right_V)(a), (dd or right_d)(a), None)
    return {"svd_lora_by_hand": lambda x, weight, bias, U, V, d, gain: Wrong.apply(x, weight, bias, U, V, d, gain)}


def right_x(a):
    return a["G"] @ a["W"] + a["g"] * (a["up"] * a["d"]) @ a["V"].T


def right_U(a):
    return a["g"] * torch.einsum("bto,btr->or", a["G"], a["down"] * a["d"])


def right_V(a):
    return a["g"] * torch.einsum("bti,btr->ir", a["x"], a["up"] * a["d"])


def right_d(a):
    return a["g"] * (a["up"] * a["down"]).sum(1)


def by_autograd(x, weight, bias, U, V, d, gain):
    return F.linear(x, weight, bias) + gain * ((x @ V) * d[:, None]) @ U.T


def looped(x, weight, bias, U, V, d, gain):
    return torch.cat([right.svd_lora_by_hand(x[b:b + 1], weight, bias, U, V, d[b:b + 1], gain) for b in range(len(x))])


def rows(change):
    """svd_lora_by_hand with other singular values."""
    return {"svd_lora_by_hand": lambda x, weight, bias, U, V, d, gain: right.svd_lora_by_hand(
        x, weight, bias, U, V, change(d), gain)}


def ray(t=lambda off, v: ((off @ v) / (v @ v)).clamp(min=0), v=lambda lam: lam - 1, start=1.0,
        norm=lambda x: x.norm(dim=1)):
    """direction_distance, one of whose pieces is replaced."""
    def wrong(unit, lam):
        way, off = v(lam), unit - start
        return norm(off - t(off, way)[:, None] * way)
    return {"direction_distance": wrong}


def dominated_in(points, strict=lambda a, b: (a >= b).all(2) & (a > b).any(2)):
    """Which points another one dominates."""
    return strict(points[:, None], points[None]).any(0)


def choosing(scale=lambda scores, pool: (scores.amin(0), scores.amax(0)), enough=lambda k, at_least: max(k, at_least),
             layers=10 ** 9, strict=lambda a, b: (a >= b).all(2) & (a > b).any(2), distance=another.direction_distance,
             lam=lambda lam: lam, order=lambda d: d, out=lambda index, pool: index, exact=False):
    """select_pareto, one of whose pieces is replaced."""
    def select(scores, lams, k, at_least):
        left, pool, count = torch.arange(len(scores)), torch.tensor([], dtype=torch.long), 0
        while len(left) and (len(pool) < enough(k, at_least) and count < layers):
            bad = dominated_in(scores[left], strict)
            pool, left, count = torch.cat([pool, left[~bad]]), left[bad], count + 1
            if bad.all():
                break
        pool = pool[:max(k, at_least)] if exact else pool
        pool = pool.sort().values
        low, high = scale(scores, pool)
        unit = ((scores - low) / (high - low))[pool]
        near = [pool[order(distance(unit, lam(l))).mul(1e9).round().argsort(stable=True)[:k]] for l in lams.to(scores)]
        return out(torch.stack(near), pool)
    return select


def stage1(**pieces):
    return {"select_pareto": choosing(**pieces)}


def standing(ends=lambda m: torch.cat([torch.eye(m), torch.full((1, m), 1 / m)]).double(),
             find=lambda d: d.argmin(1).tolist(), out=lambda found: list(dict.fromkeys(found))):
    """representatives, one of whose pieces is replaced."""
    return {"representatives": lambda lams: out(find(torch.cdist(ends(lams.shape[1]), lams)))}


def answering(good=lambda y, ended: ended and y.strip(), key=lambda x, y: (x, y), half=lambda k: max(1, k // 2),
              out=lambda pool, index: pool[index], select=right.select_pareto, last=False, early=False):
    """select_answers, one of whose pieces is replaced. early: repetitions are dropped before what did not end"""
    def wrong(answers, ended, scores, lams, k, at_least):
        kept = {}
        for i, (x, y) in enumerate(answers):
            if early and key(x, y) in kept:
                continue
            if early or good(y, ended[i]):
                if last or key(x, y) not in kept:
                    kept[key(x, y)] = i
        pool = torch.tensor(sorted(i for i in kept.values() if good(answers[i][1], ended[i])))
        return out(pool, select(scores[pool], lams, half(k), at_least))
    return {"select_answers": wrong}


def on_scale_of_all(answers, ended, scores, lams, k, at_least):
    low, high = scores.amin(0), scores.amax(0)
    return answering(select=lambda part, *rest: choosing(scale=lambda *_: (low, high))(part, *rest))["select_answers"](
        answers, ended, scores, lams, k, at_least)


MUTANTS = {
    "logprob_forward": {
        "all logits at once": logprob(usual),
        "all logits at once, by hand": logprob(lambda h, W, y, block: (
            l := h @ W.T).gather(1, y[:, None])[:, 0] - l.logsumexp(1)),
        "the blocks are kept in a list": logprob(lambda h, W, y, block: (h * W[y]).sum(1) - torch.cat(
            [h @ W[j:j + block].T for j in range(0, len(W), block)], 1).logsumexp(1)),
        "the exponentials of the blocks are kept": forward(keep=torch.exp),
        "two passes, the first for the largest": logprob(two_passes),
        "the largest is not subtracted": forward(new=lambda top, l: torch.zeros_like(top), start=0.0),
        "the old sum is not rescaled": forward(shrink=lambda top, new: 1.0),
        "the old sum is rescaled the wrong way": forward(shrink=lambda top, new: torch.where(
            top.isinf(), 0.0, (new - top).exp())),
        "the largest of the last block alone": forward(new=lambda top, l: l, shrink=lambda top, new: 1.0),
        "the largest begins at 0": forward(start=0.0),
        "the largest of the whole batch": forward(new=lambda top, l: torch.maximum(top, l.max())),
        "the largest is not added again": forward(log_Z=lambda top, total: total.log()),
        "the last block, which is smaller, is left out": forward(blocks=lambda V, block: range(
            0, max(block, V - V % block) if V >= block else V, block)),
        "blocks overlap by one word": forward(blocks=lambda V, block: range(0, V, max(1, block - 1))),
        "the first word of the target's block": forward(own=lambda l, i, inside: l[:, 0]),
        "the target is not found in the last block": forward(own=lambda l, i, inside: l.gather(1, i[:, None])[:, 0] * (
            l.shape[1] > 2)),
        "log Z is not subtracted": forward(after=lambda own, log_Z: own),
        "the sign": forward(after=lambda own, log_Z: log_Z - own),
        "the mean over places": forward(after=lambda own, log_Z: (own - log_Z).mean()),
        "Z instead of log Z": forward(after=lambda own, log_Z: own - log_Z.exp()),
        "the next target": shifted(1), "the target before": shifted(-1),
        "an epsilon in the logarithm": forward(log_Z=lambda top, total: top + (total + 1e-2).log())},
    "logprob_backward": {
        "autograd, with all logits": logprob(usual),
        "autograd, through the blocks": forward(),
        "checkpointing": logprob(checkpointed),
        "without the 1 at the target": backward(lambda p, onehot: -p),
        "without the softmax": backward(lambda p, onehot: onehot),
        "the sign": backward(lambda p, onehot: p - onehot),
        "the 1 is added to the softmax": backward(lambda p, onehot: -onehot - p),
        "the gradient of p instead of log p": backward(lambda p, onehot: onehot * p - p * p),
        "what comes in is left out": backward(g=torch.ones_like),
        "the mean of what comes in": backward(g=lambda g: g.mean().expand_as(g)),
        "the sum of what comes in": backward(g=lambda g: g.sum().expand_as(g)),
        "what comes in, twice": backward(g=lambda g: g * g),
        "divided by the number of places": backward(g=lambda g: g / len(g)),
        "a target of several places counts once": backward(once),
        "the target's place by the block alone": backward(lambda p, onehot: onehot.roll(1, 1) - p),
        "the target's place moved by one place": backward(lambda p, onehot: onehot.roll(1, 0) - p),
        "the gradient to the weight is summed over the wrong axis": backward(
            to_weight=lambda s, h: s.sum(0)[:, None] * h.mean(0)),
        "the gradient to the weight is averaged": backward(to_weight=lambda s, h: s.T @ h / len(h)),
        "the gradient to hidden has the last block alone": backward(out=lambda dh, dW: (dh * 0.5, dW)),
        "the first block is left out": backward(blocks=lambda V, block: range(block if block < V else 0, V, block)),
        "the last block is left out": backward(blocks=lambda V, block: range(0, max(block, V - V % block), block)
                                               if block < V else range(0, V, block)),
        "p without log Z": backward(log_Z=lambda hidden, Z: torch.zeros_like(Z)),
        "p by another place's log Z": backward(log_Z=lambda hidden, Z: Z.roll(1)),
        "exp before the division": backward(log_Z=lambda hidden, Z: Z.exp().log()),
        "all logits in the backward pass": backward(whole=True),
        "no gradient to the weight": backward(out=lambda dh, dW: (dh, None)),
        "no gradient to hidden": backward(out=lambda dh, dW: (None, dW))},
    "pack_tree": {
        "the responses share the prompt alone": packing(share=lambda r: False),
        "shared beginnings of the neighbour alone": {"pack_tree": with_neighbour_alone},
        "nothing is shared": packing(key=lambda parent, token, depth: object()),
        "found by token and depth": packing(lambda parent, token, depth: (depth, token)),
        "found by token": packing(lambda parent, token, depth: token),
        "found by the parent's token": packing(lambda parent, token, depth: (depth, token, parent > 3)),
        "the parent is the node to the left": packing(parent=lambda node, count: count - 1),
        "the first node is its own parent": packing(parent=lambda node, count: max(node, 0)),
        "responses begin at the root": repacked(lambda tokens, parents, paths, n: (tokens, torch.where(
            (parents == n - 1) & (torch.arange(len(parents)) >= n), -1, parents), paths)),
        "responses begin behind the first token": repacked(lambda tokens, parents, paths, n: (tokens, torch.where(
            (parents == n - 1) & (torch.arange(len(parents)) >= n), 0, parents), paths)),
        "paths have the prompt too": packing(path=lambda nodes, n: nodes),
        "paths without the first token": packing(path=lambda nodes, n: nodes[n + 1:]),
        "paths begin one node too early": packing(path=lambda nodes, n: nodes[n - 1:-1]),
        "paths hold tokens": repacked(lambda tokens, parents, paths, n: (
            tokens, parents, [tokens[torch.tensor(path)].tolist() for path in paths])),
        "paths hold parents": repacked(lambda tokens, parents, paths, n: (
            tokens, parents, [parents[torch.tensor(path)].tolist() for path in paths])),
        "the last token has no node": packing(drop_last=True),
        "equal responses are dropped": {"pack_tree": lambda prompt, responses: right.pack_tree(
            prompt, [list(y) for y in dict.fromkeys(map(tuple, responses))])},
        "responses are sorted, and so are the paths": {"pack_tree": lambda prompt, responses: right.pack_tree(
            prompt, sorted(responses))},
        "children before their parents": repacked(backwards),
        "paths are in reverse": repacked(lambda tokens, parents, paths, n: (
            tokens, parents, [path[::-1] for path in paths])),
        "lists instead of tensors": repacked(lambda tokens, parents, paths, n: (
            tokens.tolist(), parents.tolist(), paths))},
    "tree_attention": {
        "the mask is causal: siblings are seen": attention(mask=lambda p, mask, parents: torch.ones_like(mask).tril()),
        "everything is seen": attention(mask=lambda p, mask, parents: torch.ones_like(mask)),
        "rows and columns exchanged": attention(mask=lambda p, mask, parents: mask.T),
        "not itself": attention(mask=lambda p, mask, parents: mask & ~torch.eye(len(mask), dtype=torch.bool)),
        "itself and the parent": attention(mask=generations(1)),
        "up to the grandparents": attention(mask=generations(2)),
        "up to four ancestors": attention(mask=generations(4)),
        "True where it may not look": attention(mask=lambda p, mask, parents: ~mask),
        "ancestors and descendants": attention(mask=lambda p, mask, parents: mask | mask.T),
        "all that is less deep": attention(mask=lambda p, mask, parents: (p[None] < p[:, None]) | torch.eye(
            len(p), dtype=torch.bool)),
        "all that is not deeper and not later": attention(mask=lambda p, mask, parents: (
            p[None] <= p[:, None]) & torch.ones_like(mask).tril()),
        "siblings with the same parent": attention(mask=lambda p, mask, parents: mask | (
            parents[:, None] == parents[None]) & torch.ones_like(mask).tril()),
        "not the root": attention(mask=lambda p, mask, parents: mask & (
            torch.arange(len(p)) > 0)[None] | torch.eye(len(p), dtype=torch.bool)),
        "a float mask": attention(mask=lambda p, mask, parents: mask.float()),
        "positions are the nodes' numbers": attention(lambda p, mask, parents: torch.arange(len(p))),
        "positions from 1": attention(lambda p, mask, parents: p + 1),
        "positions from the end": attention(lambda p, mask, parents: p.max() - p),
        "positions of a breadth-first order": attention(lambda p, mask, parents: p.argsort(stable=True).argsort()),
        "the parent's number plus 1": attention(lambda p, mask, parents: parents + 1),
        "positions are floats": attention(lambda p, mask, parents: p.float()),
        "the order": {"tree_attention": lambda parents: right.tree_attention(parents)[::-1]}},
    "tree_logprobs": {
        "the node to the left": along(ask=lambda parents, path: path - 1),
        "the node itself": along(ask=lambda parents, path: path),
        "the parent's parent": along(ask=lambda parents, path: parents[parents[path]]),
        "the first node for all": along(ask=lambda parents, path: torch.zeros_like(path)),
        "the first token is left out": along(of=lambda path: path[1:]),
        "the last token is left out": along(of=lambda path: path[:-1]),
        "the mean": along(pool=torch.mean),
        "the largest": along(pool=torch.max),
        "probabilities are added": along(score=lambda h, W, y: usual(h, W, y).exp()),
        "log Z is left out": along(score=lambda h, W, y: (h * W[y]).sum(1)),
        "the sign": along(score=lambda h, W, y: -usual(h, W, y)),
        "without a gradient": along(score=lambda h, W, y: usual(h, W, y).detach()),
        "the head is detached": along(score=lambda h, W, y: usual(h, W.detach(), y)),
        "the states are detached": along(score=lambda h, W, y: usual(h.detach(), W, y)),
        "a shared node counts for the first response alone": {
            "tree_logprobs": lambda h, W, tokens, parents, paths: torch.stack([right.tree_logprobs(
                h, W, tokens, parents, [[n for n in path if not any(n in p for p in paths[:r])] or path])[0]
                for r, path in enumerate(paths)])},
        "the prompt counts": {"tree_logprobs": lambda h, W, tokens, parents, paths: right.tree_logprobs(
            h, W, tokens, parents, [[*range(min(map(min, paths)))] + path for path in paths])},
        "summed over the responses": {"tree_logprobs": lambda *a: right.tree_logprobs(*a).sum()}},
    "svd_lora_backward": {
        "autograd": {"svd_lora_by_hand": by_autograd},
        "a loop over the rows": {"svd_lora_by_hand": looped},
        "x V is kept": layer(keep=lambda x, V: (x @ V,)),
        "the gain is left out": layer(forward=lambda x, U, V, d, gain: ((x @ V) * d[:, None]) @ U.T),
        "the bias is left out": layer(bias=lambda bias: None),
        "d is left out": layer(forward=lambda x, U, V, d, gain: gain * (x @ V) @ U.T),
        "the frozen matrix is left out": layer(base=torch.zeros_like),
        "the singular values of the row before": rows(lambda d: d.roll(1, 0)),
        "the first row's singular values": rows(lambda d: d[:1].expand_as(d)),
        "the mean of the singular values": rows(lambda d: d.mean(0, keepdim=True).expand_as(d)),
        "d along T where B = T": layer(forward=lambda x, U, V, d, gain: gain * (
            (x @ V) * (d[None] if x.shape[1] == len(d) else d[:, None])) @ U.T),
        "x: the branch is left out": layer(dx=lambda a: a["G"] @ a["W"]),
        "x: the frozen matrix is left out": layer(dx=lambda a: right_x(a) - a["G"] @ a["W"]),
        "x: the gain is left out": layer(dx=lambda a: a["G"] @ a["W"] + (a["up"] * a["d"]) @ a["V"].T),
        "x: d is left out": layer(dx=lambda a: a["G"] @ a["W"] + a["g"] * a["up"] @ a["V"].T),
        "x: d of the row before": layer(dx=lambda a: a["G"] @ a["W"] + a["g"] * (
            a["up"] * a["d"].roll(1, 0)) @ a["V"].T),
        "U: the gain is left out": layer(dU=lambda a: right_U(a) / a["g"]),
        "U: the gain twice": layer(dU=lambda a: right_U(a) * a["g"]),
        "U: d is left out": layer(dU=lambda a: a["g"] * torch.einsum("bto,btr->or", a["G"], a["down"])),
        "U: the first row alone": layer(dU=lambda a: right_U(a | {"G": a["G"][:1], "down": a["down"][:1],
                                                                  "d": a["d"][:1]})),
        "U: g U in the place of x V": layer(dU=lambda a: right_U(a | {"down": a["up"]})),
        "U: the mean over tokens": layer(dU=lambda a: right_U(a) / a["G"].shape[:2].numel()),
        "V: the gain is left out": layer(dV=lambda a: right_V(a) / a["g"]),
        "V: d is left out": layer(dV=lambda a: a["g"] * torch.einsum("bti,btr->ir", a["x"], a["up"])),
        "V: x V in the place of g U": layer(dV=lambda a: right_V(a | {"up": a["down"]})),
        "V: the mean over rows": layer(dV=lambda a: right_V(a) / len(a["G"])),
        "V: d of the row before": layer(dV=lambda a: right_V(a | {"d": a["d"].roll(1, 0)})),
        "d: the gain is left out": layer(dd=lambda a: right_d(a) / a["g"]),
        "d: summed over the rows": layer(dd=lambda a: right_d(a).sum(0).expand(len(a["d"]), -1)),
        "d: the mean over tokens": layer(dd=lambda a: a["g"] * (a["up"] * a["down"]).mean(1)),
        "d: times d": layer(dd=lambda a: right_d(a) * a["d"][:, 0]),
        "d: of the row before": layer(dd=lambda a: right_d(a).roll(1, 0)),
        "d: the last token alone": layer(dd=lambda a: a["g"] * (a["up"] * a["down"])[:, -1]),
        "d: the sums of the factors": layer(dd=lambda a: a["g"] * a["up"].sum(1) * a["down"].sum(1))},
    "direction_distance": {
        "a line instead of a ray": ray(t=lambda off, v: (off @ v) / (v @ v)),
        "not behind λ": ray(t=lambda off, v: ((off @ v) / (v @ v)).clamp(0, 1)),
        "v · v is left out": ray(t=lambda off, v: (off @ v).clamp(min=0)),
        "the length instead of its square": ray(t=lambda off, v: ((off @ v) / v.norm()).clamp(min=0)),
        "along λ": ray(v=lambda lam: lam),
        "along 1 − λ": ray(v=lambda lam: 1 - lam),
        "from 0": ray(start=0.0),
        "from 0 along λ": ray(start=0.0, v=lambda lam: lam),
        "squared": ray(norm=lambda x: x.square().sum(1)),
        "absolute values": ray(norm=lambda x: x.abs().sum(1)),
        "the largest coordinate": ray(norm=lambda x: x.abs().amax(1)),
        "the mean": ray(norm=lambda x: x.square().mean(1).sqrt()),
        "over the points instead of the dimensions": ray(norm=lambda x: x.norm(dim=0).sum().expand(len(x))),
        "from the ideal point": ray(t=lambda off, v: off[:, 0] * 0),
        "from λ": ray(t=lambda off, v: off[:, 0] * 0 + 1),
        "t": {"direction_distance": lambda unit, lam: ((unit - 1) @ (lam - 1) / (lam - 1).square().sum())},
        "λ in reverse": {"direction_distance": lambda unit, lam: right.direction_distance(unit, lam.flip(0))},
        "the angle": {"direction_distance": lambda unit, lam: 1 - F.cosine_similarity(
            unit - 1, (lam - 1).expand_as(unit))},
        "Σ λ X": {"direction_distance": lambda unit, lam: 1 - unit @ lam}},
    "pareto_selection": {
        "dominated points are in the pool": stage1(enough=lambda k, at_least: 10 ** 9),
        "at_least is not used": {"select_pareto": lambda scores, lams, k, at_least: right.select_pareto(
            scores, lams, k, 1)},
        "one layer more": stage1(enough=lambda k, at_least: max(k, at_least) + 1),
        "at_least without k": stage1(enough=lambda k, at_least: min(at_least, k)),
        "cut to at_least points": stage1(exact=True),
        "the scale is that of the pool": stage1(scale=lambda scores, pool: (
            scores[pool].amin(0), scores[pool].amax(0))),
        "no common scale": stage1(scale=lambda scores, pool: (0.0, 1.0)),
        "one scale for all dimensions": stage1(scale=lambda scores, pool: (scores.min(), scores.max())),
        "standard scores": stage1(scale=lambda scores, pool: (
            scores.mean(0) - scores.std(0), scores.mean(0) + scores.std(0))),
        "divided by the largest": stage1(scale=lambda scores, pool: (0.0, scores.amax(0))),
        "lower is better": {"select_pareto": lambda scores, *a: right.select_pareto(-scores, *a)},
        "dominated if worse in all": stage1(strict=lambda a, b: (a > b).all(2)),
        "dominated if worse in one": stage1(strict=lambda a, b: (a > b).any(2)),
        "dominated if not better in any": stage1(strict=lambda a, b: (a >= b).all(2) & ~torch.eye(
            len(b[0]), dtype=torch.bool)),
        "the largest Σ λ X": stage1(distance=lambda unit, lam: -(unit @ lam), enough=lambda k, at_least: 10 ** 9),
        "the largest Σ λ X of the pool": stage1(distance=lambda unit, lam: -(unit @ lam)),
        "the furthest": stage1(order=lambda d: -d),
        "nearest to the ideal point": stage1(distance=lambda unit, lam: (unit - 1).norm(dim=1)),
        "nearest to λ": stage1(distance=lambda unit, lam: (unit - lam).norm(dim=1)),
        "the first preference for all": {"select_pareto": lambda scores, lams, *a: right.select_pareto(
            scores, lams[:1].expand_as(lams).contiguous(), *a)},
        "λ in reverse": stage1(lam=lambda lam: lam.flip(0)),
        "indices into the pool": stage1(out=lambda index, pool: torch.searchsorted(pool, index)),
        "in ascending order": stage1(out=lambda index, pool: index.sort(1).values),
        "a later index wins": {"select_pareto": lambda scores, *a: len(scores) - 1 - right.select_pareto(
            scores.flip(0).contiguous(), *a)},
        "each point for one preference alone": {"select_pareto": lambda scores, lams, k, at_least: torch.stack(
            [torch.tensor([i for i in right.select_pareto(scores, lams, len(scores), at_least)[f].tolist()
                           if i % len(lams) == f] + [0] * k)[:k] for f in range(len(lams))])},
        "a mask instead of indices": {"select_pareto": lambda scores, lams, *a: torch.zeros(
            len(lams), len(scores), dtype=torch.bool).scatter(1, right.select_pareto(scores, lams, *a), True)}},
    "stage_two": {
        "the vertices alone": standing(ends=lambda m: torch.eye(m).double()),
        "the middle alone": standing(ends=lambda m: torch.full((1, m), 1 / m).double()),
        "the middle first": standing(ends=lambda m: torch.cat([torch.full((1, m), 1 / m), torch.eye(m)]).double()),
        "first, last and middle by index": {"representatives": lambda lams: [0, len(lams) - 1, len(lams) // 2]},
        "an index twice": standing(out=lambda found: found),
        "sorted": standing(out=lambda found: sorted(set(found))),
        "the furthest": standing(find=lambda d: d.argmax(1).tolist()),
        "vertices in reverse": standing(ends=lambda m: torch.cat(
            [torch.eye(m).flip(0), torch.full((1, m), 1 / m)]).double()),
        "nothing is dropped": answering(good=lambda y, ended: True, key=lambda x, y: object()),
        "cut off answers stay": answering(good=lambda y, ended: y.strip()),
        "only what did not end is kept": answering(good=lambda y, ended: not ended),
        "empty answers stay": answering(good=lambda y, ended: ended),
        "answers of spaces stay": answering(good=lambda y, ended: ended and y),
        "repetitions stay": answering(key=lambda x, y: object()),
        "the last repetition stays": answering(last=True),
        "repetitions are found by the response": answering(key=lambda x, y: y),
        "one answer for each prompt": answering(key=lambda x, y: x),
        "repetitions are dropped before the cut off": answering(early=True),
        "k instead of k // 2": answering(half=lambda k: k),
        "k / 2 may be none": answering(half=lambda k: k // 2),
        "k / 2 rounded up": answering(half=lambda k: (k + 1) // 2),
        "indices into what is left": answering(out=lambda pool, index: index),
        "the scale of all answers": {"select_answers": on_scale_of_all},
        "all layers": answering(select=choosing(enough=lambda k, at_least: 10 ** 9)),
        "the first layer alone": answering(select=lambda scores, lams, k, at_least: right.select_pareto(
            scores, lams, k, 1))},
}
ZEROS = {"linear_logprob": lambda hidden, weight, target, block: 0 * hidden.sum(1),
         "pack_tree": lambda prompt, responses: (torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.long),
                                                 [[0] * len(y) for y in responses]),
         "tree_attention": lambda parents: (torch.zeros_like(parents), torch.zeros(len(parents), len(parents)).bool()),
         "tree_logprobs": lambda hidden, weight, tokens, parents, paths: 0 * hidden.sum() + torch.zeros(len(paths)),
         "svd_lora_by_hand": lambda x, weight, bias, U, V, d, gain: 0 * (x.sum() + U.sum() + V.sum() + d.sum()) +
         x.new_zeros(*x.shape[:-1], len(weight)),
         "direction_distance": lambda unit, lam: 0 * unit[:, 0],
         "select_pareto": lambda scores, lams, k, at_least: torch.zeros(len(lams), k, dtype=torch.long),
         "representatives": lambda lams: [0] * (lams.shape[1] + 1),
         "select_answers": lambda answers, ended, scores, lams, k, at_least: torch.zeros(
             len(lams), max(1, k // 2), dtype=torch.long)}
