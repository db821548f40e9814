"""grading.py - what the tests of all sets share: points, and comparisons whose messages teach.

A message says what was expected, what came, and, where the number is that of a common mistake, which mistake it looks
like. It never says how the right one is computed.
"""
import pytest
import torch


def problem(name, points):
    """Decorator of a test: the problem it belongs to, and its points, as its attribute `problem`."""
    def decorate(test):
        test.problem = name, points
        return test
    return decorate


def numbers(*shape, start=0.0):
    """Numbers in [-1, 1] that look random and are the same everywhere: float64 of this shape."""
    return torch.sin(1.3 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64).square() + start).view(shape)


def check(ok, message):
    """Fails the test with this message unless ok."""
    if not ok:
        pytest.fail(message, pytrace=False)


def raises(kind, call, what):
    """Fails unless call() raises an exception of this kind."""
    try:
        call()
    except kind:
        return
    check(False, f"{what}: expected {kind.__name__}, and nothing was raised")


def same(what, got, want, looks_like=None, tolerance=1e-6):
    """Fails unless `got` has the shape of `want`, and its entries differ by at most tolerance · the largest of `want`.

    looks_like: {"a mistake in words": the value it leads to}
    """
    want = torch.as_tensor(want, dtype=torch.float64)
    check(isinstance(got, (torch.Tensor, float, int)),
          f"{what}: expected a tensor of shape {tuple(want.shape)}, got {type(got).__name__}. Does your function "
          "return its result?")
    got = torch.as_tensor(got).detach().double()
    check(got.shape == want.shape, f"{what}: expected the shape {tuple(want.shape)}, got {tuple(got.shape)}")
    largest = max([1e-3, *want[want.isfinite()].abs().tolist()])

    def near(other):
        other = torch.as_tensor(other, dtype=torch.float64)
        close = (got == other) | ((got - other).abs() <= tolerance * largest)      # ==: both may be infinite
        return got.shape == other.shape and bool(close.all())
    if near(want):
        return
    message = [f"{what}: not the expected numbers", f"  expected {brief(want)}", f"  got      {brief(got)}"]
    if got.numel() > 6:
        off = (got - want).abs().masked_fill(got == want, 0.0).nan_to_num(torch.inf).flatten()
        at = int(off.argmax())
        place = [int(i) for i in torch.unravel_index(off.argmax(), got.shape)]
        message.append(
            f"  furthest off at index {place}: expected {want.flatten()[at]:.6g}, got {got.flatten()[at]:.6g}")
    if not got.isfinite().all() and want.isfinite().all():
        message.append("  yours has infinite numbers or NaN in it")
    elif (got == 0).all():
        message.append("  yours is zero everywhere")
    message += [f"  this is what comes out when {name}" for name, wrong in (looks_like or {}).items() if near(wrong)]
    pytest.fail("\n".join(message), pytrace=False)


def brief(x):
    """The first numbers of a tensor, for a message."""
    shown = " ".join(f"{v:.6g}" for v in x.flatten()[:6].tolist())
    return shown + (" …" if x.numel() > 6 else "")


def backward(value, x, what):
    """Runs value.backward(). Fails with "no gradient reaches …" where the leaf x, `what` in words, then has none."""
    check(value.requires_grad, f"no gradient reaches {what}")
    value.backward()
    check(x.grad is not None, f"no gradient reaches {what}")


def slope(function, x, index, step=1e-4):
    """The derivative of function() to one entry of the tensor x, by central differences; x is as before afterwards."""
    kept, values = x.detach()[index].clone(), []
    for sign in (1, -1):
        x.detach()[index] = kept + sign * step                        # detach shares memory with x
        values.append(float(function()))
    x.detach()[index] = kept
    return (values[0] - values[1]) / (2 * step)
