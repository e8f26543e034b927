"""The peer tier: idle KV blocks that other engines lend, and take back without asking.

lending.py is the table in shared memory with its protocol; borrowing.py makes slots of lent blocks for the borrower's
scheduler; memory.py copies to and from them in a worker; circuit_breaker.py spares requests a broker that does not
answer.
"""
