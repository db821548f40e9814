"""fronts - what trained policies achieve, beside what is possible.

Here lives: the geometry of sets of points (dominance, metrics, selection), the exact optima (optimum: solvers on
tensors; objective: what each objective is; exact: its front), what a policy reaches (measure, evaluation, comparison,
stationarity), and how it is shown (tables, pictures). Nothing here trains, adds adapters to a model or draws data to
train on. Imports go one way: dominance <- metrics; optimum <- measure <- objective <- exact <- evaluation <-
comparison, stationarity; and objective, exact <- pictures.
"""
