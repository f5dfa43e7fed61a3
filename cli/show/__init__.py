"""How results are shown: pages, tables, charts, numbers, and progress."""
