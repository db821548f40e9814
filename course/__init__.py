"""course/ - problem sets that build this system, for students with a laptop; instructor.md is for who hands them out.

adapters.py             typed stubs, one for each function that is graded; students connect their own code there
grade.py, grading.py    the grader: points, messages, a results.json; conftest.py and pytest.ini belong to it
gpt.py, world.py        the base model in plain PyTorch, and the embedded world's texts as batches
setN/                   handout.md, grade.py (the tests), experiment.py; mutants.py and another.py stay with the teacher
seminar/                one page on each paper for a discussion; they answer questions of set 5
handout.py, page.py     write a student's repository; a handout as one HTML page
reference_adapters.py   the solution: this repository
mutants.py              wrong answers that students write, and whether the grader sees them

May live here: handouts, tests of students' code, and what they need to run. May not: anything that the rest of the
repository imports; in grade.py, grading.py and experiment.py, anything that solves a problem, or imports what does.
"""
