"""test_reference.py - log π_ref: of the base alone, of the rows that are used, and never computed twice."""
import pytest
import torch
from test_batches import CPU, rows_of

from data import reference
from data.reference import kept_file, reference_logprobs
from data.trees import batch_logprobs, pack, predicting_states
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
    local = []
    monkeypatch.setattr(processes, "all_sum", lambda x: local.append(x) or x)
    for rank in range(2):
        monkeypatch.setattr(processes, "ranks", lambda: (rank, 2))
        reference_logprobs(model, rows, 3, 1, CPU)
    (sizes_0, logps_0, sizes_1, logps_1), sizes = local, [len(row.responses) for row in rows]
    assert (sizes_0 + sizes_1).tolist() == sizes and (sizes_0 * sizes_1 == 0).all() and sizes_0.any() and sizes_1.any()
    assert len(logps_0) == sizes_0.sum() and len(logps_1) == sizes_1.sum()
    whole = {}
    for own, logps in ((sizes_0, logps_0), (sizes_1, logps_1)):
        whole |= zip(own.nonzero()[:, 0].tolist(), logps.split(own[own > 0].tolist()))
    assert all(torch.allclose(whole[j], alone[j], atol=1e-4) for j in range(7))


def test_tokens_that_the_reference_allows(tiny):
    """At every edge of a row those of probability 0.02 or more under the base, and always the likeliest."""
    rows, _ = rows_of(5)
    model = inject_svd_lora(tiny(), 2, 0, generator=torch.Generator().manual_seed(0))
    for layer in svd_lora_layers(model).values():
        torch.nn.init.normal_(layer.sigma.data)
    for least in (0.02, 0.9):
        _, allowed = reference_logprobs(model, rows, 2, 1, CPU, least)
        for row, (counts, tokens) in zip(rows, allowed, strict=True):
            tree = pack([row])
            with torch.no_grad(), adapters_off(model):
                p = (predicting_states(model, tree) @ model.head_weight.T).softmax(-1)                # (N, V)
            want = (p >= least) | (p == p.amax(1, keepdim=True))
            assert counts.tolist() == want.sum(1).tolist() and tokens.tolist() == want.nonzero()[:, 1].tolist()
    assert (counts == 1).any()


def test_only_the_rows_that_are_used_and_only_once(tiny, tmp_path, monkeypatch, capsys):
    """A second run computes what the first one did not; the two responses of a row may be swapped."""
    rows, _ = rows_of(9)
    model = inject_svd_lora(tiny(), 2, 0, generator=torch.Generator().manual_seed(0))
    whole, _ = reference_logprobs(model, rows, 3, 1, CPU)
    seen, pack_rows = [], reference.pack
    monkeypatch.setattr(reference, "pack", lambda rows, multiple: seen.extend(rows) or pack_rows(rows, multiple))
    kept = kept_file(tmp_path / "run", model, torch.float32, "none")
    first, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[1, 4, 6], kept=kept)
    assert sorted(map(rows.index, seen)) == [1, 4, 6] == [j for j, logps in enumerate(first) if len(logps)]
    assert kept.parent == tmp_path / "reference" and "3 rows to compute, 0 kept" in capsys.readouterr().out

    seen.clear()
    for row in rows:
        row.responses.reverse()
    second, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[0, 1, 4, 8], kept=kept)
    assert sorted(map(rows.index, seen)) == [0, 8] and "2 rows to compute, 2 kept" in capsys.readouterr().out
    for j in (0, 1, 4, 8):                                             # wrong: known by row, or by response alone
        assert torch.allclose(second[j], whole[j].flip(0), atol=1e-4)
    assert torch.equal(second[4], first[4].flip(0))

    seen.clear()
    rows[1].prompt = rows[1].prompt[1:]                                # another prompt, another max_length
    third, _ = reference_logprobs(model, rows, 3, 1, CPU, used=[1, 8], kept=kept)
    assert [rows.index(x) for x in seen] == [1] and not torch.allclose(third[1], second[1], atol=1e-3)
    assert torch.equal(third[8], second[8])

    others = {kept_file(tmp_path / "run", *x) for x in ((model, torch.bfloat16, "none"), (model, torch.float32, "nf4"),
                                                       (tiny(seed=1), torch.float32, "none"))}
    assert len(others | {kept}) == 4
    kept.write_bytes(b"no file")
    with pytest.raises(UserError, match="delete it"):
        reference_logprobs(model, rows, 3, 1, CPU, kept=kept)
