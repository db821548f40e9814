"""check.py in Triton's interpreter: a kernel that is broken here is named, it alone is replaced, and what is computed
afterwards is the definition; and a decode step that cannot be recorded as a CUDA graph.

The interpreter is chosen when triton is imported, so the first part runs in processes of its own:

    TRITON_INTERPRET=1 python tests/ops/test_check.py rotate_:wrong swiglu_backward:raises
"""
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["svd_lora_down", "svd_lora_up_", "svd_lora_decode", "logprob_rows", "rms_norm_forward", "rms_norm_backward",
           "rotate_", "swiglu_forward", "swiglu_backward", "dequantize_int8", "dequantize_4bit"]


def broken(launch, how, calls):
    """A launcher that raises, or whose first number is wrong by 1. It notes its calls."""
    def launcher(*args, **more):
        calls.append(launch.__name__)
        if how == "raises":
            raise RuntimeError("no such address\nand much more")
        out = launch(*args, **more)
        for t in out if isinstance(out, tuple) else (out,):
            if t is not None:
                t[(0,) * t.ndim] += 1
        return out
    return launcher


def results(fused, generation, quantize):
    """Everything that launches kernels, values and gradients, as one list of tensors."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator).requires_grad_()
    x, up, W, U, V = randn(2, 3, 64), randn(2, 3, 64), randn(10, 64), randn(10, 5), randn(64, 5)
    d, w = randn(5), randn(64)
    turn, target = torch.randn(1, 3, 8, generator=generator), torch.randint(10, (6,), generator=generator)
    ys = [fused.svd_lora_linear(x, W.detach(), U, V, d), fused.rms_norm(x, w, 1e-5), fused.swiglu(x, up),
          fused.rope_(1 * x, turn.cos(), turn.sin()), fused.linear_logprob(x.flatten(0, 1), W, target)]
    out = [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), (x, W, U, V, d, w, up))]
    with torch.no_grad():
        for kind in ("int8", "nf4"):
            weight = quantize.quantize_weight(W, kind)
            layer = generation.FastLinear(weight, None, (V, d, U.T))
            layer = generation.OneToken([layer]) if generation.OneToken.can(layer) else layer
            out += [weight.dense(), layer(x[:, :1])]
    return out


def main(*breaks):
    """Breaks kernels, checks all of them; prints what was said, what is off, which broken kernels were launched later,
    and by how much results differ from those without kernels, then and before."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]
    from test_triton_kernels import error, patch_once

    from ops import check, fused, generation, quantize, triton_kernels
    patch_once()
    want, calls = results(fused, generation, quantize), []
    differs = lambda: max(error(a, b) for a, b in zip(results(fused, generation, quantize), want))
    fused.use_kernels = lambda x: x.dtype != torch.float64
    for name, how in (b.split(":") for b in breaks):
        setattr(triton_kernels, name, broken(getattr(triton_kernels, name), how, calls))
    before = None if any("raises" in b for b in breaks) else differs()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for kind in ("int8", "nf4", "nf4") if len(breaks) > 1 else ("nf4",):
            check.replace_broken(torch.device("cpu"), torch.float32, kind)
    calls.clear()
    after = differs()
    print(json.dumps({"said": said.getvalue().splitlines(), "off": sorted(fused.OFF), "calls": calls, "before": before,
                      "after": after}))


def run(*arguments, interpret=True):
    if interpret and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("breaks", [
    ["rotate_:wrong"], ["svd_lora_decode:raises"],
    [f"{name}:{how}" for name, how in zip(KERNELS, ["wrong", "raises"] * 6)]], ids=len)
def test_a_broken_kernel_is_named_and_it_alone_is_replaced(breaks):
    """Wrong: a kernel that stays in use, one that is turned off for another, more or less than a line."""
    process = run(__file__, *breaks)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    names = dict(b.split(":") for b in breaks)
    assert found["off"] == sorted(names) and len(found["said"]) == len(names)
    for line in found["said"]:
        name = line.split()[0]
        assert f"{name} on cpu: " in line
        assert ("RuntimeError: no such address (" if names[name] == "raises" else "differs from its definition") in line
    assert found["calls"] == [] and found["after"] < 1e-5
    if breaks and found["before"] is not None:
        assert found["before"] > 1e-3                         # without the check


def test_the_table():
    """Every kernel; without a GPU it says that there is none. (fp32: the tests above.)"""
    code = ("import test_triton_kernels as t, torch; from ops import check; t.patch_once(); "
            "del check.TOLERANCE[torch.float32]; sys.exit(check.main())")
    process = run("-c", f"import sys; sys.path[:0] = ['.', 'tests/ops']; {code}")
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and lines[-1] == "all are right", process.stdout + process.stderr
    assert {line.split()[0] for line in lines if " bfloat16 " in line} == set(KERNELS)
    if not torch.cuda.is_available():
        assert lines[0].startswith("no CUDA device here")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_the_table_without_cuda_and_interpreter():
    process = run("-m", "ops.check", interpret=False)
    assert process.returncode == 1 and process.stdout.startswith("no CUDA device here") and not process.stderr


# ---------------------------------------------------------------------------------------------------------------------

def test_a_model_that_is_read_is_a_reason_to_look(tiny, tmp_path, monkeypatch):
    import model
    looked = []
    monkeypatch.setattr(model, "replace_broken", lambda *args: looked.append(args))
    tiny("llama").save_pretrained(tmp_path)
    model.Transformer.from_pretrained(tmp_path, torch.bfloat16, quantize="nf4")
    assert looked == [(torch.device("cpu"), torch.bfloat16, "nf4")]


def test_plain_runs_without_any_kernel(monkeypatch):
    from ops import fused
    from runs.processes import pick_device
    monkeypatch.setattr(fused, "OFF", set())
    monkeypatch.setattr(fused, "use_kernels", lambda x: True)
    monkeypatch.setattr(fused, "triton", lambda: type("kernels", (), {"rotate_": "a launcher"}))
    assert fused.kernel("rotate_", None) == "a launcher" and fused.on("CUDA graph")
    pick_device("cpu", plain=True)
    assert fused.kernel("rotate_", None) is None and not fused.on("CUDA graph")


def test_decoding_goes_on_without_a_graph(tiny, close, monkeypatch, capsys):
    """A CPU records no graph. Wrong: the error itself, a line for each decoder, slots that are not filled."""
    from ops import fused
    from ops.generation import Decoder
    monkeypatch.setattr(fused, "OFF", set())
    model, prompts = tiny("llama"), [[3], [4, 5, 6]]
    with torch.no_grad():
        plain, *others = [Decoder(model, prompts, 4, graph=graph) for graph in (False, True, True)]
        first = plain.prefill()
        assert all(close(other.prefill(), first) for other in others)
        for token in torch.tensor([[9, 10], [11, 12], [13, 14]]):
            want = plain.step(token)
            for other in others:
                assert close(other.step(token), want) and not close(first, want)
                assert other.cache.seen == plain.cache.seen and other.graph is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("CUDA graph on cpu: ") and not fused.on("CUDA graph")


if __name__ == "__main__":
    main(*sys.argv[1:])
