"""Output of commands: pages, tables, charts, numbers, and progress."""
