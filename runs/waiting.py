"""waiting.py - how OpenMP's threads wait for each other. Every script imports it before torch, which reads this once.

# why: a step is many small operations, and after each the threads meet. By default the first to come spin. Beside one
other busy process that makes a step two to three times as long, since they burn what the last one waits for. Asleep
they cost nothing in training when nobody else is there, and a tenth in generation. bench/bench_waiting.py measures both
(docs/speed.md); what the environment says wins.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # GNU's and LLVM's OpenMP
os.environ.setdefault("KMP_BLOCKTIME", "0")              # Intel's, which sleeps after so many milliseconds
