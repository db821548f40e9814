"""experiments/ - the tables and figures of docs/results.md, one command each, and the labelers of Appendix A.

May live here: what runs the scripts as a user would, with fixed flags and seeds, and sums their results up. May not:
anything that a file outside this folder imports.
"""
import runs.waiting  # noqa: F401
