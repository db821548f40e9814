"""ops/ - fused operations, Triton kernels, quantisation, generation and heads: what makes the model fast, and no more.

fused.py            the operations that training spends its time in, each beside its definition in plain PyTorch
triton_kernels.py   the Triton kernels that fused.py, quantize.py and generation.py launch on CUDA
check.py            every kernel beside its definition: the table, and what a run on CUDA does first
quantize.py         a frozen base in 8 or 4 bits per weight
generation.py       continuing prompts: KV cache, decode steps, sampling
heads.py            scalar heads on hidden states: PPO's critic, the reward model

May live here: functions and layers of tensors, with the definition that their tests compare them with. May not: data,
runs, files, losses, or the meaning of λ (for an operation it is the vector d, for the critic one more input). Nothing
here imports the project outside ops/. No file is called kernels.py: transformers imports a package of that name.
"""
