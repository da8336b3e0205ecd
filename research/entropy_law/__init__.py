"""`python -m research entropy-law`: how one update changes a policy's entropy, and what predicts that."""
