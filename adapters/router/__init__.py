"""The analytic domain router and its state in the key-value cache."""
