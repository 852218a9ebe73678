"""The history checker: leases under every fault we can produce, judged in SQL afterwards.

`python -m tests.history --seed S --minutes M` storms a fleet of real servers and checks what the
database recorded (`recorder.sql`) and what the clients saw (`client_log`) against `invariants.sql`.
Then it proves itself: three broken variants (`mutants.py`) must be caught. Read `storm.py` first.
"""
