"""fronts/ - what trained policies achieve, beside what is possible.

May live here: the geometry of sets of points (dominance, metrics, selection), the exact optima (optimum: solvers on
tensors; objective: one row per objective; exact: its front), what a policy reaches (measure, evaluation, comparison,
stationarity), and how it is shown (tables, pictures: one file per kind of picture). May not: anything that trains, adds
adapters to a model, or draws data to train on.
Imports go one way: dominance <- metrics; optimum <- measure <- objective <- exact <- evaluation <- comparison;
objective <- stationarity, pictures.
"""
