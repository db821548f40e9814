"""test_reference.py - log π_ref: of the base alone, of the rows that are used, and never computed twice."""
from dataclasses import replace

import pytest
import torch
from test_batches import CPU, rows_of

from data import reference
from data.reference import kept_file, reference_logprobs
from data.tokenizers import TokenRow
from data.trees import batch_logprobs, pack, predicting_states, row_lengths
from runs import processes
from runs.files import UserError
from svd_lora import adapters_off, inject_svd_lora, svd_lora_layers


def test_reference_logprobs(tiny, monkeypatch):
    """Of the model without its adapter, each row's own; several processes share them."""
    rows, _ = rows_of(7)
    model = tiny()
    with torch.no_grad():
        alone = [batch_logprobs(model, pack([row])) for row in rows]
    inject_svd_lora(model, 2, 0, generator=torch.Generator().manual_seed(0))
    for layer in svd_lora_layers(model).values():
        torch.nn.init.normal_(layer.sigma.data)
    got, nothing = reference_logprobs(model, rows, 3, 1, CPU)
    assert nothing is None
    assert len(got) == 7 and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, alone))
    assert not any(x.requires_grad for x in got) and not torch.allclose(batch_logprobs(model, pack(rows[:1])), alone[0])
    sums, local = [], []                                               # of one process: what two must add up to
    monkeypatch.setattr(processes, "all_sum", lambda x: sums.append(x) or x)
    reference_logprobs(model, rows, 3, 1, CPU)
    monkeypatch.setattr(processes, "all_sum", lambda x: local.append(x) or sums[len(local) % 2 - 1])
    for rank in range(2):
        monkeypatch.setattr(processes, "ranks", lambda: (rank, 2))
        reference_logprobs(model, rows, 3, 1, CPU)
    (sizes, whole), (sizes_0, logps_0, sizes_1, logps_1) = sums, local
    assert torch.equal(sizes_0 + sizes_1, sizes) and (sizes_0 * sizes_1 == 0).all() and sizes_0.any() and sizes_1.any()
    assert (logps_0 * logps_1 == 0).all() and torch.allclose(logps_0 + logps_1, whole, atol=1e-4)


def repeated(rows):
    """Rows in which prompts and responses come back: the same response in two rows, twice in one, after another prompt;
    one that is the beginning of another; none at all."""
    x, (y, z) = rows[0].prompt, rows[0].responses
    return [*rows, TokenRow(x, [z, [7, 8], z, z[:1]]), TokenRow(rows[1].prompt, [y, z]), TokenRow(x, [[], y]),
            TokenRow([9], [])]


def test_a_response_of_several_rows_is_computed_once(tiny, monkeypatch):
    """Whatever row it stands in, it has its own log π_ref; no tree is longer than the longest row."""
    rows, seen, pack_rows = repeated(rows_of(4)[0]), [], reference.pack
    model = inject_svd_lora(tiny(), 2, 0, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(reference, "pack", lambda rows, multiple: seen.extend(rows) or pack_rows(rows, multiple))
    got, _ = reference_logprobs(model, rows, 3, 1, CPU)
    with torch.no_grad():
        for row, logps in zip(rows, got, strict=True):
            alone = [batch_logprobs(model, pack([TokenRow(row.prompt, [y])])).item() for y in row.responses]
            assert logps.tolist() == pytest.approx(alone, abs=1e-4)
    texts = lambda rows: [(row.prompt, y) for row in rows for y in row.responses]
    assert len(texts(seen)) == len({str(text) for text in texts(rows)}) < len(texts(rows))
    assert max(row_lengths(seen)) <= max(row_lengths(rows)) and len(seen) < len(rows)


def test_tokens_that_the_reference_allows(tiny):
    """At every edge of a row those of probability 0.02 or more under the base, and always the likeliest."""
    rows = repeated(rows_of(5)[0])
    model = inject_svd_lora(tiny(), 2, 0, generator=torch.Generator().manual_seed(0))
    for layer in svd_lora_layers(model).values():
        torch.nn.init.normal_(layer.sigma.data)
    for least in (0.02, 0.9):
        _, allowed = reference_logprobs(model, rows, 2, 1, CPU, least, [0, 2, 3, 4, 5, 6, 7, 8])
        assert [len(x) for x in allowed[1]] == [0, 0]                                 # not asked for
        for row, (counts, tokens) in zip(rows[2:], allowed[2:], strict=True):
            tree = pack([row])
            with torch.no_grad(), adapters_off(model):
                p = (predicting_states(model, tree) @ model.head_weight.T).softmax(-1)                # (N, V)
            want = (p >= least) | (p == p.amax(1, keepdim=True))
            assert counts.tolist() == want.sum(1).tolist() and tokens.tolist() == want.nonzero()[:, 1].tolist()
    assert (allowed[4][0] == 1).any()


def test_only_the_rows_that_are_used_and_only_once(tiny, tmp_path, monkeypatch, capsys):
    """A second run computes what the first one did not; the two responses of a row may be swapped."""
    rows, _ = rows_of(9)
    model = inject_svd_lora(tiny(), 2, 0, generator=torch.Generator().manual_seed(0))
    whole, _ = reference_logprobs(model, rows, 3, 1, CPU)
    seen, pack_rows = [], reference.pack
    monkeypatch.setattr(reference, "pack", lambda rows, multiple: seen.extend(rows) or pack_rows(rows, multiple))
    computed = lambda: sorted([row.prompt for row in rows].index(tree.prompt) for tree in seen)
    kept = kept_file(tmp_path / "run", model, torch.float32, "none")
    first, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[1, 4, 6], kept=kept)
    assert computed() == [1, 4, 6] == [j for j, logps in enumerate(first) if len(logps)]
    assert kept.parent == tmp_path / "reference" and "3 rows to compute, 0 kept" in capsys.readouterr().out

    seen.clear()
    rows = [replace(row, responses=row.responses[::-1]) for row in rows]
    second, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[0, 1, 4, 8], kept=kept)
    assert computed() == [0, 8] and "2 rows to compute, 2 kept" in capsys.readouterr().out
    for j in (0, 1, 4, 8):                                             # wrong: known by row, or by response alone
        assert torch.allclose(second[j], whole[j].flip(0), atol=1e-4)
    assert torch.equal(second[4], first[4].flip(0))

    seen.clear()
    rows[1] = replace(rows[1], prompt=rows[1].prompt[1:])              # another prompt, another max_length
    third, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[1, 8], kept=kept)
    assert computed() == [1] and not torch.allclose(third[1], second[1], atol=1e-3)
    assert torch.equal(third[8], second[8])

    seen.clear()
    again, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[1, 8], kept=kept)
    assert not seen and all(map(torch.equal, again, third))            # nothing is left to compute

    others = {kept_file(tmp_path / "run", *x) for x in ((model, torch.bfloat16, "none"), (model, torch.float32, "nf4"),
                                                       (tiny(seed=1), torch.float32, "none"))}
    assert len(others | {kept}) == 4
    kept.write_bytes(b"no file")
    with pytest.raises(UserError, match="delete it"):
        reference_logprobs(model, rows, 3, 1, CPU, kept=kept)
