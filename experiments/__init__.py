"""experiments/ - every table and figure of docs/results.md, one command each, and the labelers of Appendix A.

May live here: what runs the scripts as a user would, with fixed flags and seeds, and sums their results up. May not:
anything that another file imports.
"""
