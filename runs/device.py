"""device.py - the device and the precision that a run computes with."""
import torch

from runs.files import UserError


def pick_device(name, precision="auto"):
    """"auto" is CUDA where there is a GPU. Returns (torch.device, dtype of the frozen base: "auto" is bf16 on CUDA)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
