"""What scripts/fault_matrix.py is made of: small runs of the four trainers, faults that are put
into them, ways to start them, and what must hold afterwards.
"""
