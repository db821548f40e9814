"""grade.py - the tests of set 6. They compare with the usual way in float64, hand calculations and stored numbers.

N: places   D: width   V: vocabulary   T: nodes   R: responses   B: rows   F: preferences
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from course.gpt import small
from course.grading import check, numbers, problem, same, slope

PROBLEMS = {    # problem: the functions of adapters.py that it asks for
    "logprob_forward": ["linear_logprob"], "logprob_backward": ["linear_logprob"], "pack_tree": ["pack_tree"],
    "tree_attention": ["tree_attention"], "tree_logprobs": ["tree_logprobs"], "svd_lora_backward": ["svd_lora_by_hand"],
    "direction_distance": ["direction_distance"], "pareto_selection": ["select_pareto"],
    "stage_two": ["representatives", "select_answers"]}


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


class Meter(TorchDispatchMode):
    """Within it, counts the operations (calls), and the numbers of the tensors that they make: live, now, and peak, the
    most at one time. Views of other tensors count nothing."""

    def __init__(self):
        super().__init__()
        self.made, self.calls, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storages = lambda tree: {x.untyped_storage()._cdata: x for x in tree_leaves(tree) if torch.is_tensor(x)}
        given = storages((args, kwargs))
        for key, x in storages(out).items():
            if key not in given:
                storage = x.untyped_storage()
                self.made[key] = StorageWeakRef(storage), storage.nbytes() // x.element_size()
        self.calls, self.peak = self.calls + 1, max(self.peak, self.live())
        return out

    def live(self):
        self.made = {key: (ref, n) for key, (ref, n) in self.made.items() if not ref.expired()}
        return sum(n for _, n in self.made.values())


def by_hand(y, what):
    """Fails unless y comes out of an autograd.Function that the student wrote."""
    check(isinstance(y, torch.Tensor) and y.requires_grad, f"{what}: no gradient reaches its inputs")
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and not function.__module__.startswith("torch"):
            return
        nodes += [before for before, _ in node.next_functions]
    check(False, f"{what}: the gradient is autograd's own. Expected a torch.autograd.Function of yours")


# ---------------------------------------------------------------------------------------------------------------------
# logprob_forward

# logits of two places: 3 times 8 4 2 1 1, and 3 times 1 2 4 8 1, as logarithms
HAND_HIDDEN, HAND_TARGET = torch.eye(2), torch.tensor([2, 3])
HAND_WEIGHT = torch.tensor([[24.0, 3], [12, 6], [6, 12], [3, 24], [3, 3]]).log()     # (V, D)
log = lambda *x: t(*x).log()


def places(N=6, V=11, D=4, scale=4.0):
    """hidden, weight and target, float32. Some words are the target of several places."""
    target = (torch.arange(N) * 7) % V // 2 * 2
    return scale * numbers(N, D, start=1.0).float(), numbers(V, D, start=2.0).float(), target


def usual(hidden, weight, target, own=1.0, rest=1.0):
    """The usual way, in float64, with all logits. own, rest: factors of the logit of the target, and of log Z."""
    logits = hidden.double() @ weight.double().T                                      # (N, V)
    log_Z = logits.logsumexp(1)
    return own * (log_Z - F.cross_entropy(logits, target, reduction="none")) - rest * log_Z


@problem("logprob_forward", 2)
def test_logprob_forward_by_hand(adapters):
    """Five words in blocks of two, two places."""
    same("two places, five words, blocks of two",
         adapters.linear_logprob(HAND_HIDDEN, HAND_WEIGHT, HAND_TARGET, 2), log(2 / 16, 8 / 16), tolerance=1e-5,
         looks_like={
             "log Z is not subtracted": log(6, 24), "Z is that of the last block alone": log(6 / 3, 24 / 3),
             "Z is that of the first block alone": log(6 / 36, 24 / 9),
             "the last block, which is smaller, is left out": log(6 / 45, 24 / 45),
             "the blocks' log Z are added": log(6 / 972, 24 / 972),
             "the largest of the blocks' log Z is taken": log(6 / 36, 24 / 36),
             "the sign is wrong": log(8, 2), "the old sum is kept as it is where a new largest logit is found":
             log(6 / 24 / (1 + 1 / 2 + 1 / 4 + 1 / 8 + 1 / 8), 1 / (1 / 2 + 1 + 1 / 2 + 1 + 1 / 8)),
             "the target is read one word too early": log(4 / 16, 4 / 16),
             "the target is read one word too late": log(1 / 16, 1 / 16)})


@problem("logprob_forward", 2)
@pytest.mark.parametrize("block", [1, 3, 4, 11, 100])
def test_logprob_forward_any_block(adapters, block):
    """The same numbers whatever the blocks are: also where the last is smaller, or one block is more than enough."""
    hidden, weight, target = places()
    same(f"6 places, 11 words, blocks of {block}", adapters.linear_logprob(hidden, weight, target, block),
         usual(hidden, weight, target), tolerance=1e-5, looks_like={
             "log Z is not subtracted": usual(hidden, weight, target, rest=0.0),
             "the last block is left out": usual(hidden, weight[:len(weight) // block * block or None],
                                                 target.clamp(max=(len(weight) // block * block or 11) - 1))})


@problem("logprob_forward", 2)
def test_logprob_forward_large_logits(adapters):
    """Logits in the thousands: rising, falling, all high, all low."""
    columns = [[-3000, -2000, -1000, 1000, 2000, 3000], [3000, 2000, 1000, -1000, -2000, -3000], [3000] * 6,
               [-3000] * 6]
    weight = torch.tensor(columns, dtype=torch.float32).T.contiguous()                # (6, 4)
    target = torch.tensor([1, 0, 4, 5])
    want = [-5000, 0, -math.log(6), -math.log(6)]
    got = adapters.linear_logprob(torch.eye(4), weight, target, 2)
    same("logits of thousands, rising, falling, all high, all low, in blocks of two", got, want)
    same("the last three of them", got[1:], want[1:], tolerance=1e-3)
    same("the logits log 8 4 2 1 1, and 3000 more, blocks of two",
         adapters.linear_logprob(HAND_HIDDEN, HAND_WEIGHT + 3000, HAND_TARGET, 2), log(2 / 16, 8 / 16), tolerance=1e-3)


@problem("logprob_forward", 2)
def test_logprob_forward_memory(adapters):
    """No (N, V) tensor, and no list of its blocks; and each logit is computed once."""
    hidden, weight, target = places(N=128, V=2048, D=8)
    with Meter() as meter, FlopCounterMode(display=False) as counter:
        got = adapters.linear_logprob(hidden, weight, target, 64)
    same("128 places, 2048 words", got, usual(hidden, weight, target), tolerance=1e-5)
    whole = len(hidden) * len(weight)
    check(meter.peak < whole / 2, f"128 places, 2048 words, blocks of 64: your tensors have {meter.peak} numbers at "
          f"one time; half of N · V is {whole // 2}")
    times = counter.get_total_flops() / (2 * whole * hidden.shape[1])
    check(times < 1.5, f"expected one pass over the blocks; the logits were computed {times:.1f} times")


# ---------------------------------------------------------------------------------------------------------------------
# logprob_backward


def gradients(function, hidden, weight, target, g, **others):
    """The gradients of Σ g · function(…) to hidden and weight, and the result."""
    hidden, weight = (x.detach().clone().requires_grad_(True) for x in (hidden, weight))
    y = function(hidden, weight, target, **others)
    if function is not usual:
        by_hand(y, "linear_logprob")
    (g.to(y) * y).sum().backward()
    return hidden.grad, weight.grad, y


def looks_like(i, hidden, weight, target, g):
    """What comes out of common mistakes as the gradient to hidden (i = 0) or weight (1)."""
    want = gradients(usual, hidden, weight, target, g)[i]
    later = torch.stack([~(target[n + 1:] == target[n]).any() for n in range(len(target))])
    ones, made = torch.ones_like(g), lambda **factors: gradients(usual, hidden, weight, target, g, **factors)[i]
    return {"the term of the target is missing: [v = y]": made(own=0.0),
            "the term of the softmax is missing: p_v": made(rest=0.0), "the sign is wrong": -want,
            "the derivative that comes into backward is left out":
            gradients(usual, hidden, weight, target, ones)[i],
            "the mean of the derivatives that come in is used for all":
            gradients(usual, hidden, weight, target, ones * g.mean())[i],
            "the mean over places is taken": want / len(g), "the term of the target is added, not subtracted":
            made(own=-1.0), "the derivative that comes in is used twice": gradients(
                usual, hidden, weight, target, g * g)[i]} | ({
                    "a word that is the target of several places counts once": made(own=later.double())} if i else {})


G = numbers(6, start=5.0) + 0.3                                                       # what comes into backward


@problem("logprob_backward", 2)
def test_logprob_backward_to_hidden(adapters):
    a = *places(), G
    check(len(set(places()[2].tolist())) < 6, "no word is the target of two places")
    same("the gradient to hidden, 6 places, 11 words in blocks of 3",
         gradients(adapters.linear_logprob, *a, block=3)[0], gradients(usual, *a)[0], tolerance=1e-5,
         looks_like=looks_like(0, *a))


@problem("logprob_backward", 2)
def test_logprob_backward_to_weight(adapters):
    a = *places(), G
    same("the gradient to weight, 6 places, 11 words in blocks of 3",
         gradients(adapters.linear_logprob, *a, block=3)[1], gradients(usual, *a)[1], tolerance=1e-5,
         looks_like=looks_like(1, *a))


@problem("logprob_backward", 2)
@pytest.mark.parametrize("block", [1, 4, 11, 100])
def test_logprob_backward_any_block(adapters, block):
    """Also with logits of hundreds, where exp alone is infinite."""
    for scale in (4.0, 400.0):
        a = *places(scale=scale), G
        got, want = gradients(adapters.linear_logprob, *a, block=block), gradients(usual, *a)
        for i, name in enumerate(("hidden", "weight")):
            same(f"the gradient to {name}, blocks of {block}, logits up to {scale:.0f}", got[i], want[i],
                 tolerance=1e-4, looks_like=looks_like(i, *a))


@problem("logprob_backward", 2)
def test_logprob_backward_frozen(adapters):
    """One of the two is frozen, as the head often is."""
    hidden, weight, target = places()
    want = gradients(usual, hidden, weight, target, G)
    for i, name in enumerate(("hidden", "weight")):
        inputs = [hidden.clone(), weight.clone()]
        inputs[i].requires_grad_(True)
        y = adapters.linear_logprob(*inputs, target, 3)
        by_hand(y, f"linear_logprob, {name} alone needs a gradient")
        (G.to(y) * y).sum().backward()
        same(f"the gradient to {name}, where it alone needs one", inputs[i].grad, want[i], tolerance=1e-5)
        check(inputs[1 - i].grad is None, "what is frozen has got a gradient")


@problem("logprob_backward", 2)
def test_logprob_backward_memory(adapters):
    a = *places(N=128, V=2048, D=8), numbers(128, start=4.0)
    with Meter() as meter:
        got = gradients(adapters.linear_logprob, *a, block=64)
    want, whole = gradients(usual, *a), 128 * 2048
    for i, name in enumerate(("hidden", "weight")):
        same(f"the gradient to {name}, 128 places, 2048 words", got[i], want[i], tolerance=1e-4)
    check(meter.peak < whole / 2, f"128 places, 2048 words, blocks of 64, both passes: your tensors have {meter.peak} "
          f"numbers at one time; half of N · V is {whole // 2}")


# ---------------------------------------------------------------------------------------------------------------------
# pack_tree

PROMPT, RESPONSES = [11, 12], [[21, 22, 0], [21, 23, 24, 0], [30, 0]]                 # the handout's
TOKENS = torch.tensor([11, 12, 21, 22, 0, 23, 24, 0, 30, 0])
PARENTS = torch.tensor([-1, 0, 1, 2, 3, 2, 5, 6, 1, 8])
PATHS = [[2, 3, 4], [2, 5, 6, 7], [8, 9]]
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 3, 4, 5, 2, 3])


def packed(adapters, prompt, responses):
    """tokens, parents, paths as lists, checked for their kinds."""
    got = adapters.pack_tree(list(prompt), [list(y) for y in responses])
    check(isinstance(got, (tuple, list)) and len(got) == 3,
          f"expected tokens, parents, paths; got {type(got).__name__}")
    tokens, parents, paths = got
    for name, x in (("tokens", tokens), ("parents", parents)):
        check(isinstance(x, torch.Tensor) and x.ndim == 1 and x.dtype == torch.int64,
              f"{name}: expected an int64 tensor (T,), got "
              f"{f'{x.dtype} {tuple(x.shape)}' if isinstance(x, torch.Tensor) else type(x).__name__}")
    check(len(tokens) == len(parents), f"{len(tokens)} tokens, but {len(parents)} parents")
    paths = [torch.as_tensor(path).tolist() for path in paths]
    check([len(path) for path in paths] == [len(y) for y in responses],
          f"responses of {[len(y) for y in responses]} tokens: expected paths of as many nodes, got "
          f"{[len(path) for path in paths]}" + (
              ": the prompt's nodes are no part of a path"
              if [len(p) - len(prompt) for p in paths] == [len(y) for y in responses] else ""))
    check(all(0 <= node < len(tokens) for path in paths for node in path),
          f"a path has a node that is none of the {len(tokens)}: {paths}. (Are these tokens instead of nodes?)")
    return tokens.tolist(), parents.tolist(), paths


def spelled(tokens, parents, node):
    """The tokens on the way from the root to a node."""
    words = []
    while node != -1 and len(words) <= len(tokens):
        words.append(tokens[node])
        node = parents[node]
    return words[::-1]


def as_met(tokens, parents, paths):
    """The same tree with its nodes numbered in the order in which the paths meet them; the others behind."""
    order = []
    for path in paths:
        way, node = [], path[-1]
        while 0 <= node and node not in way:
            way, node = [node, *way], parents[node]
        order += [node for node in way if node not in order]
    order += [node for node in range(len(tokens)) if node not in order]
    number = {node: i for i, node in enumerate(order)} | {-1: -1}
    return ([tokens[node] for node in order], [number[parents[node]] for node in order],
            [[number[node] for node in path] for path in paths])


def some_responses(seed, R=7, words=3):
    """A prompt and responses over few words, so that beginnings are often shared, also with a response far before."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(words, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist()
    return draw(), [draw() for _ in range(R)]


@problem("pack_tree", 2)
def test_pack_tree_example(adapters):
    """The handout's example, in any order of the nodes."""
    got = packed(adapters, PROMPT, RESPONSES)
    wrong = {
        "the responses share the prompt alone": [11, 12, 21, 22, 0, 21, 23, 24, 0, 30, 0],
        "nothing is shared": [11, 12, 21, 22, 0, 11, 12, 21, 23, 24, 0, 11, 12, 30, 0],
        "equal tokens are one node, wherever they stand": [11, 12, 21, 22, 0, 23, 24, 30],
        "the parent is the node to the left": list(range(-1, 9)),
        "every response begins at the root": [-1, 0, -1, 2, 3, 2, 5, 6, -1, 8],
        "every response begins behind the first token": [-1, 0, 0, 2, 3, 2, 5, 6, 0, 8],
        "the first node is its own parent": [0, 0, 1, 2, 3, 2, 5, 6, 1, 8],
        "paths have the nodes' parents": [[1, 2, 3], [1, 2, 5, 6], [1, 8]]}
    named = [f"\n  this is what comes out when {name}" for name, x in wrong.items() if x in got]
    want = TOKENS.tolist(), PARENTS.tolist(), PATHS
    for name, x, y, z in zip(("tokens", "parents", "paths"), want, as_met(*got), got):
        check(x == y, f"{name} of the example: expected {x}, or the same tree with other numbers; got {z}"
              + "".join(named))


@problem("pack_tree", 2)
@pytest.mark.parametrize("why, responses, nodes", [
    ("two equal responses", [[5, 6, 0], [5, 6, 0]], 5), ("one response is the beginning of another", [[5, 6], [5]], 4),
    ("one response goes on where another ends", [[5], [5, 6]], 4),
    ("the same token at the same depth, after another beginning", [[5, 7, 0], [6, 7, 0]], 8),
    ("the same ending", [[5, 9], [6, 9]], 6),
    ("the first and the third response share a beginning", [[5, 6, 0], [7, 0], [5, 6, 1]], 8),
    ("the second and the third response share a beginning", [[7, 0], [5, 6, 0], [5, 6, 1]], 8),
    ("the response begins like the prompt", [[1, 2, 0]], 5)])
def test_pack_tree_counts_every_shared_token_once(adapters, why, responses, nodes):
    tokens, parents, paths = packed(adapters, [1, 2], responses)
    check(len(tokens) == nodes, f"{why}, prompt 1 2, responses {responses}: expected {nodes} nodes, got {len(tokens)}")
    for path, response in zip(paths, responses):
        check(spelled(tokens, parents, path[-1]) == [1, 2, *response],
              f"{why}: the way from the first node to node {path[-1]} is {spelled(tokens, parents, path[-1])}, not "
              f"{[1, 2, *response]}")


@problem("pack_tree", 2)
def test_pack_tree_spells_the_responses(adapters):
    """Going back along the parents from the end of a path gives prompt and response, along the path's own nodes."""
    for seed in range(20):
        prompt, responses = some_responses(seed)
        tokens, parents, paths = packed(adapters, prompt, responses)
        check(all(parent < node for node, parent in enumerate(parents)), f"a node has a later parent: {parents}")
        for path, response in zip(paths, responses):
            where = f"prompt {prompt}, responses {responses}, path {path}"
            check([tokens[node] for node in path] == response,
                  f"{where}: its tokens are {[tokens[node] for node in path]}, expected {response}")
            got = spelled(tokens, parents, path[-1])
            check(got == prompt + response, f"{where}: the way to its end is {got}, expected {prompt + response}")
            check([parents[b] for b in path[1:]] == path[:-1], f"{where}: a node's parent is not the one before it")


@problem("pack_tree", 2)
def test_pack_tree_has_nothing_twice_and_nothing_more(adapters):
    for seed in range(20):
        prompt, responses = some_responses(seed, words=2 + seed % 3)
        tokens, parents, paths = packed(adapters, prompt, responses)
        where, beginnings = f"prompt {prompt}, responses {responses}", []
        for response in responses:
            beginnings += [prompt + response[:i] for i in range(1, len(response) + 1)]
        want = set(map(tuple, [prompt[:i] for i in range(1, len(prompt) + 1)] + beginnings))
        got = [tuple(spelled(tokens, parents, node)) for node in range(len(tokens))]
        check(len(set(got)) == len(got), f"{where}: two nodes stand for the same beginning, among {got}")
        check(len(got) == len(want), f"{where}: expected {len(want)} nodes, got {len(got)}")
        check(set(got) == want, f"{where}: the nodes stand for the beginnings {got}")


# ---------------------------------------------------------------------------------------------------------------------
# tree_attention

BUSHY = torch.tensor([-1, 0, 0, 1, 1, 2, 4, 0, 6, 5, 3])                              # a tree in some order


def attended(adapters, parents):
    got = adapters.tree_attention(parents.clone())
    check(isinstance(got, (tuple, list)) and len(got) == 2,
          f"expected positions and mask, got {type(got).__name__}")
    positions, mask = got
    for name, x, dtype in (("positions", positions, torch.int64), ("mask", mask, torch.bool)):
        check(isinstance(x, torch.Tensor) and x.dtype == dtype, f"{name}: expected a tensor of {dtype}, got "
              f"{x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}")
    return positions, mask


def trues(rows, size):
    """A (size, size) matrix with 1 at the columns of each row."""
    out = torch.zeros(size, size)
    for row, columns in enumerate(rows):
        out[row, columns] = 1
    return out


@problem("tree_attention", 2)
def test_tree_attention_example(adapters):
    positions, mask = attended(adapters, PARENTS)
    same("positions of the handout's example", positions, POSITIONS, looks_like={
        "positions are the nodes' numbers": torch.arange(10), "positions count from 1": POSITIONS + 1,
        "each response begins at position 0": (POSITIONS - 2).clamp(min=0) + t(0, 1, *[0] * 8)})
    want = trues([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 5, 6],
                  [0, 1, 2, 5, 6, 7], [0, 1, 8], [0, 1, 8, 9]], 10)
    pairs = trues([[i, max(p, 0)] for i, p in enumerate(PARENTS.tolist())], 10)
    same("mask of the handout's example", mask, want, looks_like={
        "siblings are seen: the mask is causal": torch.ones(10, 10).tril(), "rows and columns have changed places":
        want.T, "a node does not see itself": want - torch.eye(10), "a node sees its parent, but not further": pairs,
        "True and False have changed places": 1 - want, "a node sees its ancestors and its descendants":
        ((want + want.T) > 0).double(), "everything that is less deep is seen":
        (POSITIONS[None] < POSITIONS[:, None]).double() + torch.eye(10)})


@problem("tree_attention", 2)
@pytest.mark.parametrize("parents", [BUSHY, PARENTS, torch.arange(8) - 1, torch.tensor([-1, 0, 0, 0, 0])])
def test_tree_attention_properties(adapters, parents):
    """A node sees itself and what its parent sees; it stands one place behind its parent."""
    positions, mask = attended(adapters, parents)
    T, what = len(parents), f"parents {parents.tolist()}"
    check(positions.shape == (T,) and mask.shape == (T, T), f"{what}: expected the shapes ({T},) and ({T}, {T}), got "
          f"{tuple(positions.shape)} and {tuple(mask.shape)}")
    check(positions[0] == 0 and mask[0].nonzero().flatten().tolist() == [0],
          f"{what}: the first node stands at 0 and sees itself alone; got {positions[0]} and "
          f"{mask[0].nonzero().flatten().tolist()}")
    for node, parent in enumerate(parents.tolist()[1:], 1):
        sees, want = (mask[i].nonzero().flatten().tolist() for i in (node, parent))
        check(positions[node] == positions[parent] + 1, f"{what}: node {node} stands at {positions[node]}, its parent "
              f"{parent} at {positions[parent]}")
        check(sees == sorted(want + [node]), f"{what}: node {node} sees {sees}, its parent {parent} sees {want}")


@problem("tree_attention", 2)
def test_tree_attention_gives_what_separate_rows_give(adapters):
    """A model reads the tree as one row; at each node it says what it says in a row that ends there."""
    model = small(layers=3)
    for parents in (PARENTS, BUSHY):
        tokens = (torch.arange(len(parents)) * 5 + 3) % 23
        positions, mask = attended(adapters, parents)
        with torch.no_grad():
            got = model(tokens[None], positions, mask)[0]                             # (T, V)
            rows = [torch.tensor(spelled(tokens.tolist(), parents.tolist(), node)) for node in range(len(tokens))]
            want = torch.stack([model(row[None])[0, -1] for row in rows])
        same("the model's logits at the nodes of a tree, beside rows of their own", got, want, looks_like={
            "siblings are seen: the mask is causal": model(tokens[None], torch.stack(
                [torch.tensor(len(row) - 1) for row in rows])).detach()[0]})


# ---------------------------------------------------------------------------------------------------------------------
# tree_logprobs


def example():
    """hidden (10, 4) and weight (31, 4), float32, for the handout's example."""
    return 2 * numbers(10, 4, start=3.0).float(), 2 * numbers(31, 4, start=4.0).float()


@problem("tree_logprobs", 2)
def test_tree_logprobs_by_hand(adapters):
    """Prompt 1, responses 2 0, 2 1 and 0: the states are logits, as the head is the identity."""
    hidden = torch.tensor([[2.0, 2, 4], [4, 1, 3], [6, 1, 1], [1, 5, 2], [1, 2, 5]]).log()
    got = adapters.tree_logprobs(hidden, torch.eye(3), torch.tensor([1, 2, 0, 1, 0]), torch.tensor([-1, 0, 1, 1, 0]),
                                 [[1, 2], [1, 3], [4]])
    p = log(1 / 4, 1 / 4, 1 / 2).tolist(), log(4 / 8, 1 / 8, 3 / 8).tolist()          # at nodes 0 and 1
    same("responses of probability 1/2 · 1/2, 1/2 · 1/8 and 1/4", got, log(1 / 4, 1 / 16, 1 / 4), tolerance=1e-5,
         looks_like={
             "the node to the left is asked, not the parent": log(1 / 4, 1 / 2 * 1 / 8, 1 / 8),
             "each node is asked for its own token": log(3 / 8 * 6 / 8, 3 / 8 * 5 / 8, 1 / 8),
             "the mean over tokens is taken": [log(1 / 4).item() / 2, log(1 / 16).item() / 2, log(1 / 4).item()],
             "the first token of a response is left out": [p[1][0], p[1][1], 0.0],
             "the last token of a response is left out": [p[0][2], p[0][2], 0.0],
             "log Z is not subtracted": log(16, 4, 2), "the sign is wrong": -log(1 / 4, 1 / 16, 1 / 4),
             "probabilities are added": [1.0, 0.625, 0.25]})


@problem("tree_logprobs", 2)
def test_tree_logprobs_numbers_and_gradients(adapters):
    """The handout's example: log-probs, and what the states and the head learn from them."""
    hidden, weight = (x.requires_grad_(True) for x in example())
    got = adapters.tree_logprobs(hidden, weight, TOKENS, PARENTS, PATHS)
    same("the three responses of the example", got, TREE_LOGPROBS, tolerance=1e-5)
    check(got.requires_grad, "no gradient reaches the states")
    (got * torch.tensor([1.0, 2.0, -1.0])).sum().backward()
    for name, x in (("hidden", hidden), ("weight", weight)):
        check(x.grad is not None, f"no gradient reaches {name}")
    same("the gradient to hidden, of y_0 + 2 y_1 − y_2", hidden.grad, TREE_TO_HIDDEN, tolerance=1e-5)
    same("the gradient to the row of the head for token 21", weight.grad[21], TREE_TO_21, tolerance=1e-5)


TREE_LOGPROBS = t(-22.15774604, -24.02620634, -14.24376827)
TREE_TO_HIDDEN = t(
    [0, 0, 0, 0], [1.20830696, 3.95287189, -4.76166152, -2.30700434],
    [0.30084167, -2.85839023, -9.75660363, 2.76778461], [-3.25596696, -2.86096215, 1.50611905, -0.12396911],
    [0, 0, 0, 0], [-0.97652182, 6.06976148, -2.77372271, 1.87619345],
    [0.63913968, -0.66007482, -1.43610905, -3.33916839], [0, 0, 0, 0],
    [2.51044838, 0.10297297, -1.49407048, -0.45032131], [0, 0, 0, 0])
TREE_TO_21 = t(-5.73153104, -4.76970713, -2.64756289, -3.91628917)

# ---------------------------------------------------------------------------------------------------------------------
# svd_lora_backward


def layer(B=3, T=2, d_in=4, d_out=5, r=3, gain=2.5):
    """The arguments of svd_lora_by_hand in float64; x, U, V and d need gradients."""
    shapes = {"x": (B, T, d_in), "weight": (d_out, d_in), "bias": (d_out,), "U": (d_out, r), "V": (d_in, r),
              "d": (B, r)}
    a = {name: numbers(*shape, start=i + 1.0) for i, (name, shape) in enumerate(shapes.items())}
    return {name: p.requires_grad_(name in "xUVd") for name, p in a.items()} | {"gain": gain}


def slopes(adapters, a, name, upstream):
    """(the gradient of the student's backward to a[name], the same by finite differences of the student's forward)"""
    value = lambda: (adapters.svd_lora_by_hand(**a) * upstream).sum()
    a[name].grad = None
    y = adapters.svd_lora_by_hand(**a)
    by_hand(y, "svd_lora_by_hand")
    (y * upstream).sum().backward()
    got = a[name].grad
    check(got is not None, f"no gradient reaches {name}")
    with torch.no_grad():
        want = torch.stack([torch.tensor(slope(value, a[name], tuple(index)), dtype=torch.float64)
                            for index in torch.ones_like(got).nonzero().tolist()]).view(a[name].shape)
    check(want.abs().max() > 1e-3, f"the output does not depend on {name}")
    return got, want


UPSTREAM = numbers(3, 2, 5, start=9.0)                                                # (B, T, d_out)


@problem("svd_lora_backward", 2)
def test_svd_lora_backward_forward_rows(adapters):
    """Three rows with singular values of their own; and each of them alone."""
    a = layer()
    base = a["x"].detach() @ a["weight"].T + a["bias"]
    same("the output of three rows", adapters.svd_lora_by_hand(**a), SVD_FORWARD, looks_like={
        "the gain is left out": base + (SVD_FORWARD - base) / a["gain"], "the branch is left out": base,
        "the bias is left out": SVD_FORWARD - a["bias"],
        "a row has the singular values of the row before": SVD_BEFORE,
        "every row has the first row's singular values": SVD_FIRST})
    same("without a bias", adapters.svd_lora_by_hand(**a | {"bias": None}), SVD_FORWARD - a["bias"])
    for B in (1, 4):                                                  # also B = T and B = r, where no axis is wrong
        b = layer(B=B, T=4, r=4)
        rows = [adapters.svd_lora_by_hand(**b | {"x": b["x"][i:i + 1], "d": b["d"][i:i + 1]}) for i in range(B)]
        same(f"B = {B}, T = 4, r = 4, beside the rows in calls of their own", adapters.svd_lora_by_hand(**b),
             torch.cat(rows))


@problem("svd_lora_backward", 2)
def test_svd_lora_backward_to_x(adapters):
    a = layer()
    got, want = slopes(adapters, a, "x", UPSTREAM)
    base = UPSTREAM @ a["weight"]
    same("the gradient to x, beside finite differences", got, want, tolerance=1e-5, looks_like={
        "the branch has no part in it": base, "the frozen matrix has no part in it": want - base,
        "the gain is left out": base + (want - base) / a["gain"], "the gain is used twice":
        base + (want - base) * a["gain"]})


@problem("svd_lora_backward", 2)
def test_svd_lora_backward_to_U_and_V(adapters):
    for name in "UV":
        a = layer()
        got, want = slopes(adapters, a, name, UPSTREAM)
        own = [slopes(adapters, layer(), name, UPSTREAM * (torch.arange(3) == b).view(3, 1, 1))[1] for b in range(3)]
        same(f"the gradient to {name}, beside finite differences", got, want, tolerance=1e-5, looks_like={
            "the gain is left out": want / a["gain"], "the gain is used twice": want * a["gain"],
            "the mean over rows is taken": want / 3, "the mean over rows and tokens is taken": want / 6,
            "the first row alone counts": own[0], "the last row alone counts": own[2]})


@problem("svd_lora_backward", 2)
def test_svd_lora_backward_to_d(adapters):
    a = layer()
    got, want = slopes(adapters, a, "d", UPSTREAM)
    same("the gradient to d, beside finite differences", got, want, tolerance=1e-5, looks_like={
        "the gain is left out": want / a["gain"], "the gain is used twice": want * a["gain"],
        "the sum is taken over the rows too": want.sum(0).expand(3, 3), "the mean over tokens is taken": want / 2,
        "a row gets the gradient of the row before": want.roll(1, 0), "d itself is a factor": want * a["d"].detach()})


@problem("svd_lora_backward", 2)
def test_svd_lora_backward_keeps_its_input_alone(adapters):
    """What is alive after the forward pass; no loop over rows; a frozen x."""
    a = layer(B=3, T=40, d_in=6, r=4)
    with Meter() as meter:
        y = adapters.svd_lora_by_hand(**a)
    by_hand(y, "svd_lora_by_hand")
    kept = meter.live() - y.numel()
    check(kept < 3 * 40, f"B = 3, T = 40, r = 4: after the forward pass {kept} numbers besides the output are still "
          "alive. Expected less than B · T = 120: of large tensors, the inputs alone")
    calls = []
    for B in (2, 9):
        with Meter() as meter:
            adapters.svd_lora_by_hand(**layer(B=B)).sum().backward()
        calls.append(meter.calls)
    check(calls[0] == calls[1], f"two rows take {calls[0]} operations of torch, nine rows {calls[1]}: is there a loop?")
    frozen = layer()
    frozen["x"].requires_grad_(False)
    for name in "UVd":
        got, want = slopes(adapters, frozen, name, UPSTREAM)
        same(f"the gradient to {name}, where x is frozen", got, want, tolerance=1e-5)


SVD_FORWARD = t(
    -0.42668286, -3.70588754, -0.93639446, 1.84591207, 2.05234759, -1.29056685, -3.65769936, -1.35922672, 1.25243029,
    1.68975122, -2.01508617, 1.83250200, 4.04091024, 4.77136756, -2.45047980, -4.79758044, -1.69209013, -1.00454965,
    4.63484260, -0.66583942, 0.97940592, -3.37818479, 0.56317624, -0.16130537, 2.27047865, -0.81625662, -3.80517975,
    0.25146707, -0.33785348, 2.61680096).view(3, 2, 5)
SVD_BEFORE = t(                                                       # with d.roll(1, 0)
    1.46886506, 0.30237447, 0.66309055, 3.17849330, -3.00883873, 0.86603777, 2.28937969, 1.55851802, 3.71564390,
    -5.33012448, 0.79750626, -3.39204972, -0.82644768, -1.43724363, 1.92193115, -4.07633011, 1.09488873, 0.50286994,
    6.03839212, -3.84692152, 3.65133721, -2.92290585, -0.02950215, -2.26915694, 1.21747809, 2.36845042, -3.27631495,
    -1.42460096, -2.52742935, 0.34760905).view(3, 2, 5)
SVD_FIRST = torch.cat([SVD_FORWARD[:1], SVD_BEFORE[1:2], t(           # with d[0] for all
    2.08403448, -1.07435284, 1.79226227, 0.48173156, -0.30468966, 0.01411283, 0.69504014, 2.41704141, 2.36544471,
    -2.85508346).view(1, 2, 5)])

# ---------------------------------------------------------------------------------------------------------------------
# direction_distance

CHK = t([.9, .1], [.8, .5], [.5, .8], [.1, .9], [.6, .6], [.2, .2])                   # scores
UNIT = (CHK - .1) / .8
DISTANCES = {(.8, .2): [.2425, 0, .4548, .9701, .2729, .6367], (.5, .5): [.7071, .2652, .2652, .7071, 0, 0],
             (.2, .8): [.9701, .4548, 0, .2425, .2729, .6367]}


@problem("direction_distance", 2)
@pytest.mark.parametrize("lam", DISTANCES)
def test_direction_distance_by_hand(adapters, lam):
    """Six points, m = 2; four decimals."""
    X, v, l = UNIT, t(*lam) - 1, t(*lam)
    along = lambda x, w: ((x * w).sum(1) / (w * w).sum())[:, None]
    same(f"six points, λ = {lam}", adapters.direction_distance(X, l), DISTANCES[lam], tolerance=1e-4, looks_like={
        "it is squared": t(*DISTANCES[lam]).square(), "the direction is λ instead of λ − 1":
        (X - 1 - along(X - 1, l) * l).norm(dim=1), "the ray begins at 0 instead of the ideal point":
        (X - along(X, l) * l).norm(dim=1), "it is the distance from the ideal point": (X - 1).norm(dim=1),
        "it is the distance from the point λ": (X - l).norm(dim=1), "v · v is left out":
        (X - 1 - ((X - 1) @ v)[:, None] * v).norm(dim=1), "it is t": along(X - 1, v)[:, 0],
        "λ is in reverse order": DISTANCES[lam[::-1]], "distances in the dimensions are added":
        (X - 1 - along(X - 1, v) * v).abs().sum(1)})


@problem("direction_distance", 2)
def test_direction_distance_is_from_a_ray(adapters):
    """m = 3: points on the ray, beside it, and behind the ideal point."""
    lam = t(.2, .3, .5)
    on = 1 + t(0, .3, 1, 2)[:, None] * (lam - 1)                                      # (4, 3)
    beside = on + .1 * t(-.7, .8, 0) / math.hypot(.7, .8)                             # at a right angle to λ − 1
    same("on the ray, and 0.1 beside it", adapters.direction_distance(torch.cat([on, beside]), lam),
         [0.0] * 4 + [.1] * 4)
    behind = t([1.3, 1.3, 1.3], [1.1, 1.4, 1.0])
    v = lam - 1
    line = (behind - 1 - ((behind - 1) @ v / (v @ v))[:, None] * v).norm(dim=1)
    same("behind the ideal point", adapters.direction_distance(behind, lam), (behind - 1).norm(dim=1),
         looks_like={"the ray is taken for a line": line})
    edge = adapters.direction_distance(UNIT, t(1, 0))
    same("λ = (1, 0): distances from the edge X_1 = 1", edge, 1 - UNIT[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# pareto_selection


def selected(what, got, want, **looks_like):
    """Indices as `same` compares them."""
    check(isinstance(got, torch.Tensor) and not got.is_floating_point(), f"{what}: expected a tensor of int64, got "
          f"{got.dtype if isinstance(got, torch.Tensor) else type(got).__name__}")
    same(what, got, want, tolerance=1e-9, **looks_like)


@problem("pareto_selection", 2)
def test_pareto_selection_by_hand(adapters):
    """The hint's six points under three preferences."""
    selected("six points, k = 2, λ = (0.8, 0.2), (0.5, 0.5), (0.2, 0.8)",
             adapters.select_pareto(CHK, t([.8, .2], [.5, .5], [.2, .8]), 2, 2), [[1, 0], [4, 1], [2, 3]], looks_like={
                 "dominated points are in the pool": [[1, 0], [4, 5], [2, 3]],
                 "the largest Σ λ_i X_i are taken": [[0, 1], [1, 2], [2, 3]],
                 "the furthest are taken": [[3, 2], [0, 3], [0, 1]],
                 "the nearest comes last": [[0, 1], [1, 4], [3, 2]],
                 "all layers are in the pool, and a later index wins": [[1, 0], [5, 4], [2, 3]],
                 "of two at the same distance the later comes first": [[1, 0], [4, 2], [2, 3]],
                 "λ is in reverse order": [[2, 3], [4, 1], [1, 0]]})


# layers: 2 | 5 0 | 3 6 | 1 | 4
LAYERED = t([9, 3], [1, 1], [10, 10], [8, 2], [0, 0], [3, 9], [2, 8])


@problem("pareto_selection", 2)
@pytest.mark.parametrize("k, at_least, want", [
    (1, 1, [2]), (3, 1, [2, 0, 5]), (3, 3, [2, 0, 5]), (3, 4, [2, 0, 3]), (3, 5, [2, 0, 3]), (3, 6, [1, 2, 0]),
    (3, 7, [1, 2, 4]), (5, 1, [2, 0, 3, 5, 6])])
def test_pareto_selection_peels_layers(adapters, k, at_least, want):
    """Seven points in layers of 1, 2, 2, 1, 1; whole layers, until they have at_least points, and k."""
    pools = {3: [2, 0, 5], 5: [2, 0, 3], 6: [1, 2, 0], 7: [1, 2, 4]} if k == 3 else {}
    selected(f"layers of 1, 2, 2, 1, 1 points, λ = (0.5, 0.5), k = {k}, at_least = {at_least}",
             adapters.select_pareto(LAYERED, t([.5, .5]), k, at_least), [want],
             looks_like={f"the pool has {n} points": [index] for n, index in pools.items() if index != want})


@problem("pareto_selection", 2)
def test_pareto_selection_scale(adapters):
    """Other units of measurement change nothing; a bad point outside the pool changes the scale."""
    lams = t([.8, .2], [.5, .5])
    want = [[1, 0], [4, 1]]
    selected("scores of (1000, 0.01) times the size, shifted", adapters.select_pareto(
        CHK * t(1000, .01) + t(-7, 3), lams, 2, 2), want)
    wide = torch.cat([t([-3, .3]), CHK])                              # the first dimension now has a range of 3.9
    selected("with one more point, (-3, 0.3), in front", adapters.select_pareto(wide, lams, 2, 2), WIDE, looks_like={
        "the scale is that of the pool": torch.tensor(want) + 1})


@problem("pareto_selection", 2)
def test_pareto_selection_three_dimensions(adapters):
    """60 points of whole numbers, m = 3, some equal, or equal in a dimension; four preferences."""
    scores = (9 * numbers(60, 3, start=1.0)).round()
    got = adapters.select_pareto(scores, t([1, 0, 0], [.2, .3, .5], [.4, .6, 0], [1 / 3, 1 / 3, 1 / 3]), 6, 25)
    selected("60 points, k = 6, at_least = 25", got, SELECTED)


WIDE = [[5, 3], [3, 4]]
SELECTED = [[8, 10, 41, 35, 29, 19], [39, 19, 28, 38, 52, 1], [19, 54, 29, 49, 48, 39], [39, 19, 28, 52, 38, 29]]

# ---------------------------------------------------------------------------------------------------------------------
# stage_two

LATTICE = torch.stack([torch.linspace(0, 1, 11), 1 - torch.linspace(0, 1, 11)], 1).double()
CORNERS = t([1 / 3, 1 / 3, 1 / 3], [0, .1, .9], [.8, .1, .1], [.1, .9, 0], [.4, .4, .2])


@problem("stage_two", 3)
@pytest.mark.parametrize("lams, want", [
    (LATTICE, [10, 0, 5]), (LATTICE.flip(0), [0, 10, 5]), (CORNERS, [2, 3, 1, 0]), (t([.2, .8], [.9, .1]), [1, 0]),
    (t([.4, .6], [.2, .8], [.35, .65]), [0, 1]), (t([.6, .1, .3]), [0])])
def test_stage_two_representatives(adapters, lams, want):
    got = adapters.representatives(lams)
    check(isinstance(got, (list, tuple, torch.Tensor)), f"expected a list of indices, got {type(got).__name__}")
    got, m = torch.as_tensor(got).tolist(), lams.shape[1]
    ends = [int((lams - end).norm(dim=1).argmin()) for end in torch.eye(m).double()]
    why = {" (an index is there twice)": len(set(got)) < len(got),
           " (the middle is missing)": got == list(dict.fromkeys(ends)) != want,
           " (they are sorted; expected the order of the vertices, then the middle)": got == sorted(want) != want}
    check(got == want, f"{len(lams)} preferences, the first {lams[0].tolist()}: expected {want}, got {got}"
          + "".join(words for words, holds in why.items() if holds))


# index:        0 not ended    1             2 empty      3 is 1 again    4 to another prompt    5 …
ANSWERS = [("p", "cut off"), ("p", "good"), ("p", "  "), ("p", "good"), ("q", "good"), ("p", "long"), ("q", "short"),
           ("q", "middle"), ("p", "cut off"), ("q", "")]
ENDED = torch.tensor([False, True, True, True, True, True, True, True, True, True])
ANSWER_SCORES = t([9, 20], [4, 4], [8, 8], [4, 4], [4.5, 3.6], [6, 1], [1, 6], [3, 5], [2, 2], [7, 7])


@problem("stage_two", 3)
def test_stage_two_answers(adapters):
    """Ten answers: one not ended, two empty, one repeated, one that another cut-off answer is equal to."""
    lams = t([.5, .5], [1, 0], [0, 1])
    answers = lambda k, at_least: adapters.select_answers(list(ANSWERS), ENDED.clone(), ANSWER_SCORES.clone(), lams, k,
                                                          at_least)
    selected("ten answers, k = 4, λ = (0.5, 0.5), (1, 0), (0, 1)", answers(4, 3), [[1, 4], [5, 4], [6, 7]], looks_like={
        "nothing is dropped": [[0, 9], [0, 2], [0, 2]],
        "the answer that did not end is not dropped": [[0, 7], [0, 5], [0, 6]],
        "an answer of spaces is not dropped": [[1, 2], [2, 5], [2, 6]],
        "empty answers are not dropped": [[1, 2], [2, 9], [2, 9]],
        "repetitions are not dropped": [[1, 3], [5, 4], [6, 7]],
        "of a repetition the last is kept": [[3, 4], [5, 4], [6, 7]],
        "they are indices into what is left, not into all answers": [[0, 1], [2, 1], [3, 4]],
        "the same response to another prompt is dropped": [[1, 7], [5, 1], [6, 7]]})
    selected("k = 12, so the six that are left, for λ = (0.5, 0.5)", answers(12, 6)[0], [1, 8, 4, 7, 5, 6], looks_like={
        "the scale is that of all answers, the dropped ones too": [7, 8, 1, 6, 4, 5]})
    selected("k = 5, at_least = 6: a second layer, for λ = (0.5, 0.5)", answers(5, 6)[0], [1, 8])
    selected("k = 1: one answer", answers(1, 3), [[1], [5], [6]])
