"""runs/ - what every script needs and no paper speaks of: flags, files, checkpoints, processes, speed, log, the list
and the curves of runs. One subject a file.

May live here: anything that a training of another method would need unchanged, and the flags that several scripts
share. May not: losses, a step of an algorithm, a class to inherit from, a callback. files.py is the ground floor: it
imports nothing of the project, and everything else, model.py and data/ too, may import it.
"""
