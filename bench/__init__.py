"""bench/ - measurements of speed and memory, beside the peers that a user might take instead; their results stand in
docs/speed.md and docs/scaling.md.

May live here: scripts that first check that all contestants compute the same and then time them; what several of them
share is in turns.py and pairs.py. May not: anything that training, evaluation or experiments import.
"""
