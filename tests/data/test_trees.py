"""test_trees.py - a packed tree gives every response the log-prob and the gradient that a row of its own would."""
import pytest
import torch

from data import toy, trees
from data.tokenizers import TokenRow, load_tokenizer, tokenize
from data.trees import batch_logprobs, pack, pack_ends, path_logprobs, predicting_states, with_prefix
from objectives import response_logprobs

PROMPTS = [[5, 6, 7], [8], [5, 6, 7, 9, 10, 11, 12]]
ROWS = [TokenRow(PROMPTS[0], [[20, 21, 22, 0], [20, 21, 23, 24, 0], [20, 21, 22, 0], [30, 0]],   # a duplicate
                 [(0, 1), (3, 2)], [[0, 1], [1, -1]]),
        TokenRow(PROMPTS[1], [[20, 21, 22, 25, 0]]),                                 # a single response, not compared
        TokenRow(PROMPTS[2], [[40, 41], [40, 41, 42, 43, 0], [40]], [(2, 1)], [[-1, 0]])]      # prefixes of one another


def tree_logprobs(model, batch, positions=None, mask=None):
    """log π of every response in float64, through the tree."""
    hidden = model(batch.tokens, batch.positions if positions is None else positions,
                   batch.mask if mask is None else mask, return_hidden=True).flatten(0, 1)[batch.parents]
    tokens = (hidden @ model.head_weight.T).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return response_logprobs(tokens, batch.paths)


def plain_logprobs(model, rows):
    """The same with a causal row of its own for each response; padding on the right is seen by none."""
    texts = [(row.prompt, response) for row in rows for response in row.responses]
    longest = max(len(prompt + response) for prompt, response in texts)
    tokens = torch.tensor([prompt + response + [0] * (longest - len(prompt + response)) for prompt, response in texts])
    logps = model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.stack([logps[b, len(x) - 1:len(x + y) - 1].sum() for b, (x, y) in enumerate(texts)])


def random_rows(seed):
    """Rows over three tokens, so that beginnings are often shared."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(3, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    return [TokenRow(draw(1, 6), [draw(1, 7) for _ in range(6)]) for _ in range(3)]


def test_a_tree_by_hand():
    batch = pack([TokenRow([5, 6], [[7, 8], [7, 9, 1], [7]], [(1, 2)], [[0, 1]]), TokenRow([4], [[3]])])
    # nodes 5-6-7-9 (8, 1 and the last row's 3 are predicted and never read); edges 6→7, 7→8, 7→9, 9→1 and 4→3
    assert batch.tokens.tolist() == [[5, 6, 7, 9], [4, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.parents.tolist() == [1, 2, 2, 3, 4] and batch.targets.tolist() == [7, 8, 9, 1, 3]
    assert batch.paths.tolist() == [[0, 1, 5], [0, 2, 3], [0, 5, 5], [4, 5, 5]]
    assert batch.mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.mask[1, 0].int().tolist() == torch.eye(4).int().tolist()


def test_the_drawn_example_is_what_pack_gives():
    row = TokenRow([11, 12], [[21, 22, 0], [21, 23, 24, 0], [30, 0]])
    batch, chains = pack([row]), trees.tree_of(row).chains
    line = lambda name, values: f"    {name:12}" + "".join(f"{x:3}" for x in values)
    drawn = trees.__doc__.split("\n")
    assert line("node", range(7)) in drawn and line("edge", range(8)) in drawn
    assert line("tokens", batch.tokens[0].tolist()) in drawn and line("positions", batch.positions[0].tolist()) in drawn
    assert line("parents", batch.parents.tolist()) in drawn and line("targets", batch.targets.tolist()) in drawn
    text = "    chains       " + " ".join(map(str, chains))
    assert text in drawn
    paths = "    paths        " + " / ".join(" ".join(map(str, path)) for path in batch.paths.tolist())
    assert any(x.startswith(paths + "  ") for x in drawn)
    # the drawing's nodes, in order, and the edges without a node
    nodes = [f"{t}:{token}" for t, token in enumerate(batch.tokens[0].tolist())]
    assert all(sum(f" {node} " in x for x in drawn) == 1 for node in nodes)
    assert sum(x.endswith(" (0)") and ":" in x for x in drawn) == len(row.responses)


def test_siblings_do_not_see_each_other():
    batch = pack([TokenRow([5], [[6, 7, 0], [8, 9, 0]])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]] and batch.positions.tolist() == [[0, 1, 2, 1, 2]]
    assert batch.mask[0, 0, 4].tolist() == [True, False, False, True, True]


def test_pairs_and_labels_with_several_rows():
    batch = pack(ROWS)
    assert batch.pairs.tolist() == [[0, 1], [3, 2], [7, 6]] and batch.pair_row.tolist() == [0, 0, 2]
    assert batch.better.tolist() == [[0, 1], [1, -1], [-1, 0]]
    assert torch.equal(batch.paths[0], batch.paths[2])                   # equal responses are one path
    N = len(batch.targets)
    targets = [batch.targets[path[path < N]].tolist() for path in batch.paths]
    assert targets == [y for row in ROWS for y in row.responses]
    bare = pack([ROWS[1]])
    assert bare.pairs.shape == (0, 2) and len(bare.better) == len(bare.pair_row) == 0


@pytest.mark.parametrize("family, tolerance", [("gpt2", 1e-10), ("llama", 1e-5)])    # rotary positions are fp32 always
@pytest.mark.parametrize("rows", [ROWS, random_rows(0)])
def test_equal_a_row_for_each_response(tiny, close, rows, family, tolerance):
    model = tiny(family, dtype=torch.float64)
    batch, g = pack(rows), torch.Generator().manual_seed(2)
    weights = torch.randn(sum(len(row.responses) for row in rows), generator=g)
    logps = {"tree": tree_logprobs(model, batch), "plain": plain_logprobs(model, rows)}
    gradients = {key: torch.autograd.grad(weights.double() @ value, list(model.parameters()))
                 for key, value in logps.items()}
    assert close(logps["tree"], logps["plain"], tolerance)
    for (name, _), tree, plain in zip(model.named_parameters(), gradients["tree"], gradients["plain"]):
        assert (tree - plain).norm() <= tolerance * max(plain.norm(), 1e-2), name    # a bias on the keys has none
    # wrong: every earlier node is attended to; the position is the place in the row, not the depth
    T = batch.tokens.shape[1]
    assert not close(tree_logprobs(model, batch, mask=torch.ones(T, T).tril().bool()), logps["plain"], 1e-3)
    assert not close(tree_logprobs(model, batch, positions=torch.arange(T)), logps["plain"], 1e-3)


def test_padding_changes_nothing(tiny, close):
    model, batch = tiny(dtype=torch.float64), pack(ROWS)
    logps = tree_logprobs(model, batch)
    # padding attends to itself alone, and nothing else attends to it
    read = batch.mask.any(2)[:, 0] & (batch.mask.sum((1, 2)) + batch.mask.sum((1, 3)) > 2)
    assert 0 < (~read).sum() < read.numel() and logps.isfinite().all()
    batch.tokens = torch.where(read, batch.tokens, 33)
    assert torch.equal(tree_logprobs(model, batch), logps)
    assert close(tree_logprobs(model, pack(ROWS[1:2])), logps[4:5], 1e-10)          # nor do the other rows of the batch


def tokens_by_loop(model, rows):
    """log π of every response's every token, one sequence after the other: a list of (length,) tensors."""
    each = []
    for x, y in ((row.prompt, y) for row in rows for y in row.responses):
        logps = model(torch.tensor([x + y]))[0, len(x) - 1:-1].log_softmax(-1)
        each.append(logps[torch.arange(len(y)), torch.tensor(y)])
    return each


@pytest.mark.parametrize("rows", [ROWS, random_rows(0)])
def test_path_logprobs_equal_a_loop_over_sequences(tiny, close, rows):
    model, batch = tiny(), pack(rows)
    tokens = path_logprobs(model, batch)                                 # (R, L)
    each = tokens_by_loop(model, rows)
    lengths = torch.tensor([len(t) for t in each])
    padded = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
    assert tokens.shape == batch.paths.shape == (len(each), int(lengths.max())) and tokens.dtype == torch.float32
    assert close(tokens, padded, 1e-5)
    assert torch.equal(batch.on_path, (torch.arange(lengths.max()) < lengths[:, None]).float())
    assert (tokens[batch.on_path == 0] == 0).all() and (tokens[batch.on_path == 1] < 0).all()
    assert close(tokens.sum(1), batch_logprobs(model, batch), 1e-6)
    assert torch.equal(tokens, path_logprobs(model, batch, predicting_states(model, batch)))     # states at hand
    # gradients of a different weight on every token of every response: shared tokens collect those of all their copies
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(4))
    tree, plain = (torch.autograd.grad((weights * t).sum(), list(model.parameters())) for t in (tokens, padded))
    for (name, _), a, b in zip(model.named_parameters(), tree, plain):
        assert (a - b).norm() <= 1e-4 * max(b.norm(), 1e-1), name


@pytest.mark.parametrize("rows", [ROWS, random_rows(0)])
def test_a_prefix_equals_packing_longer_prompts(tiny, close, rows):
    ids = torch.tensor([[50, 51, 52], [53, 54, 55], [56, 57, 58]])
    longer = lambda ids: [TokenRow(x + row.prompt, row.responses, row.pairs, row.better)
                          for x, row in zip(ids.tolist(), rows)]
    for given, each in ((ids, ids), (ids[1], ids[1].expand(3, 3))):      # a prefix for every row; one for all
        for name, value in vars(pack(longer(each))).items():
            got = getattr(with_prefix(pack(rows), given), name)
            assert torch.equal(got, value) if torch.is_tensor(value) else got == value, name
    model = tiny()
    logps = batch_logprobs(model, with_prefix(pack(rows, multiple=16), ids))              # with padding of its own
    assert close(logps, plain_logprobs(model, longer(ids)), 1e-5)
    assert not close(logps, plain_logprobs(model, longer(ids.flip(0))), 1e-3)             # wrong: another row's prefix
    assert not close(logps, batch_logprobs(model, pack(rows)), 1e-3)                      # wrong: none is seen


def test_equal_beginnings_have_equal_numbers(tiny):
    tokens = path_logprobs(tiny(), pack(ROWS))
    assert torch.equal(tokens[0], tokens[2])                             # the duplicate
    assert torch.equal(tokens[0, :2], tokens[1, :2]) and not torch.equal(tokens[0, 2], tokens[1, 2])
    assert torch.equal(tokens[5, :2], tokens[6, :2]) and tokens[7, 0] == tokens[5, 0]
    assert tokens[4, 0] != tokens[0, 0]                                  # the same token after another prompt


def test_along_and_rows():
    batch = pack(ROWS)
    N, L = len(batch.targets), batch.paths.shape[1]
    owners = [b for b, row in enumerate(ROWS) for _ in row.responses]
    laid = batch.along(batch.parents // batch.tokens.shape[1] + 1)         # of every token's row, from 1
    assert torch.equal(laid, (torch.tensor(owners)[:, None] + 1) * batch.on_path.long())
    assert torch.equal(batch.along(batch.targets)[3], torch.tensor([30] + [0] * (L - 1)))
    two = torch.stack([torch.arange(N), -torch.arange(N)], dim=1).float().requires_grad_(True)
    laid = batch.along(two)                                              # (R, L, 2)
    assert laid.shape == (8, L, 2) and torch.equal(laid[..., 0], -laid[..., 1])
    assert torch.equal(laid[1, :5, 0].long(), batch.paths[1, :5]) and not laid[7, 1:].any()
    laid.sum().backward()                                                # as often as a response runs through the token
    assert torch.equal(two.grad[:, 0], batch.paths.flatten().bincount(minlength=N + 1)[:N].float())
    assert two.grad[0, 0] == 3                                           # wrong: once, where three responses share it


def test_a_tree_has_fewer_tokens(tiny):
    prompt = toy.prompts("new_verbs")[0]
    plain = lambda row: sum(len(row.prompt) + len(y) - 1 for y in row.responses)
    for texts, saving in [(toy.responses(prompt)[:32], 3), (toy.responses(prompt)[:2], 1.3)]:
        (row,), _ = tokenize([toy.as_row(prompt, texts)], load_tokenizer("toy"), 10_000)
        assert saving * pack([row]).tokens.shape[1] < plain(row)


def test_pack_ends_reads_the_last_token_of_every_response():
    batch, last = pack_ends(ROWS, multiple=8)
    assert batch.tokens.flatten()[last].tolist() == [0, 0, 0, 0, 0, 41, 0, 40]
    ends = [len(row.prompt) + len(response) - 1 for row in ROWS for response in row.responses]
    assert batch.positions.flatten()[last].tolist() == ends and batch.tokens.shape[1] % 8 == 0
    # wrong: pack's own paths end at the node before
    plain = pack(ROWS)
    before = plain.parents[plain.paths.gather(1, plain.on_path.sum(1, keepdim=True).long() - 1)[:, 0]]
    assert plain.positions.flatten()[before].tolist() == [end - 1 for end in ends]


def test_to_moves_every_tensor():
    batch = pack(ROWS)
    moved = batch.to("meta")
    tensors = {name: x for name, x in vars(batch).items() if name != "nodes"}
    assert all(getattr(moved, name).device.type == "meta" and getattr(moved, name).shape == x.shape
               for name, x in tensors.items()) and moved.nodes == batch.nodes


def by_nodes(row):
    """The tree of one row, token by token: nodes, the parent of each, edges (node, token), each response's edges."""
    nodes, parent = list(row.prompt), list(range(-1, len(row.prompt) - 1))
    edges, child, paths = {}, {}, [[] for _ in row.responses]
    for r in sorted(range(len(paths)), key=row.responses.__getitem__):                # branch by branch
        response = row.responses[r]
        at = len(row.prompt) - 1
        for i, token in enumerate(response):
            paths[r].append(edges.setdefault((at, token), len(edges)))
            if i + 1 < len(response):
                if (at, token) not in child:
                    child[at, token] = len(nodes)
                    nodes.append(token)
                    parent.append(at)
                at = child[at, token]
    return nodes, parent, list(edges), paths


@pytest.mark.parametrize("seed", range(20))
def test_pack_equals_a_loop_over_tokens(seed):
    for row in random_rows(seed):
        batch = pack([row])
        nodes, parent, edges, paths = by_nodes(row)
        depth, sees = [], torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for t, p in enumerate(parent):
            depth.append(depth[p] + 1 if p >= 0 else 0)
            sees[t] = sees[p] if p >= 0 else False
            sees[t, t] = True
        assert batch.tokens[0].tolist() == nodes and batch.positions[0].tolist() == depth
        assert torch.equal(batch.mask[0, 0], sees)
        assert list(zip(batch.parents.tolist(), batch.targets.tolist())) == edges
        assert [[e for e in path if e < len(edges)] for path in batch.paths.tolist()] == paths


def test_padding_to_a_multiple(tiny, close):
    plain, padded = pack(ROWS), pack(ROWS, multiple=16)
    assert plain.tokens.shape == (3, 11) and padded.tokens.shape == (3, 16) and padded.mask.shape == (3, 1, 16, 16)
    assert plain.nodes == padded.nodes == [9, 5, 11] and plain.size == (25, len(plain.targets))
    assert not torch.equal(plain.parents, padded.parents)
    model = tiny()
    assert close(batch_logprobs(model, padded), batch_logprobs(model, plain), 1e-5)
