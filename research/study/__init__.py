"""`python -m research study`: does CW-GRPO do what its paper says (arXiv 2605.11538)?

study.py       which runs, then the runs, then the report; start reading here
arms.py        what is compared: tasks, methods, controls, readings of the paper
run.py         one run, and all of them side by side
summary.py     from the runs to study.json
statistics.py  pass@k, tails of the covariance, differences with intervals
report.py      from study.json to the sentences and tables of the report
figures.py     and to its pictures
"""
