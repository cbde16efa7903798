"""How many tokens are drafted in a round and how many of them are verified: budgets, and the cost model behind the load-aware ones.

Imports: nothing of this package.
"""
