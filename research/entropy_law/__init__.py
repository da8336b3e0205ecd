"""`python -m research entropy-law`: how one update changes a policy's entropy, and what predicts that.

law.py        the law, and what updates of a small policy do; start reading here
statistics.py how far each law tells what they do, with intervals
report.py     from these to the sentences and tables of docs/method.md
figures.py    and to the picture
run.py        all of it, and the files
"""
