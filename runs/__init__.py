"""runs/ - what every script needs and no paper speaks of: flags, files, checkpoints, processes, speed, log. One subject
a file.

May live here: anything that a training of another method would need unchanged. May not: losses, preferences, anything
of one paper; a class to inherit from, a callback. files.py is the ground floor: it imports nothing of the project, and
everything else, model.py and data/ too, may import it.
"""
